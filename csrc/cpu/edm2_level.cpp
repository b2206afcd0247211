// The EDM2 kernels of one SIMD level. CMake compiles this file once per level, with that level's flags and DR_LEVEL
// set to its name. Everything is in unnamed namespaces or always inlined, as in noise_level.cpp.
#include "edm2_join.h"
#include "edm2_norm.h"
#include "edm2_scale.h"

namespace diffratio::cpu {
namespace {

// Calls f(T{}) for the element type.
template <class Function>
void visit(Type type, const Function& f) {
  switch (type) {
    case Type::bfloat16: return f(BFloat16{});
    case Type::float16: return f(Float16{});
    default: return f(float{});
  }
}

template <class Arguments>
const Streamed<Arguments>& unpack(const void* arguments) {
  return *static_cast<const Streamed<Arguments>*>(arguments);
}

void pixel_norm(const void* arguments, int64_t begin, int64_t end) {
  const auto& [a, stream, tile] = unpack<PixelNorm>(arguments);
  visit(a.type, [&](auto type) {
    using T = decltype(type);
    if (a.inner == 1) {
      norm_rows<T>(a, stream, begin, end);
    } else {
      norm_tiles<T>(a, stream, tile, begin, end);
    }
  });
  finish_streaming();
}

void scale_silu(const void* arguments, int64_t begin, int64_t end) {
  const auto& [a, stream, tile] = unpack<ScaleSilu>(arguments);
  visit(a.type, [&](auto type) {
    using T = decltype(type);
    if (a.channels_last) {
      scale_chunks<T>(a, stream, begin, end);
    } else {
      scale_rows<T>(a, stream, begin, end);
    }
  });
  finish_streaming();
}

void scale_silu_sums(const void* arguments, int64_t begin, int64_t end) {
  const ScaleSilu& a = unpack<ScaleSilu>(arguments).a;
  visit(a.type, [&](auto type) { condition_sums<decltype(type)>(a, begin, end); });
}

void sum_clamp(const void* arguments, int64_t begin, int64_t end) {
  const auto& [a, stream, tile] = unpack<SumClamp>(arguments);
  visit(a.type, [&](auto type) { sum_chunks<decltype(type)>(a, stream, begin, end); });
  finish_streaming();
}

void cat_silu(const void* arguments, int64_t begin, int64_t end) {
  const auto& [a, stream, tile] = unpack<CatSilu>(arguments);
  visit(a.type, [&](auto type) { cat_chunks<decltype(type)>(a, stream, begin, end); });
  finish_streaming();
}

void ones_channel(const void* arguments, int64_t begin, int64_t end) {
  const OnesChannel& a = unpack<OnesChannel>(arguments).a;
  visit(a.type,
        [&](auto in) { visit(a.out_type, [&](auto out) { ones<decltype(in), decltype(out)>(a, begin, end); }); });
}

void qkv_norm(const void* arguments, int64_t begin, int64_t end) {
  const auto& [a, stream, tile] = unpack<QkvNorm>(arguments);
  visit(a.type, [&](auto type) { qkv_rows<decltype(type)>(a, stream, begin, end); });
  finish_streaming();
}

}  // namespace

#define DR_JOIN_(a, b) a##b
#define DR_JOIN(a, b) DR_JOIN_(a, b)
extern const Edm2Level DR_JOIN(edm2_, DR_LEVEL);
const Edm2Level DR_JOIN(edm2_, DR_LEVEL) = {pixel_norm, scale_silu,   scale_silu_sums, sum_clamp,
                                            cat_silu,   ones_channel, qkv_norm};

}  // namespace diffratio::cpu
