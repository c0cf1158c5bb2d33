// Float32 matrix products on a CPU, spread over threads in whole blocks.
//
// Each block is one oneDNN product on one thread, and blocks are taken from a shared counter. So a thread that another
// process holds up does not hold up the rest, and no bit of a result depends on how many threads there are. oneDNN is
// reached through ATen's own wrapper: its kernels use AVX-512 wherever the processor has it, which the BLAS that torch
// calls by default does only on some.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#include "matmul.h"

namespace at::native {
TORCH_API void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& out, float beta, float alpha);
}

namespace trinity {

namespace {

constexpr int64_t kRows = 256;    // rows of a result that one task computes
constexpr int64_t kColumns = 64;  // rows of a weight's gradient that one task computes
constexpr int64_t kStretch = 64;  // rows of an expert taken at once: few shapes, so oneDNN's kernels are made once

at::Tensor span(const at::Tensor& x, int64_t start, int64_t length) { return x.narrow(0, start, length); }

// out[start:end] = a[start:end] b, kStretch rows at a time.
void multiply_stretch(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, int64_t start, int64_t end) {
  for (int64_t at = start; at < end; at += kStretch) {
    const int64_t length = std::min(kStretch, end - at);
    multiply(span(a, at, length), b, span(out, at, length), false);
  }
}

// out (+)= a[start:end]^T b[start:end], summed kStretch rows at a time.
void multiply_transposed(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, int64_t start, int64_t end, bool add) {
  for (int64_t at = start; at < end; at += kStretch) {
    const int64_t length = std::min(kStretch, end - at);
    multiply(span(a, at, length).t(), span(b, at, length), out, add || at > start);
  }
}

// a [M, I] b [I, O] -> out [M, O], or added to it: whole blocks of rows of the result.
void matmul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add) {
  // A transposed left side is a weight's gradient: its result has few rows, each the sum over very many.
  const int64_t rows = out.size(0), block = a.stride(0) == 1 && a.size(1) > rows ? kColumns : kRows;
  take_turns((rows + block - 1) / block, [&](int64_t task) {
    const int64_t start = task * block, length = std::min(block, rows - start);
    multiply(span(a, start, length), b, span(out, start, length), add);
  });
}

// rows [R, I] of E experts, weights [E, O, I] (transposed: [E, I, O]), ends [E] -> out [R, O].
void grouped_rows(
    const at::Tensor& rows, const at::Tensor& weights, const at::Tensor& ends, const at::Tensor& out, bool transposed) {
  const int64_t* end = ends.const_data_ptr<int64_t>();
  take_turns(weights.size(0), [&](int64_t expert) {
    const int64_t start = expert ? end[expert - 1] : 0;
    if (start == end[expert]) return;
    const at::Tensor weight = weights.select(0, expert);
    multiply_stretch(rows, transposed ? weight : weight.t(), out, start, end[expert]);
  });
}

// grads [R, O], rows [R, I], ends [E] -> out [E, O, I] (+)= each expert's grads^T rows; zero where it has no rows.
void grouped_weights(
    const at::Tensor& grads, const at::Tensor& rows, const at::Tensor& ends, const at::Tensor& out, bool add) {
  const int64_t* end = ends.const_data_ptr<int64_t>();
  take_turns(out.size(0), [&](int64_t expert) {
    const int64_t start = expert ? end[expert - 1] : 0;
    const at::Tensor gradient = out.select(0, expert);
    if (start < end[expert]) {
      multiply_transposed(grads, rows, gradient, start, end[expert], add);
    } else if (!add) {
      gradient.zero_();
    }
  });
}

// Newton-Schulz in place on stack [n, m, k], m <= k: see optim/orthogonalise.py. A whole matrix is one task, which
// keeps it in the cache of its core over all the steps.
void orthogonalise(const at::Tensor& stack, int64_t steps, double a, double b, double c) {
  const int64_t m = stack.size(1), k = stack.size(2);
  take_turns(stack.size(0), [&](int64_t index) {
    at::Tensor x = stack.select(0, index), spare = at::empty({m, k}, stack.options());
    const at::Tensor gram = at::empty({m, m}, stack.options()), square = at::empty({m, m}, stack.options());
    for (int64_t step = 0; step < steps; ++step) {
      multiply(x, x.t(), gram, false);
      multiply(gram, gram, square, false);
      // (a I + b G + c G^2) X
      square.mul_(c).add_(gram, b);
      square.diagonal().add_(a);
      multiply(square, x, spare, false);
      std::swap(x, spare);
    }
    if (steps % 2) stack.select(0, index).copy_(x);
  });
}

}  // namespace

void multiply(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add) {
  at::native::mkldnn_matmul(a, b, out, add ? 1.0f : 0.0f, 1.0f);
}

void take_turns(int64_t tasks, const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  const auto run = [&](int64_t, int64_t) {
    at::AutoDispatchBelowADInplaceOrView plain;
    try {
      for (int64_t task = next++; task < tasks; task = next++) work(task);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      failure = std::current_exception();
    }
  };
  // As many strips as threads, each taking what is next.
  at::parallel_for(0, at::get_num_threads(), 1, run);
  if (failure) std::rethrow_exception(failure);
}

TORCH_LIBRARY_IMPL(trinity, CPU, library) {
  library.impl("matmul", matmul);
  library.impl("grouped_rows", grouped_rows);
  library.impl("grouped_weights", grouped_weights);
  library.impl("orthogonalise", orthogonalise);
}

}  // namespace trinity
