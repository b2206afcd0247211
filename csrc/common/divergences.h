// The divergences that a generator can minimize: h(l) = f''(rho) rho^2 of each, with rho = e^l.
//
// The same table in Python is diffratio_fast/divergences.py; tests compare names, order and values. To add a
// divergence, append one row to each table. Never reorder: operations use the position in the table as code.
#pragma once

#include "host_device.h"

namespace diffratio {

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

// name, bound on |l| inside h (0: none), h(l)
#define DR_DIVERGENCES(ROW)                                      \
  ROW(reverse_kl, 0.0f, 1.0f)                                    \
  ROW(jensen_shannon, 0.0f, 1.0f / (1.0f + exponential(-l)))     \
  ROW(softened_reverse_kl, 0.0f, 1.0f / (1.0f + exponential(l))) \
  ROW(forward_kl, 3.0f, exponential(l))                          \
  ROW(squared_hellinger, 5.0f, exponential(0.5f * l))            \
  ROW(jeffreys, 3.0f, 1.0f + exponential(l))

#define DR_ROW(name, bound, h) name,
enum class Divergence : int { DR_DIVERGENCES(DR_ROW) };
#undef DR_ROW

#define DR_ROW(name, bound, h) #name,
constexpr const char* divergence_names[] = {DR_DIVERGENCES(DR_ROW)};
#undef DR_ROW

constexpr int divergences = sizeof divergence_names / sizeof divergence_names[0];

// `bound` 0 means none. NaN stays NaN.
DR_HOST_DEVICE float clamped_to(float l, float bound) {
  return bound > 0.0f && l > bound ? bound : bound > 0.0f && l < -bound ? -bound : l;
}

// h of the log ratio, which is clamped to the bound.
DR_HOST_DEVICE float divergence_factor(Divergence divergence, float log_ratio) {
  switch (divergence) {
#define DR_ROW(name, bound, h)                                     \
  case Divergence::name: {                                         \
    [[maybe_unused]] const float l = clamped_to(log_ratio, bound); \
    return h;                                                      \
  }
    DR_DIVERGENCES(DR_ROW)
#undef DR_ROW
  }
  return 0.0f;  // not reached: the bindings check the code
}

}  // namespace diffratio
