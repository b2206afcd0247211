// Launchers of the ratio kernels.
#include "../launch.h"
#include "mixer_pack.cuh"
#include "mixer_width.h"

namespace diffratio::cuda {

cudaError_t pack_weights(const PackCall& c, cudaStream_t stream) {
  const int64_t blocks = (c.packing.bytes / 16 + pack_threads - 1) / pack_threads;
  pack_kernel<<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), pack_threads, 0, stream>>>(c);
  return cudaGetLastError();
}

MixerPlan plan_mixer(const MixerCall& c, Pass pass, int64_t workspace_limit, Form form) {
  if (!shape_exists(c.sizes)) return {};
  switch (c.packing.width) {
    case 64: return plan_width<64>(c, pass, workspace_limit, form);
    case 128: return plan_width<128>(c, pass, workspace_limit, form);
    default: return plan_width<256>(c, pass, workspace_limit, form);
  }
}

cudaError_t run_mixer(const MixerCall& c, const GradientCall& g, Pass pass, const MixerPlan& plan,
                      unsigned char* workspace, cudaStream_t stream) {
  switch (c.packing.width) {
    case 64: return run_width<64>(c, g, pass, plan, workspace, stream);
    case 128: return run_width<128>(c, g, pass, plan, workspace, stream);
    default: return run_width<256>(c, g, pass, plan, workspace, stream);
  }
}

}  // namespace diffratio::cuda
