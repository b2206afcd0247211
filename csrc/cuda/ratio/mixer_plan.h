// The plan of a call: slices, copies of the sums, offsets in the workspace. Host code without CUDA headers, so that
// memory for a GPU can be planned on a machine without one (csrc/module.cpp exports it).
#pragma once

#include "mixer_layout.h"

namespace diffratio::cuda {

// What a launch over samples computes: log ratios; image gradients; operands of the weight gradients.
enum class Pass { forward, image, weights };

// How weight gradients are launched: one cooperative launch, or two launches for each slice and one at the end.
enum class Form { automatic, one_launch, several };

// The launch of a call, and the offsets of its buffers in the workspace (bytes).
struct MixerPlan {
  int blocks, threads;  // of the kernel that processes samples
  uint32_t shared;
  int product_blocks;  // of the kernels that sum weight gradients
  int slice, splits;   // units staged at a time, copies of the sums
  bool one_launch;
  int64_t counters, operands, parked, columns, sums, bytes;
};

constexpr int64_t counters_bytes = 128;  // of grid barriers; zero before every call

constexpr int product_rows = 128, product_columns = 64;  // tile of a weight gradient, for a thread block of eight warps

// Adds slices and workspace to a plan whose launch (blocks, product_blocks, one_launch) is decided.
inline void plan_workspace(MixerPlan& plan, const Packing& p, Pass pass, int units, int64_t workspace_limit) {
  const auto reserve = [&](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += (bytes + 127) / 128 * 128;
    return at;
  };
  plan.counters = reserve(counters_bytes);
  plan.parked = reserve(plan.blocks * parked_bytes(p));
  if (pass == Pass::image) plan.operands = reserve(plan.blocks * checkpoint_bytes(p));
  if (pass != Pass::weights) return;
  const Staging staging = staging_of(p);
  const int64_t slice = workspace_limit / staging.bytes;
  plan.slice = static_cast<int>(slice < 1 ? 1 : slice < units ? slice : units);
  const int64_t results = int64_t{p.depth} * (p.tokens * p.tokens + 2 * p.hidden * p.width);
  const int64_t tiles = results / (product_rows * product_columns) + 1;
  const int64_t splits = plan.product_blocks / tiles;
  plan.splits = static_cast<int>(splits < 1 ? 1 : splits > 8 ? 8 : splits);
  if (plan.splits > plan.slice) plan.splits = plan.slice;
  plan.operands = reserve(plan.slice * staging.bytes);
  plan.columns = reserve(int64_t{4} * plan.blocks * (p.tokens / rows_of_warp(p)) * (p.width + p.depth * p.hidden));
  plan.sums = reserve(plan.splits * sums_of(p).floats * 4);
}

}  // namespace diffratio::cuda
