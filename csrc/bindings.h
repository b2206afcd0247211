// What the two source files of the Python module share.
#pragma once

#include <string>

#include "common/mixer.h"
#include "cpu/noise.h"

namespace diffratio {

// Raised with every change of a schema; diffratio_fast/ops/compiled.py holds the same number.
constexpr int interface_version = 3;

// The SIMD level in use, and its name.
const cpu::Level& cpu_level();
const char* simd_level();
// torch's thread pool, as the CPU twins take it.
void parallel_for(int64_t count, int64_t grain, cpu::Body body, const void* context);
// Changes it (tests do); throws std::runtime_error for a level that is not there.
void use_simd_level(const char* name);

#if defined(DIFFRATIO_WITH_CUDA)
// Whether the CUDA kernels have the shape of this network, and the device the shared memory for it.
bool ratio_kernels_fit(const MixerSizes& sizes, int device);
// How CUDA's ratio_loss is launched: "automatic", "one launch" or "several"; and how much memory it may use for
// staging.
void use_ratio_loss_form(const std::string& name, int64_t workspace_bytes);
#endif

}  // namespace diffratio
