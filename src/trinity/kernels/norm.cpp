// RMSNorm in one pass over memory each way. The twin is F.rms_norm.
//
// x, out, grad, grad_x [N, C]; weight [C]; scale [N]: 1 / rms of each row. All contiguous float32.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>

#include "turns.h"

namespace trinity {

namespace {

constexpr int64_t kValues = 1 << 16;  // of a task; fixed, so that sums over rows do not depend on threads

int64_t rows_of_a_task(int64_t columns) { return std::max<int64_t>(1, kValues / columns); }

void normalise(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& out,
               const at::Tensor& scale) {
  const int64_t rows = x.size(0), columns = x.size(1), many = rows_of_a_task(columns);
  const float* gain = weight.const_data_ptr<float>();
  take_turns((rows + many - 1) / many, [&](int64_t task) {
    for (int64_t n = task * many; n < std::min(rows, (task + 1) * many); ++n) {
      const float* from = x.const_data_ptr<float>() + n * columns;
      float *to = out.mutable_data_ptr<float>() + n * columns, squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t c = 0; c < columns; ++c) squares += from[c] * from[c];
      const float factor = 1.0f / std::sqrt(squares / static_cast<float>(columns) + static_cast<float>(eps));
      scale.mutable_data_ptr<float>()[n] = factor;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) to[c] = from[c] * factor * gain[c];
    }
  });
}

// grad_x = scale (g - normal mean(g normal)) with g = grad weight and normal = x scale; grad_weight = sum grad normal.
void normalise_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                        const at::Tensor& grad_x, const at::Tensor& grad_weight) {
  const int64_t rows = x.size(0), columns = x.size(1), many = rows_of_a_task(columns), tasks = (rows + many - 1) / many;
  const float* gain = weight.const_data_ptr<float>();
  std::vector<float> sums(tasks * columns);
  take_turns(tasks, [&](int64_t task) {
    float* sum = sums.data() + task * columns;
    for (int64_t n = task * many; n < std::min(rows, (task + 1) * many); ++n) {
      const float *from = x.const_data_ptr<float>() + n * columns, *given = grad.const_data_ptr<float>() + n * columns;
      const float factor = scale.const_data_ptr<float>()[n];
      float *to = grad_x.mutable_data_ptr<float>() + n * columns, shared = 0.0f;
#pragma omp simd reduction(+ : shared)
      for (int64_t c = 0; c < columns; ++c) shared += given[c] * gain[c] * from[c];
      shared *= factor * factor / static_cast<float>(columns);
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        sum[c] += given[c] * from[c] * factor;
        to[c] = factor * (given[c] * gain[c] - from[c] * shared);
      }
    }
  });
  float* total = grad_weight.mutable_data_ptr<float>();
  std::fill_n(total, columns, 0.0f);
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t c = 0; c < columns; ++c) total[c] += sums[task * columns + c];
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(trinity, CPU, library) {
  library.impl("normalise", normalise);
  library.impl("normalise_backward", normalise_backward);
}

}  // namespace trinity
