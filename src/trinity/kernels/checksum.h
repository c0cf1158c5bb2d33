#pragma once

// A sum over bytes that tells whether any of them changed, for data that is read again and again. The twin is
// `checksum_plainly` of engine/packed.py. Not against people: who can write the data can write its sum.

#include <cstdint>
#include <cstring>

namespace trinity {

// The sum, modulo 2^64, of mix(w[i] xor (i + 1) k) over the 64-bit words w, the last one filled with zeros; mix is the
// finaliser of SplitMix64 (Steele et al. 2014), k its constant. It is one to one: no change of one word goes unseen.
inline uint64_t checksum(const char* bytes, int64_t count) {
  const auto mixed = [](uint64_t word, int64_t i) {
    word ^= static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15;
    word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9;
    word = (word ^ word >> 27) * 0x94d049bb133111eb;
    return word ^ word >> 31;
  };
  uint64_t sum = 0;
  int64_t i = 0;
  for (; i < count / 8; ++i) {
    uint64_t word;
    std::memcpy(&word, bytes + 8 * i, 8);
    sum += mixed(word, i);
  }
  uint64_t rest = 0;
  std::memcpy(&rest, bytes + 8 * i, count - 8 * i);
  return count % 8 ? sum + mixed(rest, i) : sum;
}

}  // namespace trinity
