#pragma once

// What attention on the matrix unit is made of, whatever its numbers are (digit_attention.h, narrow_attention.h): passages
// of 16 queries through four pages. While the vector unit makes weights of the scores of one passage, the matrix unit
// multiplies the values that the one before reads and the keys that the next one meets. Products come between the
// instructions of the vector unit: a processor looks some 500 instructions ahead, so what follows in blocks does not overlap.
//
// For a microsecond after a product the processor multiplies and converts in one of its two vector ports only, and
// shuffles wait for the other, where products begin.

#include "amx.h"
#include "pages.h"

namespace trinity {

constexpr float kLogOfE = 1.44269504f;          // scores are of powers of two
constexpr int64_t kPagesAtOnce = 4;             // whose weights have one unit a query; a divisor of every stretch
constexpr int64_t kTileQueries = 16;
constexpr int64_t kKeys = kPagesAtOnce * kPage;
constexpr int64_t kScoreLine = kKeys + 16;      // floats a query: no two of a tile lie 4,096 bytes apart
constexpr float kLeastPower = -100.0f;          // smaller powers of two count as this one where nothing was read before

#ifdef TRINITY_AMX

// At most 16 queries and the pages that they go through; what is gathered of each, `size` apart in `read`.
struct Passage {
  const char* page[kPagesAtOnce];
  int64_t pages, queries;
  const char* left;                             // the queries, as tiles
  const float* units;                           // of their scores; none: these are what they are
  float *top, *sums, *read;                     // the highest score, in powers of two; weights of each lane; values
  Seen seen[kTileQueries];                      // in tokens from the first page on; perhaps nothing
};

inline Vec larger(Vec x, Vec y) {
  return std::bit_cast<Vec>(_mm512_max_ps(std::bit_cast<__m512>(x), std::bit_cast<__m512>(y)));
}

// 2^x within 2^-22, of x not above 2^16: a polynomial on [-1/2, 1/2] through Chebyshev's places.
inline Vec power_of_two(Vec x) {
  const Vec places = x + 12582912.0f, nearest = places - 12582912.0f, rest = x - nearest;
  Vec p = rest * 0.00133908f + 0.00967603f;
  p = p * rest + 0.0555035681f;
  p = p * rest + 0.240221074f;
  p = p * rest + 0.693147188f;
  p = p * rest + 1.0f;
  return std::bit_cast<Vec>(_mm512_scalef_ps(std::bit_cast<__m512>(p), std::bit_cast<__m512>(nearest)));
}

// Of 16 vectors the largest lane of each, in order.
template <class Larger>
Vec largest_lanes(Vec (&x)[kLanes], const Larger& larger_of) {
  // Vectors i and i + half -> one that has those of i in the first half of every 2 * half lanes, of i + half in the second.
  const auto fold = [&]<int half, int... L>(std::integral_constant<int, half>, std::integer_sequence<int, L...>) {
    for (int i = 0; i < half; ++i) {
      const auto merged = [&]<int from>(std::integral_constant<int, from>) -> Vec {
        return __builtin_shufflevector(x[i], x[i + half], (L / half % 2 * 16 + L / (2 * half) * 2 * half + L % half + from)...);
      };
      x[i] = larger_of(merged(std::integral_constant<int, 0>{}), merged(std::integral_constant<int, half>{}));
    }
  };
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
  fold(std::integral_constant<int, 8>{}, lanes), fold(std::integral_constant<int, 4>{}, lanes);
  fold(std::integral_constant<int, 2>{}, lanes), fold(std::integral_constant<int, 1>{}, lanes);
  return x[0];
}

// Which lanes of vector v of a row of scores a query sees.
class Sight {
 public:
  explicit Sight(Seen seen) : low_(static_cast<int>(seen.low)), high_(static_cast<int>(seen.high)) {
    for (int l = 0; l < kLanes; ++l) lanes_[l] = l;
  }
  bool whole(int64_t pages) const { return low_ <= 0 && high_ >= pages * kPage; }
  Vec of(int64_t v, Vec x, Vec otherwise) const {
    const IntVec at = lanes_ + static_cast<int>(v) * kLanes;
    return (at >= low_) & (at < high_) ? x : otherwise;
  }

 private:
  int low_, high_;
  IntVec lanes_;
};

// The highest scores so far go to `top`; what was read before is multiplied by `less` [kTileQueries].
inline void raise_tops(const Passage& p, const float* scores, float* less) {
  Vec most[kTileQueries];
  for (Vec& m : most) m = splat(kLowest);
  for (int64_t r = 0; r < p.queries; ++r, scores += kScoreLine) {
    const Sight sight(p.seen[r]);
    const bool whole = sight.whole(p.pages);
    Vec even = most[r], odd = most[r];
    for (int64_t v = 0; v < p.pages * 4; v += 2) {
      Vec first = vec(scores + v * kLanes), second = vec(scores + (v + 1) * kLanes);
      if (!whole) first = sight.of(v, first, splat(kLowest)), second = sight.of(v + 1, second, splat(kLowest));
      even = larger(first, even), odd = larger(second, odd);
    }
    most[r] = larger(even, odd);
  }
  const auto here = static_cast<__mmask16>((1 << p.queries) - 1);
  const auto those_here = [&](const float* at) { return std::bit_cast<Vec>(_mm512_maskz_loadu_ps(here, at)); };
  Vec found = largest_lanes(most, larger);
  if (p.units) found = found > kLowest ? found * those_here(p.units) : splat(kLowest);
  const Vec before = those_here(p.top), now = larger(found, before);
  vec(less) = power_of_two(larger(before - now, splat(kLeastPower)));
  _mm512_mask_storeu_ps(p.top, here, std::bit_cast<__m512>(now));
}

// The weights of one more passage, by lane, go to a query's sums. One expression for all: if compilers contracted it here
// and not there, the last bit would tell a query's company.
inline void add_weights(float* sums, float less, Vec weights) { vec(sums) = vec(sums) * less + weights; }

// While there is one, numbers below 2^-126 count as zero: weights far below the highest cost 100 cycles each otherwise.
class NoTinyNumbers {
 public:
  NoTinyNumbers() { _mm_setcsr(before_ | kResults | kOperands); }
  ~NoTinyNumbers() { _mm_setcsr(before_); }
  NoTinyNumbers(const NoTinyNumbers&) = delete;

 private:
  static constexpr unsigned kResults = 0x8000, kOperands = 0x40;
  const unsigned before_ = _mm_getcsr();
};

#endif

}  // namespace trinity
