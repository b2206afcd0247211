// What the two source files of the Python module share.
#pragma once

namespace diffratio {

// Raised with every change of a schema; diffratio_fast/ops/_module.py holds the same number.
constexpr int interface_version = 1;

// The SIMD level in use.
const char* simd_level();
// Changes it (tests do); throws std::runtime_error for a level that is not there.
void use_simd_level(const char* name);

}  // namespace diffratio
