#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <utility>
#include <vector>

namespace trinity {

// work(0), ..., work(tasks - 1), each once, on all threads, each thread taking the next one that is free. So a thread
// that another process holds up does not hold up the rest, and no bit of a result depends on how many there are.
void take_turns(int64_t tasks, const std::function<void(int64_t)>& work);

// Floats of this thread alone, in one piece that stays for the next task, each part at the start of a cache line. One
// is in use at a time.
class Scratch {
 public:
  explicit Scratch(std::initializer_list<int64_t> sizes) {
    int64_t total = kLine;
    for (const int64_t size : sizes) total += whole_lines(size);
    static thread_local std::vector<float> memory;
    if (static_cast<int64_t>(memory.size()) < total) memory.resize(total);
    const auto at = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float);
    next_ = memory.data() + (whole_lines(at) - at);
  }
  float* take(int64_t size) { return std::exchange(next_, next_ + whole_lines(size)); }

 private:
  static constexpr int64_t kLine = 16;
  static constexpr int64_t whole_lines(int64_t size) { return (size + kLine - 1) / kLine * kLine; }

  float* next_;
};

}  // namespace trinity
