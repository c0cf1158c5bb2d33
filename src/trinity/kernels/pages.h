#pragma once

// Attention over one page of keys and values after another, of queries that share them. A query's result depends on the
// page and on itself alone, to the bit, whichever others are there: every sum goes in order, along the head's values for
// a score, along the page's tokens for what is read. Pages are float32 or bfloat16; what is computed is float32.

#include <cmath>
#include <limits>

#include "panels.h"

namespace trinity {

constexpr int64_t kPage = 64;                     // tokens; engine/pages.py knows the same number
constexpr int64_t kTogether = 4 * rows_for(4);    // queries whose scores over a page stay in the nearest cache
constexpr float kLowest = -std::numeric_limits<float>::max();

inline void widen(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    vec(to + i) = std::bit_cast<Vec>(halves(reinterpret_cast<const char*>(from + i)) << 16);
  }
  for (; i < count; ++i) to[i] = std::bit_cast<float>(uint32_t{from[i]} << 16);
}

// The greatest of all lanes and `least`; what is no number counts as nothing.
inline float highest_of(Vec x, float least) {
  return folded(x > least ? x : splat(least), [](Vec a, Vec b) { return a > b ? a : b; });
}

// The keys that a query sees, of those of some pages.
struct Seen {
  int64_t low = 0, high = 0;
  Seen() = default;
  Seen(int64_t position, int64_t oldest, int64_t start, int64_t pages = 1)
      : low(std::max<int64_t>(0, oldest - start)), high(std::min(pages * kPage, position + 1 - start)) {}
};

// Scores of a query over a page become e^(score - highest so far), zero where it does not see the key. Where the highest
// rises, what was gathered before sinks: `sums` [kLanes], one for keys of each place in a vector, and `read` [size].
inline void soften(float* scores, Seen seen, float& highest, float* sums, float* read, int64_t size) {
  constexpr int V = kPage / kLanes;
  IntVec lanes;
  for (int l = 0; l < kLanes; ++l) lanes[l] = l;
  const bool partly = seen.low > 0 || seen.high < kPage;
  const int low = static_cast<int>(seen.low), high = static_cast<int>(seen.high);
  Vec score[V], most = splat(kLowest);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    score[v] = vec(scores + v * kLanes);
    if (partly) score[v] = (lanes + v * kLanes >= low) & (lanes + v * kLanes < high) ? score[v] : splat(kLowest);
    most = score[v] > most ? score[v] : most;
  }
  const float top = highest_of(most, highest);
  if (top > highest) {
    const float less = exponential(splat(highest - top))[0];
    vec(sums) *= less;
    for (int64_t c = 0; c < size; ++c) read[c] *= less;
    highest = top;
  }
  Vec gathered = vec(sums);
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    Vec part = exponential(score[v] - top);
    if (partly) part = (lanes + v * kLanes >= low) & (lanes + v * kLanes < high) ? part : Vec{};
    vec(scores + v * kLanes) = part;
    gathered += part;
  }
  vec(sums) = gathered;
}

}  // namespace trinity
