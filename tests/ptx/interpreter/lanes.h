// Handlers that compute every lane's result only from its sources.
#pragma once
#include <cmath>

#include "machine.h"

namespace ptx {

// 16-bit registers are kept in 32-bit slots; S<T> is what a slot is read as.
template <class T>
struct Slot {
  using type = T;
};
template <>
struct Slot<u16> {
  using type = u32;
};
template <>
struct Slot<int16_t> {
  using type = u32;
};

template <class D, class A, class F>
void unary(Warp& w, const Instruction& i, u32 m, F f) {
  using SA = typename Slot<A>::type;
  using SD = typename Slot<D>::type;
  const SA* a = w.r<SA>(i.sources[0]);
  alignas(64) SD t[32];
  LANES t[l] = SD(f(A(a[l])));
  put<SD>(w, i.results[0], t, m, defined_sources(w, i));
}
template <class D, class A, class B, class F>
void binary(Warp& w, const Instruction& i, u32 m, F f) {
  using SA = typename Slot<A>::type;
  using SB = typename Slot<B>::type;
  using SD = typename Slot<D>::type;
  const SA* a = w.r<SA>(i.sources[0]);
  const SB* b = w.r<SB>(i.sources[1]);
  alignas(64) SD t[32];
  LANES t[l] = SD(f(A(a[l]), B(b[l])));
  put<SD>(w, i.results[0], t, m, defined_sources(w, i));
}
template <class D, class A, class B, class C, class F>
void ternary(Warp& w, const Instruction& i, u32 m, F f) {
  const A* a = w.r<A>(i.sources[0]);
  const B* b = w.r<B>(i.sources[1]);
  const C* c = w.r<C>(i.sources[2]);
  alignas(64) D t[32];
  LANES t[l] = f(a[l], b[l], c[l]);
  put<D>(w, i.results[0], t, m, defined_sources(w, i));
}
template <class A, class F>
void compare(Warp& w, const Instruction& i, u32 m, F f) {
  using SA = typename Slot<A>::type;
  const SA *a = w.r<SA>(i.sources[0]), *b = w.r<SA>(i.sources[1]);
  u32 v = 0;
  LANES v |= u32(f(A(a[l]), A(b[l]))) << l;
  put_predicate(w, i.results[0], v, m, defined_sources(w, i));
}
template <class T>
void select(Warp& w, const Instruction& i, u32 m) {
  const T *a = w.r<T>(i.sources[0]), *b = w.r<T>(i.sources[1]);
  u32 p = predicate(w, i.sources[2]);
  alignas(64) T t[32];
  LANES t[l] = p >> l & 1 ? a[l] : b[l];
  put<T>(w, i.results[0], t, m,
         w.written[i.sources[2].mask] & ((p & w.written[i.sources[0].mask]) | (~p & w.written[i.sources[1].mask])));
}

// Table entries.
#define H(...)                                                \
  Entry {                                                     \
    [](Warp& w, const Instruction& i, u32 m) { __VA_ARGS__; } \
  }

}  // namespace ptx
