// The launchers of one width; each width has its own source file, so that they compile in parallel.
#pragma once

#include <cuda_runtime_api.h>

#include "mixer_plan.h"

namespace diffratio::cuda {

template <int width>
MixerPlan plan_width(const MixerCall& call, Pass pass, int64_t workspace_limit, Form form);

template <int width>
cudaError_t run_width(const MixerCall& call, const GradientCall& gradients, Pass pass, const MixerPlan& plan,
                      unsigned char* workspace, cudaStream_t stream);

}  // namespace diffratio::cuda
