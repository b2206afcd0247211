// Vector implementations of common/scalar.h for AVX2+FMA and AVX-512 (GCC vector types and intrinsics).
// Included once per level; the compiler flags of the level select the implementation.
#pragma once

#if defined(DR_LEVEL_AVX512) || defined(DR_LEVEL_AVX2)
#include <immintrin.h>
#endif

#include "../common/types.h"

namespace diffratio {
namespace {

#if defined(DR_LEVEL_AVX512)

struct Vector {
  static constexpr int lanes = 16;
  static constexpr int together = 2;  // registers of counters in Philox: measured, 10% faster than 1
  using Float = __m512;
  using Bits = uint32_t __attribute__((vector_size(64)));
  // vpmuludq multiplies the even 32-bit lanes into 64 bits. So a word of the Philox state is two registers, for
  // the even and the odd counters. The upper halves are undefined.
  struct Word {
    __m512i even, odd;
  };
  using Product = Word;

  static DR_HOST_DEVICE Word word(uint32_t a) { return {_mm512_set1_epi32(a), _mm512_set1_epi32(a)}; }
  // Counters first + order: after transpose() the registers are contiguous in memory.
  static DR_HOST_DEVICE Word counters(uint32_t first) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i c = _mm512_add_epi32(_mm512_set1_epi32(first), order);
    return {c, _mm512_srli_epi64(c, 32)};
  }
  static DR_HOST_DEVICE Product multiply(Word a, uint32_t m) {
    const __m512i b = _mm512_set1_epi32(m);
    return {_mm512_mul_epu32(a.even, b), _mm512_mul_epu32(a.odd, b)};
  }
  // A shuffle, not a shift: multiplications already use the execution port of shifts.
  static DR_HOST_DEVICE Word high(Product p) {
    constexpr auto odd = static_cast<_MM_PERM_ENUM>(0xf5);
    return {_mm512_shuffle_epi32(p.even, odd), _mm512_shuffle_epi32(p.odd, odd)};
  }
  static DR_HOST_DEVICE Word low(Product p) { return p; }
  static DR_HOST_DEVICE Word exclusive_or(Word a, Word b, uint32_t key) {
    const __m512i k = _mm512_set1_epi32(key);
    return {_mm512_ternarylogic_epi32(a.even, b.even, k, 0x96), _mm512_ternarylogic_epi32(a.odd, b.odd, k, 0x96)};
  }
  static DR_HOST_DEVICE Bits bits(Word a) {
    return (Bits)_mm512_mask_shuffle_epi32(a.even, 0xaaaa, a.odd, static_cast<_MM_PERM_ENUM>(0xa0));
  }

  static DR_HOST_DEVICE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static DR_HOST_DEVICE Float square_root(Float a) { return _mm512_sqrt_ps(a); }
  static DR_HOST_DEVICE Float from_signed(Bits a) { return _mm512_cvtepi32_ps((__m512i)a); }
  static DR_HOST_DEVICE Float as_float(Bits a) { return (Float)a; }
  static DR_HOST_DEVICE Bits as_bits(Float a) { return (Bits)a; }
  static DR_HOST_DEVICE Float choose(Bits mask, uint32_t bit, Float a, Float b) {
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)mask, _mm512_set1_epi32(bit)), b, a);
  }
  static DR_HOST_DEVICE Float flip_sign(Float a, Bits sign) {  // a ^ (sign & 1 << 31)
    return (Float)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)sign, _mm512_set1_epi32(1u << 31), 0x78);
  }
  static DR_HOST_DEVICE Float constant(float a) { return _mm512_set1_ps(a); }

  // From n[j] = normal j of all counters to n[0..3] in element order.
  static DR_HOST_DEVICE void transpose(Float (&n)[4]) {
    const __m512d a = (__m512d)_mm512_unpacklo_ps(n[0], n[1]), b = (__m512d)_mm512_unpackhi_ps(n[0], n[1]);
    const __m512d c = (__m512d)_mm512_unpacklo_ps(n[2], n[3]), d = (__m512d)_mm512_unpackhi_ps(n[2], n[3]);
    n[0] = (Float)_mm512_unpacklo_pd(a, c);
    n[1] = (Float)_mm512_unpackhi_pd(a, c);
    n[2] = (Float)_mm512_unpacklo_pd(b, d);
    n[3] = (Float)_mm512_unpackhi_pd(b, d);
  }
  static DR_HOST_DEVICE Float load(const Float16* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static DR_HOST_DEVICE void store(Float16* x, const float* a) {
    const __m256i half = _mm512_cvtps_ph(_mm512_loadu_ps(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), half);
  }
  static DR_HOST_DEVICE Float load(const float* x) { return _mm512_loadu_ps(x); }
  static DR_HOST_DEVICE void store(float* out, Float a) { _mm512_storeu_ps(out, a); }
};

#elif defined(DR_LEVEL_AVX2)

struct Vector {  // as above, half the width
  static constexpr int lanes = 8;
  static constexpr int together = 1;  // with 2, the 16 registers are too few
  using Float = __m256;
  using Bits = uint32_t __attribute__((vector_size(32)));
  struct Word {
    __m256i even, odd;
  };
  using Product = Word;

  static DR_HOST_DEVICE Word word(uint32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
  static DR_HOST_DEVICE Word counters(uint32_t first) {
    const __m256i c = _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    return {c, _mm256_srli_epi64(c, 32)};
  }
  static DR_HOST_DEVICE Product multiply(Word a, uint32_t m) {
    const __m256i b = _mm256_set1_epi32(m);
    return {_mm256_mul_epu32(a.even, b), _mm256_mul_epu32(a.odd, b)};
  }
  static DR_HOST_DEVICE Word high(Product p) {
    return {_mm256_shuffle_epi32(p.even, 0xf5), _mm256_shuffle_epi32(p.odd, 0xf5)};
  }
  static DR_HOST_DEVICE Word low(Product p) { return p; }
  static DR_HOST_DEVICE Word exclusive_or(Word a, Word b, uint32_t key) {
    const __m256i k = _mm256_set1_epi32(key);
    return {_mm256_xor_si256(_mm256_xor_si256(b.even, k), a.even), _mm256_xor_si256(_mm256_xor_si256(b.odd, k), a.odd)};
  }
  static DR_HOST_DEVICE Bits bits(Word a) {
    return (Bits)_mm256_blend_epi32(a.even, _mm256_slli_epi64(a.odd, 32), 0xaa);
  }

  static DR_HOST_DEVICE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static DR_HOST_DEVICE Float square_root(Float a) { return _mm256_sqrt_ps(a); }
  static DR_HOST_DEVICE Float from_signed(Bits a) { return _mm256_cvtepi32_ps((__m256i)a); }
  static DR_HOST_DEVICE Float as_float(Bits a) { return (Float)a; }
  static DR_HOST_DEVICE Bits as_bits(Float a) { return (Bits)a; }
  static DR_HOST_DEVICE Float choose(Bits mask, uint32_t bit, Float a, Float b) {
    return _mm256_blendv_ps(b, a, (Float)(mask << __builtin_clz(bit)));  // selects by the sign bit
  }
  static DR_HOST_DEVICE Float flip_sign(Float a, Bits sign) { return (Float)((Bits)a ^ (sign & 1u << 31)); }
  static DR_HOST_DEVICE Float constant(float a) { return _mm256_set1_ps(a); }

  static DR_HOST_DEVICE void transpose(Float (&n)[4]) {
    const __m256d a = (__m256d)_mm256_unpacklo_ps(n[0], n[1]), b = (__m256d)_mm256_unpackhi_ps(n[0], n[1]);
    const __m256d c = (__m256d)_mm256_unpacklo_ps(n[2], n[3]), d = (__m256d)_mm256_unpackhi_ps(n[2], n[3]);
    n[0] = (Float)_mm256_unpacklo_pd(a, c);
    n[1] = (Float)_mm256_unpackhi_pd(a, c);
    n[2] = (Float)_mm256_unpacklo_pd(b, d);
    n[3] = (Float)_mm256_unpackhi_pd(b, d);
  }
  static DR_HOST_DEVICE Float load(const Float16* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static DR_HOST_DEVICE void store(Float16* x, const float* a) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), half);
  }
  static DR_HOST_DEVICE Float load(const float* x) { return _mm256_loadu_ps(x); }
  static DR_HOST_DEVICE void store(float* out, Float a) { _mm256_storeu_ps(out, a); }
};

#else

struct Vector : Scalar {  // portable, one lane; uses the library's fma if the CPU has no fma instruction
  static constexpr int lanes = 1;
  static constexpr int together = 1;
  static DR_HOST_DEVICE Word word(uint32_t a) { return a; }
  static DR_HOST_DEVICE Word counters(uint32_t first) { return first; }
  static DR_HOST_DEVICE void transpose(Float (&)[4]) {}
  static DR_HOST_DEVICE Float load(const Float16* x) { return to_float(*x); }
  static DR_HOST_DEVICE void store(Float16* x, const float* a) { *x = from_float<Float16>(*a); }
  static DR_HOST_DEVICE Float load(const float* x) { return *x; }
  static DR_HOST_DEVICE void store(float* out, Float a) { *out = a; }
};

#endif

}  // namespace
}  // namespace diffratio
