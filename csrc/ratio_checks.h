// Memory-safety checks of the arguments of the ratio operations, for every backend.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "common/mixer.h"
#include "common/philox.h"

namespace diffratio {

inline void check(const char* name, const at::Tensor& t, std::vector<int64_t> shape, at::Device device) {
  TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(shape), name, " must be ", at::IntArrayRef(shape), ", got ",
                    t.sizes());
  TORCH_CHECK_VALUE(t.device() == device, name, " must be on ", device);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16, name,
                   " must be float32 or bfloat16");
}

// The sizes of a network and of images [B, channels, H, W] that fit it.
inline MixerSizes sizes_of(at::TensorList weights, const at::Tensor& images) {
  const at::Device device = images.device();
  TORCH_CHECK_VALUE(weights.size() == diffratio::weights || weights.size() == w_energy,
                    "weights must be 7 tensors, or 8 with an energy head");
  for (const at::Tensor& weight : weights) {
    TORCH_CHECK_TYPE(weight.scalar_type() == weights[0].scalar_type(), "weights must have one dtype");
  }
  TORCH_CHECK_VALUE(images.dim() == 4, "images must be [B, channels, H, W]");
  TORCH_CHECK_VALUE(weights[w_patch].dim() == 2 && weights[w_position].dim() == 2 && weights[w_up].dim() == 3,
                    "patch and position must be matrices, up a stack of matrices");
  MixerSizes s{};
  s.channels = images.size(1);
  s.image_height = images.size(2);
  s.image_width = images.size(3);
  s.width = weights[w_patch].size(0);
  s.tokens = weights[w_position].size(0);
  s.depth = weights[w_up].size(0);
  s.hidden = weights[w_up].size(1);
  const int64_t p = weights[w_patch].size(1);
  while (s.channels > 0 && s.channels * s.patch * s.patch < p) ++s.patch;
  TORCH_CHECK_VALUE(s.patch > 0 && s.vector() == p && s.image_height % s.patch == 0 && s.image_width % s.patch == 0 &&
                        s.image_height / s.patch * (s.image_width / s.patch) == s.tokens && s.tokens > 0 &&
                        s.width > 0 && s.depth > 0 && s.hidden > 0,
                    "weights do not fit images ", images.sizes());
  check("patch", weights[w_patch], {s.width, p}, device);
  check("position", weights[w_position], {s.tokens, s.width}, device);
  check("mix", weights[w_mix], {s.depth, s.tokens, s.tokens}, device);
  check("mix_bias", weights[w_mix_bias], {s.depth, s.tokens}, device);
  check("up", weights[w_up], {s.depth, s.hidden, s.width}, device);
  check("down", weights[w_down], {s.depth, s.width, s.hidden}, device);
  check("head", weights[w_head], {s.tokens, s.width}, device);
  s.energy = weights.size() > w_energy;
  if (s.energy) check("energy", weights[w_energy], {s.width, p}, device);
  return s;
}

inline void check_noise(const at::Tensor& rng, const at::Tensor& index, at::IntArrayRef purposes, int64_t substep,
                        int64_t batch, int64_t draws, int64_t halves, at::Device device) {
  TORCH_CHECK_VALUE(rng.scalar_type() == at::kLong && rng.device() == device && rng.sizes() == at::IntArrayRef({2}),
                    "rng must be int64 [2] on ", device);
  TORCH_CHECK_VALUE(
      index.scalar_type() == at::kLong && index.device() == device && index.sizes() == at::IntArrayRef({batch}),
      "index must be int64 [B] on ", device);
  TORCH_CHECK_VALUE(static_cast<int64_t>(purposes.size()) == halves, "one purpose for each half");
  TORCH_CHECK_VALUE(substep >= 0 && substep < 256 && draws <= 65536, "substep must be 0 to 255, draws at most 65536");
  for (int64_t purpose : purposes) TORCH_CHECK_VALUE(purpose >= 0 && purpose < 256, "purpose must be 0 to 255");
}

}  // namespace diffratio
