// The host's version of csrc/cuda/ptx.cuh: the same names and arguments, with everything checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "error.h"

#define DR_HERE ::std::source_location::current()

namespace diffratio::ptx {

using Site = simt::Site;

constexpr uint32_t all_lanes = 0xffffffffu;

struct alignas(16) Vector16 {
  uint32_t v[4];
};

enum class Cache { keep, l2, streaming, constant };

// --- building blocks of the templates below --------------------------------------------------------------------

namespace host {

enum class Shuffle { from, exclusive_or, down };
uint64_t shuffle(Shuffle how, uint64_t value, int argument, uint32_t lanes, const Site& site);

void global_read(const void* p, void* to, uint32_t bytes, const Site& site);
void global_write(void* p, const void* from, uint32_t bytes, const Site& site);

uint32_t shared_take(const char* name, uint32_t element_bytes, int64_t count, bool keep, const Site& site);
void shared_read(uint32_t address, void* to, uint32_t bytes, const Site& site);
void shared_write(uint32_t address, const void* from, uint32_t bytes, const Site& site);
[[noreturn]] void outside(int64_t first, int64_t end, int64_t count, uint32_t base, const Site& site);

void wait_for_groups(int pending, const Site& site);

}  // namespace host

// --- synchronization -------------------------------------------------------------------------------------------

void block_sync(Site site = DR_HERE);
void barrier_sync(int id, int threads, Site site = DR_HERE);
void barrier_arrive(int id, int threads, Site site = DR_HERE);
void warp_sync(uint32_t lanes = all_lanes, Site site = DR_HERE);
void grid_sync(uint32_t* arrived, Site site = DR_HERE);
void forget_shared();
inline void hide(int&) {}

// --- shuffles --------------------------------------------------------------------------------------------------

namespace host {
template <class T>
T shuffle(Shuffle how, T value, int argument, uint32_t lanes, const Site& site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(how, bits, argument, lanes, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace host

template <class T>
T shuffle(T value, int lane, uint32_t lanes = all_lanes, Site site = DR_HERE) {
  return host::shuffle(host::Shuffle::from, value, lane, lanes, site);
}
template <class T>
T shuffle_xor(T value, int mask, uint32_t lanes = all_lanes, Site site = DR_HERE) {
  return host::shuffle(host::Shuffle::exclusive_or, value, mask, lanes, site);
}
template <class T>
T shuffle_down(T value, int by, uint32_t lanes = all_lanes, Site site = DR_HERE) {
  return host::shuffle(host::Shuffle::down, value, by, lanes, site);
}

// --- global memory ---------------------------------------------------------------------------------------------

template <class T>
T load(const T* p, Site site = DR_HERE) {
  T value;
  host::global_read(p, &value, sizeof value, site);
  return value;
}
template <class T>
void store(T* p, T value, Site site = DR_HERE) {
  host::global_write(p, &value, sizeof value, site);
}
template <Cache cache = Cache::keep>
Vector16 load16(const void* p, Site site = DR_HERE) {
  Vector16 x;
  host::global_read(p, &x, sizeof x, site);
  return x;
}
template <Cache cache = Cache::keep>
void store16(void* p, const Vector16& x, Site site = DR_HERE) {
  static_assert(cache != Cache::constant, "constant memory is not stored to");
  host::global_write(p, &x, sizeof x, site);
}

// --- shared memory ---------------------------------------------------------------------------------------------

template <class T>
class Shared {
  static_assert(sizeof(T) % 2 == 0 && std::is_trivially_copyable_v<T>);

 public:
  Shared() = default;
  Shared(uint32_t base, int64_t count) : base_(base), count_(count) {}

  uint32_t address(int i) const { return base_ + static_cast<uint32_t>(i) * static_cast<uint32_t>(sizeof(T)); }

  template <class V = T>
  V load(int i, Site site = DR_HERE) const {
    check<V>(i, site);
    V value;
    host::shared_read(address(i), &value, sizeof value, site);
    return value;
  }
  template <class V>
  void store(int i, V value, Site site = DR_HERE) const {
    check<V>(i, site);
    host::shared_write(address(i), &value, sizeof value, site);
  }

  Shared part(int first, int count, Site site = DR_HERE) const {
    if (first < 0 || count < 0 || int64_t{first} + count > count_) {
      host::outside(first, int64_t{first} + count, count_, base_, site);
    }
    return Shared(address(first), count);
  }
  template <class U>
  Shared<U> as() const {
    return Shared<U>(base_, count_ * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(U)));
  }

 private:
  template <class V>
  void check(int64_t i, const Site& site) const {
    const int64_t bytes = static_cast<int64_t>(i * sizeof(T) + sizeof(V));
    if (i < 0 || bytes > count_ * static_cast<int64_t>(sizeof(T))) {
      host::outside(i, (bytes + sizeof(T) - 1) / sizeof(T), count_, base_, site);
    }
  }

  uint32_t base_ = 0;
  int64_t count_ = 0;
};

class SharedArena {
 public:
  SharedArena();
  template <class T>
  Shared<T> take(int count, const char* name = "", Site site = DR_HERE) {
    return Shared<T>(host::shared_take(name, sizeof(T), count, false, site), count);
  }
  template <class T>
  Shared<T> keep(int count, const char* name = "", Site site = DR_HERE) {
    return Shared<T>(host::shared_take(name, sizeof(T), count, true, site), count);
  }
};

// --- asynchronous copies ---------------------------------------------------------------------------------------

void copy_async(uint32_t to, const void* from, int valid, Site site = DR_HERE);
inline void copy_async(uint32_t to, const void* from, Site site = DR_HERE) { copy_async(to, from, 16, site); }
inline void copy_async_l1(uint32_t to, const void* from, int valid, Site site = DR_HERE) {
  copy_async(to, from, valid, site);
}
inline void copy_async_l1(uint32_t to, const void* from, Site site = DR_HERE) { copy_async(to, from, 16, site); }
void copy_commit(Site site = DR_HERE);
template <int pending>
void copy_wait(Site site = DR_HERE) {
  static_assert(pending >= 0);
  host::wait_for_groups(pending, site);
}

// --- arithmetic ------------------------------------------------------------------------------------------------

inline float tanh_approximate(float x) { return std::tanh(x); }

// --- matrices --------------------------------------------------------------------------------------------------

void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, Site site = DR_HERE);
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row, Site site = DR_HERE);
void ldmatrix_x2(uint32_t (&r)[2], uint32_t row, Site site = DR_HERE);
void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row, Site site = DR_HERE);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site = DR_HERE);

inline float low_bf16(uint32_t pair) {
  pair <<= 16;
  float x;
  std::memcpy(&x, &pair, sizeof x);
  return x;
}
inline float high_bf16(uint32_t pair) { return low_bf16(pair >> 16); }
uint32_t pack_bf16(float low, float high);

}  // namespace diffratio::ptx
