// The CUDA twin: launchers on plain pointers and a stream. They do not synchronise.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/noise.h"

namespace diffratio::cuda {

cudaError_t add_noise(const AddNoise& arguments, cudaStream_t stream);
cudaError_t random_words(const Words& arguments, cudaStream_t stream);

}  // namespace diffratio::cuda
