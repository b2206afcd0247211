// Shared by all kernels that generate noise.
#pragma once

#include "../../common/noise.h"
#include "../../common/normal.h"
#include "../../common/philox.h"

namespace diffratio::cuda {

struct Key {
  uint32_t low, high, step;
};

DR_HOST_DEVICE Key read_key(const int64_t* rng) {
  const uint64_t seed = static_cast<uint64_t>(rng[0]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(rng[1])};
}

// Normals 4 counter ... 4 counter + 3 of a sample. (add_noise_kernel repeats this code: with this pointer the
// compiler uses ten more registers.)
DR_HOST_DEVICE void four_normals(const Key& key, uint32_t counter, int64_t index, uint32_t stream, float* eps) {
  uint32_t state[4] = {counter, key.step, static_cast<uint32_t>(index), stream};
  philox4x32_10<Scalar>(state, key.low, key.high);
  box_muller<Scalar>(state[0], state[1], eps[0], eps[1]);
  box_muller<Scalar>(state[2], state[3], eps[2], eps[3]);
}

DR_HOST_DEVICE float noised(float x, float sigma, float eps, float scale) { return Scalar::fma(sigma, eps, x) * scale; }

}  // namespace diffratio::cuda
