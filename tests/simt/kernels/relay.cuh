// Named barriers: warp 0 reads x into two buffers in turn, the other warps sum their contents. out[i] = the sum of
// x[round][i] over rounds.
#pragma once

#include "../../../csrc/cuda/ptx.cuh"

namespace diffratio::reference {

struct Relay {
  const float* x;  // [rounds][relay_width]
  float* out;      // [relay_width]
  int rounds;
};

constexpr int relay_threads = 96, relay_width = 64;
constexpr uint32_t relay_shared_bytes = 2 * relay_width * 4;

static __global__ void __launch_bounds__(relay_threads) relay_kernel(const Relay r) {
  constexpr int full = 1, empty = 3;  // a barrier of each kind for either buffer
  ptx::SharedArena arena;
  const auto buffers = arena.take<float>(2 * relay_width, "buffers");
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 32) {
    for (int round = 0; round < r.rounds; ++round) {
      const int b = round % 2;
      if (round >= 2) ptx::barrier_sync(empty + b, relay_threads);
      for (int i = thread; i < relay_width; i += 32) {
        buffers.store(b * relay_width + i, ptx::load(r.x + round * relay_width + i));
      }
      ptx::barrier_arrive(full + b, relay_threads);
    }
  } else {
    float sum = 0;
    for (int round = 0; round < r.rounds; ++round) {
      const int b = round % 2;
      ptx::barrier_sync(full + b, relay_threads);
      sum += buffers.load(b * relay_width + thread - 32);
      if (round + 2 < r.rounds) ptx::barrier_arrive(empty + b, relay_threads);
    }
    ptx::store(r.out + thread - 32, sum);
  }
}

}  // namespace diffratio::reference
