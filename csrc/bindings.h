// What the two source files of the Python module share.
#pragma once

#include "cpu/noise.h"

namespace diffratio {

// Raised with every change of a schema; diffratio_fast/ops/_module.py holds the same number.
constexpr int interface_version = 2;

// The SIMD level in use, and its name.
const cpu::Level& cpu_level();
const char* simd_level();
// torch's thread pool, as the CPU twins take it.
void parallel_for(int64_t count, int64_t grain, cpu::Body body, const void* context);
// Changes it (tests do); throws std::runtime_error for a level that is not there.
void use_simd_level(const char* name);

}  // namespace diffratio
