// C[s] = A[s] B[s]^T for a number of samples: an example of double-buffered asynchronous copies, ldmatrix and
// mma.sync on a GPU and on the CPU. A reference for tests, not optimized.
#pragma once

#include "../../../csrc/common/types.h"
#include "../../../csrc/cuda/fragment.cuh"
#include "../../../csrc/cuda/ptx.cuh"

namespace diffratio::reference {

struct Gemm {
  const BFloat16* a;     // [samples][m][k]
  const BFloat16* b;     // [samples][n][k]
  float* c;              // [samples][m][n]
  int samples, m, n, k;  // m, n, k: multiples of 16
};

constexpr int gemm_threads = 128;  // 2 x 2 warps, each makes 16 x 16 of the block's 32 x 32
constexpr int gemm_tile = 32, gemm_depth = 16;
constexpr int gemm_stride = gemm_depth + 8;                               // of an operand's tile in shared memory
constexpr int gemm_stage = gemm_tile * gemm_stride;                       // elements
constexpr int gemm_out_stride = 16 + 4, gemm_out = 16 * gemm_out_stride;  // of a warp's staged output

constexpr uint32_t gemm_shared_bytes = 2 * 2 * gemm_stage * 2 + gemm_threads / 32 * gemm_out * 4;

// The lane maps; a test puts wrong ones in their place.
struct GemmMaps {
  static DR_DEVICE fragment::Element a_row(int lane) { return fragment::a_row(lane); }
  static DR_DEVICE fragment::Element b_row(int lane) { return fragment::b_row(lane); }
  static DR_DEVICE fragment::Element accumulator(int lane) { return fragment::accumulator(lane); }
};

// 32 rows of 16 elements from column `first` of rows `row`... of x[rows][k]; rows beyond the end are zeros.
DR_DEVICE void gemm_fetch(const ptx::SharedTile<BFloat16, gemm_stride>& to, const BFloat16* x, int row, int rows,
                          int first, int k) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= gemm_tile * gemm_depth / 8) return;
  const int r = thread / 2, c = thread % 2 * 8;
  const bool there = row + r < rows;
  ptx::copy_async(to.address(r, c), x + static_cast<int64_t>(there ? row + r : 0) * k + first + c, there ? 16 : 0);
}

template <class Maps>
__global__ void __launch_bounds__(gemm_threads) gemm_kernel(const Gemm g) {
  using Tile = ptx::SharedTile<BFloat16, gemm_stride>;
  ptx::SharedArena arena;
  const auto a_stages = arena.take<BFloat16>(2 * gemm_stage, "a");
  const auto b_stages = arena.take<BFloat16>(2 * gemm_stage, "b");
  const auto staged = arena.take<float>(gemm_threads / 32 * gemm_out, "out");

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp / 2 * 16, warp_column = warp % 2 * 16;
  const ptx::SharedTile<float, gemm_out_stride> out(staged.part(warp * gemm_out, gemm_out));
  const auto a_row = Maps::a_row(lane), b_row = Maps::b_row(lane), mine = Maps::accumulator(lane);
  const int rows = (g.m + gemm_tile - 1) / gemm_tile, columns = (g.n + gemm_tile - 1) / gemm_tile;
  const int steps = g.k / gemm_depth;

  const int works = g.samples * rows * columns;
  for (int work = static_cast<int>(blockIdx.x); work < works; work += static_cast<int>(gridDim.x)) {
    const int sample = work / (rows * columns);
    const int row = work / columns % rows * gemm_tile, column = work % columns * gemm_tile;
    const BFloat16* a = g.a + static_cast<int64_t>(sample) * g.m * g.k;
    const BFloat16* b = g.b + static_cast<int64_t>(sample) * g.n * g.k;
    const auto fetch = [&](int step) {
      const int stage = step % 2 * gemm_stage;
      gemm_fetch(Tile(a_stages.part(stage, gemm_stage)), a, row, g.m, step * gemm_depth, g.k);
      gemm_fetch(Tile(b_stages.part(stage, gemm_stage)), b, column, g.n, step * gemm_depth, g.k);
    };

    float d[2][4] = {};
    fetch(0);
    ptx::copy_commit();
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) {
        fetch(step + 1);
        ptx::copy_commit();
        ptx::copy_wait<1>();
      } else {
        ptx::copy_wait<0>();
      }
      ptx::block_sync();  // all threads' copies of this step are complete
      const Tile ta(a_stages.part(step % 2 * gemm_stage, gemm_stage));
      const Tile tb(b_stages.part(step % 2 * gemm_stage, gemm_stage));
      uint32_t fa[4], fb[4];
      ptx::ldmatrix_x4(fa, ta.address(warp_row + a_row.row, a_row.column));
      ptx::ldmatrix_x4(fb, tb.address(warp_column + b_row.row, b_row.column));
      ptx::mma_bf16(d[0], fa, fb[0], fb[1]);
      ptx::mma_bf16(d[1], fa, fb[2], fb[3]);
      if (step + 2 < steps) ptx::block_sync();  // before the stage is fetched into again
    }

    // Through shared memory, so that global memory is written 16 bytes at a time.
    DR_UNROLL
    for (int half = 0; half < 2; ++half) {
      DR_UNROLL
      for (int i = 0; i < 4; ++i) {
        out.store(mine.row + i / 2 * 8, half * 8 + mine.column + i % 2, d[half][i]);
      }
    }
    ptx::warp_sync();  // the staging is this warp's own
    if (row + warp_row < g.m && column + warp_column < g.n) {
      float* c = g.c + (static_cast<int64_t>(sample) * g.m + row + warp_row) * g.n + column + warp_column;
      for (int i = lane; i < 16 * 4; i += 32) {
        ptx::store16<ptx::Cache::streaming>(c + static_cast<int64_t>(i / 4) * g.n + i % 4 * 4,
                                            out.template load<ptx::Vector16>(i / 4, i % 4 * 4));
      }
    }
    ptx::forget_shared();
    ptx::block_sync();  // before the next tile's first fetch
  }
}

}  // namespace diffratio::reference
