#pragma once

// Attention of one step over pages of keys and values: rows of many sequences, each of which sees what its own pages hold.
// Global layers see all of it, local ones a window. Softmaxes are made by query and by stretch of pages at fixed places and
// joined in order: no bit of a row depends on its company, on how its text was cut, or on the threads.

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <vector>

#include "digit_attention.h"
#include "narrow_attention.h"
#include "pages.h"
#include "team.h"
#include "turns.h"

namespace trinity {

constexpr int64_t kStretch = 16;      // pages whose softmax is made in one go
constexpr int64_t kQueries = 192;     // that go through pages together where a prompt is read: a page is fetched for all
constexpr int64_t kMoreQueries = 768;  // the same on AMX, where fetching is the more of it
constexpr int64_t kTilesToFetch = 4;  // of queries that go through a page long enough to fetch the next one meanwhile
constexpr int64_t kApart = 8;         // rows of a sequence that share no page's fetch

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
  size_t bytes = 0;
  bool narrow = false;  // bfloat16
  int64_t layers = 0;
};

// The rows of one sequence in this step: `count` from `row` on, at positions from `position` on; the page of each kPage
// tokens of it for global layers, and the same for local ones, round and round.
struct Sequence {
  int64_t row, count, position;
  const int64_t *pages, *ring;
  int64_t ring_pages;
};

struct Task {
  int64_t row, count, position, sequence, head;  // rows of one sequence, one key head
  int64_t first, last;                           // stretches of pages
  int64_t partial;                               // where its parts of softmaxes go; -1: it has all of them
};

struct Merge {
  int64_t row, count, head, partial, parts;
};

// Of a step's pages: as the vector unit reads them; whole numbers or bfloat16 in tiles of the matrix unit.
enum class Form { vectors, digits, narrow };

// What attention knows of a layer.
struct AttentionLayer {
  bool global = false;
  int64_t place = 0;          // among the layers of its kind of pool
  const float *query, *key;   // gains of the norms of heads
};

class PagedAttention {
 public:
  PagedAttention(int64_t heads, int64_t key_heads, int64_t size, int64_t window, float eps, std::vector<float> frequencies)
      : heads_(heads), key_heads_(key_heads), size_(size), window_(window), eps_(eps), frequencies_(std::move(frequencies)),
        digits_(by_digits(size)), tiles_(by_tiles(size)) {}

  // Of a row's projections, from the front: queries, keys, values, gates.
  int64_t outputs() const { return 2 * (heads_ + key_heads_) * size_; }
  int64_t projected_width() const { return whole_panels(outputs()); }
  int64_t attended_width() const { return heads_ * size_; }

  // How many layers the pages of local and of global layers are of.
  void set_layers(const int64_t (&kinds)[2]) {
    for (const int global : {0, 1}) pools_[global].layers = kinds[global];
  }

  void begin() { positions_.clear(), of_row_.clear(), sequences_.clear(); }

  // The next rows are of one sequence.
  void add(const Sequence& sequence) {
    for (int64_t i = 0; i < sequence.count; ++i) {
      positions_.push_back(sequence.position + i), of_row_.push_back(static_cast<int64_t>(sequences_.size()));
    }
    sequences_.push_back(sequence);
  }

  // All rows are there.
  void plan(const at::Tensor& paged, const at::Tensor& local, int members) {
    take_pool(pools_[1], paged), take_pool(pools_[0], local);
    const bool narrow = pools_[0].narrow;
    TORCH_CHECK(narrow == pools_[1].narrow, "pages of two kinds");
    form_ = narrow ? (tiles_ ? Form::narrow : Form::vectors) : digits_ ? Form::digits : Form::vectors;
    logarithm_ = form_ == Form::vectors ? 1.0f : 0.693147181f;
    turns_.resize(positions_.size() * size_);
    for (const int global : {0, 1}) plan_tasks(global, members);
  }

  // Cosines, then sines, of what a row's heads are turned by, in all layers.
  void find_turn(int64_t row) {
    float* turn = &turns_[row * size_];
    for (int64_t i = 0; i < size_ / 2; ++i) {
      const float angle = static_cast<float>(positions_[row]) * frequencies_[i];
      turn[i] = std::cos(angle), turn[size_ / 2 + i] = std::sin(angle);
    }
  }

  // projected [rows, projected_width] -> attended [rows, attended_width]; keys and values go into their pages.
  void attend(Team::Member& team, const AttentionLayer& layer, float* projected, float* attended) {
    const auto &tasks = tasks_[layer.global];
    const auto &merges = merges_[layer.global];
    if (!alone()) {  // rows of one sequence see each other
      team.share(static_cast<int64_t>(positions_.size()) * key_heads_,
                 [&](int64_t task) { place(layer, projected, task / key_heads_, task % key_heads_); });
    }
    team.share(tasks.size(), [&](int64_t t) { attend_tile(layer, tasks[t], projected, attended); });
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
      finish(merge.row, merge.count, merge.head, sum, answer, projected, attended);
    });
  }

 private:
  static void take_pool(Pool& pool, const at::Tensor& values) {
    TORCH_CHECK(values.scalar_type() == at::kFloat || values.scalar_type() == at::kBFloat16, "pages of another kind");
    auto* at = static_cast<char*>(values.mutable_data_ptr());
    if (at != pool.at || values.nbytes() != pool.bytes) in_huge_pages(values, false);
    pool.at = at, pool.bytes = values.nbytes(), pool.narrow = values.scalar_type() == at::kBFloat16;
  }

  // A page's keys, with its values behind them: float or, in a narrow pool, uint16_t.
  template <class Value>
  Value* page(const AttentionLayer& layer, int64_t sequence, int64_t block, int64_t head) const {
    const Pool& pool = pools_[layer.global];
    const Sequence& s = sequences_[sequence];
    const int64_t number = layer.global ? s.pages[block] : s.ring[block % s.ring_pages];
    return reinterpret_cast<Value*>(pool.at) + ((number * pool.layers + layer.place) * key_heads_ + head) * page_size();
  }
  int64_t page_size() const { return 2 * kPage * size_; }

  // The same as bytes.
  char* its_page(const AttentionLayer& layer, int64_t sequence, int64_t block, int64_t head) const {
    return pools_[layer.global].narrow ? reinterpret_cast<char*>(page<uint16_t>(layer, sequence, block, head))
                                       : reinterpret_cast<char*>(page<float>(layer, sequence, block, head));
  }

  // A row's key and value of one head, normalised and turned, put into their page.
  void place(const AttentionLayer& layer, float* projected, int64_t row, int64_t head) {
    float* k = &projected[row * projected_width() + (heads_ + head) * size_];
    const float* v = k + key_heads_ * size_;
    normalise(k, layer.key, size_, eps_, k);
    if (!layer.global) turn(k, row);
    const int64_t slot = positions_[row] % kPage, block = positions_[row] / kPage;
#ifdef TRINITY_DIGITS
    if (form_ == Form::digits) return Digits::put_token(k, v, size_, slot, its_page(layer, of_row_[row], block, head));
#endif
#ifdef TRINITY_NARROW
    if (form_ == Form::narrow) {
      char* page = its_page(layer, of_row_[row], block, head);
      Narrow::put_token(k, v, size_, slot, page);
      const Sequence& s = sequences_[of_row_[row]];
      const bool newest = row == s.row + s.count - 1, begun = s.position <= block * kPage;
      if (newest && begun) Narrow::clear_values(slot + 1, size_, page);
      return;
    }
#endif
    const auto put = [&](auto* keys, const auto& rounded) {
      auto* values = keys + (kPage + slot) * size_;
      for (int64_t c = 0; c < size_; ++c) keys[c * kPage + slot] = rounded(k[c]), values[c] = rounded(v[c]);
    };
    if (pools_[layer.global].narrow) {
      put(page<uint16_t>(layer, of_row_[row], block, head), narrowed);
    } else {
      put(page<float>(layer, of_row_[row], block, head), [](float x) { return x; });
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
  void plan_tasks(int global, int members) {
    auto &tasks = tasks_[global];
    auto &merges = merges_[global];
    tasks.clear(), merges.clear();
    const int64_t group = heads_ / key_heads_, enough = 4 * members;
    int64_t together = std::max(kApart, (form_ == Form::vectors ? kQueries : kMoreQueries) / group), partials = 0;
    while (together > kApart && tiles(together) < enough) together = std::max(kApart, together / 2);
    const bool split = tiles(together) < enough / 2;
    for (const Sequence& s : sequences_) {
      for (int64_t i = 0; i < s.count; i += together) {
        const int64_t count = std::min(together, s.count - i), position = s.position + i;
        const int64_t first = oldest(global, position) / (kPage * kStretch);
        const int64_t last = (position + count - 1) / (kPage * kStretch) + 1;
        for (int64_t head = 0; head < key_heads_; ++head) {
          if (!split || last - first < 2) {
            tasks.push_back({s.row + i, count, position, &s - sequences_.data(), head, first, last, -1});
            continue;
          }
          merges.push_back({s.row + i, count, head, partials, last - first});
          for (int64_t part = first; part < last; ++part, partials += count * group) {
            tasks.push_back({s.row + i, count, position, &s - sequences_.data(), head, part, part + 1, partials});
          }
        }
      }
    }
    partial_.resize(std::max<size_t>(partial_.size(), partials * (size_ + 2)));
  }

  int64_t tiles(int64_t together) const {
    int64_t count = 0;
    for (const Sequence& s : sequences_) count += (s.count + together - 1) / together * key_heads_;
    return count;
  }

  // The first position that the query at `position` sees.
  int64_t oldest(bool global, int64_t position) const {
    return global ? 0 : std::max<int64_t>(0, position - window_ + 1);
  }

  // Whether every sequence has one row.
  bool alone() const { return sequences_.size() == positions_.size(); }

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

  void finish(int64_t row, int64_t count, int64_t head, const float* sum, const float* answer, const float* projected,
              float* attended) const {
    const int64_t group = heads_ / key_heads_;
    for (int64_t i = 0; i < count * group; ++i) {
      const int64_t h = head * group + i % group, r = row + i / group;
      const float* gate = &projected[r * projected_width() + (heads_ + 2 * key_heads_ + h) * size_];
      float* to = &attended[(r * heads_ + h) * size_];
      int64_t c = 0;
      for (; c + kLanes <= size_; c += kLanes) vec(to + c) = vec(answer + i * size_ + c) / sum[i] * sigmoid(vec(gate + c));
      for (; c < size_; ++c) to[c] = answer[i * size_ + c] / sum[i] * logistic(gate[c]);
    }
  }

  void attend_tile(const AttentionLayer& layer, const Task& task, float* projected, float* attended) {
    const int64_t group = heads_ / key_heads_, queries = task.count * group, room = queries * (size_ + 2);
    const float scale = 1.0f / std::sqrt(static_cast<float>(size_));
    Scratch scratch{queries * size_, room, room, queries * kLanes, room_of(layer, queries)};
    float* q = scratch.take(queries * size_);
    float *highest = scratch.take(room), *sum = highest + queries, *answer = sum + queries;
    float *top = scratch.take(room), *part = top + queries, *read = part + queries;
    float *sums = scratch.take(queries * kLanes), *more = scratch.take(room_of(layer, queries));
    for (int64_t i = 0; i < queries; ++i) {
      const float* from = &projected[(task.row + i / group) * projected_width() + (task.head * group + i % group) * size_];
      normalise(from, layer.query, size_, eps_, q + i * size_);
      if (!layer.global) turn(q + i * size_, task.row + i / group);
      for (int64_t c = 0; c < size_; ++c) q[i * size_ + c] *= scale;
    }
    if (alone() && task.position < task.last * kPage * kStretch) place(layer, projected, task.row, task.head);  // the part that sees it
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
    [[maybe_unused]] const auto in_tiles = [&]<class Attention>() {
      const AmxTiles tiles(static_cast<uint8_t>(std::min(kTileQueries, queries)));
      float *units = more, *left = units + whole_vectors(queries);
      float* room = left + Attention::Numbers::query_floats(queries, size_);
      Attention::Numbers::put_queries(q, queries, size_, left, units);
      by_stretches([&](int64_t low, int64_t high) {
        through_tiles<Attention>(layer, task, low, high, left, units, top, sums, read, room);
      });
    };
    switch (form_) {
#ifdef TRINITY_DIGITS
      case Form::digits: in_tiles.template operator()<DigitAttention>(); break;
#endif
#ifdef TRINITY_NARROW
      case Form::narrow: in_tiles.template operator()<NarrowAttention>(); break;
#endif
      default:
        by_stretches([&](int64_t low, int64_t high) { through_pages(layer, task, low, high, q, top, sums, read, more); });
    }
    if (task.partial < 0) {
      finish(task.row, task.count, task.head, sum, answer, projected, attended);
    } else {
      std::copy_n(highest, room, &partial_[task.partial * (size_ + 2)]);
    }
  }

  // Floats that a task needs to go through pages.
  int64_t room_of(const AttentionLayer& layer, int64_t queries) const {
    switch (form_) {
#ifdef TRINITY_DIGITS
      case Form::digits: return room_in_tiles<DigitAttention>(queries);
#endif
#ifdef TRINITY_NARROW
      case Form::narrow: return room_in_tiles<NarrowAttention>(queries);
#endif
      default: break;
    }
    return kTogether * kPage + (pools_[layer.global].narrow ? page_size() : 0);
  }

  template <class Attention>
  int64_t room_in_tiles(int64_t queries) const {
    return whole_vectors(queries) + Attention::Numbers::query_floats(queries, size_) + Attention::room(size_);
  }

  // The queries of a task go through pages `low` to `high` of one stretch.
  void through_pages(const AttentionLayer& layer, const Task& task, int64_t low, int64_t high, const float* q, float* top,
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

#ifdef TRINITY_AMX
  // The same on AMX: the packed queries and their units, kPagesAtOnce pages at once from multiples of it on.
  template <class Attention>
  void through_tiles(const AttentionLayer& layer, const Task& task, int64_t low, int64_t high, const float* left,
                     const float* units, float* top, float* sums, float* read, float* room) {
    const int64_t group = heads_ / key_heads_, queries = task.count * group;
    const int64_t tiles = (queries + kTileQueries - 1) / kTileQueries;
    const auto page_of = [&](int64_t block) { return its_page(layer, task.sequence, block, task.head); };
    Attention attention(size_, room);
    for (int64_t next = low; next < high;) {
      const int64_t first = next;
      next = std::min(high, (first / kPagesAtOnce + 1) * kPagesAtOnce);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        if (tiles >= kTilesToFetch) {
          for (int64_t block = next; block < std::min(high, next + kPagesAtOnce); ++block)
            fetch_part(page_of(block), Attention::Numbers::page_bytes(size_), tile, tiles);
        }
        const int64_t i = tile * kTileQueries, here = std::min(kTileQueries, queries - i);
        const int64_t position = task.position + i / group, newest = task.position + (i + here - 1) / group;
        const int64_t from = std::max(first, oldest(layer.global, position) / kPage), to = std::min(next, newest / kPage + 1);
        if (from >= to) continue;
        Passage passage{.page = {}, .pages = to - from, .queries = here,
                        .left = reinterpret_cast<const char*>(left + Attention::Numbers::query_floats(i, size_)),
                        .units = Attention::kUnits ? units + i : nullptr,
                        .top = top + i, .sums = sums + i * kLanes, .read = read + i * size_, .seen = {}};
        for (int64_t block = from; block < to; ++block) passage.page[block - from] = page_of(block);
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
  static void fetch_part(const char* page, int64_t bytes, int64_t part, int64_t parts) {
    const int64_t lines = bytes / kLine;
    for (int64_t i = part * lines / parts; i < (part + 1) * lines / parts; ++i) __builtin_prefetch(page + i * kLine, 0, 2);
  }
#endif

  const int64_t heads_, key_heads_, size_, window_;
  const float eps_;
  const std::vector<float> frequencies_;
  const bool digits_;  // pages of float32 hold whole numbers, and attention multiplies these on AMX (digits.h)
  const bool tiles_;   // pages of bfloat16 hold tiles for AMX (narrow_attention.h)

  // Of one step.
  Form form_ = Form::vectors;
  float logarithm_ = 1.0f;  // of what scores are powers of
  Pool pools_[2];
  std::vector<Sequence> sequences_;
  std::vector<int64_t> positions_, of_row_;  // of each row; which sequence it is of
  std::vector<Task> tasks_[2];
  std::vector<Merge> merges_[2];
  std::vector<float> turns_, partial_;
};

}  // namespace trinity
