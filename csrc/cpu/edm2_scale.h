// ScaleSilu and its dropout masks, for one SIMD level.
#pragma once

#include "../common/philox.h"
#include "edm2.h"
#include "several.h"
#include "wide.h"

namespace diffratio::cpu {
namespace {

// The factors (0 or gain) of elements of a sample of `count` elements.
struct Factors {
  const DropoutMask& mask;
  uint32_t key_low, key_high, step, index;
  int64_t count, half;

  DR_HOST_DEVICE Factors(const DropoutMask& m, int64_t sample, int64_t elements)
      : mask(m),
        key_low(static_cast<uint32_t>(m.rng[0])),
        key_high(static_cast<uint32_t>(static_cast<uint64_t>(m.rng[0]) >> 32)),
        step(static_cast<uint32_t>(m.rng[1])),
        index(static_cast<uint32_t>(m.index[sample])),
        count(elements),
        half((elements + 1) / 2) {}

  DR_HOST_DEVICE float of(uint32_t bits) const { return bits >= mask.least ? mask.gain : 0.0f; }

  // Of elements [first, first + n).
  DR_HOST_DEVICE void range(int64_t first, int64_t n, float* out) const {
    if (first < half && first + n > half) {
      range(half, first + n - half, out + (half - first));
      n = half - first;
    }
    const bool high = first >= half;
    const int64_t word = high ? first - half : first;
    for (int64_t w = word / 4 * 4; w < word + n; w += 4) {
      uint32_t state[4] = {static_cast<uint32_t>(w / 4), step, index, mask.stream};
      philox4x32_10<Scalar>(state, key_low, key_high);
      for (int64_t j = 0; j < 4; ++j) {
        if (w + j >= word && w + j < word + n) out[w + j - word] = of(high ? state[j] >> 16 : state[j] & 0xffffu);
      }
    }
  }

  // Whether four pixels of channels c and c + channels / 2 share a counter.
  static DR_HOST_DEVICE bool paired(int64_t channels, int64_t pixels) { return pixels % 4 == 0 && channels % 2 == 0; }

  // Of four pixels from `pixel` (a multiple of 4) on, all channels: out[4][channels].
  DR_HOST_DEVICE void pixels(int64_t pixel, int64_t channels, int64_t pixel_count, float* out) const {
    const int64_t middle = channels / 2;
    for (int64_t c = 0; c < middle; c += Vector::lanes) {
      const uint32_t stride = static_cast<uint32_t>(pixel_count / 4);
      const uint32_t first = static_cast<uint32_t>((c * pixel_count + pixel) / 4);
      Vector::Word state[4] = {Wide::strided_counters(first, stride), Vector::word(step), Vector::word(index),
                               Vector::word(mask.stream)};
      philox4x32_10<Vector>(state, key_low, key_high);
      for (int j = 0; j < 4; ++j) {
        const auto bits = Vector::bits(state[j]);
        uint32_t words[Vector::lanes];
        __builtin_memcpy(words, &bits, sizeof words);
        float *low = out + j * channels + c, *high = low + middle;
        const int64_t n = middle - c < Vector::lanes ? middle - c : Vector::lanes;
        for (int64_t i = 0; i < n; ++i) {
          low[i] = of(words[i] & 0xffffu);
          high[i] = of(words[i] >> 16);
        }
      }
    }
  }
};

template <class W>
DR_HOST_DEVICE typename W::F factor(const float* factors, int64_t i) {
  return factors ? W::load(factors + i) : W::constant(1.0f);
}

constexpr int64_t row_chunk = 2048;  // pixels of a contiguous row at a time

// Work items are rows of contiguous images: one channel of one sample.
template <class T>
void scale_rows(const ScaleSilu& s, bool stream, int64_t begin, int64_t end) {
  alignas(64) float buffer[row_chunk];
  const int64_t n = s.pixels;
  T *out = static_cast<T*>(s.out), *by_x = static_cast<T*>(s.by_x);
  stream = stream && (by_x ? streams(by_x, n) : streams(out, n));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / s.channels, channel = row % s.channels;
    const float scale = to_float(static_cast<const T*>(s.condition)[row]) + 1.0f;
    float sum = 0;
    for (int64_t first = 0; first < n; first += row_chunk) {
      const int64_t count = n - first < row_chunk ? n - first : row_chunk;
      const float* factors = nullptr;
      if (s.mask.rng) {
        Factors(s.mask, sample, s.channels * n).range(channel * n + first, count, buffer);
        factors = buffer;
      }
      const int64_t base = row * n + first;
      const T* x = static_cast<const T*>(s.x) + base;
      if (!by_x) {
        each(count, [&](auto w, int64_t i) {
          using W = decltype(w);
          const auto y = mp_silu<W>(W::load(x + i) * W::constant(scale));
          W::store(out + base + i, y * factor<W>(factors, i), stream);
        });
        continue;
      }
      const T* g = static_cast<const T*>(s.by_out) + base;
      sum += total(count, [&](auto w, int64_t i) {
        using W = decltype(w);
        const auto v = W::load(x + i);
        const auto d = W::load(g + i) * factor<W>(factors, i) * mp_silu_slope<W>(v * W::constant(scale));
        W::store(by_x + base + i, d * W::constant(scale), stream);
        return d * v;
      });
    }
    if (by_x) s.partial[row] = sum;
  }
}

// Work items are chunks of pixels of a channels_last sample.
template <class T>
void scale_chunks(const ScaleSilu& s, bool stream, int64_t begin, int64_t end) {
  alignas(64) float scale[max_scale_channels], buffer[4 * max_scale_channels];
  const int64_t chunks = s.chunks(), c = s.channels;
  const bool paired = s.mask.rng && Factors::paired(c, s.pixels);
  T *out = static_cast<T*>(s.out), *by_x = static_cast<T*>(s.by_x);
  stream = stream && (by_x ? streams(by_x, c) : streams(out, c));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / chunks, first = item % chunks * pixel_chunk;
    const int64_t last = first + pixel_chunk < s.pixels ? first + pixel_chunk : s.pixels;
    const T* condition = static_cast<const T*>(s.condition) + sample * c;
    each(c, [&](auto w, int64_t i) {
      using W = decltype(w);
      W::store(scale + i, W::load(condition + i) + W::constant(1.0f), false);
    });
    float* sums = by_x ? s.partial + item * c : nullptr;
    if (sums) {
      for (int64_t i = 0; i < c; ++i) sums[i] = 0;
    }
    for (int64_t pixel = first; pixel < last; ++pixel) {
      const float* factors = nullptr;
      if (s.mask.rng) {
        const Factors all(s.mask, sample, c * s.pixels);
        if (!paired) {
          for (int64_t i = 0; i < c; ++i) all.range(i * s.pixels + pixel, 1, buffer + i);
          factors = buffer;
        } else {
          if (pixel % 4 == 0) all.pixels(pixel, c, s.pixels, buffer);
          factors = buffer + pixel % 4 * c;
        }
      }
      const int64_t base = (sample * s.pixels + pixel) * c;
      const T* x = static_cast<const T*>(s.x) + base;
      if (!by_x) {
        each(c, [&](auto w, int64_t i) {
          using W = decltype(w);
          const auto y = mp_silu<W>(W::load(x + i) * W::load(scale + i));
          W::store(out + base + i, y * factor<W>(factors, i), stream);
        });
        continue;
      }
      const T* g = static_cast<const T*>(s.by_out) + base;
      each(c, [&](auto w, int64_t i) {
        using W = decltype(w);
        const auto v = W::load(x + i), k = W::load(scale + i);
        const auto d = W::load(g + i) * factor<W>(factors, i) * mp_silu_slope<W>(v * k);
        W::store(by_x + base + i, d * k, stream);
        W::store(sums + i, W::fma(d, v, W::load(sums + i)), false);
      });
    }
  }
}

// Work items are samples: their partial sums, in order.
template <class T>
void condition_sums(const ScaleSilu& s, int64_t begin, int64_t end) {
  const int64_t chunks = s.chunks();
  for (int64_t sample = begin; sample < end; ++sample) {
    T* to = static_cast<T*>(s.by_condition) + sample * s.channels;
    const float* partial = s.partial + sample * chunks * s.channels;
    each(s.channels, [&](auto w, int64_t i) {
      using W = decltype(w);
      auto sum = W::constant(0);
      for (int64_t k = 0; k < chunks; ++k) sum += W::load(partial + k * s.channels + i);
      W::store(to + i, sum, false);
    });
  }
}

}  // namespace
}  // namespace diffratio::cpu
