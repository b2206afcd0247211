// Every operation of ptx.cuh that no other reference kernel uses, by one warp, with known results.
#pragma once

#include "../../../csrc/common/types.h"
#include "../../../csrc/cuda/ptx.cuh"

namespace diffratio::reference {

// x: 64 numbers, an 8 x 8 matrix. cases.h contains the expected words of each lane.
constexpr int operations_out = 12;
constexpr uint32_t operations_shared_bytes = 3 * 64 * 2;

struct Operations {
  const BFloat16* x;
  uint32_t* out;  // [32][operations_out]
};

static __global__ void __launch_bounds__(32) operations_kernel(const Operations o) {
  ptx::SharedArena arena;
  const auto both = arena.take<BFloat16>(2 * 64, "both");
  const auto words = arena.take<uint32_t>(32, "words");
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 8) {
    ptx::copy_async_l1(both.address(lane * 8), o.x + lane * 8);
    ptx::copy_async_l1(both.address((15 - lane) * 8), o.x + lane * 8, 16);
  } else if (lane < 16) {  // four bytes of x, then zeros
    ptx::copy_async(words.address((lane - 8) * 4), o.x, 4);
  }
  ptx::copy_commit();
  ptx::copy_wait<0>();
  ptx::warp_sync();

  uint32_t r[operations_out] = {}, pair[2];
  ptx::ldmatrix_x2(pair, both.address(lane % 16 * 8));
  r[0] = pair[0], r[1] = pair[1];
  ptx::ldmatrix_x2_trans(pair, both.address(lane % 16 * 8));
  r[2] = pair[0], r[3] = pair[1];
  const uint32_t mine = 100u + static_cast<uint32_t>(lane);
  r[4] = ptx::shuffle(mine, 5);
  r[5] = ptx::shuffle_xor(mine, 3);
  r[6] = ptx::shuffle_down(mine, 4);
  r[7] = words.load(lane);
  const uint32_t packed = ptx::pack_bf16(static_cast<float>(lane), 1.0f + 0x1p-8f);  // a tie: to even
  r[8] = static_cast<uint32_t>(ptx::low_bf16(packed));
  r[9] = static_cast<uint32_t>(ptx::high_bf16(packed) * 256.0f);
  const auto numbers = both.as<uint32_t>();  // the same bytes, two numbers at a time
  r[10] = numbers.load(lane);
  r[11] = lane < 16 ? ptx::shuffle(mine, 2, 0xffffu) : 0;

  ptx::Vector16 line[3];
  DR_UNROLL
  for (int i = 0; i < operations_out; ++i) line[i / 4].v[i % 4] = r[i];
  uint32_t* out = o.out + lane * operations_out;
  ptx::store16(out, line[0]);
  ptx::store16<ptx::Cache::l2>(out + 4, line[1]);
  ptx::store16<ptx::Cache::streaming>(out + 8, line[2]);
  const ptx::Vector16 again[4] = {ptx::load16(out), ptx::load16<ptx::Cache::l2>(out + 4),
                                  ptx::load16<ptx::Cache::streaming>(out + 8), ptx::load16<ptx::Cache::constant>(o.x)};
  uint32_t sum = 0;
  DR_UNROLL
  for (int i = 0; i < 4; ++i) sum ^= again[i].v[0];
  if (sum == 0x12345678u) ptx::store(out, sum);  // never true; keeps the loads from being removed
}

}  // namespace diffratio::reference
