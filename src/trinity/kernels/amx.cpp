// Whole products on AMX, and the permission to use it, which Linux lends a process on request.

#include "amx.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>

#include "turns.h"

#ifdef TRINITY_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace trinity {

namespace {

std::atomic<bool> wanted{true};

bool is_lent() {
#ifdef TRINITY_AMX
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Whether products go to AMX from now on.
bool use_amx(bool wish) {
  wanted = wish;
  return has_amx();
}

// Lines of a task: as many as there is work for all threads, at most eight panels.
int64_t lines_of_a_task(int64_t lines) {
  constexpr int64_t kPanels = 8;
  const int64_t panels = (lines + kPanelLines - 1) / kPanelLines, threads = at::get_num_threads();
  const int64_t shares = threads * std::max<int64_t>(1, panels / (threads * kPanels));
  return (panels + shares - 1) / shares * kPanelLines;
}

// A block of the right side is packed for all rows, those of the left side where they are used.
void multiply_rows_by_amx(Left left, Left right, int64_t rows, int64_t columns, int64_t depth, float* out,
                          int64_t out_row, bool add) {
  constexpr int64_t kAtOnce = 1536;  // depth and columns of the packed block: 14 MB
  constexpr int64_t kDepth = 384;    // of it, what stays in the cache of a core
  const at::Tensor packed = at::empty({packed_size(std::min(columns, kAtOnce), std::min(depth, kAtOnce))}, at::kFloat);
  float* block = packed.mutable_data_ptr<float>();
  const int64_t height = lines_of_a_task(rows);
  for (int64_t j = 0; j < columns; j += kAtOnce) {
    const int64_t wide = std::min(kAtOnce, columns - j), share = lines_of_a_task(wide);
    for (int64_t k = 0; k < depth; k += kAtOnce) {
      const int64_t deep = std::min(kAtOnce, depth - k);
      take_turns((wide + share - 1) / share, [&](int64_t task) {
        const int64_t at = task * share;
        for (int64_t from = 0; from < deep; from += kDepth) {
          const int64_t some = std::min(kDepth, deep - from);
          pack_side<Side::right>(right.from(j + at, k + from), std::min(share, wide - at), some,
                                 block + packed_size(wide, from) + packed_size(at, some));
        }
      });
      take_turns((rows + height - 1) / height, [&](int64_t task) {
        const int64_t top = task * height, tall = std::min(height, rows - top);
        const AmxTiles tiles;
        Scratch scratch{packed_size(tall, kDepth)};
        float* mine = scratch.take(packed_size(tall, kDepth));
        for (int64_t from = 0; from < deep; from += kDepth) {
          const int64_t some = std::min(kDepth, deep - from);
          pack_side<Side::left>(left.from(top, k + from), tall, some, mine);
          multiply_packed(tall, wide, some, mine, block + packed_size(wide, from), out + top * out_row + j, out_row,
                          add || k + from > 0);
        }
      });
    }
  }
}

// A small result over a great depth, a weight's gradient: each task takes a stretch of the depth and packs its own.
void multiply_depth_by_amx(Left left, Left right, int64_t rows, int64_t columns, int64_t depth, float* out,
                           int64_t out_row, bool add) {
  constexpr int64_t kStretch = 512, kDepth = 128;  // of a task; at once
  const int64_t stretches = (depth + kStretch - 1) / kStretch;
  const at::Tensor parts = at::empty({stretches, rows, columns}, at::kFloat);
  float* part = parts.mutable_data_ptr<float>();
  take_turns(stretches, [&](int64_t task) {
    const AmxTiles tiles;
    Scratch scratch{packed_size(rows, kDepth), packed_size(columns, kDepth)};
    float *a = scratch.take(packed_size(rows, kDepth)), *b = scratch.take(packed_size(columns, kDepth));
    const int64_t start = task * kStretch, end = std::min(depth, start + kStretch);
    for (int64_t k = start; k < end; k += kDepth) {
      const int64_t some = std::min(kDepth, end - k);
      pack_side<Side::left>(left.from(0, k), rows, some, a);
      pack_side<Side::right>(right.from(0, k), columns, some, b);
      multiply_packed(rows, columns, some, a, b, part + task * rows * columns, columns, k > start);
    }
  });
  take_turns(rows, [&](int64_t i) {
    float* to = out + i * out_row;
    for (int64_t s = 0; s < stretches; ++s) {
      const float* from = part + (s * rows + i) * columns;
      if (s == 0 && !add) {
        std::copy_n(from, columns, to);
      } else {
        for (int64_t j = 0; j < columns; ++j) to[j] += from[j];
      }
    }
  });
}

}  // namespace

bool has_amx() {
  static const bool lent = is_lent();
  return lent && wanted;
}

void multiply_by_amx(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add) {
  TORCH_CHECK(has_amx(), "this processor has no AMX, or it is not lent to this process");
  const Left left{a.const_data_ptr<float>(), a.stride(0), a.stride(1)};
  const Left right{b.const_data_ptr<float>(), b.stride(1), b.stride(0)};  // by columns
  const int64_t rows = out.size(0), columns = out.size(1), depth = a.size(1);
  if (depth == 0 && !add) out.zero_();
  constexpr int64_t kSmall = 512;
  const bool deep = rows <= kSmall && columns <= kSmall && depth >= 4 * kSmall;
  const auto multiply = deep ? multiply_depth_by_amx : multiply_rows_by_amx;
  multiply(left, right, rows, columns, depth, out.mutable_data_ptr<float>(), out.stride(0), add);
}

TORCH_LIBRARY_IMPL(trinity, CPU, library) { library.impl("multiply_by_amx", multiply_by_amx); }
TORCH_LIBRARY_IMPL(trinity, CompositeExplicitAutograd, library) { library.impl("use_amx", use_amx); }

}  // namespace trinity
