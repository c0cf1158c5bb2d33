#include "turns.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <atomic>
#include <exception>
#include <mutex>

namespace trinity {

void take_turns(int64_t tasks, const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  const auto run = [&](int64_t, int64_t) {
    at::AutoDispatchBelowADInplaceOrView plain;
    try {
      for (int64_t task = next++; task < tasks; task = next++) work(task);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      failure = std::current_exception();
    }
  };
  // As many strips as threads, each taking what is next.
  at::parallel_for(0, at::get_num_threads(), 1, run);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace trinity
