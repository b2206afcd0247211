// The ratio kernels for 128 channels.
#include "mixer_width.cuh"

namespace diffratio::cuda {

template MixerPlan plan_width<128>(const MixerCall&, Pass, int64_t, Form);
template cudaError_t run_width<128>(const MixerCall&, const GradientCall&, Pass, const MixerPlan&, unsigned char*,
                                    cudaStream_t);

}  // namespace diffratio::cuda
