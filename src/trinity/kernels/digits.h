#pragma once

// Attention over pages on AMX, in whole numbers. A key, a value, a query becomes 24 bits and a unit of its own: three
// digits of 8 bits, which the matrix unit multiplies twice as fast as bfloat16 and sums exactly, in 32 bits. So a row's
// result depends neither on who shares its tile nor on the order of a sum. Of the nine products of two numbers' digits
// the six largest are made: what is left out, and what rounding to 24 bits of the largest value of a head costs, is what
// float32 loses in a sum of as many products.
//
// A page of whole numbers: the keys' digits, the values' digits, a unit for each key, a unit for each value. Digits lie
// in tiles of 1,024 bytes as the matrix unit takes them, the three of the same numbers side by side: of keys for every
// 16 tokens and every 64 of the head (four that follow one another to a lane), of values for every 16 of the head (tokens
// i, i + 16, i + 32 and i + 48 to a lane).

#include <type_traits>

#include "amx.h"
#include "pages.h"

#if defined(TRINITY_AMX) && defined(__AMX_INT8__) && defined(__AVX512VL__)
#define TRINITY_DIGITS
#endif

namespace trinity {

constexpr int64_t kDigitTile = 1024;       // bytes
constexpr int64_t kPagesAtOnce = 4;        // whose reading has one unit a query; a divisor of every stretch
constexpr float kMost = 127 * 65536;       // the largest whole number, of 24 bits in digits of -128 .. 127
constexpr float kMostWeight = 8388000;     // of the 23 bits of a weight, in digits of 0 .. 255; with room for rounding
constexpr float kNothing = 1e-30f;         // where all values are smaller they count as zero

// Whether heads of this size go through digits from now on.
inline bool by_digits([[maybe_unused]] int64_t size) {
#ifdef TRINITY_DIGITS
  return size % 64 == 0 && has_amx();
#else
  return false;
#endif
}

#ifdef TRINITY_DIGITS

typedef int32_t Whole __attribute__((vector_size(64), aligned(4), may_alias));
inline Whole& wholes(char* at) { return *reinterpret_cast<Whole*>(at); }
inline const Whole& wholes(const int32_t* at) { return *reinterpret_cast<const Whole*>(at); }

constexpr int64_t key_bytes(int64_t size) { return 3 * kPage * size; }
inline float* units_of_keys(char* page, int64_t size) { return reinterpret_cast<float*>(page + 2 * key_bytes(size)); }
inline const float* units_of_keys(const char* page, int64_t size) {
  return reinterpret_cast<const float*>(page + 2 * key_bytes(size));
}

inline Whole rounded(Vec x) { return std::bit_cast<Whole>(_mm512_cvtps_epi32(std::bit_cast<__m512>(x))); }
// Digits of -128 .. 127 from the bits of a whole number: what lies in the three lower bytes.
inline Whole balanced(Whole x) { return (x + 0x8080) ^ 0x8080; }
inline float unit_for(float widest) { return widest * (256.0f / kMost); }
inline float into_wholes(float widest) { return widest > kNothing ? kMost / widest : 0.0f; }
inline Vec size_of(Vec x) { return std::bit_cast<Vec>(std::bit_cast<IntVec>(x) & 0x7fffffff); }

inline Vec larger(Vec x, Vec y) {
  return std::bit_cast<Vec>(_mm512_max_ps(std::bit_cast<__m512>(x), std::bit_cast<__m512>(y)));
}

// The largest sizes so far, as bits: what is no number is larger than all others.
struct Widest {
  __m512i bits = _mm512_setzero_si512();
  void add(Vec size) { bits = _mm512_max_epu32(bits, std::bit_cast<__m512i>(size)); }
  float of_all() const { return std::bit_cast<float>(_mm512_reduce_max_epu32(bits)); }
};

inline float widest_of(const float* x, int64_t count) {
  Widest widest;
  for (int64_t i = 0; i < count; i += kLanes) widest.add(size_of(vec(x + i)));
  return widest.of_all();
}

// The digits of four vectors, those of a lane side by side: the highest, `apart` bytes on the middle ones, then the lowest.
inline void put_digits(Whole a, Whole b, Whole c, Whole d, char* to, int64_t apart) {
  const auto low = [](Whole x, Whole y) {
    const auto above = std::bit_cast<__m512i>(y << 16);
    return std::bit_cast<Whole>(_mm512_mask_blend_epi16(0xaaaaaaaa, std::bit_cast<__m512i>(x), above));
  };
  const Whole even = low(a, c), odd = low(b, d);
  constexpr int kEven = 0x00ff00ff, kOdd = static_cast<int>(0xff00ff00);
  wholes(to + 2 * apart) = (even & kEven) | ((odd << 8) & kOdd);
  wholes(to + apart) = std::bit_cast<Whole>((std::bit_cast<Bits>(even) >> 8) & 0x00ff00ffu) | (odd & kOdd);
  const auto up = [](Whole x, int bits) { return std::bit_cast<Whole>(std::bit_cast<Bits>(x) >> bits); };
  wholes(to) = (up(a, 16) & 0xff) | (up(b, 8) & 0xff00) | (c & 0xff0000) | (d << 8 & static_cast<int>(0xff000000));
}

// One token's key and value -> their places in a page.
inline void put_token(const float* key, const float* value, int64_t size, int64_t slot, char* page) {
  const auto put = [&](const float* from, float& unit, const auto& place) {
    const float widest = widest_of(from, size), factor = into_wholes(widest);
    unit = unit_for(widest);
    for (int64_t c = 0; c < size; c += kLanes) {
      const Whole digits = balanced(rounded(vec(from + c) * factor));
      for (int64_t l = 0; l < kLanes; ++l) {
        char* to = place(c + l);
        const int32_t its = digits[l];
        to[0] = static_cast<char>(its >> 16);
        to[kDigitTile] = static_cast<char>(its >> 8);
        to[2 * kDigitTile] = static_cast<char>(its);
      }
    }
  };
  float* units = units_of_keys(page, size);
  put(key, units[slot], [&](int64_t c) {
    return page + ((slot / 16 * (size / 64) + c / 64) * 3) * kDigitTile + c % 64 / 4 * 64 + slot % 16 * 4 + c % 4;
  });
  put(value, units[kPage + slot], [&](int64_t c) {
    return page + key_bytes(size) + c / 16 * 3 * kDigitTile + slot % 16 * 64 + c % 16 * 4 + slot / 16;
  });
}

// Queries as left sides: tiles of 16 of them and 64 of the head, three for the digits of each; and their units.
constexpr float kLogOfE = 1.44269504f;  // scores are of powers of two
constexpr int64_t query_floats(int64_t queries, int64_t size) { return (queries + 15) / 16 * 16 * size * 3 / 4; }

inline void put_queries(const float* q, int64_t queries, int64_t size, float* digits, float* units) {
  for (int64_t i = 0; i < queries; ++i) {
    const float widest = widest_of(q + i * size, size), factor = into_wholes(widest);
    units[i] = unit_for(widest) * kLogOfE;
    for (int64_t c = 0; c < size; c += kLanes) {
      const auto its = std::bit_cast<__m512i>(balanced(rounded(vec(q + i * size + c) * factor)));
      char* to = reinterpret_cast<char*>(digits) + (i / 16 * (size / 64) + c / 64) * 3 * kDigitTile + i % 16 * 64 + c % 64;
      const auto put = [&](__m512i x, char* to) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
      };
      put(_mm512_srai_epi32(its, 16), to);
      put(_mm512_srai_epi32(its, 8), to + kDigitTile);
      put(its, to + 2 * kDigitTile);
    }
  }
}

// Tiles 0, 2, 4 sum the products of 16 queries that weigh alike, 1, 3, 5 those of 16 more; 6 is of the left side, 7 of the
// right. The intrinsics of gcc want a tile's number as it is written.
template <int tile>
struct Sum;
#define TRINITY_SUM(tile)                                                   \
  template <>                                                               \
  struct Sum<tile> {                                                        \
    static void start() { _tile_zero(tile); }                               \
    static void add(std::true_type) { _tile_dpbusd(tile, 6, 7); }           \
    static void add(std::false_type) { _tile_dpbssd(tile, 6, 7); }          \
    static void store(int32_t* to) { _tile_stored(tile, to, 64); }          \
  };
TRINITY_SUM(0)
TRINITY_SUM(1)
TRINITY_SUM(2)
TRINITY_SUM(3)
TRINITY_SUM(4)
TRINITY_SUM(5)
#undef TRINITY_SUM

// Left sides of one or two tiles of queries: the highest digits of the first, of the second so many bytes on, and of
// each the digits below.
struct LeftDigits {
  const char* at;
  int64_t second, below;
};

// One digit of the left side by what tile 7 holds. Weights have no sign.
template <int tiles, int sum, bool weights>
inline void add_digit(LeftDigits left, int64_t digit) {
  constexpr std::bool_constant<weights> unsigned_{};
  const char* at = left.at + digit * left.below;
  _tile_loadd(6, at, 64);
  Sum<2 * sum>::add(unsigned_);
  if constexpr (tiles > 1) {
    _tile_loadd(6, at + left.second, 64);
    Sum<2 * sum + 1>::add(unsigned_);
  }
}

// The six products of digits.
template <int tiles, bool weights>
inline void add_digits(LeftDigits left, const char* right) {
  _tile_loadd(7, right, 64);
  add_digit<tiles, 2, weights>(left, 2);
  add_digit<tiles, 1, weights>(left, 1);
  add_digit<tiles, 0, weights>(left, 0);
  _tile_loadd(7, right + kDigitTile, 64);
  add_digit<tiles, 2, weights>(left, 1);
  add_digit<tiles, 1, weights>(left, 0);
  _tile_loadd(7, right + 2 * kDigitTile, 64);
  add_digit<tiles, 2, weights>(left, 0);
}

template <int tiles>
inline void start_sums() {
  Sum<0>::start(), Sum<2>::start(), Sum<4>::start();
  if constexpr (tiles > 1) Sum<1>::start(), Sum<3>::start(), Sum<5>::start();
}

// Those of the second 16 queries lie `second` values on.
template <int tiles>
inline void store_sums(int32_t* to, int64_t second) {
  Sum<0>::store(to), Sum<2>::store(to + 256), Sum<4>::store(to + 512);
  if constexpr (tiles > 1) to += second, Sum<1>::store(to), Sum<3>::store(to + 256), Sum<5>::store(to + 512);
}

// Of a row of three tiles of sums, all of it, in units of 65,536.
inline Vec whole_sum(const int32_t* sums) {
  const auto part = [&](int p) { return __builtin_convertvector(wholes(sums + p * 256), Vec); };
  return (part(0) * 256.0f + part(1)) * 256.0f + part(2);
}

// 2^x of what is not above 0, and not below 2^-100: a polynomial on [-1/2, 1/2] within 2^-25, by Chebyshev's places.
inline Vec power_of_two(Vec x) {
  x = larger(splat(-100.0f), x);
  const Vec whole = x + 12582912.0f;  // to the nearest integer, in the lower bits
  const Vec r = x - (whole - 12582912.0f);
  Vec p = splat(0.000154614478f);
  p = p * r + 0.00133908668f;
  p = p * r + 0.00961805694f;
  p = p * r + 0.0555035695f;
  p = p * r + 0.240226507f;
  p = p * r + 0.693147182f;
  p = p * r + 1.0f;
  return std::bit_cast<Vec>(std::bit_cast<IntVec>(p) + (std::bit_cast<IntVec>(whole) << 23));
}

// Scores of a query over some pages, in powers of two, become 2^(score - highest so far) as in `soften`, times the unit
// of its key's value: digits of 0 .. 255, in a tile for each page. Returns the unit of the whole; `less` is by what things
// read before are multiplied.
template <bool partly>
inline float soften_to_digits(float* scores, Seen seen, int64_t pages, const char* const* page, int64_t size, float& highest,
                              float* sums, char* to, float& less) {
  IntVec lanes;
  for (int l = 0; l < kLanes; ++l) lanes[l] = l;
  const int low = static_cast<int>(seen.low), high = static_cast<int>(seen.high);
  const auto sees = [&](int64_t v) {
    const IntVec at = lanes + static_cast<int>(v) * kLanes;
    return (at >= low) & (at < high);
  };
  constexpr int64_t V = kPage / kLanes;
  Vec most[V] = {splat(kLowest), splat(kLowest), splat(kLowest), splat(kLowest)};
  for (int64_t n = 0; n < pages; ++n) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < V; ++v) {
      Vec score = vec(scores + (n * V + v) * kLanes);
      if constexpr (partly) score = sees(n * V + v) ? score : splat(kLowest);
      most[v] = larger(score, most[v]);
    }
  }
  const float top = highest_of(larger(larger(most[0], most[1]), larger(most[2], most[3])), highest);
  less = power_of_two(splat(highest - top))[0];
  highest = top;
  Vec gathered = vec(sums) * less;
  Widest widest;
  for (int64_t n = 0; n < pages; ++n) {
    const float* units = units_of_keys(page[n], size) + kPage;
#pragma GCC unroll 4
    for (int64_t v = 0; v < V; ++v) {
      const int64_t at = n * V + v;
      Vec part = power_of_two(vec(scores + at * kLanes) - top), weighed = part * vec(units + v * kLanes);
      if constexpr (partly) part = sees(at) ? part : Vec{}, weighed = sees(at) ? weighed : Vec{};
      gathered += part;
      widest.add(weighed);
      vec(scores + at * kLanes) = weighed;
    }
  }
  vec(sums) = gathered;
  const float unit = widest.of_all(), factor = unit > kNothing ? kMostWeight / unit : 0.0f;
  for (int64_t n = 0; n < pages; ++n, to += kDigitTile) {
    // Rounded to a whole number in the lower 23 bits; bit 23 is 0.
    const auto its = [&](int64_t v) {
      return std::bit_cast<Whole>(vec(scores + (n * V + v) * kLanes) * factor + 8388608.0f);
    };
    put_digits(its(0), its(1), its(2), its(3), to, kPagesAtOnce * kDigitTile);
  }
  return unit * (256.0f / kMostWeight);
}

constexpr int64_t kTiles = 2;  // of 16 queries: so many go through the same pages while these are near
constexpr int64_t kTileScores = 16 * kPagesAtOnce * kPage, kWeights = 3 * kPagesAtOnce * kDigitTile;  // of one such tile
constexpr int64_t kDigitRoom = kTiles * (3 * 4 * 256 + kTileScores + kWeights / 4);  // floats

constexpr int64_t kApart = kPagesAtOnce * kDigitTile, kProducts = 3 * 4 * 256;

// Products of the digits of queries and keys of a page: of each 16 queries three tiles for every 16 keys.
template <int tiles>
void multiply_keys(const char* q, int64_t size, const char* page, int32_t* products) {
  const int64_t steps = size / 64;
  for (int64_t t = 0; t < 4; ++t) {
    start_sums<tiles>();
    for (int64_t s = 0; s < steps; ++s) {
      add_digits<tiles, false>({q + s * 3 * kDigitTile, steps * 3 * kDigitTile, kDigitTile},
                               page + (t * steps + s) * 3 * kDigitTile);
    }
    store_sums<tiles>(products + t * 768, kProducts);
  }
}

// Of weights and values, 16 of the head's.
template <int tiles>
void multiply_values(const char* weights, const char* const* page, int64_t pages, int64_t offset, int32_t* products) {
  start_sums<tiles>();
  for (int64_t n = 0; n < pages; ++n) {
    add_digits<tiles, true>({weights + n * kDigitTile, kWeights, kApart}, page[n] + offset);
  }
  store_sums<tiles>(products, 768);
}

// At most 32 queries, whose digits lie at `q`, go through at most kPagesAtOnce pages. seen(r): what query r sees, in
// tokens from the first page on; perhaps nothing.
template <class SeenBy>
void attend_by_digits(const char* const* page, int64_t pages, int64_t queries, int64_t size, const float* q,
                      const float* q_units, const SeenBy& seen, float* top, float* sums, float* read, float* room) {
  constexpr int64_t kScores = kPagesAtOnce * kPage;
  auto* products = reinterpret_cast<int32_t*>(room);
  float* scores = room + kTiles * kProducts;
  char* weights = reinterpret_cast<char*>(scores + kTiles * kTileScores);
  asm volatile("" ::: "memory");  // gcc 12 does not know that a tile is loaded from memory
  for (int64_t n = 0; n < pages; ++n) {
    (queries > 16 ? multiply_keys<2> : multiply_keys<1>)(reinterpret_cast<const char*>(q), size, page[n], products);
    const float* units = units_of_keys(page[n], size);
    for (int64_t r = 0; r < queries; ++r) {
#pragma GCC unroll 4
      for (int64_t t = 0; t < 4; ++t) {
        vec(scores + r * kScores + n * kPage + t * 16) =
            whole_sum(products + r / 16 * kProducts + t * 768 + r % 16 * 16) * (vec(units + t * 16) * q_units[r]);
      }
    }
  }
  float unit[kTiles * 16], less[kTiles * 16];
  for (int64_t r = 0; r < queries; ++r) {
    const Seen its = seen(r);
    const auto soften = its.low > 0 || its.high < pages * kPage ? soften_to_digits<true> : soften_to_digits<false>;
    unit[r] = soften(scores + r * kScores, its, pages, page, size, top[r], sums + r * kLanes,
                     weights + r / 16 * kWeights + r % 16 * 64, less[r]);
  }
  asm volatile("" ::: "memory");
  for (int64_t c = 0; c < size; c += 16) {
    (queries > 16 ? multiply_values<2> : multiply_values<1>)(weights, page, pages,
                                                             key_bytes(size) + c / 16 * 3 * kDigitTile, products);
    for (int64_t r = 0; r < queries; ++r) {
      Vec& to = vec(read + r * size + c);
      to = to * less[r] + whole_sum(products + r / 16 * 768 + r % 16 * 16) * unit[r];
    }
  }
}

#endif

}  // namespace trinity
