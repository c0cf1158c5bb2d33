// Softmax attention where each query sees one stretch of keys that ends at itself: causal, within a window, within a
// document, or all of these. Tiles of queries meet only the keys that some query of the tile sees, so the cost is what is
// visible. The idea of FlashAttention (Dao et al. 2022): scores live in a tile, and backward computes them again from
// the logarithm of their sum.
//
// q, out [B, H, T, C]; k, v [B, J, T, C], query head h reads key head h / (H / J); first [B, T] int64: first key seen.
// All contiguous float32.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "matmul.h"

namespace trinity {

namespace {

constexpr int64_t kTile = 64;  // queries of a tile; the keys they meet are a multiple of it, to have few shapes

// e^x for x <= 0, in a form that compilers vectorise: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes).
inline float exponential(float x) {
  x = std::max(x, -87.0f);
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest integer
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return std::bit_cast<float>(std::bit_cast<int32_t>(p) + (static_cast<int32_t>(n) << 23));
}

struct Tile {
  int64_t start, length;  // queries
  int64_t low, keys;      // keys met: [low, low + keys)
};

Tile tile_at(int64_t start, int64_t total, const int64_t* first) {
  const int64_t length = std::min(kTile, total - start);
  const int64_t low = *std::min_element(first + start, first + start + length) / kTile * kTile;
  return {start, length, low, start + length - low};
}

// Scores of one query over the keys of its tile -> probabilities, zero where it sees nothing; returns log of their sum.
float softmax(float* scores, int64_t from, int64_t to, int64_t keys, float scale) {
  float highest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : highest)
  for (int64_t i = from; i < to; ++i) highest = std::max(highest, scores[i]);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = from; i < to; ++i) {
    scores[i] = exponential((scores[i] - highest) * scale);
    sum += scores[i];
  }
  const float inverse = 1.0f / sum;
#pragma omp simd
  for (int64_t i = from; i < to; ++i) scores[i] *= inverse;
  std::fill(scores, scores + from, 0.0f);
  std::fill(scores + to, scores + keys, 0.0f);
  return highest * scale + std::log(sum);
}

void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& first, double scale,
            const at::Tensor& out, const at::Tensor& sums) {
  const int64_t heads = q.size(1), total = q.size(2), group = heads / k.size(1), tiles = (total + kTile - 1) / kTile;
  const int64_t* seen = first.const_data_ptr<int64_t>();
  float* sum = sums.mutable_data_ptr<float>();
  take_turns(q.size(0) * heads * tiles, [&](int64_t task) {
    const int64_t head = task / tiles, row = head / heads, lane = head % heads;
    const Tile tile = tile_at(task % tiles * kTile, total, seen + row * total);
    const auto keys = k.select(0, row).select(0, lane / group).narrow(0, tile.low, tile.keys);
    const auto values = v.select(0, row).select(0, lane / group).narrow(0, tile.low, tile.keys);
    const auto scores = at::empty({tile.length, tile.keys}, q.options());
    multiply(q.select(0, row).select(0, lane).narrow(0, tile.start, tile.length), keys.t(), scores, false);
    float* score = scores.mutable_data_ptr<float>();
    for (int64_t i = 0; i < tile.length; ++i) {
      const int64_t at = tile.start + i;
      sum[head * total + at] = softmax(
          score + i * tile.keys, seen[row * total + at] - tile.low, at + 1 - tile.low, tile.keys, scale);
    }
    multiply(scores, values, out.select(0, row).select(0, lane).narrow(0, tile.start, tile.length), false);
  });
}

// scores -> probabilities; grads of them -> grads of scores, both of one query and in place. `inner` is the inner product
// of the query's output and its gradient, which is the mean of grads under the probabilities.
void softmax_backward(
    float* scores, float* grads, int64_t from, int64_t to, int64_t keys, float scale, float sum, float inner) {
#pragma omp simd
  for (int64_t i = from; i < to; ++i) {
    scores[i] = exponential(std::min(scores[i] * scale - sum, 0.0f));
    grads[i] = scores[i] * (grads[i] - inner) * scale;
  }
  for (float* values : {scores, grads}) {
    std::fill(values, values + from, 0.0f);
    std::fill(values + to, values + keys, 0.0f);
  }
}

// grad_k and grad_v [B, H, T, C] are those of each query head and start as zeros; heads that share keys are not summed.
void attend_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& first, double scale, const at::Tensor& out, const at::Tensor& sums,
                     const at::Tensor& grad_q, const at::Tensor& grad_k, const at::Tensor& grad_v) {
  const int64_t heads = q.size(1), total = q.size(2), size = q.size(3), group = heads / k.size(1);
  const int64_t* seen = first.const_data_ptr<int64_t>();
  const float* sum = sums.const_data_ptr<float>();
  take_turns(q.size(0) * heads, [&](int64_t head) {
    const int64_t row = head / heads, lane = head % heads;
    const auto of = [&](const at::Tensor& x, int64_t index) { return x.select(0, row).select(0, index); };
    const auto key = of(k, lane / group), value = of(v, lane / group);
    const auto query = of(q, lane), upstream = of(grad, lane);
    const float* output = of(out, lane).const_data_ptr<float>();
    const float* given = upstream.const_data_ptr<float>();
    for (int64_t start = 0; start < total; start += kTile) {
      const Tile tile = tile_at(start, total, seen + row * total);
      const auto queries = query.narrow(0, start, tile.length), grads = upstream.narrow(0, start, tile.length);
      const auto keys = key.narrow(0, tile.low, tile.keys), values = value.narrow(0, tile.low, tile.keys);
      const auto scores = at::empty({tile.length, tile.keys}, q.options());
      const auto grad_scores = at::empty({tile.length, tile.keys}, q.options());
      multiply(queries, keys.t(), scores, false);
      multiply(grads, values.t(), grad_scores, false);
      for (int64_t i = 0; i < tile.length; ++i) {
        const int64_t at = start + i;
        float inner = 0.0f;
#pragma omp simd reduction(+ : inner)
        for (int64_t c = 0; c < size; ++c) inner += output[at * size + c] * given[at * size + c];
        softmax_backward(scores.mutable_data_ptr<float>() + i * tile.keys,
                         grad_scores.mutable_data_ptr<float>() + i * tile.keys, seen[row * total + at] - tile.low,
                         at + 1 - tile.low, tile.keys, scale, sum[head * total + at], inner);
      }
      multiply(scores.t(), grads, of(grad_v, lane).narrow(0, tile.low, tile.keys), true);
      multiply(grad_scores.t(), queries, of(grad_k, lane).narrow(0, tile.low, tile.keys), true);
      multiply(grad_scores, keys, of(grad_q, lane).narrow(0, start, tile.length), false);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(trinity, CPU, library) {
  library.impl("attend", attend);
  library.impl("attend_backward", attend_backward);
}

}  // namespace trinity
