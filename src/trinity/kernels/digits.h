#pragma once

// The numbers of attention on AMX: whole ones. A key, a value, a query becomes 24 bits and a unit of its own: three digits
// of 8 bits, which the matrix unit multiplies twice as fast as bfloat16 and sums exactly, in 32 bits. So a row's result
// depends neither on who shares its tile nor on the order of a sum. Of the nine products of two numbers' digits
// the six largest are made: what is left out, and what rounding to 24 bits of the largest value of a head costs, is what
// float32 loses in a sum of as many products.
//
// A page of whole numbers: the keys' digits, the values' digits, a unit for each key, a unit for each value. Digits lie
// in tiles of 1,024 bytes as the matrix unit takes them, the three of the same numbers side by side: of keys for every
// 16 tokens and every 64 of the head (four that follow one another to a lane), of values for every 16 of the head (tokens
// i, i + 16, i + 32 and i + 48 to a lane).

#include "amx.h"
#include "pages.h"
#include "passage.h"

#if defined(TRINITY_AMX) && defined(__AMX_INT8__) && defined(__AVX512VL__)
#define TRINITY_DIGITS
#endif

namespace trinity {

constexpr int64_t kDigitTile = 1024;       // bytes
constexpr float kMost = 127 * 65536;       // the largest whole number, of 24 bits in digits of -128 .. 127
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

typedef int32_t Whole __attribute__((vector_size(64)));
typedef int32_t WholeAnywhere __attribute__((vector_size(64), aligned(4), may_alias));
inline WholeAnywhere& wholes(char* at) { return *reinterpret_cast<WholeAnywhere*>(at); }
inline const WholeAnywhere& wholes(const int32_t* at) { return *reinterpret_cast<const WholeAnywhere*>(at); }

inline Whole rounded(Vec x) { return std::bit_cast<Whole>(_mm512_cvtps_epi32(std::bit_cast<__m512>(x))); }
// Digits of -128 .. 127 from the bits of a whole number: what lies in the three lower bytes.
inline Whole balanced(Whole x) { return (x + 0x8080) ^ 0x8080; }
inline float unit_for(float widest) { return widest * (256.0f / kMost); }
inline float into_wholes(float widest) { return widest > kNothing ? kMost / widest : 0.0f; }
inline Vec size_of(Vec x) { return std::bit_cast<Vec>(std::bit_cast<IntVec>(x) & 0x7fffffff); }

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

struct Digits {
  static constexpr int64_t key_bytes(int64_t size) { return 3 * kPage * size; }
  static float* units_of_keys(char* page, int64_t size) { return reinterpret_cast<float*>(page + 2 * key_bytes(size)); }
  static const float* units_of_keys(const char* page, int64_t size) {
    return reinterpret_cast<const float*>(page + 2 * key_bytes(size));
  }
  static constexpr int64_t page_bytes(int64_t size) { return 2 * key_bytes(size) + 2 * kPage * sizeof(float); }

  // One token's key and value -> their places in a page.
  static void put_token(const float* key, const float* value, int64_t size, int64_t slot, char* page) {
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
  static constexpr int64_t query_floats(int64_t queries, int64_t size) { return (queries + 15) / 16 * 16 * size * 3 / 4; }

  static void put_queries(const float* q, int64_t queries, int64_t size, float* digits, float* units) {
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
};

#endif

}  // namespace trinity
