// A cooperative launch: out[i] = x[i] / (the sum of x), in which every block needs the sums of the others.
#pragma once

#include "reduce.cuh"

namespace diffratio::reference {

struct Share {
  const float* x;
  float* out;
  float* partial;     // [blocks]
  uint32_t* arrived;  // zero
  int size;
};

static __global__ void __launch_bounds__(32) share_kernel(const Share s) {
  const int first = static_cast<int>(blockIdx.x * 32 + threadIdx.x), step = static_cast<int>(gridDim.x) * 32;
  float sum = 0;
  for (int i = first; i < s.size; i += step) sum += ptx::load(s.x + i);
  sum = warp_sum(sum);
  if (threadIdx.x == 0) ptx::store(s.partial + blockIdx.x, sum);
  ptx::grid_sync(s.arrived);
  float total = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) total += ptx::load(s.partial + i);
  for (int i = first; i < s.size; i += step) ptx::store(s.out + i, ptx::load(s.x + i) / total);
}

}  // namespace diffratio::reference
