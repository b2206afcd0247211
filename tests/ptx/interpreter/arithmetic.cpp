// Moves, bits, integers, floating point, comparisons. Semantics from the PTX ISA 9.0.
#include <algorithm>
#include <cfenv>

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

// A fixed pseudo-random number in [-1, 1] for the error of an approximation.
double wobble(u32 x) {
  u64 z = x * 0x9E3779B97F4A7C15ull + options.seed * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return double(s64(z)) * 0x1p-63;
}
float approximate(double exact, u32 seed, double relative) {
  if (!options.approximate) return float(exact);
  return float(exact * (1.0 + relative * wobble(seed)));
}

[[gnu::noinline]] float rounded(int mode, int what, float a, float b, float c) {
  std::fesetround(mode);
  volatile float x = a, y = b, z = c;
  volatile float r;
  if (what == 0)
    r = std::fma(float(x), float(y), float(z));
  else
    r = x + y;
  std::fesetround(FE_TONEAREST);
  return r;
}

template <class T>
void check_divisor(Warp& w, const Instruction& i, u32 m) {
  const T* b = w.r<T>(i.sources[1]);
  LANES if ((m >> l & 1) && b[l] == 0) fail("division by zero: " + where(w, i, l));
}

float fmax_ptx(float a, float b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

}  // namespace

void add_arithmetic(Table& t) {
  // moves and bits
  t["mov.b32"] = t["mov.u32"] = t["mov.s32"] = t["mov.f32"] = t["mov.u16"] = t["mov.b16"] =
      H((unary<u32, u32>(w, i, m, [](u32 a) { return a; })));
  t["mov.b64"] = t["mov.u64"] = t["mov.s64"] = t["mov.f64"] = t["cvta.to.global.u64"] =
      H((unary<u64, u64>(w, i, m, [](u64 a) { return a; })));
  t["mov.pred"] = H(put_predicate(w, i.results[0], predicate(w, i.sources[0]), m, w.written[i.sources[0].mask]));
  t["mov.b32.pack"] = H((binary<u32, u16, u16>(w, i, m, [](u16 a, u16 b) { return u32(a) | u32(b) << 16; })));
  t["mov.b32.unpack"] = H({
    const u32* a = w.r<u32>(i.sources[0]);
    alignas(64) u32 x[32];
    alignas(64) u32 y[32];
    LANES x[l] = a[l] & 0xffff;
    LANES y[l] = a[l] >> 16;
    u32 d = w.written[i.sources[0].mask];
    put<u32>(w, i.results[0], x, m, d);
    put<u32>(w, i.results[1], y, m, d);
  });
  t["and.b32"] = H((binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a & b; })));
  t["or.b32"] = H((binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a | b; })));
  t["xor.b32"] = H((binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a ^ b; })));
  t["not.b32"] = H((unary<u32, u32>(w, i, m, [](u32 a) { return ~a; })));
  t["and.b16"] = H((binary<u16, u16, u16>(w, i, m, [](u16 a, u16 b) { return u16(a & b); })));
  t["and.b64"] = H((binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a & b; })));
  t["or.b64"] = H((binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a | b; })));
  t["xor.b64"] = H((binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a ^ b; })));
  t["not.b64"] = H((unary<u64, u64>(w, i, m, [](u64 a) { return ~a; })));
  t["and.pred"] = H({
    u32 a = predicate(w, i.sources[0]), b = predicate(w, i.sources[1]), da = w.written[i.sources[0].mask],
        db = w.written[i.sources[1].mask];
    put_predicate(w, i.results[0], a & b, m, (da & db) | (da & ~a) | (db & ~b));
  });
  t["or.pred"] = H({
    u32 a = predicate(w, i.sources[0]), b = predicate(w, i.sources[1]), da = w.written[i.sources[0].mask],
        db = w.written[i.sources[1].mask];
    put_predicate(w, i.results[0], a | b, m, (da & db) | (da & a) | (db & b));
  });
  t["xor.pred"] = H(put_predicate(w, i.results[0], predicate(w, i.sources[0]) ^ predicate(w, i.sources[1]), m,
                                  defined_sources(w, i)));
  t["not.pred"] = H(put_predicate(w, i.results[0], ~predicate(w, i.sources[0]), m, defined_sources(w, i)));
  t["shl.b32"] = H((binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return b > 31 ? 0 : a << b; })));
  t["shr.u32"] = t["shr.b32"] = H((binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return b > 31 ? 0 : a >> b; })));
  t["shr.s32"] = H((binary<s32, s32, u32>(w, i, m, [](s32 a, u32 b) { return a >> (b > 31 ? 31 : b); })));
  t["shl.b64"] = H((binary<u64, u64, u32>(w, i, m, [](u64 a, u32 b) { return b > 63 ? 0 : a << b; })));
  t["shr.u64"] = t["shr.b64"] = H((binary<u64, u64, u32>(w, i, m, [](u64 a, u32 b) { return b > 63 ? 0 : a >> b; })));
  t["shr.s64"] = H((binary<s64, s64, u32>(w, i, m, [](s64 a, u32 b) { return a >> (b > 63 ? 63 : b); })));
  t["prmt.b32"] = H((ternary<u32, u32, u32, u32>(w, i, m, [](u32 a, u32 b, u32 c) {
    u64 both = u64(b) << 32 | a;
    u32 r = 0;
    for (int j = 0; j < 4; ++j) {
      u32 s = c >> (4 * j) & 15, byte = u32(both >> (8 * (s & 7))) & 255;
      if (s & 8) byte = byte & 128 ? 255 : 0;
      r |= byte << (8 * j);
    }
    return r;
  })));
  t["bfi.b32"] = H({  // the low d bits of a, put into b at bit c
    const u32 *a = w.r<u32>(i.sources[0]), *b = w.r<u32>(i.sources[1]), *c = w.r<u32>(i.sources[2]);
    const u32* d = w.r<u32>(i.sources[3]);
    alignas(64) u32 r[32];
    LANES {
      const u32 at = c[l] & 255, size = d[l] & 255;
      const u64 field = ((u64{1} << std::min(size, 32u)) - 1) << std::min(at, 32u);
      r[l] = u32((b[l] & ~field) | (u64{a[l]} << std::min(at, 32u) & field));
    }
    put<u32>(w, i.results[0], r, m, defined_sources(w, i));
  });
  t["bfe.u32"] = H((ternary<u32, u32, u32, u32>(w, i, m, [](u32 a, u32 b, u32 c) {
    const u32 at = b & 255, size = c & 255;
    return at > 31 ? 0 : u32(u64{a} >> at & ((u64{1} << std::min(size, 32u)) - 1));
  })));
  t["popc.b32"] = H((unary<u32, u32>(w, i, m, [](u32 a) { return u32(__builtin_popcount(a)); })));
  t["clz.b32"] = H((unary<u32, u32>(w, i, m, [](u32 a) { return a ? u32(__builtin_clz(a)) : 32; })));
  t["shf.l.wrap.b32"] = H((ternary<u32, u32, u32, u32>(
      w, i, m, [](u32 a, u32 b, u32 c) { return u32(((u64{b} << 32 | a) << (c & 31)) >> 32); })));
  t["shf.r.wrap.b32"] = H(
      (ternary<u32, u32, u32, u32>(w, i, m, [](u32 a, u32 b, u32 c) { return u32((u64{b} << 32 | a) >> (c & 31)); })));
  // integers
  t["add.s32"] = t["add.u32"] = H((binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a + b; })));
  t["sub.s32"] = t["sub.u32"] = H((binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a - b; })));
  t["mul.lo.s32"] = t["mul.lo.u32"] = H((binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a * b; })));
  t["mad.lo.s32"] = t["mad.lo.u32"] =
      H((ternary<u32, u32, u32, u32>(w, i, m, [](u32 a, u32 b, u32 c) { return a * b + c; })));
  t["mul.hi.s32"] = H((binary<s32, s32, s32>(w, i, m, [](s32 a, s32 b) { return s32((s64(a) * b) >> 32); })));
  t["mul.hi.u32"] = H((binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return u32((u64(a) * b) >> 32); })));
  t["mul.wide.s32"] = H((binary<s64, s32, s32>(w, i, m, [](s32 a, s32 b) { return s64(a) * b; })));
  t["mul.wide.u32"] = H((binary<u64, u32, u32>(w, i, m, [](u32 a, u32 b) { return u64(a) * b; })));
  t["mad.wide.s32"] =
      H((ternary<s64, s32, s32, s64>(w, i, m, [](s32 a, s32 b, s64 c) { return s64(u64(s64(a) * b) + u64(c)); })));
  t["mad.wide.u32"] = H((ternary<u64, u32, u32, u64>(w, i, m, [](u32 a, u32 b, u64 c) { return u64(a) * b + c; })));
  t["add.s64"] = t["add.u64"] = H((binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a + b; })));
  t["sub.s64"] = t["sub.u64"] = H((binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a - b; })));
  t["mul.lo.s64"] = t["mul.lo.u64"] = H((binary<u64, u64, u64>(w, i, m, [](u64 a, u64 b) { return a * b; })));
  t["mad.lo.s64"] = t["mad.lo.u64"] =
      H((ternary<u64, u64, u64, u64>(w, i, m, [](u64 a, u64 b, u64 c) { return a * b + c; })));
  t["neg.s32"] = H((unary<u32, u32>(w, i, m, [](u32 a) { return 0 - a; })));
  t["neg.s64"] = H((unary<u64, u64>(w, i, m, [](u64 a) { return 0 - a; })));
  t["max.s32"] = H((binary<s32, s32, s32>(w, i, m, [](s32 a, s32 b) { return a > b ? a : b; })));
  t["min.s32"] = H((binary<s32, s32, s32>(w, i, m, [](s32 a, s32 b) { return a < b ? a : b; })));
  t["max.u32"] = H((binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a > b ? a : b; })));
  t["min.u32"] = H((binary<u32, u32, u32>(w, i, m, [](u32 a, u32 b) { return a < b ? a : b; })));
  t["min.s64"] = H((binary<s64, s64, s64>(w, i, m, [](s64 a, s64 b) { return a < b ? a : b; })));
  t["max.s64"] = H((binary<s64, s64, s64>(w, i, m, [](s64 a, s64 b) { return a > b ? a : b; })));
  t["abs.s32"] = H((unary<s32, s32>(w, i, m, [](s32 a) { return a < 0 ? -a : a; })));
#define DIVISIONS(T, name)                                                                    \
  t["div." name] = H((check_divisor<T>(w, i, m), binary<T, T, T>(w, i, m, [](T a, T b) -> T { \
                        if (b == 0) return 0;                                                 \
                        if (b == T(-1) && T(-1) < 0) return T(0) - a;                         \
                        return a / b;                                                         \
                      })));                                                                   \
  t["rem." name] = H((check_divisor<T>(w, i, m), binary<T, T, T>(w, i, m, [](T a, T b) -> T { \
                        if (b == 0) return 0;                                                 \
                        if (b == T(-1) && T(-1) < 0) return 0;                                \
                        return a % b;                                                         \
                      })));
  DIVISIONS(s32, "s32")
  DIVISIONS(u32, "u32")
  DIVISIONS(s64, "s64")
  DIVISIONS(u64, "u64")
  // fp32, no .ftz: subnormals count
  t["add.rn.f32"] = t["add.f32"] = H((binary<float, float, float>(w, i, m, [](float a, float b) { return a + b; })));
  t["sub.rn.f32"] = t["sub.f32"] = H((binary<float, float, float>(w, i, m, [](float a, float b) { return a - b; })));
  t["mul.rn.f32"] = t["mul.f32"] = H((binary<float, float, float>(w, i, m, [](float a, float b) { return a * b; })));
  t["fma.rn.f32"] = H((
      ternary<float, float, float, float>(w, i, m, [](float a, float b, float c) { return __builtin_fmaf(a, b, c); })));
  t["fma.rm.f32"] = H((ternary<float, float, float, float>(
      w, i, m, [](float a, float b, float c) { return rounded(FE_DOWNWARD, 0, a, b, c); })));
  t["add.rz.f32"] =
      H((binary<float, float, float>(w, i, m, [](float a, float b) { return rounded(FE_TOWARDZERO, 1, a, b, 0); })));
  t["neg.f32"] = H((unary<u32, u32>(w, i, m, [](u32 a) { return a ^ 0x80000000u; })));
  t["abs.f32"] = H((unary<u32, u32>(w, i, m, [](u32 a) { return a & 0x7fffffffu; })));
  t["max.f32"] = H((binary<float, float, float>(w, i, m, fmax_ptx)));
  t["min.f32"] = H((binary<float, float, float>(w, i, m, [](float a, float b) { return -fmax_ptx(-a, -b); })));
  t["div.rn.f32"] = H((binary<float, float, float>(w, i, m, [](float a, float b) { return a / b; })));
  t["rcp.rn.f32"] = H((unary<float, float>(w, i, m, [](float a) { return 1.0f / a; })));
  t["sqrt.rn.f32"] = H((unary<float, float>(w, i, m, [](float a) { return std::sqrt(a); })));
  // "tanh.approx": relative error 2^-11. "ex2.approx.ftz": 2^-22, subnormal inputs and results are zeros.
  t["tanh.approx.f32"] = H((unary<float, float>(w, i, m, [](float a) {
    float r = approximate(std::tanh(double(a)), bits(a), 0x1p-11);
    return r > 1 ? 1.0f : r < -1 ? -1.0f : r;
  })));
  t["ex2.approx.ftz.f32"] = H((unary<float, float>(w, i, m, [](float a) {
    if (std::fabs(a) < 0x1p-126f) a = std::copysign(0.0f, a);
    float r = a == 0 ? 1.0f : approximate(std::exp2(double(a)), bits(a), 0x1p-22);
    return r < 0x1p-126f ? 0.0f : r;
  })));
  t["lg2.approx.ftz.f32"] = H((unary<float, float>(w, i, m, [](float a) {
    if (std::fabs(a) < 0x1p-126f) a = std::copysign(0.0f, a);
    return approximate(std::log2(double(a)), bits(a), 0x1p-22);
  })));
  t["rsqrt.approx.f32"] = H(
      (unary<float, float>(w, i, m, [](float a) { return approximate(1 / std::sqrt(double(a)), bits(a), 0x1p-22); })));
  t["rcp.approx.ftz.f32"] =
      H((unary<float, float>(w, i, m, [](float a) { return approximate(1 / double(a), bits(a), 0x1p-23); })));
  t["cvt.sat.f32.f32"] = H((unary<float, float>(w, i, m, [](float a) {
    return std::isnan(a) ? 0.0f : a < 0 ? 0.0f : a > 1 ? 1.0f : a == 0 ? 0.0f : a;
  })));
  t["add.rn.f64"] = t["add.f64"] =
      H((binary<double, double, double>(w, i, m, [](double a, double b) { return a + b; })));
  t["mul.rn.f64"] = t["mul.f64"] =
      H((binary<double, double, double>(w, i, m, [](double a, double b) { return a * b; })));
  t["fma.rn.f64"] = H((ternary<double, double, double, double>(
      w, i, m, [](double a, double b, double c) { return __builtin_fma(a, b, c); })));
  // comparisons: ordered ones are false for NaN, the ...u ones true
#define COMPARE(T, name)                                                                  \
  t["setp.eq." name] = H((compare<T>(w, i, m, [](T a, T b) { return a == b; })));         \
  t["setp.ne." name] = H((compare<T>(w, i, m, [](T a, T b) { return a < b || a > b; }))); \
  t["setp.lt." name] = H((compare<T>(w, i, m, [](T a, T b) { return a < b; })));          \
  t["setp.le." name] = H((compare<T>(w, i, m, [](T a, T b) { return a <= b; })));         \
  t["setp.gt." name] = H((compare<T>(w, i, m, [](T a, T b) { return a > b; })));          \
  t["setp.ge." name] = H((compare<T>(w, i, m, [](T a, T b) { return a >= b; })));
  // clang-format off: macros without semicolons have no stable layout
  COMPARE(s32, "s32")
  COMPARE(u32, "u32") COMPARE(s64, "s64") COMPARE(u64, "u64") COMPARE(float, "f32") COMPARE(double, "f64")
  COMPARE(u32, "b32") COMPARE(u64, "b64") COMPARE(u16, "u16") COMPARE(int16_t, "s16") COMPARE(u16, "b16")
      // clang-format on
      t["setp.equ.f32"] = H((compare<float>(w, i, m, [](float a, float b) { return !(a < b || a > b); })));
  t["setp.neu.f32"] = H((compare<float>(w, i, m, [](float a, float b) { return !(a == b); })));
  t["setp.ltu.f32"] = H((compare<float>(w, i, m, [](float a, float b) { return !(a >= b); })));
  t["setp.leu.f32"] = H((compare<float>(w, i, m, [](float a, float b) { return !(a > b); })));
  t["setp.gtu.f32"] = H((compare<float>(w, i, m, [](float a, float b) { return !(a <= b); })));
  t["setp.geu.f32"] = H((compare<float>(w, i, m, [](float a, float b) { return !(a < b); })));
  t["setp.nan.f32"] = H((compare<float>(w, i, m, [](float a, float b) { return a != a || b != b; })));
  t["setp.num.f32"] = H((compare<float>(w, i, m, [](float a, float b) { return a == a && b == b; })));
  for (const char* n : {"selp.b32", "selp.u32", "selp.s32", "selp.f32", "selp.b16", "selp.u16"})
    t[n] = H(select<u32>(w, i, m));
  for (const char* n : {"selp.b64", "selp.u64", "selp.s64", "selp.f64"}) t[n] = H(select<u64>(w, i, m));
}

}  // namespace ptx
