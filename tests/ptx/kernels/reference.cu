// Launches of the reference kernels: named barriers, shuffles, ldmatrix.x2, partial and L1 copies, cache hints, which
// the project's own kernels do not use. And of two with a wrong map of lanes, which must give wrong results.
#include "tests/simt/kernels/gemm.cuh"
#include "tests/simt/kernels/mix.cuh"
#include "tests/simt/kernels/operations.cuh"
#include "tests/simt/kernels/reduce.cuh"
#include "tests/simt/kernels/relay.cuh"
#include "tests/simt/kernels/share.cuh"

using namespace diffratio;
using namespace diffratio::reference;

namespace {

struct WrongRows : GemmMaps {  // the halves of b's 16 x 16 exchanged
  static DR_DEVICE fragment::Element b_row(int lane) { return fragment::a_row(lane); }
};
struct WrongAccumulator : GemmMaps {
  static DR_DEVICE fragment::Element accumulator(int lane) { return {lane % 8, lane / 8 * 2}; }
};

}  // namespace

extern "C" {

// maps: 0 right, 1 wrong rows, 2 wrong accumulators
int reference_gemm(const BFloat16* a, const BFloat16* b, float* c, int samples, int m, int n, int k, int blocks,
                   int maps) {
  const Gemm g{a, b, c, samples, m, n, k};
  if (maps == 0) gemm_kernel<GemmMaps><<<blocks, gemm_threads, gemm_shared_bytes>>>(g);
  if (maps == 1) gemm_kernel<WrongRows><<<blocks, gemm_threads, gemm_shared_bytes>>>(g);
  if (maps == 2) gemm_kernel<WrongAccumulator><<<blocks, gemm_threads, gemm_shared_bytes>>>(g);
  return cudaGetLastError();
}
int reference_mix(int tokens, const BFloat16* x, const BFloat16* m, const BFloat16* w, float* out, int samples,
                  int blocks) {
  const Mix g{x, m, w, out, samples};
  if (tokens == 32)
    mix_kernel<32, 16><<<blocks, mix_threads<32>, mix_shared_bytes(32, 16)>>>(g);
  else
    mix_kernel<64, 64><<<blocks, mix_threads<64>, mix_shared_bytes(64, 64)>>>(g);
  return cudaGetLastError();
}
int reference_reduce(const float* x, float* out, int samples, int size, int blocks) {
  reduce_kernel<<<blocks, reduce_threads, reduce_shared_bytes>>>(Reduce{x, out, samples, size});
  return cudaGetLastError();
}
int reference_relay(const float* x, float* out, int rounds) {
  relay_kernel<<<1, relay_threads, relay_shared_bytes>>>(Relay{x, out, rounds});
  return cudaGetLastError();
}
int reference_share(const float* x, float* out, float* partial, uint32_t* arrived, int size, int blocks) {
  Share s{x, out, partial, arrived, size};
  void* arguments[] = {&s};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&share_kernel), blocks, 32, arguments, 0, nullptr);
}
int reference_operations(const BFloat16* x, uint32_t* out) {
  operations_kernel<<<1, 32, operations_shared_bytes>>>(Operations{x, out});
  return cudaGetLastError();
}
}
