// Definitions of the launchers of one width.
#pragma once

#include "mixer_launch.h"
#include "mixer_width.h"

namespace diffratio::cuda {

struct StreamLauncher {
  cudaStream_t stream;

  template <class Kernel>
  int resident(Kernel kernel, int threads, uint32_t shared) const {
    const void* function = reinterpret_cast<const void*>(kernel);
    int device = 0, multiprocessors = 0, most = 0, blocks = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error || shared > static_cast<uint32_t>(most)) return 0;
    // Always the maximum: a call from another thread must not lower it before this launch.
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (!error) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, shared);
    if (error) {
      cudaGetLastError();  // clear the error: a later launch would report it
      return 0;
    }
    return blocks * multiprocessors;
  }

  template <class... Arguments>
  cudaError_t launch(const Launch& l, void (*kernel)(Arguments...), Arguments... arguments) const {
    void* pointers[] = {&arguments...};
    const void* function = reinterpret_cast<const void*>(kernel);
    const dim3 blocks(static_cast<unsigned>(l.blocks)), threads(static_cast<unsigned>(l.threads));
    return l.cooperative ? cudaLaunchCooperativeKernel(function, blocks, threads, pointers, l.shared, stream)
                         : cudaLaunchKernel(function, blocks, threads, pointers, l.shared, stream);
  }
};

template <int width>
MixerPlan plan_width(const MixerCall& call, Pass pass, int64_t workspace_limit, Form form) {
  return plan_mixer<width>(call, pass, workspace_limit, form, StreamLauncher{});
}

template <int width>
cudaError_t run_width(const MixerCall& call, const GradientCall& gradients, Pass pass, const MixerPlan& plan,
                      unsigned char* workspace, cudaStream_t stream) {
  if (plan.one_launch) {  // the grid barrier's counter
    const cudaError_t error = cudaMemsetAsync(workspace + plan.counters, 0, counters_bytes, stream);
    if (error) return error;
  }
  StreamLauncher launcher{stream};
  return run_mixer<width>(call, gradients, pass, plan, workspace, launcher);
}

}  // namespace diffratio::cuda
