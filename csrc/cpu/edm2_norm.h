// Normalization of vectors: PixelNorm and QkvNorm, for one SIMD level.
#pragma once

#include "edm2.h"
#include "wide.h"

namespace diffratio::cpu {
namespace {

// From the sum of squares of a vector: 1 / (epsilon + rms), and the factor of sum(gradient x) x in its derivative.
struct Norm {
  float scale, slope;
  DR_HOST_DEVICE Norm(float squares, int64_t count) {
    const float rms = Scalar::square_root(squares / static_cast<float>(count));
    scale = 1.0f / (norm_epsilon + rms);
    slope = rms > 0 ? scale * scale / (rms * static_cast<float>(count)) : 0.0f;
  }
};

template <class T>
DR_HOST_DEVICE float squares_of(const T* x, int64_t count) {
  return total(count, [&](auto w, int64_t i) {
    using W = decltype(w);
    const auto v = W::load(x + i);
    return v * v;
  });
}

// The gradient with respect to the normalized value: by_normalized + by_activated mp_silu'(normalized); null means
// zero.
template <class W, class T>
DR_HOST_DEVICE typename W::F upstream(const T* by_normalized, const T* by_activated, int64_t i,
                                      typename W::F normalized) {
  typename W::F g = by_normalized ? W::load(by_normalized + i) : W::constant(0);
  if (by_activated) g = W::fma(W::load(by_activated + i), mp_silu_slope<W>(normalized), g);
  return g;
}

template <class T>
DR_HOST_DEVICE const T* at(const T* p, int64_t i) {
  return p ? p + i : nullptr;
}

// Work items are pixels, each a vector in memory.
template <class T>
void norm_rows(const PixelNorm& a, bool stream, int64_t begin, int64_t end) {
  const int64_t n = a.channels;
  const T* x = static_cast<const T*>(a.x);
  if (!a.by_x) {
    T *normalized = static_cast<T*>(a.normalized), *activated = static_cast<T*>(a.activated);
    stream = stream && streams(normalized, n) && streams(activated, n);
    for (int64_t i = begin * n; i < end * n; i += n) {
      const Norm norm(squares_of(x + i, n), n);
      each(n, [&](auto w, int64_t c) {
        using W = decltype(w);
        const auto y = W::load(x + i + c) * W::constant(norm.scale);
        W::store(normalized + i + c, y, stream);
        W::store(activated + i + c, mp_silu<W>(y), stream);
      });
    }
    return;
  }
  const T *by_normalized = static_cast<const T*>(a.by_normalized),
          *by_activated = static_cast<const T*>(a.by_activated);
  T* by_x = static_cast<T*>(a.by_x);
  stream = stream && streams(by_x, n);
  alignas(64) float g[staged_floats];
  for (int64_t i = begin * n; i < end * n; i += n) {
    const Norm norm(squares_of(x + i, n), n);
    const T *first = at(by_normalized, i), *second = at(by_activated, i);
    const float dot = total(n, [&](auto w, int64_t c) {
      using W = decltype(w);
      const auto v = W::load(x + i + c);
      const auto u = upstream<W>(first, second, c, v * W::constant(norm.scale));
      W::store(g + c, u, false);
      return u * v;
    });
    const float k = -dot * norm.slope;
    each(n, [&](auto w, int64_t c) {
      using W = decltype(w);
      const auto v = W::load(x + i + c) * W::constant(k);
      W::store(by_x + i + c, W::fma(W::load(g + c), W::constant(norm.scale), v), stream);
    });
  }
}

// Work items are tiles of pixels of contiguous images, [channels][tile], copied to a float buffer.
template <class T>
void norm_tiles(const PixelNorm& a, bool stream, int64_t tile, int64_t begin, int64_t end) {
  const int64_t tiles = (a.inner + tile - 1) / tile;
  const T* x = static_cast<const T*>(a.x);
  T *normalized = static_cast<T*>(a.normalized), *activated = static_cast<T*>(a.activated),
    *by_x = static_cast<T*>(a.by_x);
  stream = stream && (by_x ? streams(by_x, a.inner) : streams(normalized, a.inner) && streams(activated, a.inner));
  alignas(64) float staged[staged_floats], gradient[staged_floats], sums[256], scale[256];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % tiles * tile, n = a.inner - first < tile ? a.inner - first : tile;
    const int64_t base = item / tiles * a.channels * a.inner + first;
    for (int64_t p = 0; p < n; ++p) sums[p] = 0;
    for (int64_t c = 0; c < a.channels; ++c) {
      each(n, [&](auto w, int64_t p) {
        using W = decltype(w);
        const auto v = W::load(x + base + c * a.inner + p);
        W::store(staged + c * tile + p, v, false);
        W::store(sums + p, W::fma(v, v, W::load(sums + p)), false);
      });
    }
    float slope[256];
    for (int64_t p = 0; p < n; ++p) {
      const Norm norm(sums[p], a.channels);
      scale[p] = norm.scale;
      slope[p] = norm.slope;
    }
    if (!by_x) {
      for (int64_t c = 0; c < a.channels; ++c) {
        const int64_t to = base + c * a.inner;
        each(n, [&](auto w, int64_t p) {
          using W = decltype(w);
          const auto y = W::load(staged + c * tile + p) * W::load(scale + p);
          W::store(normalized + to + p, y, stream);
          W::store(activated + to + p, mp_silu<W>(y), stream);
        });
      }
      continue;
    }
    for (int64_t p = 0; p < n; ++p) sums[p] = 0;
    for (int64_t c = 0; c < a.channels; ++c) {
      const int64_t from = base + c * a.inner;
      const T* first_upstream = at(static_cast<const T*>(a.by_normalized), from);
      const T* second_upstream = at(static_cast<const T*>(a.by_activated), from);
      each(n, [&](auto w, int64_t p) {
        using W = decltype(w);
        const auto v = W::load(staged + c * tile + p);
        const auto u = upstream<W>(first_upstream, second_upstream, p, v * W::load(scale + p));
        W::store(gradient + c * tile + p, u, false);
        W::store(sums + p, W::fma(u, v, W::load(sums + p)), false);
      });
    }
    for (int64_t p = 0; p < n; ++p) slope[p] *= -sums[p];
    for (int64_t c = 0; c < a.channels; ++c) {
      each(n, [&](auto w, int64_t p) {
        using W = decltype(w);
        const auto v = W::load(staged + c * tile + p) * W::load(slope + p);
        const auto u = W::load(gradient + c * tile + p);
        W::store(by_x + base + c * a.inner + p, W::fma(u, W::load(scale + p), v), stream);
      });
    }
  }
}

// Work items are tokens of a sample, all their vectors.
template <class T>
void qkv_rows(const QkvNorm& a, bool stream, int64_t begin, int64_t end) {
  const int64_t n = a.size;
  T* by_qkv = static_cast<T*>(a.by_qkv);
  stream = stream && (by_qkv ? streams(by_qkv, n)
                             : streams(static_cast<T*>(a.out[0]), n) && streams(static_cast<T*>(a.out[1]), n) &&
                                   streams(static_cast<T*>(a.out[2]), n));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / a.tokens, token = item % a.tokens;
    for (int64_t role = 0; role < 3; ++role) {
      for (int64_t head = 0; head < a.heads; ++head) {
        const int64_t from = ((item * 3 + role) * a.heads + head) * n;
        const T* x = static_cast<const T*>(a.qkv) + from;
        const Norm norm(squares_of(x, n), n);
        if (!by_qkv) {
          T* out = static_cast<T*>(a.out[role]) + ((sample * a.heads + head) * a.tokens + token) * n;
          each(n, [&](auto w, int64_t i) {
            using W = decltype(w);
            W::store(out + i, W::load(x + i) * W::constant(norm.scale), stream);
          });
          continue;
        }
        const T* g = static_cast<const T*>(a.by_out[role]) + sample * a.stride[role][0] + head * a.stride[role][1] +
                     token * a.stride[role][2];
        const float dot = total(n, [&](auto w, int64_t i) {
          using W = decltype(w);
          return W::load(x + i) * W::load(g + i);
        });
        const float k = -dot * norm.slope;
        each(n, [&](auto w, int64_t i) {
          using W = decltype(w);
          const auto v = W::load(x + i) * W::constant(k);
          W::store(by_qkv + from + i, W::fma(W::load(g + i), W::constant(norm.scale), v), stream);
        });
      }
    }
  }
}

}  // namespace
}  // namespace diffratio::cpu
