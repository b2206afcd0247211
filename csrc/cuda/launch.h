// The CUDA implementation: launchers with plain pointers and a stream, for the current device. They do not synchronize.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/noise.h"
#include "ratio/mixer_plan.h"

namespace diffratio::cuda {

cudaError_t add_noise(const AddNoise& arguments, cudaStream_t stream);
cudaError_t random_words(const Words& arguments, cudaStream_t stream);

cudaError_t pack_weights(const PackCall& arguments, cudaStream_t stream);
// The launch of a call; blocks = 0 if no kernel has this shape or the device has too little shared memory for it.
MixerPlan plan_mixer(const MixerCall& call, Pass pass, int64_t workspace_limit, Form form);
// `workspace`: plan.bytes at a multiple of 128.
cudaError_t run_mixer(const MixerCall& call, const GradientCall& gradients, Pass pass, const MixerPlan& plan,
                      unsigned char* workspace, cudaStream_t stream);

}  // namespace diffratio::cuda
