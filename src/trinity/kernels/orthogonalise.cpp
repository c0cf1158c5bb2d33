// Newton-Schulz on a stack of matrices: see optim/orthogonalise.py. A whole matrix is one task, which keeps it in the
// cache of its core over all the steps.
//
//   G = X X^T,   X <- (a I + b G + c G^2) X          stack [n, m, k], m <= k, in place; contiguous float32

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "amx.h"
#include "tile.h"
#include "turns.h"

namespace trinity {

namespace {

// a + b G + c G^2 in place of G^2: the factor of X in a step of Newton-Schulz, [m, m] in rows `row` apart.
void polynomial(int64_t m, int64_t row, double a, double b, double c, const float* gram, float* square) {
  const float linear = static_cast<float>(b), quadratic = static_cast<float>(c);
  for (int64_t i = 0; i < m * row; ++i) square[i] = square[i] * quadratic + gram[i] * linear;
  for (int64_t i = 0; i < m; ++i) square[i * row + i] += static_cast<float>(a);
}

// c [m, m] = a b of packed sides where it is symmetric: half of it is computed, the rest its mirror image.
void multiply_symmetric(int64_t m, int64_t depth, const float* a, const float* b, float* c) {
  for (int64_t i = 0; i < m; i += kPanelLines) {
    const int64_t tall = std::min(kPanelLines, m - i);
    multiply_packed(tall, m - i, depth, a + packed_size(i, depth), b + packed_size(i, depth), c + i * m + i, m, false);
    if (i + tall < m) transpose_back(c + i * m + i + tall, m, tall, m - i - tall, c + (i + tall) * m + i, m);
  }
}

void orthogonalise_by_amx(const at::Tensor& stack, int64_t steps, double a, double b, double c) {
  const int64_t m = stack.size(1), k = stack.size(2);
  take_turns(stack.size(0), [&](int64_t index) {
    const AmxTiles tiles;
    float* x = stack.mutable_data_ptr<float>() + index * m * k;
    const int64_t side = packed_size(m, k), other_side = std::max(side, packed_size(k, m));
    Scratch scratch{side, other_side, m * m, m * m};
    float *left = scratch.take(side), *right = scratch.take(other_side);
    float *gram = scratch.take(m * m), *factor = scratch.take(m * m);
    for (int64_t step = 0; step < steps; ++step) {
      pack_side<Side::left>({x, k, 1}, m, k, left);
      pack_side<Side::right>({x, k, 1}, m, k, right);
      multiply_symmetric(m, k, left, right, gram);
      pack_side<Side::left>({gram, m, 1}, m, m, left);
      pack_side<Side::right>({gram, 1, m}, m, m, right);
      multiply_symmetric(m, m, left, right, factor);
      polynomial(m, m, a, b, c, gram, factor);
      pack_side<Side::left>({factor, m, 1}, m, m, left);
      pack_side<Side::right>({x, 1, k}, k, m, right);
      multiply_packed(m, k, m, left, right, x, k, false);
    }
  });
}

void orthogonalise_by_tiles(const at::Tensor& stack, int64_t steps, double a, double b, double c) {
  const int64_t m = stack.size(1), k = stack.size(2), high = whole_vectors(m), wide = whole_vectors(k);
  float* matrices = stack.mutable_data_ptr<float>();
  take_turns(stack.size(0), [&](int64_t index) {
    Scratch scratch{2 * m * wide, wide * high, 2 * m * high};
    float *x = scratch.take(m * wide), *next = scratch.take(m * wide), *flipped = scratch.take(wide * high);
    float *gram = scratch.take(m * high), *factor = scratch.take(m * high);
    for (int64_t i = 0; i < m; ++i) {
      std::copy_n(matrices + (index * m + i) * k, k, x + i * wide);
      std::fill_n(x + i * wide + k, wide - k, 0.0f);
    }
    for (int64_t step = 0; step < steps; ++step) {
      transpose(x, wide, m, k, flipped, high);
      multiply_here(m, high, k, {x, wide, 1}, flipped, high, gram, high, false);
      multiply_here(m, high, m, {gram, high, 1}, gram, high, factor, high, false);
      polynomial(m, high, a, b, c, gram, factor);
      multiply_here(m, wide, m, {factor, high, 1}, x, wide, next, wide, false);
      std::swap(x, next);
    }
    for (int64_t i = 0; i < m; ++i) std::copy_n(x + i * wide, k, matrices + (index * m + i) * k);
  });
}

void orthogonalise(const at::Tensor& stack, int64_t steps, double a, double b, double c) {
  (has_amx() ? orthogonalise_by_amx : orthogonalise_by_tiles)(stack, steps, a, b, c);
}

}  // namespace

TORCH_LIBRARY_IMPL(trinity, CPU, library) { library.impl("orthogonalise", orthogonalise); }

}  // namespace trinity
