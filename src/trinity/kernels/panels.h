#pragma once

// Weights in panels of 64 outputs, depth by depth: 64 values that meet the same input lie side by side, so that one walk
// over memory serves any number of rows. Every output is one sum along the depth, in order, whatever company its row
// has: a row's result has the same bits alone and among others.
//
// float32: [panel][depth][64]; bfloat16 the same; int8 the same, and behind all panels a float16 scale for 32 values of
// depth [panel][depth / 32][64]; int4 the same, two depths a byte, the first in the low half, 8 being zero.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <type_traits>

#include "tile.h"

namespace trinity {

constexpr int64_t kPanel = 64, kGroup = 32;
constexpr int kRowsAtOnce = kSums / 4;
constexpr int64_t kLine = 64, kAhead = 4096;  // bytes: of a cache line; how far weights are fetched ahead of their use

constexpr int64_t whole_panels(int64_t outputs) { return (outputs + kPanel - 1) / kPanel * kPanel; }

enum class Kind : int64_t { kFloat32, kBFloat16, kInt8, kInt4 };

constexpr int64_t bytes_of(Kind kind, int64_t values) {
  return kind == Kind::kFloat32 ? 4 * values : kind == Kind::kBFloat16 ? 2 * values : kind == Kind::kInt8 ? values : values / 2;
}

// One matrix: all its panels, then all its scales; outputs beyond `outputs` in the last panel are zeros.
struct Matrix {
  Kind kind = Kind::kFloat32;
  int64_t outputs = 0, depth = 0;
  const char* values = nullptr;

  // 8 and 4 bits need whole groups along the depth.
  static Matrix of(Kind kind, int64_t outputs, int64_t depth) {
    return {depth % kGroup && narrow(kind) ? Kind::kFloat32 : kind, outputs, depth};
  }
  static bool narrow(Kind kind) { return kind == Kind::kInt8 || kind == Kind::kInt4; }

  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  const char* panel(int64_t p) const { return values + p * bytes_of(kind, depth * kPanel); }
  const _Float16* scale(int64_t p) const {
    return reinterpret_cast<const _Float16*>(values + panels() * bytes_of(kind, depth * kPanel)) + p * depth / kGroup * kPanel;
  }
  int64_t bytes() const {
    return panels() * (bytes_of(kind, depth * kPanel) + (narrow(kind) ? depth / kGroup * kPanel * 2 : 0));
  }
  Matrix at(const char* values) const { return {kind, outputs, depth, values}; }
};

// Narrow values as vectors of whole numbers or floats. GCC takes the portable form apart, one value after another.
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2), aligned(1), may_alias));
typedef _Float16 ScaleVec __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef int8_t ByteVec __attribute__((vector_size(kLanes), aligned(1), may_alias));

inline IntVec halves(const char* at) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVec>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#elif defined(__AVX2__)
  return reinterpret_cast<IntVec>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#else
  return __builtin_convertvector(*reinterpret_cast<const HalfVec*>(at), IntVec);
#endif
}

inline IntVec bytes(const char* at) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVec>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#elif defined(__AVX2__)
  return reinterpret_cast<IntVec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
#else
  return __builtin_convertvector(*reinterpret_cast<const ByteVec*>(at), IntVec);
#endif
}

inline Vec factors(const _Float16* at) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#elif defined(__F16C__)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#else
  return __builtin_convertvector(*reinterpret_cast<const ScaleVec*>(at), Vec);
#endif
}

// The values 0 .. 15 of the low four bits of each, less 8.
inline Vec nibbles(IntVec from) {
#if defined(__AVX512F__)
  const Vec numbers = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  return reinterpret_cast<Vec>(
      _mm512_permutexvar_ps(reinterpret_cast<__m512i>(from), reinterpret_cast<__m512>(numbers)));
#else
  return __builtin_convertvector((from & 15) - 8, Vec);
#endif
}

// To bfloat16: the nearest, of two equally near the even one, as torch rounds.
inline uint16_t narrowed(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

template <Kind T>
inline Vec loaded(const char* at) {
  if constexpr (T == Kind::kFloat32) {
    return vec(reinterpret_cast<const float*>(at));
  } else if constexpr (T == Kind::kBFloat16) {
    return std::bit_cast<Vec>(halves(at) << 16);
  } else {
    return __builtin_convertvector(bytes(at), Vec);
  }
}

// y[r][0 .. 63] = x[r] . panel, for R rows.
template <Kind T, int R>
void multiply_panel(const float* const* x, int64_t depth, const char* values, const _Float16* scales,
                    float (*y)[kPanel]) {
  constexpr int V = 4;
  constexpr int64_t row = bytes_of(T, kPanel);
  // One row of float32 leaves the processor time to fetch ahead by itself.
  constexpr bool kFetch = R > 1 || T != Kind::kFloat32;
  for (int64_t part = 0; part < kPanel; part += V * kLanes) {
    Vec sum[R][V] = {};
    if constexpr (T == Kind::kFloat32 || T == Kind::kBFloat16) {
      const char* at = values + bytes_of(T, part);
      for (int64_t k = 0; k < depth; ++k, at += row) {
        Vec right[V];
        for (int64_t line = 0; kFetch && line < row; line += kLine) __builtin_prefetch(at + kAhead + line, 0, 2);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) right[v] = loaded<T>(at + bytes_of(T, v * kLanes));
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const float left = x[r][k];
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
        }
      }
    } else {
      const char* at = values + part;
      for (int64_t k = 0; k < depth; k += kGroup) {
        Vec inner[R][V] = {};
        constexpr int kStep = T == Kind::kInt8 ? 1 : 2;
        for (int64_t i = k; i < k + kGroup; i += kStep, at += kPanel) {
          Vec right[kStep][V];
          if (part == 0) __builtin_prefetch(at + kAhead, 0, 2);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            if constexpr (T == Kind::kInt8) {
              right[0][v] = loaded<T>(at + v * kLanes);
            } else {
              const IntVec pair = bytes(at + v * kLanes);
              right[0][v] = nibbles(pair);
              right[1][v] = nibbles(pair >> 4);
            }
          }
#pragma GCC unroll 2
          for (int s = 0; s < kStep; ++s) {
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
              const float left = x[r][i + s];
#pragma GCC unroll 4
              for (int v = 0; v < V; ++v) inner[r][v] += left * right[s][v];
            }
          }
        }
        const _Float16* scale = scales + k / kGroup * kPanel + part;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const Vec factor = factors(scale + v * kLanes);
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) sum[r][v] += factor * inner[r][v];
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) vec(y[r] + part + v * kLanes) = sum[r][v];
    }
  }
}

using PanelProduct = void (*)(const float* const*, int64_t, const char*, const _Float16*, float (*)[kPanel]);

inline PanelProduct panel_product(Kind kind, int64_t rows) {
  static constexpr auto table = []<int... I>(std::integer_sequence<int, I...>) {
    return std::array<PanelProduct, sizeof...(I)>{
        multiply_panel<static_cast<Kind>(I / kRowsAtOnce), I % kRowsAtOnce + 1>...};
  }(std::make_integer_sequence<int, 4 * kRowsAtOnce>{});
  return table[static_cast<int64_t>(kind) * kRowsAtOnce + rows - 1];
}

}  // namespace trinity
