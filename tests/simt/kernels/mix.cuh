// Two stages of a mixer, per sample: y = x + M x over tokens, then out = y + y W^T over channels, with the residual
// in the accumulators throughout and both weights in shared memory for the lifetime of the block.
#pragma once

#include "../../../csrc/common/types.h"
#include "../../../csrc/cuda/fragment.cuh"
#include "../../../csrc/cuda/ptx.cuh"

namespace diffratio::reference {

struct Mix {
  const BFloat16* x;  // [samples][tokens][channels]
  const BFloat16* m;  // [tokens][tokens]
  const BFloat16* w;  // [channels][channels]
  float* out;         // like x
  int samples;
};

template <int tokens>
constexpr int mix_threads = tokens * 2;  // a warp for every 16 tokens
constexpr uint32_t mix_shared_bytes(int tokens, int channels) {
  return 2 * (tokens * (channels + 8) + tokens * (tokens + 8) + channels * (channels + 8));
}

template <int rows, int columns>
DR_DEVICE void mix_fetch(const ptx::SharedTile<BFloat16, columns + 8>& to, const BFloat16* from, int threads) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns / 8; i += threads) {
    const int row = i / (columns / 8), column = i % (columns / 8) * 8;
    ptx::copy_async(to.address(row, column), from + row * columns + column);
  }
}

template <int tokens, int channels>
__global__ void __launch_bounds__(mix_threads<tokens>) mix_kernel(const Mix g) {
  constexpr int threads = mix_threads<tokens>, columns = channels / 8;
  ptx::SharedArena arena;
  const ptx::SharedTile<BFloat16, channels + 8> x(arena.take<BFloat16>(tokens * (channels + 8), "x"));
  const ptx::SharedTile<BFloat16, tokens + 8> m(arena.keep<BFloat16>(tokens * (tokens + 8), "m"));
  const ptx::SharedTile<BFloat16, channels + 8> w(arena.keep<BFloat16>(channels * (channels + 8), "w"));

  const int lane = static_cast<int>(threadIdx.x) % 32, first = static_cast<int>(threadIdx.x) / 32 * 16;
  const auto a_row = fragment::a_row(lane), b_row = fragment::b_row(lane), mine = fragment::accumulator(lane);
  mix_fetch<tokens, tokens>(m, g.m, threads);
  mix_fetch<channels, channels>(w, g.w, threads);

  for (int sample = static_cast<int>(blockIdx.x); sample < g.samples; sample += static_cast<int>(gridDim.x)) {
    mix_fetch<tokens, channels>(x, g.x + static_cast<int64_t>(sample) * tokens * channels, threads);
    ptx::copy_commit();
    ptx::copy_wait<0>();
    ptx::block_sync();  // x is loaded, and in the first iteration the weights

    float h[columns][4];
    DR_UNROLL
    for (int n = 0; n < columns; ++n) {
      DR_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = x.template load<uint32_t>(first + mine.row + half * 8, n * 8 + mine.column);
        h[n][2 * half] = ptx::low_bf16(pair);
        h[n][2 * half + 1] = ptx::high_bf16(pair);
      }
    }
    for (int k = 0; k < tokens; k += 16) {
      uint32_t a[4], b[4];
      ptx::ldmatrix_x4(a, m.address(first + a_row.row, k + a_row.column));
      DR_UNROLL
      for (int n = 0; n < columns; n += 2) {
        ptx::ldmatrix_x4_trans(b, x.address(k + a_row.row, n * 8 + a_row.column));
        ptx::mma_bf16(h[n], a, b[0], b[1]);
        ptx::mma_bf16(h[n + 1], a, b[2], b[3]);
      }
    }
    ptx::block_sync();  // every warp has read all of x: y may overwrite it

    DR_UNROLL
    for (int n = 0; n < columns; ++n) {
      DR_UNROLL
      for (int half = 0; half < 2; ++half) {
        x.store(first + mine.row + half * 8, n * 8 + mine.column, ptx::pack_bf16(h[n][2 * half], h[n][2 * half + 1]));
      }
    }
    ptx::warp_sync();  // a warp reads only its own tokens of y
    DR_UNROLL
    for (int k = 0; k < channels; k += 16) {
      uint32_t a[4], b[4];
      ptx::ldmatrix_x4(a, x.address(first + a_row.row, k + a_row.column));
      DR_UNROLL
      for (int n = 0; n < columns; n += 2) {
        ptx::ldmatrix_x4(b, w.address(n * 8 + b_row.row, k + b_row.column));
        ptx::mma_bf16(h[n], a, b[0], b[1]);
        ptx::mma_bf16(h[n + 1], a, b[2], b[3]);
      }
    }

    float* out = g.out + static_cast<int64_t>(sample) * tokens * channels;
    DR_UNROLL
    for (int n = 0; n < columns; ++n) {
      DR_UNROLL
      for (int i = 0; i < 4; ++i) {
        ptx::store(out + (first + mine.row + i / 2 * 8) * channels + n * 8 + mine.column + i % 2, h[n][i]);
      }
    }
    ptx::forget_shared();
    ptx::block_sync();  // before the next sample is fetched
  }
}

}  // namespace diffratio::reference
