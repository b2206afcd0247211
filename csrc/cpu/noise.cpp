// Selection of the SIMD level, and distribution of work to threads.
#include "noise.h"

#include <cstring>

namespace diffratio::cpu {

extern const Level level_portable;
#if defined(DR_HAVE_X86)
extern const Level level_avx2;
extern const Level level_avx512;
static const Level all[] = {level_portable, level_avx2, level_avx512};
#else
static const Level all[] = {level_portable};
#endif

namespace {
constexpr int64_t chunk = 2048;   // as in noise_level.cpp
constexpr int64_t grain = 16384;  // minimum elements per thread: about 10 microseconds
}  // namespace

const Level* levels(int* count) {
  *count = static_cast<int>(sizeof all / sizeof all[0]);
  return all;
}

const Level* choose_level(const char* name, const char** error) {
  int count;
  const Level* level = levels(&count);
  if (!name || !*name) {
    while (count > 1 && !level[count - 1].supported()) --count;
    return &level[count - 1];
  }
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(level[i].name, name) == 0) {
      if (level[i].supported()) return &level[i];
      *error = "this processor does not support it";
      return nullptr;
    }
  }
  *error = "it was not compiled";
  return nullptr;
}

void add_noise(const Level& level, const AddNoise& a, ParallelFor parallel_for) {
  if (a.batch == 0 || a.size == 0) return;
  const int64_t chunks = (a.size + chunk - 1) / chunk;
  const int64_t elements = (a.size < chunk ? a.size : chunk) * a.sharing();  // of an item
  parallel_for(a.inputs / a.sharing() * a.batch * chunks, (grain + elements - 1) / elements, level.add_noise, &a);
}

void random_words(const Level& level, const Words& a, ParallelFor parallel_for) {
  if (a.batch == 0 || a.count == 0) return;
  parallel_for(a.batch, (grain / 4 + a.count - 1) / a.count, level.words, &a);
}

}  // namespace diffratio::cpu
