#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace trinity {

// out = a b, or out += a b: one oneDNN product of float32 matrices with any strides. Called inside take_turns it runs on
// one thread.
void multiply(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add);

// work(0), ..., work(tasks - 1), each once, on all threads, each thread taking the next one that is free.
void take_turns(int64_t tasks, const std::function<void(int64_t)>& work);

}  // namespace trinity
