// out[s] = the sum of x[s][0..size): a block reduction with shuffles and barriers, several samples per block.
#pragma once

#include "../../../csrc/cuda/ptx.cuh"

namespace diffratio::reference {

struct Reduce {
  const float* x;
  float* out;
  int samples, size;
};

constexpr int reduce_threads = 128, reduce_warps = reduce_threads / 32;
constexpr uint32_t reduce_shared_bytes = reduce_warps * 4;

DR_DEVICE float warp_sum(float x) {
  DR_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += ptx::shuffle_xor(x, mask);
  return x;
}

static __global__ void __launch_bounds__(reduce_threads) reduce_kernel(const Reduce r) {
  ptx::SharedArena arena;
  const auto partial = arena.take<float>(reduce_warps, "partial");
  const int thread = static_cast<int>(threadIdx.x);
  for (int sample = static_cast<int>(blockIdx.x); sample < r.samples; sample += static_cast<int>(gridDim.x)) {
    float sum = 0;
    const float* x = r.x + static_cast<int64_t>(sample) * r.size;
    for (int i = thread; i < r.size; i += reduce_threads) sum += ptx::load(x + i);
    sum = warp_sum(sum);
    if (thread % 32 == 0) partial.store(thread / 32, sum);
    ptx::block_sync();  // all warps' sums are written
    if (thread == 0) {
      float total = 0;
      for (int i = 0; i < reduce_warps; ++i) total += partial.load(i);
      ptx::store(r.out + sample, total);
    }
    ptx::forget_shared();
    ptx::block_sync();  // before the next sample's sums
  }
}

}  // namespace diffratio::reference
