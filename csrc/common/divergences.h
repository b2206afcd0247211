// h(l) of the divergences, by their place in the table of diffratio_fast/ops/divergences.py.
#pragma once

#include "host_device.h"

namespace diffratio {

constexpr int divergences = 6;

// h of the clamped log ratio; *clamped says whether the clamp acted.
DR_HOST_DEVICE float divergence_factor(int divergence, float log_ratio, bool* clamped) {
  const float bound = divergence == 3 || divergence == 5 ? 3.0f : divergence == 4 ? 5.0f : 0.0f;
  *clamped = bound > 0.0f && __builtin_fabsf(log_ratio) > bound;
  const float l = *clamped ? __builtin_copysignf(bound, log_ratio) : log_ratio;
  switch (divergence) {
    case 1: return 1.0f / (1.0f + __builtin_expf(-l));  // jensen_shannon
    case 2: return 1.0f / (1.0f + __builtin_expf(l));   // softened_reverse_kl
    case 3: return __builtin_expf(l);                   // forward_kl
    case 4: return __builtin_expf(0.5f * l);            // squared_hellinger
    case 5: return 1.0f + __builtin_expf(l);            // jeffreys
    default: return 1.0f;                               // reverse_kl
  }
}

}  // namespace diffratio
