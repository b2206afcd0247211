// Arguments of the ratio operations, the same for every backend (diffratio_fast/ops/reference_ratio.py is the
// definition). All pointers are to memory of the backend's device.
#pragma once

#include "divergences.h"
#include "host_device.h"
#include "integers.h"
#include "types.h"

namespace diffratio {

struct MixerSizes {
  int64_t channels, image_height, image_width, patch;  // images, side of a patch
  int64_t tokens, width, depth, hidden;                // T, C, L, H
  bool energy = false;                                 // whether the network has an energy head

  DR_HOST_DEVICE int64_t image() const { return channels * image_height * image_width; }
  DR_HOST_DEVICE int64_t vector() const { return channels * patch * patch; }      // P
  DR_HOST_DEVICE int64_t conditioning() const { return width + depth * hidden; }  // D
};

// The weights in the order of ops/ratio_checks.py, which has their shapes. The last exists only with an energy head.
enum Weight { w_patch, w_position, w_mix, w_mix_bias, w_up, w_down, w_head, w_energy, weights };

// The function of the log ratio l that is differentiated.
enum class Objective {
  none,      // no gradient
  given,     // its derivative by l is upstream[sample]
  score,     // its derivative by l is -upstream[sample][draw] h(l) / draws
  logistic,  // mean softplus(-l) of half 0 plus mean softplus(l) of half 1
};

// A unit is a draw of a sample of a half. Its index is (half * batch + sample) * draws + draw in log_ratio, and
// sample * draws + draw in sigma, in each half's conditioning and in the upstream of Objective::score.
struct MixerInputs {
  int batch, draws;
  int halves;                    // 1, or 2: real and fake
  const void* images[2];         // of each half [batch][image]
  Type type;                     // of the images: float32, or on CUDA bfloat16
  const float* sigma;            // [batch][draws]
  const float* conditioning[2];  // of each half [batch][draws][conditioning]
};

struct MixerNoise {
  const int64_t* rng;    // [2]: seed, step; null: the images are noised already
  const int64_t* index;  // [batch]
  uint32_t streams[2];   // stream word of each half, of draw 0
};

struct MixerObjective {
  Objective kind;
  Divergence divergence;  // of Objective::score
  const float* upstream;  // given: [batch]; score: [batch][draws]
};

struct MixerResults {
  float* log_ratio;                 // [halves][batch][draws]
  float* image_gradient;            // [batch][image], summed over draws, or null
  float* conditioning_gradient[2];  // of each half like conditioning, or null
};

struct RatioCall {
  MixerSizes sizes;
  float sigma_data;
  MixerInputs inputs;
  MixerNoise noise;
  MixerObjective objective;
  MixerResults results;
};

constexpr float mixer_residual = 0.7f;  // RESIDUAL of reference_ratio.py

}  // namespace diffratio
