// Small matrix products built from one register tile, for one SIMD level. Included by mixer_level.cpp; the level's
// compiler flags decide the register width.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/host_device.h"

namespace diffratio::cpu {
namespace {

#if defined(DR_LEVEL_AVX512)
constexpr int lanes = 16, tile_rows = 8;
#elif defined(DR_LEVEL_AVX2)
constexpr int lanes = 8, tile_rows = 4;
#else
constexpr int lanes = 4, tile_rows = 4;
#endif
constexpr int panel = 2 * lanes;

typedef float V __attribute__((vector_size(4 * lanes)));
typedef int32_t I __attribute__((vector_size(4 * lanes)));

// Flushes subnormal numbers to zero during its lifetime. At large log ratios many gradients are subnormal, and each
// operation on one costs about a hundred cycles.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

DR_HOST_DEVICE V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
DR_HOST_DEVICE void store(float* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
DR_HOST_DEVICE V constant(float a) { return V{} + a; }

// exp for arguments in [-87, 87], to about one unit in the last place: 2^n e^r with |r| <= ln(2) / 2 and a
// polynomial for e^r.
DR_HOST_DEVICE V exponential(V x) {
  const V shifted = x * 0x1.715476p+0f + 0x1.8p23f;  // n in the low bits of the mantissa
  const V n = shifted - 0x1.8p23f;
  const V r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  V p = constant(0x1.6850e4p-10f);
  p = p * r + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (V)((I)p + ((I)shifted << 23));
}

DR_HOST_DEVICE V reciprocal(V x) {
#if defined(DR_LEVEL_AVX512)
  const V guess = (V)_mm512_rcp14_ps((__m512)x);  // a division takes twice as long as this and Newton's step
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

DR_HOST_DEVICE V sigmoid(V x) {
  const V bound = constant(87.0f);
  V y = x > bound ? bound : x;
  y = y < -bound ? -bound : y;
  return reciprocal(1.0f + exponential(-y));  // NaN stays NaN: both comparisons are false
}

template <int N>
using Tile = V[tile_rows][N];

// The left factor of a product. Row-major pieces: element (i, k) at start + (k / chunk) * stride + i * row + k % chunk.
// Transposed: element (i, k) of the transpose of a panelled matrix, at start + (i / panel) * stride + k * panel +
// i % panel.
struct Left {
  const float* start;
  int64_t row, chunk, stride;
};

template <int N>
DR_HOST_DEVICE void rank_one(Tile<N>& sum, const float* a, int64_t step, const float* b) {
  V right[N];
  for (int j = 0; j < N; ++j) right[j] = load(b + j * lanes);
  for (int i = 0; i < tile_rows; ++i) {
    for (int j = 0; j < N; ++j) sum[i][j] += a[i * step] * right[j];
  }
}

// For every tile of left [rows, depth] times right [depth, panels * N * lanes], the latter in panels of N registers:
// done(first row, panel, sums).
template <int N, bool transposed, class Done>
DR_HOST_DEVICE void product(int64_t rows, int64_t panels, int64_t depth, const Left& left, const float* right,
                            const Done& done) {
  for (int64_t n = 0; n < panels; ++n) {
    const float* b0 = right + n * depth * N * lanes;
    for (int64_t i = 0; i < rows; i += tile_rows) {
      Tile<N> sum = {};
      const float* b = b0;
      if constexpr (transposed) {
        const float* a = left.start + i / panel * left.stride + i % panel;
        int64_t step = 1;
        __asm__("" : "+r"(step));  // unknown to the compiler, which else loads a whole column and takes it apart
#pragma GCC unroll 2
        for (int64_t k = 0; k < depth; ++k, a += panel, b += N * lanes) rank_one<N>(sum, a, step, b);
      } else {
        const int64_t row = left.row;
        for (int64_t k = 0; k < depth; k += left.chunk) {
          const float* a = left.start + k / left.chunk * left.stride + i * row;
          const int64_t count = depth - k < left.chunk ? depth - k : left.chunk;
#pragma GCC unroll 4
          for (int64_t j = 0; j < count; ++j, ++a, b += N * lanes) rank_one<N>(sum, a, row, b);
        }
      }
      done(i, n, sum);
    }
  }
}

// With panels of `width` floats: one register or two. `done` takes either tile.
template <bool transposed, class Done>
DR_HOST_DEVICE void product_of(int64_t width, int64_t rows, int64_t panels, int64_t depth, const Left& left,
                               const float* right, const Done& done) {
  if (width == lanes) {
    product<1, transposed>(rows, panels, depth, left, right, done);
  } else {
    product<2, transposed>(rows, panels, depth, left, right, done);
  }
}

}  // namespace
}  // namespace diffratio::cpu
