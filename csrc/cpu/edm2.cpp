// The CPU backend of the EDM2 operations: distribution of work to threads. The arithmetic is in edm2_level.cpp.
#include "edm2.h"

#include <cstring>

namespace diffratio::cpu {

extern const Edm2Level edm2_portable;
#if defined(DR_HAVE_X86)
extern const Edm2Level edm2_avx2;
extern const Edm2Level edm2_avx512;
#endif

namespace {

constexpr int64_t grain = 16384;        // minimum elements per thread
constexpr int64_t streamed = 24 << 20;  // bytes of results above which stores bypass the cache

const Edm2Level& kernels(const Level& level) {
#if defined(DR_HAVE_X86)
  if (std::strcmp(level.name, "avx512") == 0) return edm2_avx512;
  if (std::strcmp(level.name, "avx2") == 0) return edm2_avx2;
#else
  (void)level;
#endif
  return edm2_portable;
}

// `items` of about `elements` elements each; `results` elements of `type` are written in all.
template <class Arguments>
void run(ParallelFor parallel_for, Body body, const Arguments& a, int64_t items, int64_t elements, int64_t results,
         Type type, int64_t tile = 0) {
  if (items == 0 || elements == 0) return;
  const Streamed<Arguments> arguments{a, results * size_of(type) >= streamed, tile};
  parallel_for(items, (grain + elements - 1) / elements, body, &arguments);
}

}  // namespace

void pixel_norm(const Level& level, const PixelNorm& a, ParallelFor parallel_for) {
  const int64_t results = a.outer * a.channels * a.inner * (a.by_x ? 1 : 2);
  const int64_t tile = a.inner == 1 ? 1 : norm_tile(a.channels);
  const int64_t tiles = (a.inner + tile - 1) / tile;
  run(parallel_for, kernels(level).pixel_norm, a, a.outer * tiles, a.channels * tile, results, a.type, tile);
}

void scale_silu(const Level& level, const ScaleSilu& a, ParallelFor parallel_for) {
  const int64_t results = a.batch * a.channels * a.pixels;
  if (results == 0) return;
  const Edm2Level& k = kernels(level);
  if (a.channels_last) {
    run(parallel_for, k.scale_silu, a, a.batch * a.chunks(), a.channels * pixel_chunk, results, a.type);
  } else {
    run(parallel_for, k.scale_silu, a, a.batch * a.channels, a.pixels, results, a.type);
  }
  if (a.by_x) run(parallel_for, k.scale_silu_sums, a, a.batch, a.channels * a.chunks(), 0, a.type);
}

void sum_clamp(const Level& level, const SumClamp& a, ParallelFor parallel_for) {
  const int64_t results = a.count * (a.by_a || a.activated ? 2 : 1);
  run(parallel_for, kernels(level).sum_clamp, a, (a.count + element_chunk - 1) / element_chunk, element_chunk, results,
      a.type);
}

void cat_silu(const Level& level, const CatSilu& a, ParallelFor parallel_for) {
  const int64_t row = a.first + a.second, chunks = (row + element_chunk - 1) / element_chunk;
  run(parallel_for, kernels(level).cat_silu, a, a.rows * chunks, row < element_chunk ? row : element_chunk,
      a.rows * row * (a.by_a ? 1 : 2), a.type);
}

void ones_channel(const Level& level, const OnesChannel& a, ParallelFor parallel_for) {
  run(parallel_for, kernels(level).ones_channel, a, a.batch, (a.channels + 1) * a.pixels, 0, a.type);
}

void qkv_norm(const Level& level, const QkvNorm& a, ParallelFor parallel_for) {
  const int64_t token = 3 * a.heads * a.size;
  run(parallel_for, kernels(level).qkv_norm, a, a.batch * a.tokens, token, a.batch * a.tokens * token, a.type);
}

}  // namespace diffratio::cpu
