// The CPU twin of the ratio operations (diffratio_fast/ops/reference_ratio.py is the definition): plain pointers
// and sizes, no torch. Every operation is one Mixer: images are noised, cut, sent through the network, and where
// asked the gradient of their objective comes back to images, conditioning and weights.
//
// A sample goes through the whole network, and back, on one thread with its activations in that thread's
// workspace, small enough for its cache. Weight gradients are summed over a fixed number of groups of samples
// and then over groups, in order: results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../common/mixer.h"
#include "noise.h"

namespace diffratio::cpu {

// Unit (half, sample, draw) has place (half * batch + sample) * draws + draw in log_ratio, and
// sample * draws + draw in sigma and weight.
struct Mixer {
  MixerSizes sizes;
  const float* weight[weights];  // contiguous, shapes as in ops/ratio_checks.py
  float sigma_data;
  int64_t batch, draws;
  int halves;                    // 1 or 2
  const float* images[2];        // each [batch][image]
  const float* sigma;            // [batch][draws]
  const float* conditioning[2];  // each [batch][draws][conditioning]
  const int64_t* rng;            // null: images are already noised
  const int64_t* index;          // [batch]
  uint32_t streams[2];           // stream word of each half, draw 0
  Objective objective;
  const float* upstream;  // given: [batch]; score: the weights [batch][draws]
  int divergence;
  float* log_ratio;                 // [halves][batch][draws]
  float* image_gradient;            // [batch][image], summed over draws, or null
  float* conditioning_gradient[2];  // each [batch][draws][conditioning], or null
  float* weight_gradient[weights];  // null: none
};

// Sizes padded to whole registers, and the layouts that the kernels of one SIMD level use. Activations [T, X] lie in
// panels [X / panel][T][panel]: as the right factor of a product rows are whole registers, as the left one its
// elements are broadcast.
struct MixerLayout {
  int64_t lanes, panel;                        // floats in a register, and in a panel: two registers
  int64_t tokens, width, hidden;               // padded
  int64_t vector, vector_panel;                // patch vectors: padded, one or two registers wide
  int64_t token_panel;                         // panel of matrices whose columns are tokens
  int64_t packed[11], packed_floats;           // offsets of the packed weights, see mixer.cpp
  int64_t gradient[weights], gradient_floats;  // offsets of a group's weight gradients
  int64_t workspace_floats;                    // for one thread
  int64_t groups;                              // of samples, for weight gradients; 0 without
};

enum Packed {
  p_patch,
  p_position,
  p_mix,
  p_mix_bias,
  p_up,
  p_down,
  p_head,
  p_mix_t,
  p_up_t,
  p_down_t,
  p_patch_t,
  packs
};

MixerLayout mixer_layout(const Level& level, const Mixer& call);

// Runs it on `workers` threads. Memory comes from outside, aligned to 64 bytes: packed_floats, workers *
// workspace_floats, groups * gradient_floats.
void mixer(const Level& level, const Mixer& call, const MixerLayout& layout, float* packed, float* workspace,
           float* gradients, int64_t workers, ParallelFor parallel_for);

// The kernels of one SIMD level.
struct MixerLevel {
  int64_t lanes;
  int64_t (*workspace_floats)(const Mixer&, const MixerLayout&);
  // Samples [begin, end) of halves * batch; gradient: this group's sums, or null.
  void (*samples)(const Level&, const Mixer&, const MixerLayout&, const float* packed, float* workspace,
                  float* gradient, int64_t begin, int64_t end);
};

}  // namespace diffratio::cpu
