// The number types of images, with the same codes in every implementation.
#pragma once

#include "integers.h"
#include "scalar.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace diffratio {

enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

DR_HOST_DEVICE int64_t size_of(Type t) { return t == Type::float32 ? 4 : t == Type::float64 ? 8 : 2; }

// Storage of the 16-bit types. Conversions round to nearest even and keep NaN.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DR_HOST_DEVICE float to_float(float x) { return x; }

DR_HOST_DEVICE float to_float(BFloat16 x) { return Scalar::as_float(static_cast<uint32_t>(x.bits) << 16); }

DR_HOST_DEVICE float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN (made quiet, as hardware does)
    return Scalar::as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u));
  }
  // The exponent is 112 too low, then scaled up exactly; this converts subnormals to normal numbers.
  return Scalar::as_float(sign | Scalar::as_bits(Scalar::as_float(magnitude << 13) * 0x1p112f));
#endif
}

template <class T>
DR_HOST_DEVICE T from_float(float x);

template <>
DR_HOST_DEVICE float from_float<float>(float x) {
  return x;
}

template <>
DR_HOST_DEVICE BFloat16 from_float<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = Scalar::as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
#endif
}

template <>
DR_HOST_DEVICE Float16 from_float<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = Scalar::as_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above: infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum with 1/2 rounds at the subnormals' last bit
    half = Scalar::as_bits(Scalar::as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
#endif
}

}  // namespace diffratio
