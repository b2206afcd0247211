// Words that the twins of the ratio operations share (diffratio_fast/ops/reference_ratio.py is the definition).
#pragma once

#include "host_device.h"
#include "integers.h"

namespace diffratio {

struct MixerSizes {
  int64_t channels, height, across, patch;  // images, patch size
  int64_t tokens, width, depth, hidden;     // T, C, L, H

  DR_HOST_DEVICE int64_t image() const { return channels * height * across; }
  DR_HOST_DEVICE int64_t vector() const { return channels * patch * patch; }      // P
  DR_HOST_DEVICE int64_t conditioning() const { return width + depth * hidden; }  // D
};

// The weights in the order of ops/ratio_checks.py, which has their shapes.
enum Weight { w_patch, w_position, w_mix, w_mix_bias, w_up, w_down, w_head, weights };

enum class Objective {
  none,      // log ratios only
  given,     // upstream[i]
  score,     // -weight h(l) / draws
  logistic,  // mean softplus(-l) of half 0 plus mean softplus(l) of half 1
};

constexpr float mixer_residual = 0.7f;  // RESIDUAL of reference_ratio.py

}  // namespace diffratio
