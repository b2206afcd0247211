// The shim's reference kernels compiled by nvcc, so that the shim and a GPU execute the same code.
#include "kernels/gemm.cuh"
#include "kernels/mix.cuh"
#include "kernels/operations.cuh"
#include "kernels/reduce.cuh"
#include "kernels/relay.cuh"
#include "kernels/share.cuh"

namespace diffratio::reference {

template __global__ void gemm_kernel<GemmMaps>(Gemm);
template __global__ void mix_kernel<32, 16>(Mix);
template __global__ void mix_kernel<64, 64>(Mix);

// So that the compiler keeps them.
extern const void* const kernels[];
const void* const kernels[] = {
    reinterpret_cast<const void*>(&reduce_kernel), reinterpret_cast<const void*>(&relay_kernel),
    reinterpret_cast<const void*>(&share_kernel), reinterpret_cast<const void*>(&operations_kernel)};

}  // namespace diffratio::reference
