// cvt: between types, with the ISA's roundings and saturations.
#include <algorithm>

#include "lanes.h"

namespace ptx {
namespace {

u32 bits(float f) {
  u32 b;
  std::memcpy(&b, &f, 4);
  return b;
}
float number(u32 b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

// "cvt": to bf16 and f16, round to nearest even; NaN results are 0x7fff.
u32 to_bf16(float x) {
  u32 b = bits(x);
  if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
  u32 kept = b >> 16, rest = b & 0xffff;
  if (rest > 0x8000 || (rest == 0x8000 && (kept & 1))) ++kept;  // carries into the exponent, up to infinity
  return kept;
}
u32 to_f16(float x) {
  if (std::isnan(x)) return 0x7fff;
  u32 sign = std::signbit(x) ? 0x8000 : 0;
  double m = std::fabs(double(x));
  if (m >= 65520) return sign | 0x7c00;
  int e;
  if (m == 0) return sign;
  std::frexp(m, &e);  // m = f 2^e, f in [0.5, 1)
  int unit = std::max(e - 11, -24);
  double q = std::nearbyint(std::ldexp(m, -unit));  // to even; exact scaling
  double r = std::ldexp(q, unit);
  if (r >= 65536) return sign | 0x7c00;
  if (r < 0x1p-14) return sign | u32(std::ldexp(r, 24));
  std::frexp(r, &e);
  return sign | u32((e - 1 + 15) << 10) | (u32(std::ldexp(r, 11 - e)) & 0x3ff);
}
float from_f16(u32 h) {
  u32 e = h >> 10 & 31, f = h & 0x3ff;
  double v = e == 31 ? (f ? NAN : INFINITY) : e ? std::ldexp(1024 + f, int(e) - 25) : std::ldexp(f, -24);
  return float(h & 0x8000 ? -v : v);
}

}  // namespace

void add_conversions(Table& t) {
  // conversions
  t["cvt.u64.u32"] = H((unary<u64, u32>(w, i, m, [](u32 a) { return u64(a); })));
  t["cvt.s64.s32"] = t["cvt.u64.s32"] = H((unary<s64, s32>(w, i, m, [](s32 a) { return s64(a); })));
  t["cvt.u64.u32.chopped"] = H((unary<u64, u64>(w, i, m, [](u64 a) { return u64(u32(a)); })));
  t["cvt.s64.s32.chopped"] = H((unary<s64, u64>(w, i, m, [](u64 a) { return s64(s32(u32(a))); })));
  t["cvt.rn.f32.s32.chopped"] = H((unary<float, u64>(w, i, m, [](u64 a) { return float(s32(u32(a))); })));
  t["cvt.u32.u64"] = t["cvt.s32.s64"] = t["cvt.u32.s64"] = t["cvt.s32.u64"] =
      H((unary<u32, u64>(w, i, m, [](u64 a) { return u32(a); })));
  t["cvt.u32.u16"] = H((unary<u32, u16>(w, i, m, [](u16 a) { return u32(a); })));
  t["cvt.u16.u32"] = H((unary<u16, u32>(w, i, m, [](u32 a) { return u16(a); })));
  t["cvt.s32.s16"] = H((unary<u32, u16>(w, i, m, [](u16 a) { return u32(s32(int16_t(a))); })));
  t["cvt.u64.u16"] = H((unary<u64, u16>(w, i, m, [](u16 a) { return u64(a); })));
  t["cvt.rn.f32.s32"] = H((unary<float, s32>(w, i, m, [](s32 a) { return float(a); })));
  t["cvt.rn.f32.u32"] = H((unary<float, u32>(w, i, m, [](u32 a) { return float(a); })));
  t["cvt.rn.f32.s64"] = H((unary<float, s64>(w, i, m, [](s64 a) { return float(a); })));
  t["cvt.rn.f32.u64"] = H((unary<float, u64>(w, i, m, [](u64 a) { return float(a); })));
  t["cvt.rzi.u32.f32"] =
      H((unary<u32, float>(w, i, m, [](float a) -> u32 { return !(a > 0)       ? 0
                                                                : a >= 0x1p32f ? ~0u
                                                                               : u32(a); })));
  t["cvt.rzi.s32.f32"] = H((unary<s32, float>(w, i, m, [](float a) -> s32 {
    return std::isnan(a) ? 0 : a >= 0x1p31f ? 0x7fffffff : a < -0x1p31f ? s32(0x80000000u) : s32(a);
  })));
  t["cvt.f64.f32"] = H((unary<double, float>(w, i, m, [](float a) { return double(a); })));
  t["cvt.rn.f32.f64"] = H((unary<float, double>(w, i, m, [](double a) { return float(a); })));
  t["cvt.rn.bf16.f32"] = H((unary<u32, float>(w, i, m, to_bf16)));
  t["cvt.rn.f16.f32"] = H((unary<u32, float>(w, i, m, to_f16)));
  t["cvt.f32.f16"] = H((unary<float, u32>(w, i, m, [](u32 a) { return from_f16(a & 0xffff); })));
  t["cvt.f32.bf16"] = H((unary<float, u32>(w, i, m, [](u32 a) { return number(a << 16); })));
  // "for .bf16x2, a is converted into the upper half of d, b into the lower"
  t["cvt.rn.bf16x2.f32"] =
      H((binary<u32, float, float>(w, i, m, [](float a, float b) { return to_bf16(a) << 16 | to_bf16(b); })));
}

}  // namespace ptx
