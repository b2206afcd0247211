// Declarations shared by the source files of the Python module: *_bindings.cpp and module.cpp.
#pragma once

#include <string>

#include "common/mixer.h"
#include "cpu/noise.h"

namespace diffratio {

// Increment with every change of a schema, together with INTERFACE in diffratio_fast/ops/compiled.py.
constexpr int interface_version = 5;

// The SIMD level in use, and its name.
const cpu::Level& cpu_level();
const char* simd_level();
// Changes the level (for tests). Throws std::runtime_error if the level does not exist.
void use_simd_level(const char* name);
// torch's thread pool, with the interface that the CPU implementations use.
void parallel_for(int64_t count, int64_t grain, cpu::Body body, const void* context);

// Bytes that a ratio operation allocates besides its arguments and results.
struct RatioPlan {
  int64_t packed, workspace;
};

// Bytes of staged operands that ratio_loss may use on CUDA.
constexpr int64_t default_workspace_limit = int64_t{256} << 20;

// The plan of `operation` on "cpu" or "cuda" for that many samples (of both halves). `parallel`: threads, or thread
// blocks that run at once on the GPU. Needs no GPU.
RatioPlan plan_ratio(const std::string& operation, const std::string& device, const MixerSizes& sizes, int64_t samples,
                     int64_t parallel);

#if defined(DIFFRATIO_WITH_CUDA)
// Whether the operation's kernels exist for this network and fit the shared memory of the device.
bool ratio_kernels_fit(const std::string& operation, const MixerSizes& sizes, int device);
// Sets how ratio_loss is launched on CUDA ("automatic", "one launch" or "several") and its limit of staged operands.
void use_ratio_loss_form(const std::string& name, int64_t workspace_bytes);
#endif

}  // namespace diffratio
