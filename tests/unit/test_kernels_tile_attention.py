"""Attention on the matrix unit by itself, in builds that no optimiser has put right: the library's is one of many."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import trinity.kernels
from trinity.kernels.compiled import is_loaded

# 19 queries, then 35, each of which sees one key less than the one before, go through 14 pages; beside float64.
PROGRAM = """
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <random>
#include <vector>

#include "digit_attention.h"
#include "narrow_attention.h"

using namespace trinity;
bool trinity::has_amx() { return true; }

float kept(float x, bool narrow) { return narrow ? std::bit_cast<float>(uint32_t{narrowed(x)} << 16) : x; }

template <class Attention>
void check(int64_t kQueries, double most) {
  using Numbers = typename Attention::Numbers;
  constexpr int64_t kAllPages = 14, kSeen = 13 * kPage + 7;
  for (const int64_t size : {64, 128, 192}) {
    std::mt19937 random(size);
    std::normal_distribution<float> normal;
    const auto drawn = [&](int64_t count) {
      std::vector<float> x(count);
      for (float& one : x) one = normal(random);
      return x;
    };
    const auto aligned = [](std::vector<float>& x, int64_t count) {
      x.assign(count + kLanes, 0.0f);
      return x.data() + -reinterpret_cast<uintptr_t>(x.data()) % 64 / sizeof(float);
    };
    std::vector<float> k = drawn(kSeen * size), v = drawn(kSeen * size), q = drawn(kQueries * size), at[6];
    for (std::vector<float>* x : {&k, &v}) for (float& one : *x) one = kept(one, !Attention::kUnits);
    const int64_t page_floats = 2 * kPage * size;
    float* memory = aligned(at[0], kAllPages * page_floats);
    char* pages[kAllPages];
    for (int64_t n = 0; n < kAllPages; ++n) pages[n] = reinterpret_cast<char*>(memory + n * page_floats);
    for (int64_t t = 0; t < kSeen; ++t) {
      Numbers::put_token(&k[t * size], &v[t * size], size, t % kPage, pages[t / kPage]);
    }
    for (float& one : q) one /= std::sqrt(static_cast<float>(size));
    float *left = aligned(at[1], Numbers::query_floats(kQueries, size)), *units = aligned(at[2], kQueries);
    Numbers::put_queries(q.data(), kQueries, size, left, units);
    float *read = aligned(at[3], kQueries * size), *sums = aligned(at[4], kQueries * kLanes);
    std::vector<float> top(kQueries, kLowest);
    {
      const AmxTiles tiles(16);
      Attention attention(size, aligned(at[5], Attention::room(size)));
      for (int64_t first = 0; first < kAllPages; first += kPagesAtOnce) {
        for (int64_t i = 0; i < kQueries; i += kTileQueries) {
          Passage passage{};
          passage.pages = std::min(kPagesAtOnce, kAllPages - first);
          passage.queries = std::min(kTileQueries, kQueries - i);
          passage.left = reinterpret_cast<const char*>(left + Numbers::query_floats(i, size));
          passage.units = Attention::kUnits ? units + i : nullptr;
          passage.top = &top[i], passage.sums = sums + i * kLanes, passage.read = read + i * size;
          for (int64_t n = 0; n < passage.pages; ++n) passage.page[n] = pages[first + n];
          for (int64_t r = 0; r < passage.queries; ++r) {
            passage.seen[r] = Seen(kSeen - 1 - i - r, 0, first * kPage, passage.pages);
          }
          attention.attend(passage);
        }
      }
      attention.finish();
    }
    double worst = 0;
    for (int64_t i = 0; i < kQueries; ++i) {
      std::vector<double> sum(size);
      double whole = 0;
      for (int64_t t = 0; t < kSeen - i; ++t) {
        double score = 0;
        for (int64_t c = 0; c < size; ++c) score += double(q[i * size + c]) * k[t * size + c];
        whole += std::exp(score);
        for (int64_t c = 0; c < size; ++c) sum[c] += std::exp(score) * v[t * size + c];
      }
      const float total = sum_of(vec(sums + i * kLanes));
      for (int64_t c = 0; c < size; ++c) worst = std::max(worst, std::abs(sum[c] / whole - read[i * size + c] / total));
    }
    std::printf("%d ", worst < most);
  }
}

int main() {
  syscall(SYS_arch_prctl, 0x1023, 18);  // Linux lends the matrix unit to who asks
  for (const int64_t queries : {19, 35}) check<DigitAttention>(queries, 1e-6), check<NarrowAttention>(queries, 2e-5);
}
"""
COMPILERS = [path for path in map(shutil.which, ("g++", "clang++")) if path]
HAS_AMX = os.environ.get("TRINITY_KERNELS") != "tiles" and is_loaded() and torch.ops.trinity.use_amx(True)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_AMX, reason="this processor has no AMX, or it is left out")
@pytest.mark.parametrize("level", ["-O0", "-O3"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_it_computes_attention_in_any_build(compiler: str, level: str, tmp_path: Path):
    (tmp_path / "attention.cpp").write_text(PROGRAM)
    folders = [f"-I{Path(trinity.kernels.__file__).parent}", f"-isystem{Path(torch.__file__).parent / 'include'}"]
    build = [compiler, "-std=c++20", level, "-march=native", "-w", *folders, "attention.cpp", "-o", "attention"]
    subprocess.run(build, cwd=tmp_path, check=True, timeout=300)
    ran = subprocess.run([tmp_path / "attention"], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, 12 * "1 ")
