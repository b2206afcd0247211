// Macros for functions that are compiled for the CPU, for CUDA and for the CUDA-on-CPU tests.
#pragma once

#if defined(__CUDACC__)
#define DR_HOST_DEVICE __host__ __device__ __forceinline__
#define DR_DEVICE __device__ __forceinline__
#define DR_UNROLL _Pragma("unroll")
#define DR_UNROLL_TWICE _Pragma("unroll 2")
#define DR_PRAGMA(text) _Pragma(#text)
#define DR_UNROLL_TIMES(n) DR_PRAGMA(unroll(n))
#define DR_UNROLL_NOT _Pragma("unroll 1")
#else
#define DR_HOST_DEVICE inline __attribute__((always_inline))
#define DR_DEVICE inline
#define DR_UNROLL
#define DR_UNROLL_TWICE
#define DR_UNROLL_NOT
#define DR_UNROLL_TIMES(n)
#endif
