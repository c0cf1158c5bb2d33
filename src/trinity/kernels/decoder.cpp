// A whole forward pass of the model over a few rows, as the engine has them: tokens of several sequences, each with its
// past in pages. One call, one team of threads, no tensor made on the way. Float32 but for the weights (panels.h).
//
// A row's result depends on its own sequence alone, to the bit: products sum along the depth in order (panels.h), and
// attention goes through keys in pages and in stretches of pages whose bounds lie at fixed positions (paged_attention.h),
// whatever other rows are there and however a prompt was cut into chunks. The twin is model/transformer.py.
//
// Shapes: M rows, D width, H query and J key heads of size C, E experts, K chosen, F hidden width of an expert.
// A page holds kPage tokens of one layer and one key head: keys [C, kPage], then values [kPage, C]; or whole numbers.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <vector>

#include "expert_cache.h"
#include "paged_attention.h"
#include "panels.h"
#include "team.h"

namespace trinity {

namespace {

constexpr int64_t kFewRows = 8;  // that one thread normalises sooner than several

struct Layer : AttentionLayer {
  bool sparse = false;
  int64_t sparse_place = 0;  // among the sparse layers
  const float *before_attention, *after_attention, *before_mlp, *after_mlp;
  Matrix heads, out;             // q, k, v and gate; o
  Matrix gate_up, down;          // dense, or what those of an expert look like
  const char* experts = nullptr;  // a record of both for each, end to end; null where a cache holds them
  Matrix router, shared_gate_up, shared_down;
  const float* bias = nullptr;
};

// A float as a whole number of the same order: those that are not finite lie outside all others. -0 is 0.
inline int32_t ordered(float value) {
  const int32_t bits = std::bit_cast<int32_t>(value + 0.0f);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

// The greatest logit of a row so far and its place, as one number: greater for the earlier of equals.
constexpr uint64_t kNoNumber = ~uint64_t{0};
constexpr uint64_t rank_of(int32_t value, int64_t place) {
  return uint64_t{static_cast<uint32_t>(value) ^ 1u << 31} << 32 | (0xffffffff - place);
}
constexpr int64_t place_of(uint64_t rank) { return rank == kNoNumber ? -1 : 0xffffffff - static_cast<int64_t>(rank & 0xffffffff); }

}  // namespace

class Decoder : public torch::CustomClassHolder {
 public:
  // shape: vocabulary, D, layers, H, J, C, E, K, window, dense hidden, expert hidden, shared hidden, kind of the matrices
  // and of the head, and a 1 for each global and then for each sparse layer. constants: eps, route scale, embedding
  // scale, then C / 2 inverse frequencies. weights: embedding, final norm, head, then those of each layer as
  // engine/weights.py lists them, a matrix as its bytes. Where a cache holds the experts, theirs are empty.
  Decoder(const std::vector<int64_t>& shape, const std::vector<double>& constants, std::vector<at::Tensor> weights,
          std::optional<c10::intrusive_ptr<ExpertCache>> cache)
      : weights_(std::move(weights)), cache_(cache ? *cache : nullptr) {
    size_t given = 0;
    const auto take = [&] { return shape.at(given++); };
    vocabulary_ = take(), width_ = take();
    const int64_t layers = take();
    const int64_t heads = take(), key_heads = take(), size = take();
    experts_ = take(), chosen_ = take();
    const int64_t window = take();
    dense_ = take(), hidden_ = take(), shared_ = take();
    eps_ = static_cast<float>(constants.at(0)), route_scale_ = static_cast<float>(constants.at(1));
    embed_scale_ = static_cast<float>(constants.at(2));
    attention_.emplace(heads, key_heads, size, window, eps_, std::vector<float>(constants.begin() + 3, constants.end()));
    size_t next = 0;
    const auto tensor = [&]() -> const at::Tensor& { return weights_.at(next++); };
    const auto vector = [&]() { return tensor().const_data_ptr<float>(); };
    const auto bytes = [&](int64_t wanted) {
      const at::Tensor& values = tensor();
      TORCH_CHECK(values.is_contiguous() && static_cast<int64_t>(values.nbytes()) == wanted, "a matrix of another size");
      return static_cast<const char*>(values.const_data_ptr());
    };
    const auto kind = static_cast<Kind>(take()), head_kind = static_cast<Kind>(take());
    const auto matrix = [&](int64_t outputs, int64_t depth, Kind kind) {
      const Matrix m = Matrix::of(kind, outputs, depth);
      return m.at(bytes(m.bytes()));
    };
    embedding_ = tensor();
    final_norm_ = vector();
    head_ = matrix(vocabulary_, width_, head_kind);
    int64_t kinds[2] = {0, 0}, sparse = 0;
    for (int64_t l = 0; l < layers; ++l) {
      Layer layer;
      layer.global = shape.at(given + l), layer.sparse = shape.at(given + layers + l);
      layer.place = kinds[layer.global]++;
      layer.before_attention = vector(), layer.query = vector(), layer.key = vector();
      layer.after_attention = vector(), layer.before_mlp = vector(), layer.after_mlp = vector();
      layer.heads = matrix(attention_->outputs(), width_, kind);
      layer.out = matrix(width_, attention_->attended_width(), kind);
      if (layer.sparse) {
        layer.sparse_place = sparse++;
        layer.gate_up = Matrix::of(kind, 2 * padded(hidden_), width_), layer.down = Matrix::of(kind, width_, hidden_);
        const char* experts = bytes(cache_ ? 0 : experts_ * record_of(layer));
        layer.experts = cache_ ? nullptr : experts;
        layer.router = matrix(experts_, width_, Kind::kFloat32);
        layer.bias = vector();
        if (shared_) {
          layer.shared_gate_up = matrix(2 * padded(shared_), width_, kind), layer.shared_down = matrix(width_, shared_, kind);
        }
      } else {
        layer.gate_up = matrix(2 * padded(dense_), width_, kind), layer.down = matrix(width_, dense_, kind);
      }
      layers_.push_back(layer);
    }
    TORCH_CHECK(next == weights_.size(), "weights are left over");
    for (const at::Tensor& weight : weights_) in_huge_pages(weight, true);
    waves_.resize(layers_.size());
    attention_->set_layers(kinds);
  }

  // step: of each sequence how many rows, the position of the first, of how many of the last ones logits are wanted, how
  // many pages in `paged` and how many in `local` (see Sequence); then its tokens, pages and ring. `paged` and `local` are
  // float32 or bfloat16; out [N, V], for the wanted rows in order, is float32. counts [sparse layers, E] int64 grow by the
  // rows each expert was given. Returns of each wanted row the first of its greatest logits, -1 where one is not finite.
  std::vector<int64_t> forward(const std::vector<int64_t>& step, const at::Tensor& paged, const at::Tensor& local,
                               const at::Tensor& out, const at::Tensor& counts) {
    if (cache_) cache_->check_process();
    take_in(step);
    TORCH_CHECK(out.numel() == static_cast<int64_t>(wanted_.size()) * vocabulary_, "logits of another size");
    const int members = at::get_num_threads();
    make_room();
    attention_->plan(paged, local, members);
    int64_t* counted = counts.mutable_data_ptr<int64_t>();
    Team team;
#pragma omp parallel num_threads(members)
    team.join([&](Team::Member& member) { run(member, out.mutable_data_ptr<float>(), counted); });
    team.check();
    std::vector<int64_t> likeliest;
    for (const uint64_t rank : best_) likeliest.push_back(place_of(rank));
    return likeliest;
  }

 private:
  static int64_t record_of(const Layer& layer) { return layer.gate_up.bytes() + layer.down.bytes(); }

  // Where the record of an expert lies; null where it could not be read.
  const char* expert(const Layer& layer, int64_t e) {
    return cache_ ? cache_->wait(layer.sparse_place, e) : layer.experts + e * record_of(layer);
  }

  void take_in(const std::vector<int64_t>& step) {
    tokens_.clear(), wanted_.clear(), attention_->begin();
    for (const int64_t *at = step.data(), *end = at + step.size(); at < end;) {
      const int64_t count = at[0], position = at[1], wanted = at[2], pages = at[3], ring = at[4];
      const int64_t row = static_cast<int64_t>(tokens_.size());
      const int64_t* tokens = at + 5;
      at = tokens + count + pages + ring;
      TORCH_CHECK(at <= end, "a step ends early");
      attention_->add({row, count, position, tokens + count, tokens + count + pages, ring});
      tokens_.insert(tokens_.end(), tokens, tokens + count);
      for (int64_t i = count - wanted; i < count; ++i) wanted_.push_back(row + i);
    }
    rows_ = static_cast<int64_t>(tokens_.size());
    best_.assign(wanted_.size(), 0);
  }

  static int64_t padded(int64_t hidden) { return (hidden + kPanel / 2 - 1) / (kPanel / 2) * (kPanel / 2); }

  void make_room() {
    const int64_t slots = rows_ * (chosen_ + 1), widest = std::max({padded(hidden_), padded(shared_), int64_t{1}});
    x_.resize(rows_ * width_), normed_.resize(rows_ * width_), mixed_.resize(rows_ * width_);
    projected_.resize(rows_ * attention_->projected_width());
    attended_.resize(rows_ * attention_->attended_width());
    active_.resize(std::max(slots * widest, rows_ * padded(dense_)));
    made_.resize(slots * width_);
    scores_.resize(rows_ * whole_panels(experts_));
    picked_.resize(rows_ * chosen_), weight_.resize(rows_ * chosen_);
    order_.resize(slots), begin_.resize(experts_ + 1);
  }

  void run(Team::Member& team, float* out, int64_t* counts) {
    const auto by_rows = [&](const auto& work) {
      team.share((rows_ + kFewRows - 1) / kFewRows, [&](int64_t task) {
        for (int64_t i = task * kFewRows; i < std::min(rows_, (task + 1) * kFewRows); ++i) work(i);
      });
    };
    // Work on every row behind a phase: where rows are few by whoever ends that, else in a phase of its own.
    const bool few = rows_ <= kFewRows;
    const auto followed = [&](const auto& phase, const auto& work) {
      phase([&] {
        for (int64_t i = 0; few && i < rows_; ++i) work(i);
      });
      if (!few) by_rows(work);
    };
    by_rows([&](int64_t i) {
      embed(tokens_[i], &x_[i * width_]);
      attention_->find_turn(i);
      normalise(&x_[i * width_], layers_[0].before_attention, width_, eps_, &normed_[i * width_]);
    });
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Layer& layer = layers_[l];
      product(team, layer.heads, normed_.data(), width_, projected_.data(), attention_->projected_width());
      attention_->attend(team, layer, projected_.data(), attended_.data());
      followed(
          [&](const auto& then) {
            product(team, layer.out, attended_.data(), attention_->attended_width(), mixed_.data(), width_, then);
          },
          [&](int64_t i) {
            add_normalised(&mixed_[i * width_], layer.after_attention, &x_[i * width_]);
            normalise(&x_[i * width_], layer.before_mlp, width_, eps_, &normed_[i * width_]);
          });
      const float* next = l + 1 < layers_.size() ? layers_[l + 1].before_attention : final_norm_;
      followed(
          [&](const auto& then) {
            if (layer.sparse) {
              through_experts(team, layer, counts, then);
              counts += experts_;
            } else {
              gated(team, layer.gate_up, active_.data(), padded(dense_));
              product(team, layer.down, active_.data(), padded(dense_), mixed_.data(), width_, then);
            }
          },
          [&](int64_t i) {
            if (layer.sparse) combine(i);
            add_normalised(&mixed_[i * width_], layer.after_mlp, &x_[i * width_]);
            normalise(&x_[i * width_], next, width_, eps_, &normed_[i * width_]);
          });
    }
    const int64_t count = static_cast<int64_t>(wanted_.size());
    team.share(count ? head_.panels() : 0, [&](int64_t p) {
      const int64_t first = p * kPanel, here = std::min(kPanel, vocabulary_ - first);
      panel_rows(head_, p, count, [&](int64_t i) { return &normed_[wanted_[i] * width_]; },
                 [&](int64_t i, float* y) {
                   std::copy_n(y, here, out + i * vocabulary_ + first);
                   std::fill(y + here, y + kPanel, kLowest);
                   rank(y, first, best_[i]);
                 });
    });
  }

  // Raise `best` to the rank of the greatest of 64 values.
  static void rank(const float* y, int64_t first, uint64_t& best) {
    int32_t greatest = ordered(y[0]), widest = 0;
    for (int64_t i = 0; i < kPanel; ++i) {
      greatest = std::max(greatest, ordered(y[i]));
      widest = std::max(widest, std::bit_cast<int32_t>(y[i]) & 0x7fffffff);
    }
    std::atomic_ref shared(best);
    uint64_t before = shared.load(std::memory_order_relaxed), found = kNoNumber;
    if (widest < std::bit_cast<int32_t>(std::numeric_limits<float>::infinity())) {
      if (rank_of(greatest, first) < before) return;
      int64_t place = 0;
      while (ordered(y[place]) != greatest) ++place;
      found = rank_of(greatest, first + place);
    }
    while (found > before && !shared.compare_exchange_weak(before, found, std::memory_order_relaxed)) {
    }
  }

  void embed(int64_t token, float* to) const {
    if (embedding_.scalar_type() == at::kFloat) {
      const float* from = embedding_.const_data_ptr<float>() + token * width_;
      for (int64_t i = 0; i < width_; ++i) to[i] = from[i] * embed_scale_;
    } else {
      const auto* from = static_cast<const uint16_t*>(embedding_.const_data_ptr()) + token * width_;
      for (int64_t i = 0; i < width_; ++i) to[i] = std::bit_cast<float>(uint32_t{from[i]} << 16) * embed_scale_;
    }
  }

  // x += norm(y).
  void add_normalised(float* y, const float* gain, float* x) const {
    normalise(y, gain, width_, eps_, y);
    for (int64_t i = 0; i < width_; ++i) x[i] += y[i];
  }

  // Panel p of a matrix for all rows, kRowsAtOnce at a time.
  template <class From, class To>
  static void panel_rows(const Matrix& m, int64_t p, int64_t rows, const From& from, const To& to) {
    float y[kRowsAtOnce][kPanel];
    const float* x[kRowsAtOnce];
    for (int64_t i = 0; i < rows; i += kRowsAtOnce) {
      const int64_t here = std::min<int64_t>(kRowsAtOnce, rows - i);
      for (int64_t r = 0; r < here; ++r) x[r] = from(i + r);
      panel_product(m.kind, here)(x, m.depth, m.panel(p), m.scale(p), y);
      for (int64_t r = 0; r < here; ++r) to(i + r, y[r]);
    }
  }

  template <class Then = void (*)()>
  void product(Team::Member& team, const Matrix& m, const float* x, int64_t x_row, float* out, int64_t out_row,
               const Then& then = [] {}) {
    team.share(
        m.panels(),
        [&](int64_t p) {
          panel_rows(m, p, rows_, [&](int64_t i) { return x + i * x_row; },
                     [&](int64_t i, const float* y) {
                       std::copy_n(y, std::min(kPanel, out_row - p * kPanel), out + i * out_row + p * kPanel);
                     });
        },
        then);
  }

  // silu(gate) * up, of a panel that holds 32 of each.
  static void activate(const float* y, float* to) {
    for (int64_t i = 0; i < kPanel / 2; i += kLanes) {
      const Vec gate = vec(y + i);
      vec(to + i) = gate * sigmoid(gate) * vec(y + kPanel / 2 + i);
    }
  }

  void gated(Team::Member& team, const Matrix& m, float* out, int64_t out_row) {
    team.share(m.panels(), [&](int64_t p) {
      panel_rows(m, p, rows_, [&](int64_t i) { return &normed_[i * width_]; },
                 [&](int64_t i, const float* y) { activate(y, out + i * out_row + p * kPanel / 2); });
    });
  }

  template <class Then>
  void through_experts(Team::Member& team, const Layer& layer, int64_t* counts, const Then& then) {
    int64_t& waves = waves_[&layer - layers_.data()];  // a thread that comes late still finds the number of this layer
    product(team, layer.router, normed_.data(), width_, scores_.data(), whole_panels(experts_), [&] {
      route(layer, counts);
      waves = cache_ ? cache_->begin(layer.sparse_place, used_, begin_, rows_) : 1;
    });
    for (int64_t wave = 0; wave < waves; ++wave) {
      if (wave) team.share(1, [&](int64_t) { cache_->turn(wave); });
      through_wave(team, layer, wave, [&] {
        if (wave + 1 == waves) then();
      });
    }
  }

  // The experts of one wave, and in the first one the shared expert.
  template <class Then>
  void through_wave(Team::Member& team, const Layer& layer, int64_t wave, const Then& then) {
    const int64_t wide = std::max(padded(hidden_), padded(shared_)), slots = rows_ * chosen_;
    const auto first = [&] { return cache_ ? wave * cache_->wave_size() : 0; };
    const auto used = [&] {
      const int64_t rest = static_cast<int64_t>(used_.size()) - first();
      return cache_ ? std::clamp<int64_t>(rest, 0, cache_->wave_size()) : rest;
    };
    const bool shared = shared_ && wave == 0;
    const int64_t panels = layer.gate_up.panels(), shared_panels = shared ? layer.shared_gate_up.panels() : 0;
    team.share_some([&] { return used() * panels + shared_panels; }, [&](int64_t task) {
      if (task < shared_panels) {
        panel_rows(layer.shared_gate_up, task, rows_, [&](int64_t i) { return &normed_[i * width_]; },
                   [&](int64_t i, const float* y) { activate(y, &active_[(slots + i) * wide + task * kPanel / 2]); });
        return;
      }
      const int64_t e = used_[first() + (task - shared_panels) / panels], p = (task - shared_panels) % panels, begin = begin_[e];
      const char* record = expert(layer, e);
      if (!record) return;
      panel_rows(layer.gate_up.at(record), p, begin_[e + 1] - begin,
                 [&](int64_t i) { return &normed_[order_[begin + i] / chosen_ * width_]; },
                 [&](int64_t i, const float* y) { activate(y, &active_[(begin + i) * wide + p * kPanel / 2]); });
    }, [] {});
    const int64_t downs = layer.down.panels();
    team.share_some([&] { return (used() + shared) * downs; }, [&](int64_t task) {
      const int64_t p = task % downs, columns = std::min(kPanel, width_ - p * kPanel), which = task / downs - shared;
      if (which < 0) {
        panel_rows(layer.shared_down, p, rows_, [&](int64_t i) { return &active_[(slots + i) * wide]; },
                   [&](int64_t i, const float* y) { std::copy_n(y, columns, &made_[(slots + i) * width_ + p * kPanel]); });
        return;
      }
      const int64_t e = used_[first() + which], begin = begin_[e];
      const char* record = expert(layer, e);
      if (!record) return;
      panel_rows(layer.down.at(record + layer.gate_up.bytes()), p, begin_[e + 1] - begin,
                 [&](int64_t i) { return &active_[(begin + i) * wide]; },
                 [&](int64_t i, const float* y) { std::copy_n(y, columns, &made_[order_[begin + i] * width_ + p * kPanel]); });
    }, then);
  }

  // The chosen experts of every row, their weights, and the slots of each expert (slot = row K + choice).
  void route(const Layer& layer, int64_t* counts) {
    std::fill(begin_.begin(), begin_.end(), 0);
    for (int64_t i = 0; i < rows_; ++i) {
      float* score = &scores_[i * whole_panels(experts_)];
      for (int64_t e = 0; e < whole_panels(experts_); e += kLanes) vec(score + e) = sigmoid(vec(score + e));
      float total = 0.0f;
      for (int64_t k = 0; k < chosen_; ++k) {
        int64_t best = -1;
        float highest = -std::numeric_limits<float>::infinity();
        for (int64_t e = 0; e < experts_; ++e) {
          const float value = score[e] + layer.bias[e];
          if (value > highest && !taken(i, k, e)) highest = value, best = e;
        }
        if (best < 0) best = k;  // nothing is greater than nothing: scores that are no numbers
        picked_[i * chosen_ + k] = best;
        weight_[i * chosen_ + k] = score[best];
        total += score[best];
        ++begin_[best + 1];
      }
      for (int64_t k = 0; k < chosen_; ++k) {
        weight_[i * chosen_ + k] = weight_[i * chosen_ + k] / (total + 1e-20f) * route_scale_;
      }
    }
    used_.clear();
    for (int64_t e = 0; e < experts_; ++e) {
      if (begin_[e + 1]) used_.push_back(e);
      counts[e] += begin_[e + 1];
      begin_[e + 1] += begin_[e];
    }
    std::vector<int64_t> next(begin_.begin(), begin_.end());
    for (int64_t slot = 0; slot < rows_ * chosen_; ++slot) order_[next[picked_[slot]]++] = slot;
  }

  bool taken(int64_t row, int64_t before, int64_t expert) const {
    for (int64_t k = 0; k < before; ++k) {
      if (picked_[row * chosen_ + k] == expert) return true;
    }
    return false;
  }

  // What a row's experts made, weighed and summed with the shared one's.
  void combine(int64_t row) {
    float* to = &mixed_[row * width_];
    if (shared_) {
      std::copy_n(&made_[(rows_ * chosen_ + row) * width_], width_, to);
    } else {
      std::fill_n(to, width_, 0.0f);
    }
    for (int64_t k = 0; k < chosen_; ++k) {
      const float *from = &made_[(row * chosen_ + k) * width_], weight = weight_[row * chosen_ + k];
      for (int64_t i = 0; i < width_; ++i) to[i] += weight * from[i];
    }
  }

  std::vector<at::Tensor> weights_;
  c10::intrusive_ptr<ExpertCache> cache_;  // null where all experts are in memory
  at::Tensor embedding_;
  const float* final_norm_ = nullptr;
  Matrix head_;
  std::vector<Layer> layers_;
  std::optional<PagedAttention> attention_;  // there from the constructor on
  int64_t vocabulary_, width_, experts_, chosen_, dense_, hidden_, shared_;
  float eps_, route_scale_, embed_scale_;

  // Of one step.
  int64_t rows_ = 0;
  std::vector<uint64_t> best_;  // of each wanted row, the rank of its greatest logit
  std::vector<int64_t> tokens_, wanted_, picked_, order_, begin_, used_, waves_;
  std::vector<float> x_, normed_, mixed_, projected_, attended_, active_, made_, scores_, weight_;
};

}  // namespace trinity

TORCH_LIBRARY_FRAGMENT(trinity, library) {
  library.class_<trinity::ExpertCache>("ExpertCache")
      .def(torch::init<std::string, std::vector<int64_t>, int64_t, int64_t, int64_t, at::Tensor>())
      .def("counts", &trinity::ExpertCache::counts)
      .def("failure", &trinity::ExpertCache::failure);
  library.class_<trinity::Decoder>("Decoder")
      .def(torch::init<std::vector<int64_t>, std::vector<double>, std::vector<at::Tensor>,
                       std::optional<c10::intrusive_ptr<trinity::ExpertCache>>>())
      .def("forward", &trinity::Decoder::forward);
}
