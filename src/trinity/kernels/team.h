#pragma once

// The threads of one step of decoding: they stay together through all its phases, which are too short to start threads
// for. A phase is a number of tasks, taken one by one by whoever is free; the next begins when all are done. Nobody is
// waited for who has no task: a thread that the system has put aside holds the others up only by what it was doing, and
// finds its place again when it comes back. (A barrier after each phase cost nine tenths of the speed beside neighbours.)

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace trinity {

class Team {
 public:
  // One thread's way through the phases. Every member makes the same calls in the same order.
  class Member {
   public:
    explicit Member(Team& team) : team_(team) {}

    // work(0), ..., work(count() - 1), each by one member, and where there was any, then() by whoever ends the last of
    // them: a phase of one task would cost more than it does. `count` may depend on the phases before. No bit of a result
    // may depend on who does what.
    template <class Count, class Work, class Then>
    void share_some(const Count& count, const Work& work, const Then& then) {
      const uint64_t phase = phase_++;
      for (int spins = 0;;) {
        uint64_t state = team_.state_.load(std::memory_order_acquire);
        if (state >> 32 != phase) return;  // done by the others
        const uint64_t tasks = count(), next = state & 0xffffffff;
        if (tasks == 0) {
          if (team_.state_.compare_exchange_strong(state, (phase + 1) << 32)) return;
        } else if (next >= tasks) {
          if (++spins > kSpins) std::this_thread::yield();  // somebody has a task, and perhaps no core
          pause();
        } else if (team_.state_.compare_exchange_weak(state, state + 1)) {  // still this phase, so `tasks` was right
          work(static_cast<int64_t>(next));
          if (team_.done_.fetch_add(1) + 1 == tasks) {
            then();
            team_.done_.store(0);
            team_.state_.store((phase + 1) << 32, std::memory_order_release);
            return;
          }
        }
      }
    }

    template <class Work, class Then = void (*)()>
    void share(int64_t tasks, const Work& work, const Then& then = [] {}) {
      share_some([tasks] { return static_cast<uint64_t>(tasks); }, work, then);
    }

   private:
    static constexpr int kSpins = 2000;
    static void pause() {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }

    Team& team_;
    uint64_t phase_ = 0;
  };

  // One thread's part, in a region of many. What it throws ends the phases of all: an exception must not leave a region.
  template <class Part>
  void join(const Part& part) {
    try {
      Member member(*this);
      part(member);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard_);
      failure_ = std::current_exception();
      state_.store(kNoPhase << 32);  // where another goes on with the phase all the same, it comes to its end
    }
  }

  // Behind the region: throws what a member threw.
  void check() {
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  static constexpr uint64_t kNoPhase = 0xffffffff;

  std::mutex guard_;
  std::exception_ptr failure_;
  alignas(64) std::atomic<uint64_t> state_ = 0;  // the phase, and the next of its tasks
  alignas(64) std::atomic<uint64_t> done_ = 0;
};

}  // namespace trinity
