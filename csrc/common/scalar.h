// The one-lane "vector": the operations that philox.h and normal.h use, for one number at a time.
// csrc/cpu/simd.h has the same operations for SIMD registers. Each operation is exact or correctly rounded (IEEE), so
// all implementations are bit-identical.
#pragma once

#include "host_device.h"
#include "integers.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#include <cstring>
#endif

namespace diffratio {

struct Scalar {
  using Float = float;
  using Bits = uint32_t;     // 32-bit words, also the bits of a Float
  using Word = uint32_t;     // a word of the Philox state
  using Product = uint64_t;  // a 32 x 32 -> 64 bit product

  static DR_HOST_DEVICE Product multiply(Word a, uint32_t m) { return static_cast<uint64_t>(a) * m; }
  static DR_HOST_DEVICE Word high(Product p) { return static_cast<uint32_t>(p >> 32); }
  static DR_HOST_DEVICE Word low(Product p) { return static_cast<uint32_t>(p); }
  static DR_HOST_DEVICE Word exclusive_or(Word a, Word b, uint32_t key) { return a ^ b ^ key; }
  static DR_HOST_DEVICE Bits bits(Word a) { return a; }

  static DR_HOST_DEVICE Float fma(Float a, Float b, Float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
  }
  static DR_HOST_DEVICE Float square_root(Float a) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(a);
#else
    return std::sqrt(a);
#endif
  }
  static DR_HOST_DEVICE Float from_signed(Bits a) {  // int32 -> float, to nearest even
#if defined(__CUDA_ARCH__)
    return __int2float_rn(static_cast<int32_t>(a));
#else
    return static_cast<float>(static_cast<int32_t>(a));
#endif
  }
  static DR_HOST_DEVICE Float as_float(Bits a) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(a);
#else
    float f;
    std::memcpy(&f, &a, sizeof f);
    return f;
#endif
  }
  static DR_HOST_DEVICE Bits as_bits(Float a) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(a);
#else
    uint32_t b;
    std::memcpy(&b, &a, sizeof b);
    return b;
#endif
  }
  // a if `mask & bit` is set, else b.
  static DR_HOST_DEVICE Float choose(Bits mask, uint32_t bit, Float a, Float b) { return mask & bit ? a : b; }
  // a with its sign flipped where bit 31 of `sign` is set.
  static DR_HOST_DEVICE Float flip_sign(Float a, Bits sign) { return as_float(as_bits(a) ^ (sign & 0x80000000u)); }
  static DR_HOST_DEVICE Float constant(float a) { return a; }
};

}  // namespace diffratio
