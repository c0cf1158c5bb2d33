#pragma once

// Experts of a model that is larger than memory: their records stay in a file, and some of them in slots of memory.
//
// A layer asks for the experts that its rows chose (begin). Those that are here can be used at once; the others are read
// by threads of their own in the order of their use, while the first ones are computed with (wait). Where a layer needs
// more experts than there are slots, it goes through them in waves, of which the next is read during the present one
// (turn). The slot that is given up is that of the expert of the least heat: the tokens that chose it, each counting half
// as much kHalfLife tokens later. Every record is checked against the sum that was taken when it was written.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <fcntl.h>
#include <torch/custom_class.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "checksum.h"

namespace trinity {

class ExpertCache : public torch::CustomClassHolder {
 public:
  // starts: where in the file the records of each layer begin, end to end, `record` bytes each; sums [layers x experts]:
  // their checksums. Takes slots x record bytes of memory at once: what was promised is then there, and others can count
  // on what is left.
  ExpertCache(std::string file, std::vector<int64_t> starts, int64_t experts, int64_t record, int64_t slots, at::Tensor sums)
      : file_(std::move(file)), starts_(std::move(starts)), experts_(experts), record_(record), sums_(std::move(sums)) {
    TORCH_CHECK(slots >= 2 && record > 0 && record % 64 == 0 && sums_.is_contiguous() && sums_.scalar_type() == at::kLong);
    TORCH_CHECK(sums_.numel() == static_cast<int64_t>(starts_.size()) * experts);
    memory_ = at::empty({slots * record + 64}, at::kByte);
    std::memset(memory_.mutable_data_ptr(), 0, memory_.nbytes());
    slots_ = std::vector<Slot>(slots);
    place_.assign(sums_.numel(), -1), heat_.assign(sums_.numel(), -std::numeric_limits<double>::infinity());
    clock_.assign(starts_.size(), 0);
    descriptor_ = open(file_.c_str(), O_RDONLY | O_CLOEXEC);
    TORCH_CHECK(descriptor_ >= 0, file_, " cannot be opened: ", std::strerror(errno));
    try {
      for (int i = 0; i < kReaders; ++i) readers_.emplace_back([this] { read_on(); });
    } catch (...) {
      stop();
      throw;
    }
  }

  ~ExpertCache() override { stop(); }

  // Before a step: a process that forked has no readers.
  void check_process() const {
    TORCH_CHECK(getpid() == process_, "experts on the disk cannot be read after a fork: load the model in the new process");
  }

  // Ask for the experts `used` of a layer, whose rows are those of `ends` (expert e has ends[e] .. ends[e + 1]); puts those
  // that are here first. Returns the number of waves, each of wave_size() experts in the order of `used`.
  int64_t begin(int64_t layer, std::vector<int64_t>& used, const std::vector<int64_t>& ends, int64_t rows) {
    const std::lock_guard lock(mutex_);
    ++epoch_, wave_ = 0, layer_ = layer;
    for (const int64_t place : failed_) leave(slots_[place]);
    failed_.clear();
    clock_[layer] += rows;
    for (const int64_t e : used) warm(layer * experts_ + e, ends[e + 1] - ends[e], clock_[layer]);
    std::stable_partition(used.begin(), used.end(), [&](int64_t e) { return place_[layer * experts_ + e] >= 0; });
    used_ = used;
    const int64_t count = static_cast<int64_t>(used.size()), slots = static_cast<int64_t>(slots_.size());
    wave_size_ = std::max<int64_t>(1, count <= slots ? count : slots / 2);
    request(0), request(1);
    return std::max<int64_t>(1, (count + wave_size_ - 1) / wave_size_);
  }

  // Go on to a wave: what the one before it used may be given up, and the next one is asked for.
  void turn(int64_t wave) {
    const std::lock_guard lock(mutex_);
    wave_ = wave;
    request(wave + 1);
  }

  int64_t wave_size() const { return wave_size_; }

  // The record of an expert that the present wave has, once it is here; null where it could not be read.
  const char* wait(int64_t layer, int64_t expert) {
    const int64_t place = place_[layer * experts_ + expert];
    Slot& slot = slots_[place];
    State state = slot.state.load(std::memory_order_acquire);
    if (state == State::kLoading) {
      std::unique_lock lock(mutex_);
      const auto now = [] { return std::chrono::steady_clock::now(); };
      if (waiting_++ == 0) since_ = now();
      arrived_.wait(lock, [&] { return (state = slot.state) != State::kLoading; });
      if (--waiting_ == 0) stalled_ += std::chrono::duration_cast<std::chrono::nanoseconds>(now() - since_).count();
    }
    return state == State::kReady ? record_at(place) : nullptr;
  }

  // So far: experts asked for that were here, that were not, bytes read, nanoseconds that some thread had to wait.
  std::vector<int64_t> counts() const {
    const std::lock_guard lock(mutex_);
    return {hits_, misses_, bytes_, stalled_};
  }

  // What went wrong since the last call, empty if nothing.
  std::string failure() {
    const std::lock_guard lock(mutex_);
    return std::exchange(failure_, {});
  }

 private:
  static constexpr int kReaders = 4;  // so that a disk has several reads before it
  static constexpr double kHalfLife = 512;
  enum class State { kEmpty, kLoading, kReady, kFailed };
  struct Slot {
    std::atomic<State> state = State::kEmpty;
    int64_t expert = -1, epoch = 0, wave = 0;  // layer x experts + expert; when it was last asked for
    Slot() = default;
    Slot(const Slot&) {}  // only empty ones are copied
  };

  void stop() {
    if (getpid() != process_) {  // the readers are another process's
      for (std::thread& reader : readers_) reader.detach();
    } else {
      {
        const std::lock_guard lock(mutex_);
        over_ = true;
      }
      wanted_.notify_all();
      for (std::thread& reader : readers_) reader.join();
    }
    close(descriptor_);
  }

  char* record_at(int64_t place) {
    const auto first = (reinterpret_cast<uintptr_t>(memory_.mutable_data_ptr()) + 63) / 64 * 64;
    return reinterpret_cast<char*>(first) + place * record_;
  }

  // The logarithm of the sum over tokens of 2^(time / half-life): in the order of decayed counts, and nothing to decay.
  void warm(int64_t expert, int64_t rows, int64_t time) {
    const double added = std::log2(static_cast<double>(rows)) + static_cast<double>(time) / kHalfLife;
    const double most = std::max(heat_[expert], added), least = std::min(heat_[expert], added);
    heat_[expert] = most + std::log2(1.0 + std::exp2(least - most));
  }

  void leave(Slot& slot) {
    if (slot.expert >= 0) place_[slot.expert] = -1;
    slot.expert = -1, slot.state = State::kEmpty;
  }

  void request(int64_t wave) {
    const auto begin = used_.begin() + std::min<int64_t>(wave * wave_size_, used_.size());
    const auto end = used_.begin() + std::min<int64_t>((wave + 1) * wave_size_, used_.size());
    missing_.clear();
    for (auto e = begin; e != end; ++e) {
      const int64_t expert = layer_ * experts_ + *e, place = place_[expert];
      if (place < 0) {
        missing_.push_back(expert);
      } else {
        slots_[place].epoch = epoch_, slots_[place].wave = wave;
      }
    }
    misses_ += missing_.size(), hits_ += end - begin - missing_.size();
    if (missing_.empty()) return;
    give_up(missing_.size());
    for (size_t i = 0; i < missing_.size(); ++i) {
      Slot& slot = slots_[victims_[i]];
      leave(slot);
      slot.expert = missing_[i], slot.state = State::kLoading, slot.epoch = epoch_, slot.wave = wave;
      place_[missing_[i]] = victims_[i];
      jobs_.push_back(victims_[i]);
    }
    wanted_.notify_all();
  }

  // Find the slots to give up: empty ones, then those of the least heat which the present waves do not use.
  void give_up(size_t count) {
    victims_.clear();
    for (int64_t place = 0; place < static_cast<int64_t>(slots_.size()); ++place) {
      const Slot& slot = slots_[place];
      const bool in_use = slot.state == State::kLoading || (slot.epoch == epoch_ && slot.wave >= wave_);
      if (slot.expert < 0 || !in_use) victims_.push_back(place);
    }
    TORCH_INTERNAL_ASSERT(victims_.size() >= count, "two waves fit into the slots");
    const auto heat = [&](int64_t place) {
      const int64_t expert = slots_[place].expert;
      return expert < 0 ? -std::numeric_limits<double>::infinity() : heat_[expert];
    };
    std::nth_element(victims_.begin(), victims_.begin() + count - 1, victims_.end(),
                     [&](int64_t a, int64_t b) { return heat(a) < heat(b); });
  }

  void read_on() {
    std::unique_lock lock(mutex_);
    while (true) {
      wanted_.wait(lock, [&] { return over_ || !jobs_.empty(); });
      if (over_) return;
      const int64_t place = jobs_.front();
      jobs_.pop_front();
      const int64_t expert = slots_[place].expert;
      lock.unlock();
      std::string wrong = read(expert, record_at(place));
      lock.lock();
      bytes_ += wrong.empty() ? record_ : 0;
      slots_[place].state.store(wrong.empty() ? State::kReady : State::kFailed, std::memory_order_release);
      if (!wrong.empty()) failed_.push_back(place);
      if (failure_.empty()) failure_ = std::move(wrong);
      arrived_.notify_all();
    }
  }

  std::string read(int64_t expert, char* to) const {
    const int64_t start = starts_[expert / experts_] + expert % experts_ * record_;
    for (int64_t done = 0; done < record_;) {
      const ssize_t got = pread(descriptor_, to + done, record_ - done, start + done);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return file_ + " cannot be read: " + std::strerror(errno);
      if (got == 0) return file_ + " is shorter than it was";
      done += got;
    }
    const auto sum = static_cast<uint64_t>(sums_.const_data_ptr<int64_t>()[expert]);
    return checksum(to, record_) == sum ? "" : file_ + " is not what it was: an expert's bytes have changed";
  }

  const std::string file_;
  const std::vector<int64_t> starts_;
  const int64_t experts_, record_;
  const at::Tensor sums_;
  const pid_t process_ = getpid();
  int descriptor_ = -1;
  at::Tensor memory_;

  mutable std::mutex mutex_;
  std::condition_variable wanted_, arrived_;
  std::vector<Slot> slots_;
  std::vector<int64_t> place_;  // of each expert, or -1
  std::vector<double> heat_;
  std::vector<int64_t> clock_;  // rows that each layer has seen
  std::deque<int64_t> jobs_;    // slots to fill
  std::vector<int64_t> failed_, missing_, victims_;
  std::vector<int64_t> used_;   // by the present layer
  int64_t layer_ = 0, epoch_ = 0, wave_ = 0, wave_size_ = 1;
  int64_t hits_ = 0, misses_ = 0, bytes_ = 0, stalled_ = 0;
  int waiting_ = 0;
  std::chrono::steady_clock::time_point since_;
  std::string failure_;
  bool over_ = false;
  std::vector<std::thread> readers_;
};

}  // namespace trinity
