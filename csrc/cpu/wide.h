// Registers of floats with loads and stores of every type, and functions for the EDM2 and parameter operations. `One`
// has one lane: it processes the remaining elements at the end of a row, with bit-identical results.
#pragma once

#include <cmath>

#include "../common/edm2.h"
#include "simd.h"

namespace diffratio {
namespace {

struct One {
  static constexpr int lanes = 1;
  using F = float;
  using I = uint32_t;
  static DR_HOST_DEVICE F constant(float a) { return a; }
  static DR_HOST_DEVICE I as_bits(F a) { return Scalar::as_bits(a); }
  static DR_HOST_DEVICE F as_float(I a) { return Scalar::as_float(a); }
  static DR_HOST_DEVICE F fma(F a, F b, F c) { return Scalar::fma(a, b, c); }
  static DR_HOST_DEVICE F square_root(F a) { return Scalar::square_root(a); }
  static DR_HOST_DEVICE float sum(F a) { return a; }
  template <class T>
  static DR_HOST_DEVICE F load(const T* p) {
    return to_float(*p);
  }
  template <class T>
  static DR_HOST_DEVICE void store(T* p, F a, bool) {
    *p = from_float<T>(a);
  }
  // Bit i: whether lane i of |a| is not above the limit (true for NaN).
  static DR_HOST_DEVICE uint32_t within(F a, float limit) { return !(std::fabs(a) > limit); }
  // Lanes of a if the bit is set, else 0.
  static DR_HOST_DEVICE F keep(uint32_t bits, F a) { return bits & 1 ? a : 0.0f; }
  // Philox counters first, first + stride, ... of the lanes.
  static DR_HOST_DEVICE uint32_t strided_counters(uint32_t first, uint32_t) { return first; }
};

#if defined(DR_LEVEL_AVX512)

struct Wide {
  static constexpr int lanes = 16;
  using F = __m512;
  using I = uint32_t __attribute__((vector_size(64)));
  static DR_HOST_DEVICE F constant(float a) { return _mm512_set1_ps(a); }
  static DR_HOST_DEVICE I as_bits(F a) { return (I)a; }
  static DR_HOST_DEVICE F as_float(I a) { return (F)a; }
  static DR_HOST_DEVICE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static DR_HOST_DEVICE F square_root(F a) { return _mm512_sqrt_ps(a); }
  static DR_HOST_DEVICE float sum(F a) { return _mm512_reduce_add_ps(a); }
  static DR_HOST_DEVICE F load(const float* p) { return _mm512_loadu_ps(p); }
  static DR_HOST_DEVICE F load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  }
  static DR_HOST_DEVICE F load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static DR_HOST_DEVICE void store(float* p, F a, bool stream) {
    if (stream) {
      _mm512_stream_ps(p, a);
    } else {
      _mm512_storeu_ps(p, a);
    }
  }
  static DR_HOST_DEVICE void store(__m256i* p, __m256i a, bool stream) {
    if (stream) {
      _mm256_stream_si256(p, a);
    } else {
      _mm256_storeu_si256(p, a);
    }
  }
  static DR_HOST_DEVICE void store(BFloat16* p, F a, bool stream) {
    const I bits = (I)a;
    const __m512i rounded = (__m512i)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    store(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result), stream);
  }
  static DR_HOST_DEVICE void store(Float16* p, F a, bool stream) {
    store(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), stream);
  }
  static DR_HOST_DEVICE uint32_t within(F a, float limit) {
    return _mm512_cmp_ps_mask(_mm512_abs_ps(a), _mm512_set1_ps(limit), _CMP_NGT_UQ);
  }
  static DR_HOST_DEVICE F keep(uint32_t bits, F a) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a); }
  static DR_HOST_DEVICE Vector::Word strided_counters(uint32_t first, uint32_t stride) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i c = _mm512_add_epi32(_mm512_set1_epi32(first), _mm512_mullo_epi32(lane, _mm512_set1_epi32(stride)));
    return {c, _mm512_srli_epi64(c, 32)};
  }
};

#elif defined(DR_LEVEL_AVX2)

struct Wide {  // as above, half the width
  static constexpr int lanes = 8;
  using F = __m256;
  using I = uint32_t __attribute__((vector_size(32)));
  static DR_HOST_DEVICE F constant(float a) { return _mm256_set1_ps(a); }
  static DR_HOST_DEVICE I as_bits(F a) { return (I)a; }
  static DR_HOST_DEVICE F as_float(I a) { return (F)a; }
  static DR_HOST_DEVICE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static DR_HOST_DEVICE F square_root(F a) { return _mm256_sqrt_ps(a); }
  static DR_HOST_DEVICE float sum(F a) {
    const __m128 half = _mm256_castps256_ps128(a) + _mm256_extractf128_ps(a, 1);
    const __m128 quarter = half + _mm_movehl_ps(half, half);
    return quarter[0] + quarter[1];
  }
  static DR_HOST_DEVICE F load(const float* p) { return _mm256_loadu_ps(p); }
  static DR_HOST_DEVICE F load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
  }
  static DR_HOST_DEVICE F load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static DR_HOST_DEVICE void store(float* p, F a, bool stream) {
    if (stream) {
      _mm256_stream_ps(p, a);
    } else {
      _mm256_storeu_ps(p, a);
    }
  }
  static DR_HOST_DEVICE void store(__m128i* p, __m128i a, bool stream) {
    if (stream) {
      _mm_stream_si128(p, a);
    } else {
      _mm_storeu_si128(p, a);
    }
  }
  static DR_HOST_DEVICE void store(BFloat16* p, F a, bool stream) {
    const I bits = (I)a;
    const __m256 rounded = (__m256)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    const __m256i result = (__m256i)_mm256_blendv_ps(rounded, (__m256)_mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
    store(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed), stream);
  }
  static DR_HOST_DEVICE void store(Float16* p, F a, bool stream) {
    store(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), stream);
  }
  static DR_HOST_DEVICE uint32_t within(F a, float limit) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(magnitude, _mm256_set1_ps(limit), _CMP_NGT_UQ)));
  }
  static DR_HOST_DEVICE F keep(uint32_t bits, F a) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_and_ps(a, (__m256)_mm256_cmpeq_epi32(set, lane));
  }
  static DR_HOST_DEVICE Vector::Word strided_counters(uint32_t first, uint32_t stride) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i c = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_mullo_epi32(lane, _mm256_set1_epi32(stride)));
    return {c, _mm256_srli_epi64(c, 32)};
  }
};

#else

using Wide = One;

#endif

// Orders streaming stores before a later signal to other threads.
DR_HOST_DEVICE void finish_streaming() {
#if defined(DR_LEVEL_AVX512) || defined(DR_LEVEL_AVX2)
  _mm_sfence();
#endif
}

// Whether streaming stores can write rows of `count` elements at p: every register store is aligned.
template <class T>
DR_HOST_DEVICE bool streams(const T* p, int64_t count) {
  constexpr int64_t bytes = Wide::lanes * sizeof(T);
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && count % Wide::lanes == 0;
}

// e^x to within 2 units in the last place for x in [-87, 88], and constant outside.
template <class W>
DR_HOST_DEVICE typename W::F exponential(typename W::F x) {
  using F = typename W::F;
  const F low = W::constant(-87.0f), high = W::constant(88.0f), magic = W::constant(0x1.8p23f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const F shifted = W::fma(x, W::constant(0x1.715476p0f), magic);  // the nearest integer n of x / ln 2, in the low bits
  const F n = shifted - magic;
  F r = W::fma(n, W::constant(-0x1.62e4p-1f), x);
  r = W::fma(n, W::constant(-0x1.7f7d1cp-20f), r);
  F p = W::constant(0x1.6d431ep-10f);  // (e^r - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2]: Chebyshev interpolation
  p = W::fma(p, r, W::constant(0x1.120b66p-7f));
  p = W::fma(p, r, W::constant(0x1.5554eap-5f));
  p = W::fma(p, r, W::constant(0x1.5554dcp-3f));
  p = W::fma(p, r, W::constant(0.5f));
  p = W::fma(p, r, W::constant(1.0f));
  p = W::fma(p, r, W::constant(1.0f));
  return W::as_float(W::as_bits(p) + (W::as_bits(shifted) << 23));
}

template <class W>
DR_HOST_DEVICE typename W::F sigmoid(typename W::F x) {
  return W::constant(1.0f) / (W::constant(1.0f) + exponential<W>(-x));
}

template <class W>
DR_HOST_DEVICE typename W::F mp_silu(typename W::F x) {
  return x * W::constant(silu_gain) * sigmoid<W>(x);
}

// Its derivative.
template <class W>
DR_HOST_DEVICE typename W::F mp_silu_slope(typename W::F x) {
  const typename W::F s = sigmoid<W>(x), one = W::constant(1.0f);
  return s * W::constant(silu_gain) * W::fma(x, one - s, one);
}

// Calls f(W{}, i) for whole registers of [0, count), then for single elements.
template <class Function>
DR_HOST_DEVICE void each(int64_t count, const Function& f) {
  int64_t i = 0;
  for (; i + Wide::lanes <= count; i += Wide::lanes) f(Wide{}, i);
  if constexpr (Wide::lanes > 1) {
    for (; i < count; ++i) f(One{}, i);
  }
}

// The sums of f(W{}, i) over [0, count), in a fixed order.
template <class Function>
DR_HOST_DEVICE float total(int64_t count, const Function& f) {
  constexpr int lanes = Wide::lanes;
  Wide::F s0 = Wide::constant(0), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    s0 += f(Wide{}, i);
    s1 += f(Wide{}, i + lanes);
    s2 += f(Wide{}, i + 2 * lanes);
    s3 += f(Wide{}, i + 3 * lanes);
  }
  for (; i + lanes <= count; i += lanes) s0 += f(Wide{}, i);
  float sum = Wide::sum((s0 + s1) + (s2 + s3));
  if constexpr (lanes > 1) {
    for (; i < count; ++i) sum += f(One{}, i);
  }
  return sum;
}

}  // namespace
}  // namespace diffratio
