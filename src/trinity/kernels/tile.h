#pragma once

// The core of every product: a tile of a few rows and a few vectors that stays in registers over the whole depth, as in
// BLIS (Van Zee, van de Geijn 2015). Left sides are read where they lie, one value at a time, so a weight that meets
// few tokens is never copied; right sides are read a vector at a time, where they lie or from panels.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>

namespace trinity {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kSums = 24, kTileVectors = 4;  // sums: as many as the registers hold beside the operands
#elif defined(__AVX__)
constexpr int kLanes = 8, kSums = 12, kTileVectors = 4;
#else
constexpr int kLanes = 4, kSums = 24, kTileVectors = 4;
#endif
constexpr int kTileRows = 12;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(float))));
// Among floats that lie anywhere; only to load and store, since a template's argument loses the alignment.
typedef float VecAnywhere __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

constexpr int64_t whole_vectors(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }
inline Vec splat(float x) { return x - Vec{}; }
inline VecAnywhere& vec(float* at) { return *reinterpret_cast<VecAnywhere*>(at); }
inline const VecAnywhere& vec(const float* at) { return *reinterpret_cast<const VecAnywhere*>(at); }

// e^x, in a form that compilers vectorise: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes). NaN stays NaN.
inline Vec exponential(Vec x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const Vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return std::bit_cast<Vec>(std::bit_cast<IntVec>(p) + (__builtin_convertvector(n, IntVec) << 23));
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

inline float logistic(float x) { return sigmoid(splat(x))[0]; }

// All lanes as one, those at a distance of 1 first, then 2, 4, ...
template <class Both>
inline float folded(Vec x, const Both& both) {
  [&]<int... Bit>(std::integer_sequence<int, Bit...>) {
    const auto fold = [&]<int Step, int... L>(std::integral_constant<int, Step>, std::integer_sequence<int, L...>) {
      x = both(x, __builtin_shufflevector(x, x, (L ^ Step)...));
    };
    ((1 << Bit < kLanes ? fold(std::integral_constant<int, (1 << Bit) % kLanes>{},
                               std::make_integer_sequence<int, kLanes>{}) : void()), ...);
  }(std::make_integer_sequence<int, 4>{});
  return x[0];
}

inline float sum_of(Vec x) { return folded(x, [](Vec a, Vec b) { return a + b; }); }

inline float dot(const float* a, const float* b, int64_t n) {
  Vec sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += vec(a + i) * vec(b + i);
  float whole = sum_of(sum);
  for (; i < n; ++i) whole += a[i] * b[i];
  return whole;
}

// to = from / rms(from) * gain, over `size` values.
inline void normalise(const float* from, const float* gain, int64_t size, float eps, float* to) {
  const float factor = 1.0f / std::sqrt(dot(from, from, size) / static_cast<float>(size) + eps);
  for (int64_t i = 0; i < size; ++i) to[i] = from[i] * factor * gain[i];
}

// A left side: element (i, k) lies at at[i * row + k * column].
struct Left {
  const float* at;
  int64_t row, column;
  Left from(int64_t i, int64_t k) const { return {at + i * row + k * column, row, column}; }
};

// R x V vectors of c (+)= a b over the whole depth. b holds whole vectors; of c only `columns` values a row are
// written.
template <int R, int V>
void multiply_tile(int64_t depth, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t columns,
                   bool add) {
  Vec sum[R][V] = {};
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < V; ++v) __builtin_prefetch(c + i * c_row + v * kLanes, 1);
  }
  // The rows of a that come next, so that weights arrive from memory while this tile is computed.
  const float* ahead = a.at + R * a.row;
  const int64_t ahead_step = a.column == 1 ? R : a.column;
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(ahead + k * ahead_step, 0, 2);
    Vec right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      right[v] = vec(b + k * b_row + v * kLanes);
      __builtin_prefetch(b + k * b_row + (V + v) * kLanes, 0, 2);  // of the panel beside it
    }
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const float left = a.at[i * a.row + k * a.column];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] += left * right[v];
    }
  }
  if (columns >= V * kLanes) {  // unrolled, since sums that are counted through would leave their registers
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        VecAnywhere& to = vec(c + i * c_row + v * kLanes);
        to = add ? to + sum[i][v] : sum[i][v];
      }
    }
    return;
  }
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < V; ++v) {
      float* to = c + i * c_row + v * kLanes;
      if (columns >= (v + 1) * kLanes) {
        vec(to) = add ? vec(to) + sum[i][v] : sum[i][v];
      } else {
        for (int64_t l = 0; l < columns - v * kLanes; ++l) to[l] = add ? to[l] + sum[i][v][l] : sum[i][v][l];
      }
    }
  }
}

using TileProduct = void (*)(int64_t, Left, const float*, int64_t, float*, int64_t, int64_t, bool);

constexpr int rows_for(int64_t vectors) { return std::min<int64_t>(kTileRows, kSums / vectors); }

template <int R, int V>
constexpr TileProduct some_tile() {
  if constexpr (R <= rows_for(V)) return multiply_tile<R, V>;
  return nullptr;
}

// The tile for 1 .. kTileRows rows and 1 .. kTileVectors vectors.
inline TileProduct tile_for(int64_t rows, int64_t vectors) {
  static constexpr auto table = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array<TileProduct, sizeof...(I)>{some_tile<I / kTileVectors + 1, I % kTileVectors + 1>()...};
  }(std::make_integer_sequence<int, kTileRows * kTileVectors>{});
  return table[(rows - 1) * kTileVectors + vectors - 1];
}

// Columns cut into panels of at most three vectors, or one of four where these are all there is: measured to be the
// fastest widths. As even as can be, since a thin last one would starve the processor.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t columns)
      : vectors((columns + kLanes - 1) / kLanes), count(vectors == kTileVectors ? 1 : (vectors + 2) / 3) {}
  int64_t start(int64_t panel) const { return (panel * (vectors / count) + std::min(panel, vectors % count)) * kLanes; }
  int64_t width(int64_t panel) const { return start(panel + 1) - start(panel); }
};

// c [rows, columns] (+)= a b on this thread. b: `depth` rows of whole vectors, b_row apart; b_row = 0: packed in
// panels, each a matrix of its own. Rows of c go outermost, so that a is read once and b stays in the cache.
inline void multiply_here(int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, int64_t b_row, float* c,
                          int64_t c_row, bool add) {
  const Panels panels(columns);
  const int64_t tall = rows_for(panels.width(0) / kLanes);
  for (int64_t i = 0; i < rows; i += tall) {
    const int64_t height = std::min<int64_t>(tall, rows - i);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t start = panels.start(p), width = panels.width(p);
      tile_for(height, width / kLanes)(depth, a.from(i, 0), b + (b_row ? start : start * depth), b_row ? b_row : width,
                                       c + i * c_row + start, c_row, columns - start, add);
    }
  }
}

// c [rows, columns] (+)= a b on this thread, b being contiguous rows of `columns` values, whatever their number.
inline void multiply_rows(int64_t rows, int64_t columns, int64_t depth, Left a, const float* b, float* c, bool add) {
  const int64_t whole = columns / kLanes * kLanes;
  if (whole) multiply_here(rows, whole, depth, a, b, columns, c, columns, add);
  for (int64_t i = 0; i < rows && whole < columns; ++i) {
    for (int64_t j = whole; j < columns; ++j) {
      float sum = add ? c[i * columns + j] : 0.0f;
      for (int64_t k = 0; k < depth; ++k) sum += a.at[i * a.row + k * a.column] * b[k * columns + j];
      c[i * columns + j] = sum;
    }
  }
}

// A block of kLanes x kLanes transposed in registers: bit by bit of their numbers, row and lane swap places.
template <int Stage>
void swap_lanes(Vec (&block)[kLanes]) {
  if constexpr (Stage < kLanes) {
    [&]<int... L>(std::integer_sequence<int, L...>) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i & Stage) continue;
        const Vec low = block[i], high = block[i | Stage];
        block[i] = __builtin_shufflevector(low, high, ((L & Stage) ? kLanes + (L ^ Stage) : L)...);
        block[i | Stage] = __builtin_shufflevector(low, high, ((L & Stage) ? kLanes + L : (L | Stage))...);
      }
    }(std::make_integer_sequence<int, kLanes>{});
    swap_lanes<Stage * 2>(block);
  }
}

// from [rows, columns], rows `from_row` apart -> to [columns, whole_vectors(rows)], zeros beyond `rows`.
inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t height = std::min<int64_t>(kLanes, rows - i);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, columns - j);
      if (height == kLanes && width == kLanes) {
        Vec block[kLanes];
        for (int l = 0; l < kLanes; ++l) block[l] = vec(from + (i + l) * from_row + j);
        swap_lanes<1>(block);
        for (int l = 0; l < kLanes; ++l) vec(to + (j + l) * to_row + i) = block[l];
      } else {
        for (int64_t l = 0; l < width; ++l) {
          for (int64_t h = 0; h < kLanes; ++h) {
            to[(j + l) * to_row + i + h] = h < height ? from[(i + h) * from_row + j + l] : 0.0f;
          }
        }
      }
    }
  }
}

// The same without padding: exactly to [columns, rows].
inline void transpose_back(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to,
                           int64_t to_row) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      if (rows - i >= kLanes && columns - j >= kLanes) {
        transpose(from + i * from_row + j, from_row, kLanes, kLanes, to + j * to_row + i, to_row);
      } else {
        for (int64_t h = i; h < std::min(rows, i + kLanes); ++h) {
          for (int64_t l = j; l < std::min(columns, j + kLanes); ++l) to[l * to_row + h] = from[h * from_row + l];
        }
      }
    }
  }
}

}  // namespace trinity
