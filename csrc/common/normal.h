// NOISE CONTRACT, part 2: from words to normals (Box-Muller). Words (0, 1) and (2, 3) of a counter are pairs:
//   u = ((w_first >> 8) + 1) 2^-24 in (0, 1], exact in float32;   r = sqrt(-2 ln u)
//   theta = w_second 2^-32 turns, as the nearest quarter turn and a remainder of at most 1/8 turn
//   normals: r cos(theta), r sin(theta)
// The largest radius is sqrt(48 ln 2) = 5.77. Logarithm and sine are the polynomials below, in explicit fma;
// files that include this one are compiled without contraction (-ffp-contract=off, --fmad=false), so results are
// bit-identical on every device. The error against the exact formulas is below 9.35e-7: at most 3.53e-7 from the
// radius (over all 2^24 values), 7.5e-8 r from the angle and 2.4e-7 from the product.
// diffratio_fast/ops/reference_noise.py repeats these lines in PyTorch and must change with them.
#pragma once

#include "host_device.h"
#include "integers.h"

namespace diffratio {

// sqrt(-2 ln u) for u = ((word >> 8) + 1) 2^-24. With u = 2^k (1 + s), |s| <= 1/3:
// -2 ln u = -2 ln(2) k + s Q(s), Q a minimax polynomial for -2 ln(1 + s) / s (error of r below 1e-8).
template <class V>
DR_HOST_DEVICE typename V::Float radius(typename V::Bits word) {
  using F = typename V::Float;
  using B = typename V::Bits;
  const F u = V::fma(V::from_signed(word >> 8), V::constant(0x1p-24f), V::constant(0x1p-24f));
  const B bits = V::as_bits(u);
  const B k23 = (bits - 0x3f2aaaabu) & 0xff800000u;  // k << 23: the mantissa is in [2/3, 4/3)
  const F s = V::as_float(bits - k23) - V::constant(1.0f);
  F q = V::constant(-0x1.25295ep-2f);
  q = V::fma(q, s, V::constant(0x1.3dd1e4p-2f));
  q = V::fma(q, s, V::constant(-0x1.1d4e10p-2f));
  q = V::fma(q, s, V::constant(0x1.4fa594p-2f));
  q = V::fma(q, s, V::constant(-0x1.99ebe4p-2f));
  q = V::fma(q, s, V::constant(0x1.0018d8p-1f));
  q = V::fma(q, s, V::constant(-0x1.5554bcp-1f));
  q = V::fma(q, s, V::constant(0x1.ffffc2p-1f));
  q = V::fma(q, s, V::constant(-2.0f));
  // -2 ln(2) 2^-23 times k << 23.
  return V::square_root(V::fma(V::from_signed(k23), V::constant(-0x1.62e430p-23f), s * q));
}

// cosine and sine of word 2^-32 turns. a in [-1, 1] is the remainder in eighths of a turn.
template <class V>
DR_HOST_DEVICE void cosine_sine(typename V::Bits word, typename V::Float& cosine, typename V::Float& sine) {
  using F = typename V::Float;
  using B = typename V::Bits;
  const F a = V::from_signed(word << 2) * V::constant(0x1p-31f);
  const F y = a * a;
  // sin(pi/4 a) = S0 a + (S0' + S1 y + ...) a, where S0 + S0' is the leading coefficient to more than 24 bits.
  F s = V::constant(-0x1.2cf5d4p-15f);
  s = V::fma(s, y, V::constant(0x1.465a3ep-9f));
  s = V::fma(s, y, V::constant(-0x1.4abba8p-4f));
  s = V::fma(s, y, V::constant(0x1.ce0a14p-26f));
  s = V::fma(a, V::constant(0x1.921fb4p-1f), s * a);
  F c = V::constant(0x1.d9f7bcp-19f);
  c = V::fma(c, y, V::constant(-0x1.55c664p-12f));
  c = V::fma(c, y, V::constant(0x1.03c1dep-6f));
  c = V::fma(c, y, V::constant(-0x1.3bd3ccp-2f));
  c = V::fma(c, y, V::constant(1.0f));
  // Quarter turn q = bits 30-31 of word + 1/8 turn: odd q swaps; sine is negative for q = 2, 3, cosine for 1, 2.
  const B quarter = word + 0x20000000u;
  cosine = V::flip_sign(V::choose(quarter, 0x40000000u, s, c), quarter + 0x40000000u);
  sine = V::flip_sign(V::choose(quarter, 0x40000000u, c, s), quarter);
}

// The two normals of a pair of words.
template <class V>
DR_HOST_DEVICE void box_muller(typename V::Bits first, typename V::Bits second, typename V::Float& n0,
                               typename V::Float& n1) {
  typename V::Float cosine, sine;
  cosine_sine<V>(second, cosine, sine);
  const typename V::Float r = radius<V>(first);
  n0 = r * cosine;
  n1 = r * sine;
}

}  // namespace diffratio
