// The CPU implementation of the noise operations: plain pointers and sizes, no torch. The words and the arithmetic are
// those of csrc/common, so results do not depend on the SIMD level or on the number of threads.
#pragma once

#include <cstdint>

#include "../common/noise.h"

namespace diffratio::cpu {

// Calls body(context, begin, end) on disjoint ranges that cover [0, count), each of at least `grain` items
// (or all), from any number of threads. The caller passes torch's thread pool.
using Body = void (*)(const void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, Body body, const void* context);

// SIMD levels in ascending order; the build determines which exist.
struct Level {
  const char* name;
  bool (*supported)();  // by this CPU
  void (*add_noise)(const void* arguments, int64_t begin, int64_t end);
  void (*words)(const void* arguments, int64_t begin, int64_t end);
  void (*philox)(const uint32_t* counter, const uint32_t* key, uint32_t* out);  // one raw counter, for tests
};

const Level* levels(int* count);
// The level with this name, or the best supported level if the name is null or empty. Returns null and sets *error
// if the level is not compiled or not supported.
const Level* choose_level(const char* name, const char** error);

void add_noise(const Level& level, const AddNoise& arguments, ParallelFor parallel_for);
void random_words(const Level& level, const Words& arguments, ParallelFor parallel_for);

}  // namespace diffratio::cpu
