// Launchers of the noise kernels.
#include <type_traits>

#include "../launch.h"
#include "noise_kernel.cuh"

namespace diffratio::cuda {
namespace {

// As many thread blocks as the work needs, at most as many as keep every multiprocessor of any GPU busy.
unsigned blocks_for(int64_t work) {
  const int64_t blocks = (work + threads - 1) / threads;
  return static_cast<unsigned>(blocks < 65536 ? blocks : 65536);
}

}  // namespace

cudaError_t add_noise(const AddNoise& a, cudaStream_t stream) {
  if (a.batch == 0 || a.size == 0) return cudaSuccess;
  const unsigned blocks = blocks_for((a.size + unit - 1) / unit * a.batch * (a.inputs / a.sharing()));
  const bool in_aligned = inputs_aligned(a), out_aligned = is_aligned(a.out, a.size, a.out_type);
  return visit_types(a, [&](auto* in, auto* out, auto constant) {
    using In = std::remove_pointer_t<decltype(in)>;
    using Out = std::remove_pointer_t<decltype(out)>;
    add_noise_kernel<In, Out, decltype(constant)::normals_only>
        <<<blocks, threads, 0, stream>>>(a, in_aligned, out_aligned);
    return cudaGetLastError();
  });
}

cudaError_t random_words(const Words& a, cudaStream_t stream) {
  if (a.batch == 0 || a.count == 0) return cudaSuccess;
  random_words_kernel<<<blocks_for((a.count + 3) / 4 * a.batch), threads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace diffratio::cuda
