// Philox4x32-10: a counter-based generator. J. Salmon, M. Moraes, R. Dror, D. Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
//
// NOISE CONTRACT, part 1: which words. A word is a pure function of
//   key      = (low 32 bits of seed, high 32 bits of seed)
//   counter  = (element / 4, low 32 bits of step, low 32 bits of the sample's index,
//               purpose << 24 | substep << 16 | draw)
// and element i of a sample is word i % 4 of counter i / 4. It does not depend on device, grid, threads, batch or
// ranks. Part 2, from words to normals, is normal.h.
#pragma once

#include "host_device.h"
#include "integers.h"

namespace diffratio {

// The state is (counter words 0..3) on entry and the four random words on return. V is Scalar or a SIMD type.
template <class V>
DR_HOST_DEVICE void philox4x32_10(typename V::Word (&state)[4], uint32_t key0, uint32_t key1) {
  DR_UNROLL
  for (int round = 0; round < 10; ++round) {
    const typename V::Product p0 = V::multiply(state[0], 0xD2511F53u);
    const typename V::Product p1 = V::multiply(state[2], 0xCD9E8D57u);
    state[0] = V::exclusive_or(V::high(p1), state[1], key0);
    state[1] = V::low(p1);
    state[2] = V::exclusive_or(V::high(p0), state[3], key1);
    state[3] = V::low(p0);
    key0 += 0x9E3779B9u;  // golden ratio
    key1 += 0xBB67AE85u;  // sqrt(3) - 1
  }
}

// The last counter word: the stream of a sample. purpose < 256, substep < 256, draw < 65536.
DR_HOST_DEVICE uint32_t stream_word(int64_t purpose, int64_t substep, int64_t draw) {
  return static_cast<uint32_t>(purpose) << 24 | static_cast<uint32_t>(substep) << 16 | static_cast<uint32_t>(draw);
}

}  // namespace diffratio
