// The parameter kernels of one SIMD level. CMake compiles this file once per level, with that level's flags and
// DR_LEVEL set to its name. Everything is in unnamed namespaces or always inlined, as in noise_level.cpp.
#include "parameters.h"
#include "wide.h"

namespace diffratio::cpu {
namespace {

DR_HOST_DEVICE float squares_of(const float* x, int64_t n) {
  return total(n, [&](auto w, int64_t i) {
    using W = decltype(w);
    const auto v = W::load(x + i);
    return v * v;
  });
}

// The factor of a row, from the sum of its squares.
DR_HOST_DEVICE float row_scale(float squares, int64_t n) {
  const float length = static_cast<float>(n);
  return 1.0f / ((weight_epsilon + Scalar::square_root(squares / length)) * Scalar::square_root(length));
}

template <class T>
DR_HOST_DEVICE void write_normalized(const float* weight, float squares, int64_t n, T* out) {
  const float scale = row_scale(squares, n);
  each(n, [&](auto w, int64_t i) {
    using W = decltype(w);
    W::store(out + i, W::load(weight + i) * W::constant(scale), false);
  });
}

template <class T>
void normalize_rows(const NormalizeWeight& a, int64_t begin, int64_t end) {
  const int64_t n = a.length;
  for (int64_t row = begin; row < end; ++row) {
    const float* weight = a.weight + row * n;
    const float squares = squares_of(weight, n);
    if (!a.by_weight) {
      write_normalized(weight, squares, n, static_cast<T*>(a.normalized) + row * n);
      continue;
    }
    const T* gradient = static_cast<const T*>(a.gradient) + row * n;
    const float dot = total(n, [&](auto w, int64_t i) {
      using W = decltype(w);
      return W::load(gradient + i) * W::load(weight + i);
    });
    const float length = static_cast<float>(n), rms = Scalar::square_root(squares / length);
    const float scale = row_scale(squares, n);
    const float k = rms > 0 ? -dot * scale / ((weight_epsilon + rms) * rms * length) : 0.0f;
    each(n, [&](auto w, int64_t i) {
      using W = decltype(w);
      const auto v = W::load(weight + i) * W::constant(k);
      W::store(a.by_weight + row * n + i, W::fma(W::load(gradient + i), W::constant(scale), v), false);
    });
  }
}

void normalize_weight(const void* arguments, int64_t begin, int64_t end) {
  const NormalizeWeight& a = *static_cast<const NormalizeWeight*>(arguments);
  switch (a.type) {
    case Type::bfloat16: return normalize_rows<BFloat16>(a, begin, end);
    case Type::float16: return normalize_rows<Float16>(a, begin, end);
    default: return normalize_rows<float>(a, begin, end);
  }
}

// As torch.lerp: exact at both ends.
template <class W>
DR_HOST_DEVICE typename W::F interpolate(typename W::F from, typename W::F to, float weight) {
  if (weight < 0.5f) return W::fma(W::constant(weight), to - from, from);
  return W::fma(W::constant(weight - 1.0f), to - from, to);
}

void adam(const void* arguments, int64_t begin, int64_t end) {
  const AdamRows& a = *static_cast<const AdamRows*>(arguments);
  const AdamSettings& s = a.settings;
  const AdamTensor& t = a.tensor;
  const int64_t n = t.length;
  const float keep = s.decoupled ? 1.0f - a.rate * s.decay : 1.0f, added = s.decoupled ? 0.0f : s.decay;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * n;
    float* weight = t.weight + at;
    a.partial[row] = total(n, [&](auto w, int64_t i) {
      using W = decltype(w);
      const auto gradient = W::load(t.gradient + at + i);
      auto p = W::load(weight + i);
      const auto g = added == 0.0f ? gradient : W::fma(W::constant(added), p, gradient);
      p = p * W::constant(keep);
      const auto m = W::fma(W::constant(s.beta1), W::load(t.first + at + i), W::constant(1.0f - s.beta1) * g);
      const auto v = W::fma(W::constant(s.beta2), W::load(t.second + at + i), W::constant(1.0f - s.beta2) * g * g);
      W::store(t.first + at + i, m, false);
      W::store(t.second + at + i, v, false);
      const auto root = W::fma(W::square_root(v), W::constant(a.correction), W::constant(s.epsilon));
      p = W::fma(W::constant(-a.step_size), m / root, p);
      W::store(weight + i, p, false);
      for (int k = 0; k < s.averages; ++k) {
        float* average = t.average[k] + at + i;
        W::store(average, interpolate<W>(W::load(average), p, a.average_weight[k]), false);
      }
      return gradient * gradient;
    });
    if (!t.normalize) continue;
    const float rms = Scalar::square_root(squares_of(weight, n) / static_cast<float>(n));
    const float scale = (1.0f - weight_epsilon) / (rms < weight_epsilon ? weight_epsilon : rms);
    each(n, [&](auto w, int64_t i) {
      using W = decltype(w);
      W::store(weight + i, W::load(weight + i) * W::constant(scale), false);
    });
    if (!t.normalized) continue;
    const float squares = squares_of(weight, n);
    switch (s.type) {
      case Type::bfloat16: write_normalized(weight, squares, n, static_cast<BFloat16*>(t.normalized) + at); break;
      case Type::float16: write_normalized(weight, squares, n, static_cast<Float16*>(t.normalized) + at); break;
      default: write_normalized(weight, squares, n, static_cast<float*>(t.normalized) + at);
    }
  }
}

}  // namespace

#define DR_JOIN_(a, b) a##b
#define DR_JOIN(a, b) DR_JOIN_(a, b)
extern const ParametersLevel DR_JOIN(parameters_, DR_LEVEL);
const ParametersLevel DR_JOIN(parameters_, DR_LEVEL) = {normalize_weight, adam};

}  // namespace diffratio::cpu
