// The CPU implementation of the ratio operations: plain pointers and sizes, no torch. Every operation is one Mixer:
// images get noise, are split into patches and go through the network; where a gradient is wanted, the gradient of the
// objective is propagated back to images, conditioning and weights.
//
// One thread takes a sample through the whole network and back. Its activations stay in that thread's workspace, which
// fits the cache. Weight gradients are summed within a fixed number of groups of samples, then over the groups, both in
// order: results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "../common/mixer.h"
#include "noise.h"

namespace diffratio::cpu {

struct Mixer : RatioCall {          // images are float32
  const float* weight[weights];     // contiguous, shapes as in ops/ratio_checks.py
  float* weight_gradient[weights];  // null: none

  bool has_backward() const { return objective.kind != Objective::none; }
  bool has_weight_gradients() const { return weight_gradient[0] != nullptr; }
  int64_t samples() const { return int64_t{inputs.halves} * inputs.batch; }
};

// Sizes padded to whole registers, and the layouts that the kernels of one SIMD level use. Activations [T, X] lie in
// panels [X / panel][T][panel]: as the right factor of a product rows are whole registers, as the left one its
// elements are broadcast.
struct MixerLayout {
  int64_t lanes, panel;                        // floats in a register, and in a panel: two registers
  int64_t tokens, width, hidden;               // padded
  int64_t vector, vector_panel;                // patch vectors: padded, one or two registers wide
  int64_t token_panel;                         // panel of matrices whose columns are tokens
  int64_t packed[13], packed_floats;           // offsets of the packed weights: pack_weights in mixer.cpp
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
  p_energy,
  p_energy_t,
  packs
};

MixerLayout mixer_layout(const Level& level, const Mixer& mixer);

// Runs the call on `workers` threads. The caller provides the memory, aligned to 64 bytes: packed_floats,
// workers * workspace_floats and, with weight gradients, groups * gradient_floats.
void run_mixer(const Level& level, const Mixer& mixer, const MixerLayout& layout, float* packed, float* workspace,
               float* gradients, int64_t workers, ParallelFor parallel_for);

// The kernels of one SIMD level.
struct MixerLevel {
  int64_t lanes;
  int64_t (*workspace_floats)(const Mixer&, const MixerLayout&);
  // Samples [begin, end) of halves * batch. `gradient`: this group's sums, or null.
  void (*samples)(const Level&, const Mixer&, const MixerLayout&, const float* packed, float* workspace,
                  float* gradient, int64_t begin, int64_t end);
};

}  // namespace diffratio::cpu
