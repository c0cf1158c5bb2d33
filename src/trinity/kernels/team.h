#pragma once

// The threads of one step of decoding: they stay together through all its phases, which are too short to start threads
// for. A phase is a number of tasks, taken one by one by whoever is free; the next begins when all are done.

#include <atomic>
#include <cstdint>

namespace trinity {

constexpr int kSpins = 4000;  // some 100 microseconds

class Team {
 public:
  int members = 1;  // set before the first phase

  // Called by every member: work(0), ..., work(tasks - 1), each once. No bit of a result may depend on who does what.
  template <class Work>
  void share(int64_t tasks, const Work& work) {
    const int turn = turn_.load(std::memory_order_acquire);
    std::atomic<int64_t>& next = next_[turn & 1];
    for (int64_t task = next++; task < tasks; task = next++) work(task);
    meet(turn);
  }

 private:
  void meet(int turn) {
    if (arrived_.fetch_add(1) + 1 == members) {
      arrived_.store(0);
      next_[(turn & 1)].store(0);
      turn_.store(turn + 1, std::memory_order_release);
      turn_.notify_all();
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins >= kSpins) turn_.wait(turn);  // somebody else has the core: asleep it comes back sooner
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  alignas(64) std::atomic<int64_t> next_[2] = {0, 0};
  alignas(64) std::atomic<int> arrived_ = 0;
  alignas(64) std::atomic<int> turn_ = 0;
};

}  // namespace trinity
