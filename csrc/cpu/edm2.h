// The CPU backend of the EDM2 operations: plain pointers and sizes, no torch. Arguments: common/edm2.h.
// Results do not depend on the number of threads.
#pragma once

#include "../common/edm2.h"
#include "noise.h"

namespace diffratio::cpu {

// Floats of the buffer for tiles of contiguous images; also the maximum channels of PixelNorm.
constexpr int64_t staged_floats = 32768;
constexpr int64_t max_norm_channels = staged_floats / 16;
constexpr int64_t max_scale_channels = 8192;  // of ScaleSilu
constexpr int64_t element_chunk = 8192;       // elements of a work item of SumClamp, CatSilu

void pixel_norm(const Level& level, const PixelNorm& arguments, ParallelFor parallel_for);
void scale_silu(const Level& level, const ScaleSilu& arguments, ParallelFor parallel_for);
void sum_clamp(const Level& level, const SumClamp& arguments, ParallelFor parallel_for);
void cat_silu(const Level& level, const CatSilu& arguments, ParallelFor parallel_for);
void ones_channel(const Level& level, const OnesChannel& arguments, ParallelFor parallel_for);
void qkv_norm(const Level& level, const QkvNorm& arguments, ParallelFor parallel_for);

// Arguments of the kernels of a SIMD level. `stream`: results are larger than the cache, so stores bypass it.
template <class Arguments>
struct Streamed {
  Arguments a;
  bool stream;
  int64_t tile;  // pixels of a work item of PixelNorm on contiguous images
};

// Pixels that PixelNorm stages at a time: a multiple of 16.
inline int64_t norm_tile(int64_t channels) {
  const int64_t fit = staged_floats / channels / 16 * 16;
  return fit < 256 ? fit : 256;
}

// The kernels of one SIMD level; work items [begin, end) of Streamed arguments.
struct Edm2Level {
  Body pixel_norm, scale_silu, scale_silu_sums, sum_clamp, cat_silu, ones_channel, qkv_norm;
};

}  // namespace diffratio::cpu
