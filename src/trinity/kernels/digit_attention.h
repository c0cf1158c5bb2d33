#pragma once

// Attention in whole numbers (digits.h), as a pipeline of passages.

#include "digits.h"

#ifdef TRINITY_DIGITS

namespace trinity {

constexpr int64_t kTileSums = 3 * 256;              // of a tile of products, one tile for each weight of digits
constexpr float kMostWeight = 8388000;          // of the 23 bits of a weight, in digits of 0 .. 255; with room for rounding

// The digits of four vectors, those of a lane side by side: the highest, then the middle ones, then the lowest.
inline void put_digits(Whole a, Whole b, Whole c, Whole d, char* to) {
  // Where `at` has a byte of y, it takes those that `from` names of every lane, else it keeps x.
  const auto taken = [](Whole x, uint64_t at, Whole y, int from) {
    const auto places = _mm512_add_epi8(_mm512_set1_epi32(from), _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    return std::bit_cast<Whole>(
        _mm512_mask_shuffle_epi8(std::bit_cast<__m512i>(x), at, std::bit_cast<__m512i>(y), places));
  };
  constexpr uint64_t kFirst = 0x1111111111111111;
  const Whole even = taken(a, kFirst * 0xc, c, 0x01000000), odd = taken(b, kFirst * 0xc, d, 0x01000000);
  wholes(to + 128) = taken(even, kFirst * 0xa, odd, 0x02000000);
  wholes(to + 64) = taken(odd, kFirst * 0x5, even, 0x00030001);
  wholes(to) = taken(taken(taken(c, kFirst, a, 0x02), kFirst * 2, b, 0x0200), kFirst * 8, d, 0x02000000);
}

// Of a row of three tiles of sums, all of it, in units of 65,536.
inline Vec whole_sum(const int32_t* sums) {
  const auto part = [&](int p) { return __builtin_convertvector(wholes(sums + p * 256), Vec); };
  return (part(0) * 256.0f + part(1)) * 256.0f + part(2);
}

// The same of sums of at most 2^22, as those of 64 products are, by additions alone.
inline Vec small_sum(const int32_t* sums) {
  const auto part = [&](int p) { return std::bit_cast<Vec>(wholes(sums + p * 256) + 0x4b400000) - 12582912.0f; };
  return (part(0) * 256.0f + part(1)) * 256.0f + part(2);
}

class DigitAttention {
 public:
  using Numbers = Digits;
  static constexpr bool kUnits = true;
  static constexpr int64_t room(int64_t) { return 2 * kTileQueries * kScoreLine + 2 * kTileSums; }  // floats

  // For heads of `size` values; `room` lies on a multiple of 64 bytes.
  DigitAttention(int64_t size, float* room) : size_(size), steps_(size / 64) {
    for (Slot& slot : slots_) slot.scores = room + (&slot - slots_) % 2 * kTileQueries * kScoreLine;
    sums_ = reinterpret_cast<int32_t*>(room + 2 * kTileQueries * kScoreLine);
  }

  // Passages of the same queries come in the order of their pages.
  void attend(const Passage& passage) {
    Slot& ahead = slots_[count_++ % 4];
    static_cast<Passage&>(ahead) = passage;
    advance(&ahead);
  }

  // Of all passages so far, to the end.
  void finish() { advance(nullptr), advance(nullptr); }

 private:
  // A passage on its way: of four in turn each second one has the same place for its scores, since the weights of the one
  // behind are read before scores of the one ahead come.
  struct Slot : Passage {
    float* scores;
    alignas(64) float unit[kTileQueries], less[kTileQueries];  // of the weights; by what was read before is multiplied
  };

  // The scores of the passage here become weights; the one ahead gets its scores, the one behind what it reads.
  void advance(Slot* ahead) {
    asm volatile("" ::: "memory");  // gcc 12 does not know that a tile is loaded from memory
    ahead_ = ahead, done_ = 0, step_ = 0, tile_ = 0, page_ = 0, column_ = 0;
    reads_ = behind_ ? behind_->pages * size_ / 16 : 0;
    products_ = reads_ + (ahead ? ahead->pages * 4 * steps_ : 0);
    if (here_) make_weights();
    multiply(products_);
    settle();
    behind_ = here_, here_ = ahead;
  }

  // Softening takes longer than splitting, so half of the products for the passage ahead go along with it.
  void make_weights() {
    const int64_t queries = here_->queries, pages = here_->pages, half = (reads_ + products_) / 2;
    raise_tops(*here_, here_->scores, here_->less);
    int64_t portion = (half << 16) / (queries * pages) + 1, due = 0;  // in 65,536ths of a product
    const auto go_on = [&] { multiply(std::min(half, (due += portion) >> 16)); };
    for (int64_t r = 0; r < queries; ++r) {
      Sight(here_->seen[r]).whole(pages) ? soften<false>(r, go_on) : soften<true>(r, go_on);
    }
    settle();
    find_units();
    portion = ((products_ - half) << 16) / queries + 1, due = half << 16;
    for (int64_t r = 0; r < queries; ++r) {
      split(r);
      multiply(std::min(products_, (due += portion) >> 16));
    }
  }

  // Scores of a query become 2^(score - highest so far), as in `soften`, times the units of the values.
  template <bool partly, class GoOn>
  void soften(int64_t r, const GoOn& go_on) {
    Slot& p = *here_;
    const Sight sight(p.seen[r]);
    const Vec unit = splat(p.units[r]), top = splat(p.top[r]);
    Vec gathered{};
    Widest widest;
    for (int64_t n = 0; n < p.pages; ++n) {
      const float* units = Digits::units_of_keys(p.page[n], size_) + kPage;
      float* scores = p.scores + r * kScoreLine + n * kPage;
#pragma GCC unroll 4
      for (int64_t v = 0; v < kPage / kLanes; ++v) {
        Vec part = power_of_two(vec(scores + v * kLanes) * unit - top), weighed = part * vec(units + v * kLanes);
        if constexpr (partly) {
          part = sight.of(n * (kPage / kLanes) + v, part, Vec{}), weighed = sight.of(n * (kPage / kLanes) + v, weighed, Vec{});
        }
        gathered += part;
        widest.add(weighed);
        vec(scores + v * kLanes) = weighed;
      }
      go_on();
    }
    add_weights(p.sums + r * kLanes, p.less[r], gathered);
    widest_[r] = std::bit_cast<Vec>(widest.bits);
  }

  void find_units() {
    for (int64_t r = here_->queries; r < kTileQueries; ++r) widest_[r] = Vec{};
    const Vec unit = largest_lanes(widest_, [](Vec a, Vec b) {  // by their bits: what is no number is larger than all others
      return std::bit_cast<Vec>(_mm512_max_epu32(std::bit_cast<__m512i>(a), std::bit_cast<__m512i>(b)));
    });
    vec(factor_) = unit > kNothing ? kMostWeight / unit : Vec{};
    vec(here_->unit) = unit * (256.0f / kMostWeight);
  }

  // A query's weights as digits of 0 .. 255, in the place of the scores.
  void split(int64_t r) {
    const Vec factor = splat(factor_[r]);
    float* weighed = here_->scores + r * kScoreLine;
    for (int64_t n = here_->pages; n > 0; --n, weighed += kPage) {
      // Rounded to a whole number in the lower 23 bits; bit 23 is 0.
      const auto whole = [&](int64_t v) { return std::bit_cast<Whole>(vec(weighed + v * kLanes) * factor + 8388608.0f); };
      put_digits(whole(0), whole(1), whole(2), whole(3), reinterpret_cast<char*>(weighed));
    }
  }

  void multiply(int64_t until) {
    for (; done_ < until; ++done_) done_ < reads_ ? read_values() : meet_keys();
  }

  // The queries ahead by 16 keys and 64 of the head.
  void meet_keys() {
    if (step_ == 0) start_sums();
    if (steps_ > 1 || tile_ == 0) load_left(ahead_->left + step_ * 3 * kDigitTile, kDigitTile, 64);
    if (tile_ % 4 == 0 && step_ == 0) keys_ = ahead_->page[tile_ / 4];
    add_products<false>(keys_);
    keys_ += 3 * kDigitTile;
    if (++step_ == steps_) store_sums(true, tile_++), step_ = 0;
  }

  // The weights behind of one page by 16 of the head.
  void read_values() {
    if (page_ == 0) start_sums();
    const float* weights = behind_->scores + page_ * kPage;
    load_left(reinterpret_cast<const char*>(weights), 64, kScoreLine * sizeof(float));
    add_products<true>(behind_->page[page_] + Digits::key_bytes(size_) + column_ * 3 * kDigitTile);
    if (++page_ == behind_->pages) store_sums(false, column_++), page_ = 0;
  }

  // Tiles 0 to 2 sum products of digits that weigh alike, 3 to 5 are the digits of the left side, 6 and 7 of the right.
  static void start_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
  }

  static void load_left(const char* at, int64_t apart, int64_t row) {
    _tile_loadd(3, at, row);
    _tile_loadd(4, at + apart, row);
    _tile_loadd(5, at + 2 * apart, row);
  }

  // The six products of digits. Weights have no sign.
  template <bool weights>
  static void add_products(const char* right) {
#define TRINITY_PRODUCT(sum, left, right) \
  if constexpr (weights) {                \
    _tile_dpbusd(sum, left, right);       \
  } else {                                \
    _tile_dpbssd(sum, left, right);       \
  }
    _tile_loadd(6, right, 64);
    _tile_loadd(7, right + kDigitTile, 64);
    TRINITY_PRODUCT(0, 3, 6)
    TRINITY_PRODUCT(1, 4, 6)
    TRINITY_PRODUCT(2, 5, 6)
    _tile_loadd(6, right + 2 * kDigitTile, 64);
    TRINITY_PRODUCT(1, 3, 7)
    TRINITY_PRODUCT(2, 4, 7)
    TRINITY_PRODUCT(2, 3, 6)
#undef TRINITY_PRODUCT
  }

  // Stored sums wait until those of the next products are: what was stored just now cannot be loaded yet.
  void store_sums(bool of_keys, int64_t which) {
    int32_t* to = sums_ + turn_ * kTileSums;
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    _tile_stored(2, to + 512, 64);
    settle();
    waiting_ = to, of_keys_ = of_keys, which_ = which, turn_ ^= 1;
  }

  void settle() {
    if (!waiting_) return;
    of_keys_ ? settle_scores(waiting_) : settle_values(waiting_);
    waiting_ = nullptr;
  }

  void settle_scores(const int32_t* sums) {
    const Vec units = vec(Digits::units_of_keys(ahead_->page[which_ / 4], size_) + which_ % 4 * kLanes);
    float* to = ahead_->scores + which_ * kLanes;
    const int64_t queries = ahead_->queries;
    if (steps_ == 1) {
      for (int64_t r = 0; r < queries; ++r) vec(to + r * kScoreLine) = small_sum(sums + r * kLanes) * units;
    } else {
      for (int64_t r = 0; r < queries; ++r) vec(to + r * kScoreLine) = whole_sum(sums + r * kLanes) * units;
    }
  }

  void settle_values(const int32_t* sums) {
    const float *less = behind_->less, *unit = behind_->unit;
    float* read = behind_->read + which_ * kLanes;
    const int64_t queries = behind_->queries, size = size_;
    for (int64_t r = 0; r < queries; ++r) {
      vec(read + r * size) = vec(read + r * size) * less[r] + whole_sum(sums + r * kLanes) * unit[r];
    }
  }

  const NoTinyNumbers no_tiny_numbers_;
  const int64_t size_, steps_;                  // of the head; 64 of it are a step
  Slot slots_[4], *behind_ = nullptr, *here_ = nullptr, *ahead_ = nullptr;
  int64_t count_ = 0;                           // of passages
  int64_t reads_ = 0, products_ = 0, done_ = 0; // of the matrix unit in this turn: for the passage behind, in all, so far
  int64_t page_ = 0, column_ = 0;               // of values, those to come
  int64_t tile_ = 0, step_ = 0;                 // of keys
  const char* keys_ = nullptr;
  int32_t* sums_;
  const int32_t* waiting_ = nullptr;            // sums of the tile of keys or column of values `which_`
  bool of_keys_ = false;
  int64_t which_ = 0, turn_ = 0;
  Vec widest_[kTileQueries];
  alignas(64) float factor_[kTileQueries];
};

}  // namespace trinity

#endif
