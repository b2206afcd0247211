// The CPU backend of the parameter operations: plain pointers and sizes, no torch. Arguments: common/parameters.h.
// Results do not depend on the number of threads.
#pragma once

#include "../common/parameters.h"
#include "noise.h"

namespace diffratio::cpu {

void normalize_weight(const Level& level, const NormalizeWeight& arguments, ParallelFor parallel_for);
void adam(const Level& level, const Adam& arguments, ParallelFor parallel_for);

// Row length for tensors that are not normalized.
constexpr int64_t plain_row = 4096;

// Arguments of a level's kernels for one tensor of an Adam step.
struct AdamRows {
  AdamSettings settings;
  AdamTensor tensor;
  float* partial;    // [rows]
  float step_size;   // rate / (1 - beta1^step)
  float correction;  // 1 / sqrt(1 - beta2^step)
  float rate;
  float average_weight[max_averages];
};

// The kernels of one SIMD level; work items are rows.
struct ParametersLevel {
  Body normalize_weight, adam;
};

}  // namespace diffratio::cpu
