// Matrices in panels, as the decoder reads them (panels.h). The twin is `packed` of engine/weights.py.
//
// matrices [M, N, K] float32 or bfloat16; out uint8 [M, bytes of one].

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "checksum.h"
#include "panels.h"
#include "turns.h"

namespace trinity {

namespace {

// To the nearest whole number, to the even one of two; for numbers far below 2^22.
inline float whole(float x) { return (x + 12582912.0f) - 12582912.0f; }

// 32 depths of 64 outputs: their scales, and the whole numbers that stand for them.
struct Group {
  float values[kGroup][kPanel];
  float scale[kPanel], factor[kPanel];

  // The scales that make the widest of each column `most`, rounded to what is kept.
  void scale_by(const float* widest, float most) {
    for (int64_t j = 0; j < kPanel; ++j) {
      scale[j] = static_cast<float>(static_cast<_Float16>(widest[j] / most));
      factor[j] = std::max(scale[j], 1e-30f);
    }
  }

  void widest(float* found) const {
    std::fill_n(found, kPanel, 0.0f);
    for (int64_t k = 0; k < kGroup; ++k) {
#pragma omp simd
      for (int64_t j = 0; j < kPanel; ++j) {
        const float size = std::abs(values[k][j]);
        found[j] = found[j] < size ? size : found[j];
      }
    }
  }

  // Of a few scales near the one that makes the widest 7, that of the least squared error.
  void scale_of_4_bits(const float* widest) {
    float best[kPanel], least[kPanel];
    std::fill_n(least, kPanel, std::numeric_limits<float>::infinity());
    std::fill_n(best, kPanel, 0.0f);
    for (const float part : {7.0f, 7.4f, 7.8f, 8.2f, 8.6f}) {
      scale_by(widest, part);
      float error[kPanel] = {};
      for (int64_t k = 0; k < kGroup; ++k) {
#pragma omp simd
        for (int64_t j = 0; j < kPanel; ++j) {
          const float number = std::min(std::max(whole(values[k][j] / factor[j]), -8.0f), 7.0f);
          const float off = number * factor[j] - values[k][j];
          error[j] += off * off;
        }
      }
      for (int64_t j = 0; j < kPanel; ++j) {
        if (error[j] < least[j]) least[j] = error[j], best[j] = scale[j];
      }
    }
    for (int64_t j = 0; j < kPanel; ++j) scale[j] = best[j], factor[j] = std::max(best[j], 1e-30f);
  }

  void write(int64_t k, float low, float high, int8_t* to) const {
#pragma omp simd
    for (int64_t j = 0; j < kPanel; ++j) {
      to[j] = static_cast<int8_t>(std::min(std::max(whole(values[k][j] / factor[j]), low), high));
    }
  }
};

inline float widened(float x) { return x; }
inline float widened(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

template <class Value>
void pack_panel(const Value* rows, int64_t here, const Matrix& m, int64_t p, char* to) {
  char* panel = to + p * bytes_of(m.kind, m.depth * kPanel);
  auto* scales = reinterpret_cast<_Float16*>(to + m.panels() * bytes_of(m.kind, m.depth * kPanel)) + p * m.depth / kGroup * kPanel;
  Group group;
  for (int64_t start = 0; start < m.depth; start += kGroup) {
    const int64_t depths = std::min(kGroup, m.depth - start);
    float* flat = reinterpret_cast<float*>(group.values);
    std::fill_n(flat, kGroup * kPanel, 0.0f);
    for (int64_t j = 0; j < here; ++j) {
      for (int64_t k = 0; k < depths; ++k) group.values[k][j] = widened(rows[j * m.depth + start + k]);
    }
    if (m.kind == Kind::kFloat32) {
      std::copy_n(flat, depths * kPanel, reinterpret_cast<float*>(panel) + start * kPanel);
      continue;
    }
    if (m.kind == Kind::kBFloat16) {
      for (int64_t i = 0; i < depths * kPanel; ++i) {
        reinterpret_cast<uint16_t*>(panel)[start * kPanel + i] = narrowed(flat[i]);
      }
      continue;
    }
    float widest[kPanel];
    group.widest(widest);
    if (m.kind == Kind::kInt8) {
      group.scale_by(widest, 127.0f);
      for (int64_t k = 0; k < kGroup; ++k) group.write(k, -127, 127, reinterpret_cast<int8_t*>(panel) + (start + k) * kPanel);
    } else {
      group.scale_of_4_bits(widest);
      for (int64_t k = 0; k < kGroup; k += 2) {
        int8_t low[kPanel], high[kPanel];
        group.write(k, -8, 7, low), group.write(k + 1, -8, 7, high);
        auto* pair = reinterpret_cast<uint8_t*>(panel) + (start + k) / 2 * kPanel;
        for (int64_t j = 0; j < kPanel; ++j) pair[j] = static_cast<uint8_t>((low[j] + 8) | (high[j] + 8) << 4);
      }
    }
    for (int64_t j = 0; j < kPanel; ++j) scales[start / kGroup * kPanel + j] = static_cast<_Float16>(group.scale[j]);
  }
}

void pack(const at::Tensor& matrices, int64_t kind, const at::Tensor& out) {
  const int64_t count = matrices.size(0), outputs = matrices.size(1), depth = matrices.size(2);
  const Matrix m = Matrix::of(static_cast<Kind>(kind), outputs, depth);
  TORCH_CHECK(matrices.is_contiguous() && out.is_contiguous() && out.numel() == count * m.bytes(), "out of another size");
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const auto go = [&](const auto* from) {
    take_turns(count * m.panels(), [&](int64_t task) {
      const int64_t which = task / m.panels(), p = task % m.panels();
      pack_panel(from + (which * outputs + p * kPanel) * depth, std::min(kPanel, outputs - p * kPanel), m, p,
                 to + which * m.bytes());
    });
  };
  if (matrices.scalar_type() == at::kFloat) {
    go(matrices.const_data_ptr<float>());
  } else {
    TORCH_CHECK(matrices.scalar_type() == at::kBFloat16, "neither float32 nor bfloat16");
    go(static_cast<const uint16_t*>(matrices.const_data_ptr()));
  }
}

int64_t sum_bytes(const at::Tensor& bytes) {
  TORCH_CHECK(bytes.is_contiguous());
  return static_cast<int64_t>(checksum(static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes()));
}

}  // namespace

TORCH_LIBRARY_IMPL(trinity, CPU, library) {
  library.impl("pack", pack);
  library.impl("checksum", sum_bytes);
}

}  // namespace trinity
