// h(l) of the divergences, by their place in the table of diffratio_fast/ops/divergences.py.
#pragma once

#include "host_device.h"

namespace diffratio {

constexpr int divergences = 6;

DR_HOST_DEVICE float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  return __builtin_expf(x);
#endif
}

DR_HOST_DEVICE float log_one_plus(float x) {
#if defined(__CUDA_ARCH__)
  return log1pf(x);
#else
  return __builtin_log1pf(x);
#endif
}

// h of the clamped log ratio; *clamped says whether the clamp acted.
DR_HOST_DEVICE float divergence_factor(int divergence, float log_ratio, bool* clamped) {
  const float bound = divergence == 3 || divergence == 5 ? 3.0f : divergence == 4 ? 5.0f : 0.0f;
  *clamped = bound > 0.0f && (log_ratio > bound || log_ratio < -bound);
  const float l = !*clamped ? log_ratio : log_ratio > 0.0f ? bound : -bound;
  switch (divergence) {
    case 1: return 1.0f / (1.0f + exponential(-l));  // jensen_shannon
    case 2: return 1.0f / (1.0f + exponential(l));   // softened_reverse_kl
    case 3: return exponential(l);                   // forward_kl
    case 4: return exponential(0.5f * l);            // squared_hellinger
    case 5: return 1.0f + exponential(l);            // jeffreys
    default: return 1.0f;                            // reverse_kl
  }
}

}  // namespace diffratio
