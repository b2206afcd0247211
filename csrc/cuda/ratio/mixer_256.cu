// The ratio kernels for 256 channels.
#include "mixer_width.cuh"

namespace diffratio::cuda {

template MixerPlan plan_width<256>(const MixerCall&, Pass, int64_t, Form);
template cudaError_t run_width<256>(const MixerCall&, const GradientCall&, Pass, const MixerPlan&, unsigned char*,
                                    cudaStream_t);

}  // namespace diffratio::cuda
