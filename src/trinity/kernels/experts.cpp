// The routed experts of a layer, from tokens to tokens: each expert gathers its rows, and gate, up, activation, down
// and their gradients follow one another in the cache of one core. Weights are read where they lie, once a pass;
// between the operands rows stand as columns ([width, rows]), so that rows fill the vectors and no weight is ever
// copied.
//
//   y_r = down_e (silu(gate_e x_r) * up_e x_r)          out_n = sum over the K rows r of token n of weight_r y_r
//
// x [N, D]; order [R]: rows grouped by expert, row r being choice order[r] % K of token order[r] / K; ends [E]:
// cumulative counts; weights [N, K]; gate_up [E, 2, F, D]; down [E, D, F]; kept [R + 15 E, 2 F]: gate and up before the
// activation, as [2 F, rows] for each stretch of an expert. made [R, D]: scratch, what each row makes before they are
// summed. All contiguous float32, order and ends int64.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#include "tile.h"
#include "turns.h"

namespace trinity {

namespace {

constexpr int64_t kRowsAtOnce = 96;  // rows of an expert in hand: what they fill fits beside a core
constexpr int64_t kPadding = 15;     // rows that each expert may take more in `kept`
static_assert(kRowsAtOnce % kLanes == 0 && kLanes <= kPadding + 1);

// Where one expert's stretch of rows is.
struct Stretch {
  int64_t expert, start, rows, padded;  // padded: whole vectors
};

struct Layer {
  const at::Tensor &x, &order, &ends, &weights, &gate_up, &down;
  int64_t width() const { return down.size(1); }
  int64_t hidden() const { return down.size(2); }
  int64_t choices() const { return weights.size(1); }
  const int64_t* rows() const { return order.const_data_ptr<int64_t>(); }
  Left gate_up_of(int64_t expert) const {
    return {gate_up.const_data_ptr<float>() + expert * 2 * hidden() * width(), width(), 1};
  }
  Left down_of(int64_t expert) const {
    return {down.const_data_ptr<float>() + expert * hidden() * width(), hidden(), 1};
  }
  // work(stretch) for at most kRowsAtOnce rows at a time, each expert on one thread; idle(expert) where it has none.
  template <class Work, class Idle>
  void each(const Work& work, const Idle& idle) const {
    const int64_t* end = ends.const_data_ptr<int64_t>();
    take_turns(ends.size(0), [&](int64_t expert) {
      const int64_t start = expert ? end[expert - 1] : 0;
      if (start == end[expert]) idle(expert);
      for (int64_t at = start; at < end[expert]; at += kRowsAtOnce) {
        const int64_t rows = std::min(kRowsAtOnce, end[expert] - at);
        work(Stretch{expert, at, rows, whole_vectors(rows)}, at == start);
      }
    });
  }
};

void check(const Layer& layer) {
  const int64_t experts = layer.ends.size(0), rows = layer.order.size(0);
  TORCH_CHECK(layer.gate_up.is_contiguous() && layer.down.is_contiguous(), "experts must be contiguous");
  TORCH_CHECK(layer.gate_up.size(0) == experts && layer.down.size(0) == experts, experts, " counts for ",
              layer.gate_up.size(0), " experts");
  TORCH_CHECK(layer.weights.numel() == rows && layer.x.size(0) * layer.choices() == rows, rows, " rows for ",
              layer.weights.numel(), " weights");
  TORCH_CHECK(experts == 0 || layer.ends.const_data_ptr<int64_t>()[experts - 1] == rows, "every row needs an expert");
}

// Rows of `from` that a stretch is made of -> to [rows, width].
void gather(const float* from, const int64_t* order, int64_t choices, const Stretch& s, int64_t width, float* to) {
  for (int64_t r = 0; r < s.rows; ++r) {
    const float* row = from + order[s.start + r] / choices * width;
    std::copy(row, row + width, to + r * width);
  }
}

// out_n = sum over k of rows[place of (n, k)], times weight where there is one.
void sum_by_token(const float* rows, const std::vector<int64_t>& place, const float* weights, int64_t choices,
                  const at::Tensor& out) {
  const int64_t width = out.size(1), tokens = out.size(0);
  constexpr int64_t kTokens = 64;
  float* to = out.mutable_data_ptr<float>();
  take_turns((tokens + kTokens - 1) / kTokens, [&](int64_t task) {
    for (int64_t n = task * kTokens; n < std::min(tokens, (task + 1) * kTokens); ++n) {
      for (int64_t k = 0; k < choices; ++k) {
        const float* row = rows + place[n * choices + k] * width;
        const float weight = weights ? weights[n * choices + k] : 1.0f;
        float* token = to + n * width;
        if (k == 0) {
          for (int64_t d = 0; d < width; ++d) token[d] = weight * row[d];
        } else {
          for (int64_t d = 0; d < width; ++d) token[d] += weight * row[d];
        }
      }
    }
  });
}

std::vector<int64_t> places(const at::Tensor& order) {
  std::vector<int64_t> place(order.size(0));
  const int64_t* rows = order.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < order.size(0); ++r) place[rows[r]] = r;
  return place;
}

// Where a stretch begins in `kept`. Only the last stretch of an expert is padded, by less than kPadding + 1 rows.
int64_t kept_at(const Stretch& s, int64_t hidden) { return (s.start + s.expert * kPadding) * 2 * hidden; }

void experts(const at::Tensor& x, const at::Tensor& order, const at::Tensor& ends, const at::Tensor& weights,
             const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& out, const at::Tensor& kept,
             const at::Tensor& made) {
  const Layer layer{x, order, ends, weights, gate_up, down};
  check(layer);
  const int64_t width = layer.width(), hidden = layer.hidden();
  float* result = made.mutable_data_ptr<float>();
  float* keep = kept.mutable_data_ptr<float>();
  layer.each(
      [&](const Stretch& s, bool) {
        Scratch scratch{s.rows * width, width * s.padded, hidden * s.padded, width * s.padded};
        float *rows = scratch.take(s.rows * width), *columns = scratch.take(width * s.padded);
        float *product = scratch.take(hidden * s.padded), *answer = scratch.take(width * s.padded);
        gather(x.const_data_ptr<float>(), layer.rows(), layer.choices(), s, width, rows);
        transpose(rows, width, s.rows, width, columns, s.padded);
        float* gate = keep + kept_at(s, hidden);
        const float* up = gate + hidden * s.padded;
        multiply_here(2 * hidden, s.padded, width, layer.gate_up_of(s.expert), columns, s.padded, gate, s.padded,
                      false);
        for (int64_t i = 0; i < hidden * s.padded; i += kLanes) {
          const Vec g = vec(gate + i);
          vec(product + i) = g * sigmoid(g) * vec(up + i);
        }
        multiply_here(width, s.padded, hidden, layer.down_of(s.expert), product, s.padded, answer, s.padded, false);
        transpose_back(answer, s.padded, width, s.rows, result + s.start * width, width);
      },
      [](int64_t) {});
  sum_by_token(result, places(order), weights.const_data_ptr<float>(), layer.choices(), out);
}

// grad [N, D] -> grad_x [N, D], grad_weights [N, K], and grad_gate_up, grad_down: set, or added to.
void experts_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& order, const at::Tensor& ends,
                      const at::Tensor& weights, const at::Tensor& gate_up, const at::Tensor& down,
                      const at::Tensor& kept, const at::Tensor& grad_x, const at::Tensor& grad_weights,
                      const at::Tensor& grad_gate_up, const at::Tensor& grad_down, bool add_gate_up, bool add_down,
                      const at::Tensor& made) {
  const Layer layer{x, order, ends, weights, gate_up, down};
  check(layer);
  const int64_t width = layer.width(), hidden = layer.hidden(), size = width * hidden;
  float *result = made.mutable_data_ptr<float>(), *by_choice = grad_weights.mutable_data_ptr<float>();
  float *to_gate_up = grad_gate_up.mutable_data_ptr<float>(), *to_down = grad_down.mutable_data_ptr<float>();
  const float *keep = kept.const_data_ptr<float>(), *weight = weights.const_data_ptr<float>();
  layer.each(
      [&](const Stretch& s, bool first) {
        Scratch scratch{2 * s.padded * width, 6 * hidden * s.padded, 2 * s.padded};
        float *rows = scratch.take(s.padded * width), *given = scratch.take(s.padded * width);
        float *inner_rows = scratch.take(hidden * s.padded), *inner = scratch.take(hidden * s.padded);
        float *product_rows = scratch.take(hidden * s.padded), *product = scratch.take(hidden * s.padded);
        float* both = scratch.take(2 * hidden * s.padded);
        float *scale = scratch.take(s.padded), *by_row = scratch.take(s.padded);
        const int64_t* order_of = layer.rows() + s.start;
        for (int64_t r = 0; r < s.padded; ++r) scale[r] = r < s.rows ? weight[order_of[r]] : 0.0f, by_row[r] = 0.0f;
        gather(x.const_data_ptr<float>(), layer.rows(), layer.choices(), s, width, rows);
        gather(grad.const_data_ptr<float>(), layer.rows(), layer.choices(), s, width, given);
        // What arrives at the product of gate and up, before the choice's weight: its inner product with the product is
        // the gradient of that weight.
        multiply_rows(s.rows, hidden, width, {given, width, 1}, layer.down_of(s.expert).at, inner_rows, false);
        transpose(inner_rows, hidden, s.rows, hidden, inner, s.padded);
        const float *gate = keep + kept_at(s, hidden), *up = gate + hidden * s.padded;
        for (int64_t f = 0; f < hidden; ++f) {
          for (int64_t r = 0; r < s.padded; r += kLanes) {
            const int64_t at = f * s.padded + r;
            const Vec g = vec(gate + at), u = vec(up + at), gated = sigmoid(g), silu = g * gated;
            const Vec p = silu * u, d = vec(inner + at), scaled = d * vec(scale + r);
            vec(by_row + r) = vec(by_row + r) + d * p;
            vec(product + at) = p * vec(scale + r);
            vec(both + at) = scaled * u * (gated + silu * (1.0f - gated));
            vec(both + hidden * s.padded + at) = scaled * silu;
          }
        }
        for (int64_t r = 0; r < s.rows; ++r) by_choice[order_of[r]] = by_row[r];
        transpose_back(product, s.padded, hidden, s.rows, product_rows, hidden);
        // Gradients of weights sum over rows.
        multiply_rows(width, hidden, s.rows, {given, 1, width}, product_rows, to_down + s.expert * size,
                      add_down || !first);
        multiply_rows(2 * hidden, width, s.rows, {both, s.padded, 1}, rows, to_gate_up + s.expert * 2 * size,
                      add_gate_up || !first);
        multiply_rows(s.rows, width, 2 * hidden, {both, 1, s.padded}, layer.gate_up_of(s.expert).at,
                      result + s.start * width, false);
      },
      [&](int64_t expert) {
        if (!add_down) std::fill_n(to_down + expert * size, size, 0.0f);
        if (!add_gate_up) std::fill_n(to_gate_up + expert * 2 * size, 2 * size, 0.0f);
      });
  sum_by_token(result, places(order), nullptr, layer.choices(), grad_x);
}

}  // namespace

TORCH_LIBRARY_IMPL(trinity, CPU, library) {
  library.impl("experts", experts);
  library.impl("experts_backward", experts_backward);
}

}  // namespace trinity
