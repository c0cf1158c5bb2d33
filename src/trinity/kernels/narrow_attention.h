#pragma once

// Attention over pages of bfloat16 on AMX, as a pipeline of passages. A key or value was rounded once, on its way into its
// page. A query or a weight is two numbers of bfloat16, 16 bits: what that loses is little beside what the page lost. The
// matrix unit sums in float32, each place of a tile by itself and in the order of its products, so no bit of a row depends
// on who shares the tile.
//
// What sets the pace is the tiles' way from the caches. A tile cannot be loaded before its register's last product is done;
// so a load comes right behind that product, and as far as there are registers before its own first one. Weights take the
// place of their scores, and the scores ahead the place of the weights behind, which have been read: all of it stays in
// the first cache. Between each two vectors of scores that become weights stands one product, or two for heads of 128.

#include "passage.h"

#if defined(TRINITY_AMX) && defined(__AVX512VL__)
#define TRINITY_NARROW
#endif

namespace trinity {

// Whether pages of bfloat16, of heads of this size, go through AMX.
inline bool by_tiles([[maybe_unused]] int64_t size) {
#ifdef TRINITY_NARROW
  return size % 64 == 0 && has_amx();
#else
  return false;
#endif
}

#ifdef TRINITY_NARROW

// Two vectors' upper halves, those of a lane side by side; the rest of each number, which has a shorter one.
inline __m512i upper_halves(Vec first, Vec second) {
  const auto places = _mm512_add_epi8(_mm512_set1_epi32(0x0302), _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
  return _mm512_mask_shuffle_epi8(std::bit_cast<__m512i>(second), 0x3333333333333333, std::bit_cast<__m512i>(first), places);
}
inline Vec rest_of(Vec x) { return x - std::bit_cast<Vec>(std::bit_cast<IntVec>(x) & static_cast<int>(0xffff0000)); }

// A page: the keys, then the values, in tiles of 1,024 bytes as the matrix unit takes them: of keys for every 16 tokens and
// every 32 of the head (c and c + 16 to a lane), of values for every 32 tokens (t and t + 16 to a lane) and every 16 of
// the head.
struct Narrow {
  static constexpr int64_t kTile = 1024;
  static constexpr int64_t key_bytes(int64_t size) { return 2 * kPage * size; }
  static constexpr int64_t page_bytes(int64_t size) { return 2 * key_bytes(size); }

  // One token's key and value -> their places in a page.
  static void put_token(const float* key, const float* value, int64_t size, int64_t slot, char* page) {
    const auto put = [](float x, char* to) { *reinterpret_cast<Half*>(to) = narrowed(x); };
    char* keys = page + slot / 16 * (size / 32) * kTile + slot % 16 * 4;
    char* values = values_of(slot, size, page);
    for (int64_t c = 0; c < size; ++c) {
      put(key[c], keys + c / 32 * kTile + c % 16 * 64 + c / 16 % 2 * 2);
      put(value[c], values + c / 16 * kTile + c % 16 * 4);
    }
  }

  // The values of a page from `slot` on become zero: what nobody wrote may be no number, which a weight of zero leaves so.
  static void clear_values(int64_t slot, int64_t size, char* page) {
    for (; slot < kPage; ++slot) {
      char* values = values_of(slot, size, page);
      for (int64_t c = 0; c < size; ++c) *reinterpret_cast<Half*>(values + c / 16 * kTile + c % 16 * 4) = 0;
    }
  }

  // Queries as left sides: tiles of 16 of them and 32 of the head, two for the parts of each.
  static constexpr int64_t query_floats(int64_t queries, int64_t size) { return (queries + 15) / 16 * 16 * size; }

  static void put_queries(const float* q, int64_t queries, int64_t size, float* left, float*) {
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t c = 0; c < size; c += 32) {
        char* to = reinterpret_cast<char*>(left) + (i / 16 * (size / 32) + c / 32) * 2 * kTile + i % 16 * 64;
        const Vec first = vec(q + i * size + c) * kLogOfE, second = vec(q + i * size + c + 16) * kLogOfE;
        _mm512_storeu_si512(to, upper_halves(first, second));
        _mm512_storeu_si512(to + kTile, upper_halves(rest_of(first), rest_of(second)));
      }
    }
  }

 private:
  typedef uint16_t Half __attribute__((may_alias));

  static char* values_of(int64_t slot, int64_t size, char* page) {
    return page + key_bytes(size) + slot / 32 * (size / 16) * kTile + slot % 16 * 64 + slot / 16 % 2 * 2;
  }
};

class NarrowAttention {
 public:
  using Numbers = Narrow;
  static constexpr bool kUnits = false;  // scores are what they are
  static constexpr int64_t room(int64_t size) { return kTileQueries * (2 * kScoreLine + size); }  // floats

  // For heads of `size` values; `room` lies on a multiple of 64 bytes.
  NarrowAttention(int64_t size, float* room) : size_(size), parts_(size / 64) {
    for (Slot& slot : slots_) slot.scores = room + (&slot - slots_) % 2 * kTileQueries * kScoreLine;
    sums_ = room + 2 * kTileQueries * kScoreLine;
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
  static constexpr int64_t kTile = Narrow::kTile, kRow = kScoreLine * sizeof(float);
  static constexpr int kPairs = kKeys / (2 * kLanes);  // of vectors, in a row of scores

  // A passage on its way: of four in turn each second one has the same place for its scores.
  struct Slot : Passage {
    float* scores;
    alignas(64) float less[kTileQueries];  // by what was read before is multiplied
  };

  // Of eight products each: 32 tokens by 64 of the head.
  int64_t units_of(const Slot* passage) const { return passage ? passage->pages * 2 * parts_ : 0; }

  // The scores of the passage here become weights; the one ahead gets its scores, the one behind what it reads.
  void advance(Slot* ahead) {
    asm volatile("" ::: "memory");  // gcc 12 does not know that a tile is loaded from memory
    ahead_ = ahead, done_ = 0, tokens_ = 0, part_ = 0;
    reads_ = units_of(behind_), units_ = reads_ + units_of(ahead);
    if (here_) make_weights();
    multiply(units_);
    if (behind_) settle();
    behind_ = here_, here_ = ahead;
  }

  void make_weights() {
    raise_tops(*here_, here_->scores, here_->less);
    const int64_t queries = here_->queries;
    const auto steady = [&](const auto& even, const auto& odd) {
      for (int64_t r = 0; r < kTileQueries; ++r) {
        Sight(here_->seen[r]).whole(kPagesAtOnce) ? (r < kTileQueries / 2 ? even(r) : odd(r)) : soften_alone(r);
        multiply(units_ * (r + 1) / kTileQueries);
      }
    };
    const bool whole = reads_ == kPagesAtOnce * 2 * parts_ && units_ == 2 * reads_ && here_->pages == kPagesAtOnce;
    if (whole && queries == kTileQueries && parts_ == 1) {
      steady([&](int64_t r) { soften<true, 1>(r); }, [&](int64_t r) { soften<false, 1>(r); });
    } else if (whole && queries == kTileQueries && parts_ == 2) {
      steady([&](int64_t r) { soften<true, 2>(r); }, [&](int64_t r) { soften<false, 2>(r); });
    } else {
      for (int64_t r = 0; r < queries; ++r) {
        soften_alone(r);
        multiply(units_ * (r + 1) / queries);
      }
    }
  }

  // Two vectors of scores become 2^(score - highest so far), as the two parts of each.
  static Vec weigh(float* scores, Vec first, Vec second) {
    _mm512_storeu_si512(scores, upper_halves(first, second));
    _mm512_storeu_si512(scores + kLanes, upper_halves(rest_of(first), rest_of(second)));
    return first + second;
  }

  // Scores of a query that sees all of them become weights, with `parts` units of products between them.
  template <bool reading, int parts>
  void soften(int64_t r) {
    Slot& p = *here_;
    const Vec top = splat(p.top[r]);
    Vec gathered{};
    float* scores = p.scores + r * kScoreLine;
    const auto pair = [&]<int i>(std::integral_constant<int, i>) {
      float* at = scores + i * 2 * kLanes;
      gathered += weigh(at, power_of_two(vec(at) - top), power_of_two(vec(at + kLanes) - top));
      const auto product = [&]<int which>(std::integral_constant<int, which>) {
        reading ? read_values<which % kPairs>() : meet_keys<which % kPairs>();
      };
      if constexpr (parts == 1) {
        product(std::integral_constant<int, i>{});
      } else {
        product(std::integral_constant<int, 2 * i>{}), product(std::integral_constant<int, 2 * i + 1>{});
      }
    };
    in_turn(pair);
    add_weights(p.sums + r * kLanes, p.less[r], gathered);
  }

  void soften_alone(int64_t r) {
    Slot& p = *here_;
    const Sight sight(p.seen[r]);
    const Vec top = splat(p.top[r]);
    Vec gathered{};
    float* scores = p.scores + r * kScoreLine;
    for (int64_t v = 0; v < p.pages * 4; v += 2, scores += 2 * kLanes) {
      const auto weight = [&](int64_t i) { return sight.of(v + i, power_of_two(vec(scores + i * kLanes) - top), Vec{}); };
      gathered += weigh(scores, weight(0), weight(1));
    }
    add_weights(p.sums + r * kLanes, p.less[r], gathered);
  }

  void multiply(int64_t until) {
    while (done_ < until) {
      if (done_ < reads_) {
        in_turn([&]<int i>(std::integral_constant<int, i>) { read_values<i>(); });
      } else {
        in_turn([&]<int i>(std::integral_constant<int, i>) { meet_keys<i>(); });
      }
    }
  }

  template <class Each>
  static void in_turn(const Each& each) {
    [&]<int... i>(std::integer_sequence<int, i...>) { (each(std::integral_constant<int, i>{}), ...); }(
        std::make_integer_sequence<int, kPairs>{});
  }

  static void start_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  // One of the eight products of a unit for the passage behind: sums in tiles 0 to 3, parts of weights in 4 and 5, values in
  // 6 and 7. All tokens for 64 of the head, then for the next.
  template <int i>
  __attribute__((always_inline)) void read_values() {
    const auto values = [&] {
      const int64_t tile = tokens_ % 2 * (size_ / 16) + part_ * 4;
      return behind_->page[tokens_ / 2] + Narrow::key_bytes(size_) + tile * kTile;
    };
    const auto weights = [&] { return behind_->scores + tokens_ * 2 * kLanes; };
    if constexpr (i == 0) {
      if (tokens_ == 0) start_sums();
      if (done_ == 0) {
        right_ = values();
        _tile_loadd(4, weights(), kRow);
        _tile_loadd(6, right_, 64);
      }
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, right_ + kTile, 64);
      _tile_loadd(5, weights() + kLanes, kRow);
    } else if constexpr (i == 1) {
      _tile_dpbf16ps(0, 5, 6);
      _tile_loadd(6, right_ + 2 * kTile, 64);
    } else if constexpr (i == 2) {
      _tile_dpbf16ps(1, 4, 7);
    } else if constexpr (i == 3) {
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(7, right_ + 3 * kTile, 64);
    } else if constexpr (i == 4) {
      _tile_dpbf16ps(2, 4, 6);
    } else if constexpr (i == 5) {
      _tile_dpbf16ps(2, 5, 6);
      if (++tokens_ == behind_->pages * 2) tokens_ = 0, ++part_;
      if (++done_ < reads_) {
        right_ = values();
        _tile_loadd(6, right_, 64);
      }
    } else if constexpr (i == 6) {
      _tile_dpbf16ps(3, 4, 7);
      if (done_ < reads_) _tile_loadd(4, weights(), kRow);
    } else {
      _tile_dpbf16ps(3, 5, 7);
      if (tokens_ > 0) return;
      float* to = sums_ + (part_ - 1) * 4 * kLanes;
      _tile_stored(0, to, size_ * sizeof(float));
      _tile_stored(1, to + kLanes, size_ * sizeof(float));
      _tile_stored(2, to + 2 * kLanes, size_ * sizeof(float));
      _tile_stored(3, to + 3 * kLanes, size_ * sizeof(float));
      if (done_ == reads_) part_ = 0;
    }
  }

  // The same for the passage ahead: sums of 16 keys each in tiles 0 and 1, queries in 2 to 5, keys in 6 and 7. 64 of the head
  // after the other, then the next tokens.
  template <int i>
  __attribute__((always_inline)) void meet_keys() {
    const auto keys = [&] { return ahead_->page[tokens_ / 2] + (tokens_ % 2 * 2 * (size_ / 32) + part_ * 2) * kTile; };
    const auto queries = [&] { return ahead_->left + part_ * 4 * kTile; };
    const int64_t below = size_ / 32 * kTile;  // of the next 16 keys
    if constexpr (i == 0) {
      if (done_ == reads_) {
        right_ = keys();
        _tile_loadd(6, right_, 64);
        _tile_loadd(7, right_ + kTile, 64);
        _tile_loadd(2, queries(), 64);
        _tile_loadd(3, queries() + kTile, 64);
        _tile_loadd(4, queries() + 2 * kTile, 64);
        _tile_loadd(5, queries() + 3 * kTile, 64);
      }
      if (part_ == 0) _tile_zero(0);
      _tile_dpbf16ps(0, 2, 6);
    } else if constexpr (i == 1) {
      _tile_dpbf16ps(0, 3, 6);
      _tile_loadd(6, right_ + below, 64);
    } else if constexpr (i == 2) {
      _tile_dpbf16ps(0, 4, 7);
      if (part_ == 0) {
        if (tokens_ > 0) _tile_stored(1, ahead_->scores + tokens_ * 2 * kLanes - kLanes, kRow);
        _tile_zero(1);
      }
    } else if constexpr (i == 3) {
      _tile_dpbf16ps(0, 5, 7);
      _tile_loadd(7, right_ + below + kTile, 64);
    } else if constexpr (i == 4) {
      _tile_dpbf16ps(1, 2, 6);
      if (++part_ == parts_) part_ = 0, ++tokens_;
      if (++done_ < units_ && parts_ > 1) _tile_loadd(2, queries(), 64);
    } else if constexpr (i == 5) {
      _tile_dpbf16ps(1, 3, 6);
      if (done_ == units_) return;
      right_ = keys();
      _tile_loadd(6, right_, 64);
      if (parts_ > 1) _tile_loadd(3, queries() + kTile, 64);
    } else if constexpr (i == 6) {
      _tile_dpbf16ps(1, 4, 7);
      if (part_ == 0) _tile_stored(0, ahead_->scores + (tokens_ - 1) * 2 * kLanes, kRow);
      if (done_ < units_ && parts_ > 1) _tile_loadd(4, queries() + 2 * kTile, 64);
    } else {
      _tile_dpbf16ps(1, 5, 7);
      if (done_ == units_) {
        _tile_stored(1, ahead_->scores + tokens_ * 2 * kLanes - kLanes, kRow);
        return;
      }
      _tile_loadd(7, right_ + kTile, 64);
      if (parts_ > 1) _tile_loadd(5, queries() + 3 * kTile, 64);
    }
  }

  void settle() {
    for (int64_t r = 0; r < behind_->queries; ++r) {
      float* read = behind_->read + r * size_;
      for (int64_t c = 0; c < size_; c += kLanes) {
        vec(read + c) = vec(read + c) * behind_->less[r] + vec(sums_ + r * size_ + c);
      }
    }
  }

  const NoTinyNumbers no_tiny_numbers_;
  const int64_t size_, parts_;                  // of the head; of 64 each
  Slot slots_[4], *behind_ = nullptr, *here_ = nullptr, *ahead_ = nullptr;
  int64_t count_ = 0;                           // of passages
  int64_t reads_ = 0, units_ = 0, done_ = 0;    // of this turn: for the passage behind, in all, so far
  int64_t tokens_ = 0, part_ = 0;               // of the unit: 32 tokens, 64 of the head
  const char* right_ = nullptr;                 // its first tile of keys or values
  float* sums_;                                 // of values, [kTileQueries, size]
};

#endif

}  // namespace trinity
