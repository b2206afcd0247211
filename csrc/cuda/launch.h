// The CUDA twin: launchers on plain pointers and a stream, for the current device. They do not synchronise.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/noise.h"
#include "ratio/mixer_layout.h"

namespace diffratio::cuda {

cudaError_t add_noise(const AddNoise& arguments, cudaStream_t stream);
cudaError_t random_words(const Words& arguments, cudaStream_t stream);

cudaError_t pack_weights(const PackCall& arguments, cudaStream_t stream);
// How the call would be launched; no blocks if the device has not the shared memory for it, or the shape does not
// exist.
MixerPlan plan_mixer(const MixerSizes& sizes, const MixerCall& call, Pass pass, int64_t workspace_limit, Form form);
// `workspace`: plan.bytes at a multiple of 128.
cudaError_t run_mixer(const MixerCall& call, const GradientCall& gradients, Pass pass, const MixerPlan& plan,
                      unsigned char* workspace, cudaStream_t stream);

}  // namespace diffratio::cuda
