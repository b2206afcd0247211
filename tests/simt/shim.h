// Enough of CUDA's language to run a kernel body without barriers on the CPU: a loop over blocks and threads.
#pragma once

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __launch_bounds__(n)

namespace simt {

// Runs body() once per thread of a one-dimensional launch; backwards: the last thread of the last block first.
template <class Body>
void launch(unsigned grid, unsigned block, bool backwards, Body body) {
  gridDim.x = grid;
  blockDim.x = block;
  for (unsigned i = 0; i < grid * block; ++i) {
    const unsigned thread = backwards ? grid * block - 1 - i : i;
    blockIdx.x = thread / block;
    threadIdx.x = thread % block;
    body();
  }
}

}  // namespace simt
