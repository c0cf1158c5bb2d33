// Softmax attention where each query sees one stretch of keys that ends at itself: causal, within a window, within a
// document, or all of these. Tiles of queries meet only the keys that some query of the tile sees, a block at a time,
// so the cost is what is visible and the scores stay in the cache: FlashAttention (Dao et al. 2022; algorithm 1 with
// the running maximum, and backward from the logarithm of the sum). Queries stand side by side in the vectors, so that
// the softmax goes down the keys without a sum across a vector, and keys and values are read where they lie.
//
// q, out [B, H, T, C]; k, v [B, J, T, C], query head h reads key head h / (H / J); first [B, T] int64: first key seen.
// All contiguous float32.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "tile.h"
#include "turns.h"

namespace trinity {

namespace {

constexpr int64_t kQueries = 64;  // of a tile
constexpr int64_t kKeys = 256;    // of a block

// The queries of one tile as columns, and the keys they see.
struct Tile {
  int64_t start, length, padded;
  int64_t low, high;                      // some query sees a key of [low, high)
  int64_t certain, uncertain;             // every query sees every key of [certain, uncertain)
  float first[kQueries], self[kQueries];  // the stretch [first, self] of each; nothing where there is no query

  Tile(int64_t at, int64_t total, const int64_t* seen)
      : start(at), length(std::min(kQueries, total - at)), padded(whole_vectors(length)) {
    low = *std::min_element(seen + start, seen + start + length);
    certain = *std::max_element(seen + start, seen + start + length);
    high = start + length;
    uncertain = start + 1;
    for (int64_t i = 0; i < padded; ++i) {
      // A column without a query sees the tile's last key, so that its sum is not zero.
      first[i] = static_cast<float>(i < length ? seen[start + i] - low : high - 1 - low);
      self[i] = static_cast<float>((i < length ? start + i : high - 1) - low);
    }
  }
  bool seen_by_all(int64_t key) const { return key >= certain && key < uncertain && length == padded; }
  // -inf where column i does not see the key.
  Vec masked(Vec score, int64_t key, int64_t i) const {
    const Vec at = splat(static_cast<float>(key - low));
    return (vec(first + i) <= at) & (at <= vec(self + i)) ? score : splat(-INFINITY);
  }
};

void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& first, double scaling,
            const at::Tensor& out, const at::Tensor& sums) {
  const int64_t heads = q.size(1), total = q.size(2), size = q.size(3), group = heads / k.size(1);
  const int64_t tiles = (total + kQueries - 1) / kQueries;
  const float scale = static_cast<float>(scaling);
  take_turns(q.size(0) * heads * tiles, [&](int64_t task) {
    const int64_t head = task / tiles, row = head / heads, source = row * k.size(1) + head % heads / group;
    const Tile tile(task % tiles * kQueries, total, first.const_data_ptr<int64_t>() + row * total);
    const float *key = k.const_data_ptr<float>() + source * total * size,
                *value = v.const_data_ptr<float>() + source * total * size;
    Scratch scratch{size * kQueries, kKeys * kQueries, size * kQueries};
    float *queries = scratch.take(size * kQueries), *scores = scratch.take(kKeys * kQueries),
          *answer = scratch.take(size * kQueries);
    float highest[kQueries], sum[kQueries];
    std::fill_n(highest, kQueries, -std::numeric_limits<float>::max());
    std::fill_n(sum, kQueries, 0.0f);
    std::fill_n(answer, size * kQueries, 0.0f);
    transpose(q.const_data_ptr<float>() + (head * total + tile.start) * size, size, tile.length, size, queries,
              tile.padded);
    for (int64_t low = tile.low; low < tile.high; low += kKeys) {
      const int64_t keys = std::min(kKeys, tile.high - low);
      multiply_here(keys, tile.padded, size, {key + low * size, size, 1}, queries, tile.padded, scores, tile.padded,
                    false);
      for (int64_t i = 0; i < tile.padded; i += kLanes) {
        Vec top = vec(highest + i);
        for (int64_t s = 0; s < keys; ++s) {
          VecAnywhere& score = vec(scores + s * tile.padded + i);
          score = score * scale;
          if (!tile.seen_by_all(low + s)) score = tile.masked(score, low + s, i);
          top = top < score ? score : top;
        }
        Vec gathered{};
        for (int64_t s = 0; s < keys; ++s) {
          VecAnywhere& score = vec(scores + s * tile.padded + i);
          const Vec p = exponential(score - top);
          score = tile.seen_by_all(low + s) ? p : (score > -INFINITY) | (score != score) ? p : Vec{};
          gathered += score;
        }
        const Vec before = exponential(vec(highest + i) - top);
        vec(sum + i) = vec(sum + i) * before + gathered;
        vec(highest + i) = top;
        if (low > tile.low) {
          for (int64_t c = 0; c < size; ++c)
            vec(answer + c * tile.padded + i) = vec(answer + c * tile.padded + i) * before;
        }
      }
      multiply_here(size, tile.padded, keys, {value + low * size, 1, size}, scores, tile.padded, answer, tile.padded,
                    true);
    }
    for (int64_t i = 0; i < tile.padded; i += kLanes) {
      const Vec inverse = 1.0f / vec(sum + i);
      for (int64_t c = 0; c < size; ++c)
        vec(answer + c * tile.padded + i) = vec(answer + c * tile.padded + i) * inverse;
    }
    transpose_back(answer, tile.padded, size, tile.length,
                   out.mutable_data_ptr<float>() + (head * total + tile.start) * size, size);
    float* logs = sums.mutable_data_ptr<float>() + head * total + tile.start;
    for (int64_t i = 0; i < tile.length; ++i) logs[i] = highest[i] + std::log(sum[i]);
  });
}

// grad_k and grad_v [B, H, T, C] are those of each query head and start as zeros; heads that share keys are not summed.
void attend_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const at::Tensor& first, double scaling, const at::Tensor& out, const at::Tensor& sums,
                     const at::Tensor& grad_q, const at::Tensor& grad_k, const at::Tensor& grad_v) {
  const int64_t heads = q.size(1), total = q.size(2), size = q.size(3), group = heads / k.size(1);
  const float scale = static_cast<float>(scaling);
  take_turns(q.size(0) * heads, [&](int64_t head) {
    const int64_t row = head / heads, source = (row * k.size(1) + head % heads / group) * total * size;
    const float *key = k.const_data_ptr<float>() + source, *value = v.const_data_ptr<float>() + source;
    float *to_key = grad_k.mutable_data_ptr<float>() + head * total * size,
          *to_value = grad_v.mutable_data_ptr<float>() + head * total * size;
    Scratch scratch{3 * size * kQueries, 2 * kKeys * kQueries};
    float *queries = scratch.take(size * kQueries), *arriving = scratch.take(size * kQueries),
          *leaving = scratch.take(size * kQueries);
    float *scores = scratch.take(kKeys * kQueries), *grads = scratch.take(kKeys * kQueries);
    for (int64_t start = 0; start < total; start += kQueries) {
      const Tile tile(start, total, first.const_data_ptr<int64_t>() + row * total);
      const int64_t at = (head * total + start) * size;
      const float *query = q.const_data_ptr<float>() + at, *given = grad.const_data_ptr<float>() + at;
      const float *output = out.const_data_ptr<float>() + at,
                  *logs = sums.const_data_ptr<float>() + head * total + start;
      // The inner product of a query's output and its gradient: the mean of the scores' gradients.
      float mean[kQueries] = {}, sum[kQueries] = {};
      for (int64_t i = 0; i < tile.length; ++i) {
        sum[i] = logs[i];
        for (int64_t c = 0; c < size; ++c) mean[i] += output[i * size + c] * given[i * size + c];
      }
      transpose(query, size, tile.length, size, queries, tile.padded);
      transpose(given, size, tile.length, size, arriving, tile.padded);
      for (int64_t low = tile.low; low < tile.high; low += kKeys) {
        const int64_t keys = std::min(kKeys, tile.high - low);
        multiply_here(keys, tile.padded, size, {key + low * size, size, 1}, queries, tile.padded, scores, tile.padded,
                      false);
        multiply_here(keys, tile.padded, size, {value + low * size, size, 1}, arriving, tile.padded, grads, tile.padded,
                      false);
        for (int64_t s = 0; s < keys; ++s) {
          for (int64_t i = 0; i < tile.padded; i += kLanes) {
            VecAnywhere &score = vec(scores + s * tile.padded + i), &g = vec(grads + s * tile.padded + i);
            Vec p = exponential(score * scale - vec(sum + i));
            if (!tile.seen_by_all(low + s)) p = tile.masked(splat(0.0f), low + s, i) == 0.0f ? p : Vec{};
            score = p;
            g = p * (g - vec(mean + i)) * scale;
          }
        }
        multiply_rows(keys, size, tile.length, {scores, tile.padded, 1}, given, to_value + low * size, true);
        multiply_rows(keys, size, tile.length, {grads, tile.padded, 1}, query, to_key + low * size, true);
        multiply_here(size, tile.padded, keys, {key + low * size, 1, size}, grads, tile.padded, leaving, tile.padded,
                      low > tile.low);
      }
      transpose_back(leaving, tile.padded, size, tile.length, grad_q.mutable_data_ptr<float>() + at, size);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(trinity, CPU, library) {
  library.impl("attend", attend);
  library.impl("attend_backward", attend_backward);
}

}  // namespace trinity
