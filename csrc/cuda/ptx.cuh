// Everything that exists only on a GPU: all inline PTX, and the access to shared memory.
//
// A kernel written in terms of this file also compiles for the host, where tests/simt supplies the same functions and
// executes them with checks (docs/kernels.md). Every operation therefore takes a `Site`, by default the line of the
// call. It is empty on a GPU; error reports on the host print it. There is no host code, so NVRTC compiles this file.
#pragma once

#include "../common/host_device.h"

#if !defined(__CUDACC__)
#include <simt.h>  // the host's version of all that follows: compile with -Itests/simt
#else

#include "../common/integers.h"

#define DR_HERE \
  ::diffratio::ptx::Site {}

namespace diffratio::ptx {

struct Site {};

constexpr uint32_t all_lanes = 0xffffffffu;

struct alignas(16) Vector16 {
  uint32_t v[4];
};

// Test builds (DR_SHARED_MARKS) leave a gap after each array of shared memory and mark it for tests/ptx with an
// instruction that no other code uses.
#if defined(DR_SHARED_MARKS)
constexpr uint32_t shared_gap = 128;
DR_DEVICE void mark_shared(uint64_t end) { asm volatile("prefetchu.L1 [%0];" ::"l"(end) : "memory"); }
#else
constexpr uint32_t shared_gap = 0;
DR_DEVICE void mark_shared(uint64_t) {}
#endif

// --- synchronization -------------------------------------------------------------------------------------------

DR_DEVICE void block_sync(Site = DR_HERE) { __syncthreads(); }

// Named barriers 1 to 15 (0 is block_sync's). `threads`: how many arrive, of sync and arrive together.
DR_DEVICE void barrier_sync(int id, int threads, Site = DR_HERE) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DR_DEVICE void barrier_arrive(int id, int threads, Site = DR_HERE) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Orders the lanes' memory accesses. ldmatrix, mma and shuffles do not.
DR_DEVICE void warp_sync(uint32_t lanes = all_lanes, Site = DR_HERE) { __syncwarp(lanes); }

// All blocks of a cooperative launch. `arrived`: a word of global memory, zero before the launch, not used otherwise.
DR_DEVICE void grid_sync(uint32_t* arrived, Site = DR_HERE) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t blocks = gridDim.x * gridDim.y * gridDim.z;
    __threadfence();
    const uint32_t target = (atomicAdd(arrived, 1u) / blocks + 1) * blocks;
    uint32_t now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
    } while (now < target);
  }
  __syncthreads();
}

// Invalidates the contents of this block's shared memory, except the arrays of SharedArena::keep.
// It does not synchronize and does nothing on a GPU. On the host, reading an older value afterwards is an error.
DR_DEVICE void forget_shared() { mark_shared(0); }

// Makes the compiler recompute values that depend on x after this point, instead of keeping them in registers.
DR_DEVICE void hide(int& x) { asm volatile("" : "+r"(x)); }

// --- shuffles --------------------------------------------------------------------------------------------------

template <class T>
DR_DEVICE T shuffle(T value, int lane, uint32_t lanes = all_lanes, Site = DR_HERE) {
  return __shfl_sync(lanes, value, lane);
}
template <class T>
DR_DEVICE T shuffle_xor(T value, int mask, uint32_t lanes = all_lanes, Site = DR_HERE) {
  return __shfl_xor_sync(lanes, value, mask);
}
template <class T>
DR_DEVICE T shuffle_down(T value, int by, uint32_t lanes = all_lanes, Site = DR_HERE) {
  return __shfl_down_sync(lanes, value, by);
}

// --- global memory ---------------------------------------------------------------------------------------------

// keep: the default; l2: not in L1; streaming: used once, evicted first; constant: not written during the launch.
enum class Cache { keep, l2, streaming, constant };

template <class T>
DR_DEVICE T load(const T* p, Site = DR_HERE) {
  return *p;
}
template <class T>
DR_DEVICE void store(T* p, T value, Site = DR_HERE) {
  *p = value;
}

#define DR_LOAD16(instruction)                                          \
  asm volatile(instruction " {%0, %1, %2, %3}, [%4];"                   \
               : "=r"(x.v[0]), "=r"(x.v[1]), "=r"(x.v[2]), "=r"(x.v[3]) \
               : "l"(p)                                                 \
               : "memory")
#define DR_STORE16(instruction)                                                                                    \
  asm volatile(instruction " [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.v[0]), "r"(x.v[1]), "r"(x.v[2]), "r"(x.v[3]) \
               : "memory")

// 16 bytes at a multiple of 16.
template <Cache cache = Cache::keep>
DR_DEVICE Vector16 load16(const void* p, Site = DR_HERE) {
  Vector16 x;
  if constexpr (cache == Cache::keep) DR_LOAD16("ld.global.v4.u32");
  if constexpr (cache == Cache::l2) DR_LOAD16("ld.global.cg.v4.u32");
  if constexpr (cache == Cache::streaming) DR_LOAD16("ld.global.cs.v4.u32");
  if constexpr (cache == Cache::constant) {  // not volatile: the compiler may move it anywhere
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x.v[0]), "=r"(x.v[1]), "=r"(x.v[2]), "=r"(x.v[3])
        : "l"(p));
  }
  return x;
}
template <Cache cache = Cache::keep>
DR_DEVICE void store16(void* p, const Vector16& x, Site = DR_HERE) {
  static_assert(cache != Cache::constant, "constant memory is not stored to");
  if constexpr (cache == Cache::keep) DR_STORE16("st.global.v4.u32");
  if constexpr (cache == Cache::l2) DR_STORE16("st.global.cg.v4.u32");
  if constexpr (cache == Cache::streaming) DR_STORE16("st.global.cs.v4.u32");
}

#undef DR_LOAD16
#undef DR_STORE16

// --- shared memory ---------------------------------------------------------------------------------------------

// `count` elements of shared memory. Addresses are 32-bit offsets in the shared window.
template <class T>
class Shared {
 public:
  DR_DEVICE Shared() {}
  DR_DEVICE explicit Shared(uint32_t base) : base_(base) {}

  DR_DEVICE uint32_t address(int i) const { return base_ + i * static_cast<uint32_t>(sizeof(T)); }

  // The sizeof(V) bytes from element i on, at a multiple of sizeof(V): a T, a pair as uint32_t, a Vector16.
  template <class V = T>
  DR_DEVICE V load(int i, Site = DR_HERE) const {
    return *static_cast<const V*>(__cvta_shared_to_generic(address(i)));
  }
  template <class V>
  DR_DEVICE void store(int i, V value, Site = DR_HERE) const {
    *static_cast<V*>(__cvta_shared_to_generic(address(i))) = value;
  }

  // part: a part of the array. as: the same bytes as another type.
  DR_DEVICE Shared part(int first, int /*count*/, Site = DR_HERE) const { return Shared(address(first)); }
  template <class U>
  DR_DEVICE Shared<U> as() const {
    return Shared<U>(base_);
  }

 private:
  uint32_t base_;
};

// Allocates arrays in the dynamic shared memory of the launch, at multiples of 16 bytes. Every thread of the block
// must allocate the same arrays in the same order.
class SharedArena {
 public:
  DR_DEVICE SharedArena() {
    extern __shared__ __align__(128) unsigned char shared_window[];
    next_ = static_cast<uint32_t>(__cvta_generic_to_shared(shared_window));
  }
  template <class T>
  DR_DEVICE Shared<T> take(int count, const char* /*name*/ = "", Site = DR_HERE) {
    return reserve<T>(count, 0);
  }
  // As take(), for an array that forget_shared() does not invalidate.
  template <class T>
  DR_DEVICE Shared<T> keep(int count, const char* /*name*/ = "", Site = DR_HERE) {
    return reserve<T>(count, 1);
  }

 private:
  template <class T>
  DR_DEVICE Shared<T> reserve(int count, uint32_t kept) {
    const Shared<T> array(next_);
    next_ += (count * static_cast<uint32_t>(sizeof(T)) + 15) / 16 * 16;
    mark_shared(next_ + kept);
    next_ += shared_gap;
    return array;
  }

  uint32_t next_;
};

// --- asynchronous copies ---------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, both at multiples of 16. `valid` bytes are read, the rest are zeros.
// In flight until the issuing thread waits for its group; no thread may access source or destination before. copy_async
// goes through L2 only; copy_async_l1 keeps the line in L1, for what several warps of a multiprocessor read.
DR_DEVICE void copy_async(uint32_t to, const void* from, Site = DR_HERE) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DR_DEVICE void copy_async(uint32_t to, const void* from, int valid, Site = DR_HERE) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
DR_DEVICE void copy_async_l1(uint32_t to, const void* from, Site = DR_HERE) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
DR_DEVICE void copy_async_l1(uint32_t to, const void* from, int valid, Site = DR_HERE) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
}
// Closes this thread's group of copies.
DR_DEVICE void copy_commit(Site = DR_HERE) { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the `pending` newest groups of this thread are complete. Other threads need a barrier after it.
template <int pending>
DR_DEVICE void copy_wait(Site = DR_HERE) {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// --- arithmetic ------------------------------------------------------------------------------------------------

// One instruction, relative error 2^-11.
DR_DEVICE float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- matrices --------------------------------------------------------------------------------------------------

// 8 x 8 matrices of 16-bit elements from shared memory: lane 8 i + j gives the address of row j of matrix i (16
// bytes, at a multiple of 16) and gets elements 2 (lane % 4) and the next of row lane / 4 of matrix i in r[i]; with
// _trans, of the transposed matrix. No "memory" clobber, so that the compiler may move other accesses past it: other
// lanes' stores need a warp_sync or more in between anyway, which it does not cross. fragment.cuh has the lane maps.
DR_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, Site = DR_HERE) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}
DR_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row, Site = DR_HERE) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}
DR_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t row, Site = DR_HERE) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row));
}
DR_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row, Site = DR_HERE) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row));
}

// d[16, 8] += a[16, 16] b[16, 8] in bf16 with fp32 accumulators; b0 and b1 are b's upper and lower eight rows.
DR_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site = DR_HERE) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats as a pair of bf16, rounded to nearest even: `low` in the lower half, which is the first in memory.
DR_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DR_DEVICE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
DR_DEVICE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace diffratio::ptx

#endif

namespace diffratio::ptx {

// A matrix in shared memory; `stride` is the number of elements from row to row. A stride of 16 (2 n + 1) bytes gives
// ldmatrix no bank conflicts.
template <class T, int stride>
class SharedTile {
 public:
  DR_DEVICE SharedTile() {}
  DR_DEVICE explicit SharedTile(Shared<T> data) : data_(data) {}
  DR_DEVICE uint32_t address(int row, int column) const { return data_.address(row * stride + column); }
  // The memory of rows, for other data.
  DR_DEVICE Shared<T> rows(int first, int count) const { return data_.part(first * stride, count * stride); }
  template <class V = T>
  DR_DEVICE V load(int row, int column, Site site = DR_HERE) const {
    return data_.template load<V>(row * stride + column, site);
  }
  template <class V>
  DR_DEVICE void store(int row, int column, V value, Site site = DR_HERE) const {
    data_.store(row * stride + column, value, site);
  }

 private:
  Shared<T> data_;
};

}  // namespace diffratio::ptx
