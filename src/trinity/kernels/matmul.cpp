// Float32 matrix products on a CPU, spread over threads in whole blocks.
//
// The BLAS that torch calls uses AVX-512 on some processors only; these use what the compiler knows this one to have.

#include <ATen/Config.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "amx.h"
#include "tile.h"
#include "turns.h"

// The BLAS inside torch; absent from builds that hide it.
extern "C" __attribute__((weak)) void sgemm_(const char* flip_a, const char* flip_b, const int* m, const int* n,
                                             const int* k, const float* alpha, const float* a, const int* a_row,
                                             const float* b, const int* b_row, const float* beta, float* c,
                                             const int* c_row);

namespace trinity {

namespace {

constexpr int64_t kRows = 96;       // rows of a result that one task computes; a multiple of every tile's rows
constexpr int64_t kDepth = 384;     // of a product at once: a panel of the right side this deep stays in the cache
constexpr int64_t kColumns = 3072;  // columns of a result that one task computes

// A panel of b [depth, width], values row and column apart, its columns beyond `columns` zero.
void pack_panel(const float* b, int64_t row, int64_t column, int64_t depth, int64_t columns, int64_t width, float* to) {
  const int64_t real = std::min(columns, width);
  if (row == 1) return transpose(b, column, real, depth, to, width);
  for (int64_t k = 0; k < depth; ++k, to += width) {
    if (column == 1 && real == width) {
      for (int64_t j = 0; j < width; j += kLanes) vec(to + j) = vec(b + k * row + j);
    } else {
      for (int64_t j = 0; j < width; ++j) to[j] = j < real ? b[k * row + j * column] : 0.0f;
    }
  }
}

// `tall` rows of a left side whose columns are contiguous -> [depth, tall], so that a tile finds its next values near.
template <int64_t tall>
void pack_left(const Left& a, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = 0; r < tall; ++r) to[k * tall + r] = a.at[r + k * a.column];
  }
}

void pack_left(const Left& a, int64_t tall, int64_t depth, float* to) {
  if (tall == 6) return pack_left<6>(a, depth, to);
  if (tall == 8) return pack_left<8>(a, depth, to);
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = 0; r < tall; ++r) to[k * tall + r] = a.at[r + k * a.column];
  }
}

// The product by our own tiles, the right side packed once for all rows.
void multiply_by_tiles(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add) {
  const int64_t rows = out.size(0), columns = out.size(1), depth = a.size(1), out_row = out.stride(0);
  const float* right = b.const_data_ptr<float>();
  const Left left{a.const_data_ptr<float>(), a.stride(0), a.stride(1)};
  float* result = out.mutable_data_ptr<float>();
  const Panels panels(columns);
  const int64_t padded = whole_vectors(columns), deep = std::max<int64_t>(1, (depth + kDepth - 1) / kDepth);
  const at::Tensor packed = at::empty({padded * depth}, b.options());
  float* pack = packed.mutable_data_ptr<float>();
  take_turns(deep * panels.count, [&](int64_t task) {
    const int64_t k = task / panels.count * kDepth, thick = std::min(kDepth, depth - k),
                  start = panels.start(task % panels.count);
    pack_panel(right + k * b.stride(0) + start * b.stride(1), b.stride(0), b.stride(1), thick, columns - start,
               panels.width(task % panels.count), pack + k * padded + start * thick);
  });
  const int64_t tall = rows_for(panels.width(0) / kLanes), across = std::max<int64_t>(1, kColumns / panels.width(0));
  const int64_t wide = (panels.count + across - 1) / across;
  take_turns((rows + kRows - 1) / kRows * wide, [&](int64_t task) {
    const int64_t top = task / wide * kRows, height = std::min(kRows, rows - top);
    const int64_t from = task % wide * across, to = std::min(panels.count, from + across);
    Scratch scratch{kTileRows * kDepth};
    float* block = scratch.take(kTileRows * kDepth);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t thick = std::min(kDepth, depth - k);
      for (int64_t i = 0; i < height; i += tall) {
        const int64_t some = std::min(tall, height - i);
        Left piece = left.from(top + i, k);
        if (piece.row == 1 && piece.column != 1) {
          pack_left(piece, some, thick, block);
          piece = {block, 1, some};
        }
        for (int64_t p = from; p < to; ++p) {
          const int64_t start = panels.start(p), width = panels.width(p);
          tile_for(some, width / kLanes)(thick, piece, pack + k * padded + start * thick, width,
                                         result + (top + i) * out_row + start, out_row, columns - start, add || k > 0);
        }
      }
    }
    if (depth == 0 && !add) {
      for (int64_t i = 0; i < height; ++i) std::fill_n(result + (top + i) * out_row, columns, 0.0f);
    }
  });
}

// Torch's BLAS is MKL on x86, which uses all of a processor that Intel made and half the vector width of others.
bool blas_is_whole() {
#if defined(__x86_64__)
  static const bool intel = AT_MKL_ENABLED() && sgemm_ != nullptr && __builtin_cpu_is("intel");
  return intel;
#else
  return false;
#endif
}

// The product by torch's BLAS: whole blocks of rows of the result, each on one thread.
void multiply_by_blas(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add) {
  // A transposed left side is a weight's gradient: its result has few rows, each the sum over very many.
  const int64_t rows = out.size(0), block = a.stride(0) == 1 && a.size(1) > rows ? 64 : 256;
  const bool b_flipped = b.stride(1) != 1, a_flipped = a.stride(1) != 1;
  const int columns = static_cast<int>(out.size(1)), depth = static_cast<int>(a.size(1));
  const int b_row = static_cast<int>(b.stride(b_flipped ? 1 : 0)),
            a_row = static_cast<int>(a.stride(a_flipped ? 1 : 0));
  const int out_row = static_cast<int>(out.stride(0));
  const float one = 1.0f, kept = add ? 1.0f : 0.0f;
  // BLAS counts columns first: the transposed product of the transposed matrices.
  take_turns((rows + block - 1) / block, [&](int64_t task) {
    const int64_t top = task * block;
    const int height = static_cast<int>(std::min(block, rows - top));
    sgemm_(b_flipped ? "T" : "N", a_flipped ? "T" : "N", &columns, &height, &depth, &one, b.const_data_ptr<float>(),
           &b_row, a.const_data_ptr<float>() + top * a.stride(0), &a_row, &kept,
           out.mutable_data_ptr<float>() + top * out_row, &out_row);
  });
}

// a [M, I] b [I, O] -> out [M, O], or added to it. Each side has contiguous rows or columns, out contiguous rows.
void matmul(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool add) {
  TORCH_CHECK(out.stride(1) == 1 || out.size(1) == 1, "the result's rows must be contiguous");
  // BLAS wants rows or columns that do not overlap, as those of an expanded gradient do.
  const auto plain = [](const at::Tensor& x) {
    return x.size(0) > 1 && x.size(1) > 1 &&
           ((x.stride(1) == 1 && x.stride(0) >= x.size(1)) || (x.stride(0) == 1 && x.stride(1) >= x.size(0)));
  };
  constexpr int64_t kWorthPacking = 1 << 14;  // values of the right side; below it BLAS is as fast
  if (has_amx() && b.numel() >= kWorthPacking) return multiply_by_amx(a, b, out, add);
  if (blas_is_whole() && plain(a) && plain(b)) return multiply_by_blas(a, b, out, add);
  multiply_by_tiles(a, b, out, add);
}

}  // namespace

TORCH_LIBRARY_IMPL(trinity, CPU, library) {
  library.impl("matmul", matmul);
  library.impl("multiply_by_tiles", multiply_by_tiles);
}

}  // namespace trinity
