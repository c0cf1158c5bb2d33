#pragma once

// Float32 products on AMX, the matrix unit of Intel's server processors since 2023: it multiplies bfloat16 and sums in
// float32. The 24 bits of a float32 are exactly three bfloat16 of 8 bits, x = x1 + x2 + x3, and of the nine products of
// two such sums the six largest leave an error of 2^-24, no more than float32's own (Henry, Tang, Heinecke 2019,
// "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations"). What differs:
// infinities come out as NaN, and parts below 2^-126 count as zero.

#include <ATen/core/Tensor.h>

#include <cstdlib>

#include "tile.h"

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define TRINITY_AMX
#include <immintrin.h>
#endif

namespace trinity {

// Whether this process may use AMX: the processor has it, the kernel lends it, and nobody switched it off.
bool has_amx();

// a [M, I] b [I, O] -> out [M, O], or added to it: any strides, but out's rows contiguous.
void multiply_by_amx(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add);

// A side of a product is packed in panels of 32 lines (rows of a left side, columns of a right one), a panel in steps
// of 32 of depth, a step as its three parts, a part as a tile for each 16 lines. The last panel may have one tile.
constexpr int64_t kTileLines = 16, kPanelLines = 32, kStepDepth = 32, kTileSize = 256;
enum class Side { left, right };

constexpr int64_t steps_of(int64_t depth) { return (depth + kStepDepth - 1) / kStepDepth; }
// Of a packed side, in the room of so many floats.
constexpr int64_t packed_size(int64_t lines, int64_t depth) {
  return (lines + kTileLines - 1) / kTileLines * steps_of(depth) * 3 * kTileSize;
}

#ifdef TRINITY_AMX

// The matrix unit in the hands of this thread, eight tiles of 16 rows of 64 bytes; or, all but the
// last two, of as many rows as a left side has.
class AmxTiles {
 public:
  explicit AmxTiles(uint8_t rows = 16) {
    Configuration all;
    std::fill_n(all.row_bytes, 8, uint16_t{64});
    std::fill_n(all.rows, 6, rows), std::fill_n(all.rows + 6, 2, uint8_t{16});
    // gcc 12 thinks that the instruction reads eight bytes and may drop what fills the others.
    asm volatile("" ::"m"(all));
    _tile_loadconfig(&all);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
};

typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint32_t BitsAnywhere __attribute__((vector_size(64), aligned(4), may_alias));

// The three parts of 16 values, each in the upper half of its lanes.
struct Parts {
  Bits part[3];
  explicit Parts(Vec x) {
#pragma GCC unroll 3
    for (Bits& p : part) {
      p = std::bit_cast<Bits>(x) & 0xffff0000u;
      x = x - std::bit_cast<Vec>(p);
    }
  }
};

// 16 lines and 32 of depth -> a tile of each part, `apart` from one another. A lane holds values k and k + 16 of the
// depth, in both sides alike; a row of a left tile is a line, a row of a right tile a k. Deep: values that follow one
// another in depth do so in memory too, else those of neighbouring lines do.
template <Side side, bool deep>
void pack_tile(Left from, float* to, int64_t apart) {
  constexpr bool direct = deep == (side == Side::left);
  const int64_t row = deep ? from.row : from.column;
  const float *first = from.at, *second = from.at + 16 * from.column;
  const int64_t ahead = deep ? kPanelLines * row : kStepDepth * row;  // what is packed next: a weight comes from memory
  alignas(64) float turned[direct ? 1 : 2 * kTileSize];
  if constexpr (!direct) {
    transpose(first, row, kLanes, kLanes, turned, kLanes);
    transpose(second, row, kLanes, kLanes, turned + kTileSize, kLanes);
  }
  for (int64_t i = 0; i < kTileLines; ++i) {
    const float *low = first + i * row, *high = second + i * row;
    __builtin_prefetch(low + ahead, 0, 2);
    __builtin_prefetch(high + ahead, 0, 2);
    const Parts a(vec(direct ? low : turned + i * kLanes)), b(vec(direct ? high : turned + kTileSize + i * kLanes));
#pragma GCC unroll 3
    for (int p = 0; p < 3; ++p) {
      *reinterpret_cast<BitsAnywhere*>(to + p * apart + i * kLanes) = a.part[p] >> 16 | b.part[p];
    }
  }
}

// One step of a panel: at most 32 lines and 32 of depth, zeros beyond both.
template <Side side>
void pack_step(Left from, int64_t lines, int64_t depth, float* to) {
  const int64_t apart = packed_size(lines, 1) / 3;
  for (int64_t i = 0; i < lines; i += kTileLines, to += kTileSize) {
    const int64_t some = std::min(kTileLines, lines - i);
    const Left tile = from.from(i, 0);
    const bool whole = some == kTileLines && depth == kStepDepth;
    if (whole && tile.column == 1) {
      pack_tile<side, true>(tile, to, apart);
      continue;
    }
    if (whole && tile.row == 1) {
      pack_tile<side, false>(tile, to, apart);
      continue;
    }
    float edge[kTileLines * kStepDepth] = {};
    for (int64_t l = 0; l < some; ++l) {
      for (int64_t k = 0; k < depth; ++k) edge[l * kStepDepth + k] = tile.at[l * tile.row + k * tile.column];
    }
    pack_tile<side, true>({edge, kStepDepth, 1}, to, apart);
  }
}

// A whole side, panel after panel, read in the order in which it lies in memory.
template <Side side>
void pack_side(Left from, int64_t lines, int64_t depth, float* to) {
  const int64_t panels = (lines + kPanelLines - 1) / kPanelLines, steps = steps_of(depth);
  const auto step = [&](int64_t panel, int64_t k) {
    const int64_t some = std::min(kPanelLines, lines - panel * kPanelLines);
    pack_step<side>(from.from(panel * kPanelLines, k * kStepDepth), some, std::min(kStepDepth, depth - k * kStepDepth),
                    to + panel * packed_size(kPanelLines, depth) + packed_size(some, k * kStepDepth));
  };
  if (from.column == 1) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t k = 0; k < steps; ++k) step(panel, k);
    }
  } else {
    for (int64_t k = 0; k < steps; ++k) {
      for (int64_t panel = 0; panel < panels; ++panel) step(panel, k);
    }
  }
}

// Tiles 0 to 3 sum, 4 and 5 are of the left side, 6 and 7 of the right.
template <int R>
void load_left(const float* at) {
  _tile_loadd(4, at, 64);
  if constexpr (R > 1) _tile_loadd(5, at + kTileSize, 64);
}

template <int C>
void load_right(const float* at) {
  _tile_loadd(6, at, 64);
  if constexpr (C > 1) _tile_loadd(7, at + kTileSize, 64);
}

template <int R, int C>
void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (C > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
}

// c [16 R, 16 C] (+)= a panel times a panel, of R and C tiles. The next block of c is fetched meanwhile.
template <int R, int C>
void multiply_panels(int64_t steps, const float* a, const float* b, float* c, int64_t c_row, bool add,
                     const float* next) {
  const int64_t bytes = c_row * static_cast<int64_t>(sizeof(float));
  const int64_t some = (kPanelLines + 6 * steps - 1) / (6 * steps);
  const auto fetch = [&] {
    for (int64_t r = 0; r < some; ++r, next += c_row) {
      __builtin_prefetch(next, 0, 2);
      __builtin_prefetch(next + kTileLines, 0, 2);
    }
  };
  if (add) {
    _tile_loadd(0, c, bytes);
    if constexpr (C > 1) _tile_loadd(1, c + 16, bytes);
    if constexpr (R > 1) _tile_loadd(2, c + 16 * c_row, bytes);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, c + 16 * c_row + 16, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  constexpr int64_t kLeft = R * kTileSize, kRight = C * kTileSize;
  for (int64_t step = 0; step < steps; ++step, a += 3 * kLeft, b += 3 * kRight) {
    // The six pairs of parts in an order in which one side stays from each to the next.
    load_left<R>(a);
    load_right<C>(b + 2 * kRight);
    add_products<R, C>();
    fetch();
    load_right<C>(b + kRight);
    add_products<R, C>();
    fetch();
    load_left<R>(a + kLeft);
    add_products<R, C>();
    fetch();
    load_right<C>(b);
    add_products<R, C>();
    fetch();
    load_left<R>(a + 2 * kLeft);
    add_products<R, C>();
    fetch();
    load_left<R>(a);
    add_products<R, C>();
    fetch();
  }
  _tile_stored(0, c, bytes);
  if constexpr (C > 1) _tile_stored(1, c + 16, bytes);
  if constexpr (R > 1) _tile_stored(2, c + 16 * c_row, bytes);
  if constexpr (R > 1 && C > 1) _tile_stored(3, c + 16 * c_row + 16, bytes);
}

// c [rows, columns] (+)= a b of packed sides, on this thread, which holds AmxTiles.
inline void multiply_packed(int64_t rows, int64_t columns, int64_t depth, const float* a, const float* b, float* c,
                            int64_t c_row, bool add) {
  static constexpr decltype(&multiply_panels<1, 1>) products[2][2] = {{multiply_panels<1, 1>, multiply_panels<1, 2>},
                                                                      {multiply_panels<2, 1>, multiply_panels<2, 2>}};
  constexpr int64_t kCached = 1 << 18;  // floats: half the cache of a core
  const int64_t steps = steps_of(depth), down = (rows + kPanelLines - 1) / kPanelLines,
                across = (columns + kPanelLines - 1) / kPanelLines, panel = packed_size(kPanelLines, depth);
  // Block after block along the rows of c, unless the right side would then be read from memory for each.
  const bool by_column = across * panel > kCached && across > down;
  for (int64_t block = 0; block < down * across; ++block) {
    const int64_t i = by_column ? block % down : block / across, j = by_column ? block / down : block % across;
    const float* next = c + ((i + 1) * c_row + j) * kPanelLines;  // early enough to come from memory
    const int64_t tall = std::min(kPanelLines, rows - i * kPanelLines),
                  wide = std::min(kPanelLines, columns - j * kPanelLines);
    const auto product = products[tall > kTileLines][wide > kTileLines];
    float* to = c + (i * c_row + j) * kPanelLines;
    if (tall % kTileLines == 0 && wide % kTileLines == 0) {
      product(steps, a + i * panel, b + j * panel, to, c_row, add, next);
      continue;
    }
    alignas(64) float edge[kPanelLines * kPanelLines];
    product(steps, a + i * panel, b + j * panel, edge, kPanelLines, false, next);
    for (int64_t r = 0; r < tall; ++r) {
      for (int64_t l = 0; l < wide; ++l)
        to[r * c_row + l] = edge[r * kPanelLines + l] + (add ? to[r * c_row + l] : 0.0f);
    }
  }
}

#else  // never called: has_amx() is false

struct AmxTiles {
  explicit AmxTiles(uint8_t = 16) { std::abort(); }
};
template <Side side>
void pack_side(Left, int64_t, int64_t, float*) {}
inline void multiply_packed(int64_t, int64_t, int64_t, const float*, const float*, float*, int64_t, bool) {}

#endif

}  // namespace trinity
