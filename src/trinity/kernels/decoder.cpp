// A whole forward pass of the model over a few rows, as the engine has them: tokens of several sequences, each with its
// past in pages. One call, one team of threads, no tensor made on the way. Float32 but for the weights (panels.h).
//
// A row's result depends on its own sequence alone, to the bit: products sum along the depth in order (panels.h), and
// attention goes through keys in pages (pages.h) and in stretches of kStretch pages whose bounds lie at fixed positions,
// whatever other rows are there and however a prompt was cut into chunks. The twin is model/transformer.py.
//
// Shapes: M rows, D width, H query and J key heads of size C, E experts, K chosen, F hidden width of an expert.
// A page holds kPage tokens of one layer and one key head: keys [C, kPage], then values [kPage, C]; or whole numbers.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "digit_attention.h"
#include "expert_cache.h"
#include "pages.h"
#include "panels.h"
#include "team.h"
#include "turns.h"

namespace trinity {

namespace {

constexpr int64_t kStretch = 16;   // pages whose softmax is made in one go
constexpr int64_t kQueries = 192;  // that go through pages together where a prompt is read: a page is fetched for all
constexpr int64_t kMoreQueries = 768;  // the same where whole numbers are multiplied, and fetching is the more of it
constexpr int64_t kTilesToFetch = 4;  // of queries that go through a page long enough to fetch the next one meanwhile
constexpr int64_t kFewRows = 8;    // that one thread normalises sooner than several, and that share no page's fetch

struct Layer {
  bool global = false, sparse = false;
  int64_t place = 0;         // among the layers of its kind of pool
  int64_t sparse_place = 0;  // among the sparse layers
  const float *before_attention, *query, *key, *after_attention, *before_mlp, *after_mlp;
  Matrix heads, out;             // q, k, v and gate; o
  Matrix gate_up, down;          // dense, or what those of an expert look like
  const char* experts = nullptr;  // a record of both for each, end to end; null where a cache holds them
  Matrix router, shared_gate_up, shared_down;
  const float* bias = nullptr;
};

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

inline float logistic(float x) { return sigmoid(splat(x))[0]; }

// Pages of 2 MB for what is walked through: a fetch ahead that meets an unknown page waits for it. Only a wish.
inline void in_huge_pages(const at::Tensor& tensor, bool filled) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1: now, where the tensor is filled already
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = (begin + tensor.nbytes()) / kHuge * kHuge;
  if (first >= last) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  if (filled) madvise(reinterpret_cast<void*>(first), last - first, kCollapse);
#endif
}

// Keys and values of one kind of layer: pages, and how many layers a page is of.
struct Pool {
  char* at = nullptr;
  bool narrow = false;  // bfloat16
  int64_t layers = 0;
};

// The rows of one sequence in this step: `count` from `row` on, at positions from `position` on; the page of each of its
// stretches of kPage tokens for global layers, and the same for local ones, round and round.
struct Stretch {
  int64_t row, count, position, sequence;
  const int64_t *pages, *ring;
  int64_t ring_pages;
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

struct Task {
  int64_t row, count, position, sequence, head;  // rows of one sequence, one key head
  int64_t first, last;                           // stretches of pages
  int64_t partial;                               // where its parts of softmaxes go; -1: it has all of them
};

struct Merge {
  int64_t row, count, head, partial, parts;
};

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
    heads_ = take(), key_heads_ = take(), size_ = take(), experts_ = take(), chosen_ = take(), window_ = take();
    dense_ = take(), hidden_ = take(), shared_ = take();
    digits_ = by_digits(size_);
    eps_ = static_cast<float>(constants.at(0)), route_scale_ = static_cast<float>(constants.at(1));
    embed_scale_ = static_cast<float>(constants.at(2));
    for (int64_t i = 0; i < size_ / 2; ++i) frequencies_.push_back(static_cast<float>(constants.at(3 + i)));
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
    const int64_t query_width = heads_ * size_, key_width = key_heads_ * size_;
    int64_t kinds[2] = {0, 0}, sparse = 0;
    for (int64_t l = 0; l < layers; ++l) {
      Layer layer;
      layer.global = shape.at(given + l), layer.sparse = shape.at(given + layers + l);
      layer.place = kinds[layer.global]++;
      layer.before_attention = vector(), layer.query = vector(), layer.key = vector();
      layer.after_attention = vector(), layer.before_mlp = vector(), layer.after_mlp = vector();
      layer.heads = matrix(2 * query_width + 2 * key_width, width_, kind);
      layer.out = matrix(width_, query_width, kind);
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
    for (const int global : {0, 1}) pools_[global].layers = kinds[global];
  }

  // step: of each sequence how many rows, the position of the first, of how many of the last ones logits are wanted, how
  // many pages in `paged` and how many in `local` (see Stretch); then its tokens, pages and ring. `paged` and `local` are
  // float32 or bfloat16; out [N, V], for the wanted rows in order, is float32. counts [sparse layers, E] int64 grow by the
  // rows each expert was given. Returns of each wanted row the first of its greatest logits, -1 where one is not finite.
  std::vector<int64_t> forward(const std::vector<int64_t>& step, const at::Tensor& paged, const at::Tensor& local,
                               const at::Tensor& out, const at::Tensor& counts) {
    if (cache_) cache_->check_process();
    take_in(step);
    TORCH_CHECK(out.numel() == static_cast<int64_t>(wanted_.size()) * vocabulary_, "logits of another size");
    take_pool(pools_[1], paged), take_pool(pools_[0], local);
    whole_ = digits_ && !pools_[0].narrow && !pools_[1].narrow;
    logarithm_ = whole_ ? 0.693147181f : 1.0f;
    const int members = at::get_num_threads();
    make_room();
    for (const int global : {0, 1}) plan_attention(global, members);
    int64_t* counted = counts.mutable_data_ptr<int64_t>();
    Team team;
#pragma omp parallel num_threads(members)
    {
      Team::Member member(team);
      run(member, out.mutable_data_ptr<float>(), counted);
    }
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
    tokens_.clear(), positions_.clear(), sequence_.clear(), stretches_.clear(), wanted_.clear();
    for (const int64_t *at = step.data(), *end = at + step.size(); at < end;) {
      const int64_t count = at[0], position = at[1], wanted = at[2], pages = at[3], ring = at[4];
      const int64_t row = static_cast<int64_t>(tokens_.size()), sequence = static_cast<int64_t>(stretches_.size());
      const int64_t* tokens = at + 5;
      at = tokens + count + pages + ring;
      TORCH_CHECK(at <= end, "a step ends early");
      stretches_.push_back({row, count, position, sequence, tokens + count, tokens + count + pages, ring});
      tokens_.insert(tokens_.end(), tokens, tokens + count);
      for (int64_t i = 0; i < count; ++i) positions_.push_back(position + i), sequence_.push_back(sequence);
      for (int64_t i = count - wanted; i < count; ++i) wanted_.push_back(row + i);
    }
    rows_ = static_cast<int64_t>(tokens_.size());
    best_.assign(wanted_.size(), 0);
  }

  static int64_t padded(int64_t hidden) { return (hidden + kPanel / 2 - 1) / (kPanel / 2) * (kPanel / 2); }

  static void take_pool(Pool& pool, const at::Tensor& values) {
    TORCH_CHECK(values.scalar_type() == at::kFloat || values.scalar_type() == at::kBFloat16, "pages of another kind");
    auto* at = static_cast<char*>(values.mutable_data_ptr());
    if (at != pool.at) in_huge_pages(values, false);
    pool.at = at, pool.narrow = values.scalar_type() == at::kBFloat16;
  }

  void make_room() {
    const int64_t slots = rows_ * (chosen_ + 1), widest = std::max({padded(hidden_), padded(shared_), int64_t{1}});
    x_.resize(rows_ * width_), normed_.resize(rows_ * width_), mixed_.resize(rows_ * width_);
    turns_.resize(rows_ * size_);
    projected_.resize(rows_ * projected_width());
    attended_.resize(rows_ * heads_ * size_);
    active_.resize(std::max(slots * widest, rows_ * padded(dense_)));
    made_.resize(slots * width_);
    scores_.resize(rows_ * whole_panels(experts_));
    picked_.resize(rows_ * chosen_), weight_.resize(rows_ * chosen_);
    order_.resize(slots), begin_.resize(experts_ + 1);
  }
  static int64_t whole_panels(int64_t outputs) { return (outputs + kPanel - 1) / kPanel * kPanel; }

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
      find_turn(i);
      normalise(&x_[i * width_], layers_[0].before_attention, width_, eps_, &normed_[i * width_]);
    });
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Layer& layer = layers_[l];
      product(team, layer.heads, normed_.data(), width_, projected_.data(), projected_width());
      attend(team, layer);
      followed(
          [&](const auto& then) {
            product(team, layer.out, attended_.data(), heads_ * size_, mixed_.data(), width_, then);
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

  int64_t projected_width() const { return whole_panels(2 * (heads_ + key_heads_) * size_); }

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

  // A page's keys, with its values behind them: float or, in a narrow pool, uint16_t.
  template <class Value>
  Value* page(const Layer& layer, int64_t sequence, int64_t block, int64_t head) const {
    const Pool& pool = pools_[layer.global];
    const Stretch& s = stretches_[sequence];
    const int64_t number = layer.global ? s.pages[block] : s.ring[block % s.ring_pages];
    return reinterpret_cast<Value*>(pool.at) + ((number * pool.layers + layer.place) * key_heads_ + head) * page_size();
  }
  int64_t page_size() const { return 2 * kPage * size_; }

  // A row's key and value of one head, normalised and turned, put into their page.
  void place(const Layer& layer, int64_t row, int64_t head) {
    float* k = &projected_[row * projected_width() + (heads_ + head) * size_];
    const float* v = k + key_heads_ * size_;
    normalise(k, layer.key, size_, eps_, k);
    if (!layer.global) turn(k, row);
    const int64_t slot = positions_[row] % kPage, block = positions_[row] / kPage;
    const auto put = [&](auto* keys, const auto& rounded) {
      auto* values = keys + (kPage + slot) * size_;
      for (int64_t c = 0; c < size_; ++c) keys[c * kPage + slot] = rounded(k[c]), values[c] = rounded(v[c]);
    };
    if (pools_[layer.global].narrow) {
      put(page<uint16_t>(layer, sequence_[row], block, head), narrowed);
#ifdef TRINITY_DIGITS
    } else if (whole_) {
      put_token(k, v, size_, slot, reinterpret_cast<char*>(page<float>(layer, sequence_[row], block, head)));
#endif
    } else {
      put(page<float>(layer, sequence_[row], block, head), [](float x) { return x; });
    }
  }

  // Cosines, then sines, of what a row's heads are turned by, in all layers.
  void find_turn(int64_t row) {
    float* turn = &turns_[row * size_];
    for (int64_t i = 0; i < size_ / 2; ++i) {
      const float angle = static_cast<float>(positions_[row]) * frequencies_[i];
      turn[i] = std::cos(angle), turn[size_ / 2 + i] = std::sin(angle);
    }
  }

  void turn(float* x, int64_t row) const {
    const int64_t half = size_ / 2;
    const float *cosine = &turns_[row * size_], *sine = cosine + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cosine[i] - b * sine[i];
      x[i + half] = b * cosine[i] + a * sine[i];
    }
  }

  // Which rows attend together, and in how many parts where they alone would leave threads without work. No bit depends
  // on either: softmaxes are made by query and stretch, and joined in order.
  void plan_attention(int global, int members) {
    auto &tasks = tasks_[global];
    auto &merges = merges_[global];
    tasks.clear(), merges.clear();
    const int64_t group = heads_ / key_heads_, enough = 4 * members;
    int64_t together = std::max(kFewRows, (whole_ ? kMoreQueries : kQueries) / group), partials = 0;
    while (together > kFewRows && tiles(together) < enough) together = std::max(kFewRows, together / 2);
    const bool split = tiles(together) < enough / 2;
    for (const Stretch& s : stretches_) {
      for (int64_t i = 0; i < s.count; i += together) {
        const int64_t count = std::min(together, s.count - i), position = s.position + i;
        const int64_t first = oldest(global, position) / (kPage * kStretch);
        const int64_t last = (position + count - 1) / (kPage * kStretch) + 1;
        for (int64_t head = 0; head < key_heads_; ++head) {
          if (!split || last - first < 2) {
            tasks.push_back({s.row + i, count, position, s.sequence, head, first, last, -1});
            continue;
          }
          merges.push_back({s.row + i, count, head, partials, last - first});
          for (int64_t part = first; part < last; ++part, partials += count * group) {
            tasks.push_back({s.row + i, count, position, s.sequence, head, part, part + 1, partials});
          }
        }
      }
    }
    partial_.resize(std::max<size_t>(partial_.size(), partials * (size_ + 2)));
  }

  int64_t tiles(int64_t together) const {
    int64_t count = 0;
    for (const Stretch& s : stretches_) count += (s.count + together - 1) / together * key_heads_;
    return count;
  }

  // The first position that the query at `position` sees.
  int64_t oldest(bool global, int64_t position) const {
    return global ? 0 : std::max<int64_t>(0, position - window_ + 1);
  }

  void attend(Team::Member& team, const Layer& layer) {
    const auto &tasks = tasks_[layer.global];
    const auto &merges = merges_[layer.global];
    if (!alone()) {  // rows of one sequence see each other
      team.share(rows_ * key_heads_, [&](int64_t task) { place(layer, task / key_heads_, task % key_heads_); });
    }
    team.share(tasks.size(), [&](int64_t t) { attend_tile(layer, tasks[t]); });
    if (merges.empty()) return;
    team.share(merges.size(), [&](int64_t t) {
      const Merge& merge = merges[t];
      const int64_t queries = merge.count * (heads_ / key_heads_), room = queries * (size_ + 2);
      Scratch scratch{room};
      float *highest = scratch.take(room), *sum = highest + queries, *answer = sum + queries;
      std::fill_n(highest, queries, kLowest), std::fill_n(sum, queries * (size_ + 1), 0.0f);
      for (int64_t part = 0; part < merge.parts; ++part) {
        const float* other = &partial_[merge.partial * (size_ + 2) + part * room];
        join(queries, highest, sum, answer, other, other + queries, other + 2 * queries);
      }
      finish(merge.row, merge.count, merge.head, sum, answer);
    });
  }

  // Whether every sequence has one row.
  bool alone() const { return static_cast<int64_t>(stretches_.size()) == rows_; }

  // Softmaxes over two stretches of keys become one over both.
  void join(int64_t queries, float* highest, float* sum, float* answer, const float* other_highest,
            const float* other_sum, const float* other) const {
    for (int64_t i = 0; i < queries; i += kLanes) {
      const int64_t some = std::min<int64_t>(kLanes, queries - i);
      Vec mine{}, its{};  // the highest scores, then what they leave of either
      std::copy_n(highest + i, some, reinterpret_cast<float*>(&mine));
      std::copy_n(other_highest + i, some, reinterpret_cast<float*>(&its));
      const Vec top = mine > its ? mine : its;
      mine = exponential((mine - top) * logarithm_), its = exponential((its - top) * logarithm_);
      for (int64_t r = 0; r < some; ++r) {
        const int64_t query = i + r;
        highest[query] = top[r];
        sum[query] = sum[query] * mine[r] + other_sum[query] * its[r];
        for (int64_t c = 0; c < size_; ++c) {
          answer[query * size_ + c] = answer[query * size_ + c] * mine[r] + other[query * size_ + c] * its[r];
        }
      }
    }
  }

  void finish(int64_t row, int64_t count, int64_t head, const float* sum, const float* answer) {
    const int64_t group = heads_ / key_heads_;
    for (int64_t i = 0; i < count * group; ++i) {
      const int64_t h = head * group + i % group, r = row + i / group;
      const float* gate = &projected_[r * projected_width() + (heads_ + 2 * key_heads_ + h) * size_];
      float* to = &attended_[(r * heads_ + h) * size_];
      int64_t c = 0;
      for (; c + kLanes <= size_; c += kLanes) vec(to + c) = vec(answer + i * size_ + c) / sum[i] * sigmoid(vec(gate + c));
      for (; c < size_; ++c) to[c] = answer[i * size_ + c] / sum[i] * logistic(gate[c]);
    }
  }

  void attend_tile(const Layer& layer, const Task& task) {
    const int64_t group = heads_ / key_heads_, queries = task.count * group, room = queries * (size_ + 2);
    const float scale = 1.0f / std::sqrt(static_cast<float>(size_));
    Scratch scratch{queries * size_, room, room, queries * kLanes, room_of(layer, queries)};
    float* q = scratch.take(queries * size_);
    float *highest = scratch.take(room), *sum = highest + queries, *answer = sum + queries;
    float *top = scratch.take(room), *part = top + queries, *read = part + queries;
    float *sums = scratch.take(queries * kLanes), *more = scratch.take(room_of(layer, queries));
    for (int64_t i = 0; i < queries; ++i) {
      const float* from = &projected_[(task.row + i / group) * projected_width() + (task.head * group + i % group) * size_];
      normalise(from, layer.query, size_, eps_, q + i * size_);
      if (!layer.global) turn(q + i * size_, task.row + i / group);
      for (int64_t c = 0; c < size_; ++c) q[i * size_ + c] *= scale;
    }
    if (alone() && task.position < task.last * kPage * kStretch) place(layer, task.row, task.head);  // the part that sees it
    std::fill_n(highest, queries, kLowest), std::fill_n(sum, queries * (size_ + 1), 0.0f);
    const int64_t begin = oldest(layer.global, task.position) / kPage, end = (task.position + task.count - 1) / kPage + 1;
    const auto by_stretches = [&](const auto& go) {
      for (int64_t stretch = task.first; stretch < task.last; ++stretch) {
        std::fill_n(top, queries, kLowest), std::fill_n(read, queries * size_, 0.0f);
        std::fill_n(sums, queries * kLanes, 0.0f);
        go(std::max(begin, stretch * kStretch), std::min(end, (stretch + 1) * kStretch));
        for (int64_t i = 0; i < queries; ++i) part[i] = sum_of(vec(sums + i * kLanes));
        join(queries, highest, sum, answer, top, part, read);
      }
    };
#ifdef TRINITY_DIGITS
    if (whole_) {
      const AmxTiles tiles(static_cast<uint8_t>(std::min<int64_t>(16, queries)));
      float *left = more, *units = left + query_floats(queries, size_);
      put_queries(q, queries, size_, left, units);
      by_stretches([&](int64_t low, int64_t high) {
        through_digits(layer, task, low, high, left, units, top, sums, read, units + whole_line(queries));
      });
    } else
#endif
      by_stretches([&](int64_t low, int64_t high) { through_pages(layer, task, low, high, q, top, sums, read, more); });
    if (task.partial < 0) {
      finish(task.row, task.count, task.head, sum, answer);
    } else {
      std::copy_n(highest, room, &partial_[task.partial * (size_ + 2)]);
    }
  }

  static constexpr int64_t whole_line(int64_t floats) { return (floats + 15) / 16 * 16; }

  // Floats that a task needs to go through pages.
  int64_t room_of(const Layer& layer, int64_t queries) const {
#ifdef TRINITY_DIGITS
    if (whole_) return query_floats(queries, size_) + whole_line(queries) + DigitAttention::kRoom + kLanes;
#endif
    return kTogether * kPage + (pools_[layer.global].narrow ? page_size() : 0);
  }

  // The queries of a task go through pages `low` to `high` of one stretch.
  void through_pages(const Layer& layer, const Task& task, int64_t low, int64_t high, const float* q, float* top,
                     float* sums, float* read, float* room) {
    const int64_t group = heads_ / key_heads_, queries = task.count * group;
    float *scores = room, *wide = room + kTogether * kPage;
    for (int64_t block = low; block < high; ++block) {
      const float* keys = wide;
      if (pools_[layer.global].narrow) {
        widen(page<uint16_t>(layer, task.sequence, block, task.head), page_size(), wide);
      } else {
        keys = page<float>(layer, task.sequence, block, task.head);
      }
      for (int64_t i = 0; i < queries; i += kTogether) {
        const int64_t here = std::min(kTogether, queries - i);
        const int64_t position = task.position + i / group, newest = task.position + (i + here - 1) / group;
        if (newest < block * kPage || oldest(layer.global, position) >= (block + 1) * kPage) continue;
        multiply_here(here, kPage, size_, {q + i * size_, size_, 1}, keys, kPage, scores, kPage, false);
        for (int64_t r = i; r < i + here; ++r) {
          const int64_t its = task.position + r / group;
          const Seen seen(its, oldest(layer.global, its), block * kPage);
          soften(scores + (r - i) * kPage, seen, top[r], sums + r * kLanes, read + r * size_, size_);
        }
        const int64_t written = std::min(kPage, newest - block * kPage + 1);
        multiply_rows(here, size_, written, {scores, kPage, 1}, keys + kPage * size_, read + i * size_, true);
      }
    }
  }

#ifdef TRINITY_DIGITS
  // The same in whole numbers: the queries' digits and units, kPagesAtOnce pages at once from multiples of it on.
  void through_digits(const Layer& layer, const Task& task, int64_t low, int64_t high, const float* left,
                      const float* units, float* top, float* sums, float* read, float* room) {
    const int64_t group = heads_ / key_heads_, queries = task.count * group;
    const int64_t tiles = (queries + kTileQueries - 1) / kTileQueries;
    const auto its_page = [&](int64_t block) {
      return reinterpret_cast<const char*>(page<float>(layer, task.sequence, block, task.head));
    };
    DigitAttention attention(size_, room + -reinterpret_cast<uintptr_t>(room) % 64 / sizeof(float));
    for (int64_t next = low; next < high;) {
      const int64_t first = next;
      next = std::min(high, (first / kPagesAtOnce + 1) * kPagesAtOnce);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        if (tiles >= kTilesToFetch) {
          for (int64_t block = next; block < std::min(high, next + kPagesAtOnce); ++block) fetch_part(its_page(block), tile, tiles);
        }
        const int64_t i = tile * kTileQueries, here = std::min(kTileQueries, queries - i);
        const int64_t position = task.position + i / group, newest = task.position + (i + here - 1) / group;
        const int64_t from = std::max(first, oldest(layer.global, position) / kPage), to = std::min(next, newest / kPage + 1);
        if (from >= to) continue;
        Passage passage{.page = {}, .pages = to - from, .queries = here,
                        .digits = reinterpret_cast<const char*>(left + query_floats(i, size_)), .units = units + i,
                        .top = top + i, .sums = sums + i * kLanes, .read = read + i * size_, .seen = {}};
        for (int64_t block = from; block < to; ++block) passage.page[block - from] = its_page(block);
        for (int64_t r = 0; r < here; ++r) {
          const int64_t its = task.position + (i + r) / group;
          passage.seen[r] = Seen(its, oldest(layer.global, its), from * kPage, to - from);
        }
        attention.attend(passage);
      }
    }
    attention.finish();
  }

  // Of the pages that come next each tile of queries has a part fetched from memory, for all of them.
  void fetch_part(const char* page, int64_t part, int64_t parts) const {
    const int64_t lines = (2 * key_bytes(size_) + 2 * kPage * sizeof(float)) / kLine;
    for (int64_t i = part * lines / parts; i < (part + 1) * lines / parts; ++i) __builtin_prefetch(page + i * kLine, 0, 2);
  }
#endif

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
  bool digits_ = false;  // pages of float32 hold whole numbers, and attention multiplies these on AMX (digits.h)
  c10::intrusive_ptr<ExpertCache> cache_;  // null where all experts are in memory
  at::Tensor embedding_;
  const float* final_norm_ = nullptr;
  Matrix head_;
  std::vector<Layer> layers_;
  std::vector<float> frequencies_;
  int64_t vocabulary_, width_, heads_, key_heads_, size_, experts_, chosen_, window_, dense_, hidden_, shared_;
  float eps_, route_scale_, embed_scale_;

  // Of one step.
  int64_t rows_ = 0;
  bool whole_ = false;  // in whole numbers: in bfloat16 a page would be split for every token that is written
  float logarithm_ = 1.0f;  // of what scores are powers of
  Pool pools_[2];
  std::vector<Stretch> stretches_;
  std::vector<Task> tasks_[2];
  std::vector<Merge> merges_[2];
  std::vector<uint64_t> best_;  // of each wanted row, the rank of its greatest logit
  std::vector<int64_t> tokens_, positions_, sequence_, wanted_, picked_, order_, begin_, used_, waves_;
  std::vector<float> x_, turns_, normed_, mixed_, projected_, attended_, active_, made_, scores_, weight_, partial_;
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
