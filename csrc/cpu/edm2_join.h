// Operations that join two tensors: SumClamp, CatSilu, OnesChannel, for one SIMD level.
#pragma once

#include "edm2.h"
#include "wide.h"

namespace diffratio::cpu {
namespace {

template <class W>
DR_HOST_DEVICE void write_bits(uint8_t* bits, int64_t i, uint32_t value) {
  if constexpr (W::lanes == 1) {
    if (i % 8 == 0) bits[i / 8] = 0;
    bits[i / 8] = static_cast<uint8_t>(bits[i / 8] | value << i % 8);
  } else {
    __builtin_memcpy(bits + i / 8, &value, W::lanes / 8);
  }
}

template <class W>
DR_HOST_DEVICE uint32_t read_bits(const uint8_t* bits, int64_t i) {
  uint32_t value = 0;
  if constexpr (W::lanes == 1) {
    value = bits[i / 8] >> i % 8;
  } else {
    __builtin_memcpy(&value, bits + i / 8, W::lanes / 8);
  }
  return value;
}

// Work items are chunks of elements.
template <class T>
void sum_chunks(const SumClamp& s, bool stream, int64_t begin, int64_t end) {
  const int64_t first = begin * element_chunk;
  const int64_t last = end * element_chunk < s.count ? end * element_chunk : s.count;
  uint8_t* passes = s.passes ? s.passes + first / 8 : nullptr;
  T* out = s.out ? static_cast<T*>(s.out) + first : nullptr;
  T* activated = s.activated ? static_cast<T*>(s.activated) + first : nullptr;
  if (!s.by_a) {
    const T *a = static_cast<const T*>(s.a) + first, *b = s.b ? static_cast<const T*>(s.b) + first : nullptr;
    stream = stream && (!out || streams(out, 0)) && (!activated || streams(activated, 0));
    each(last - first, [&](auto w, int64_t i) {
      using W = decltype(w);
      auto v = W::load(a + i) * W::constant(s.weight_a);
      if (b) v = W::fma(W::load(b + i), W::constant(s.weight_b), v);
      if (passes) {
        write_bits<W>(passes, i, W::within(v, s.clip));
        const auto high = W::constant(s.clip), low = W::constant(-s.clip);
        v = v > high ? high : v;
        v = v < low ? low : v;
      }
      if (out) W::store(out + i, v, stream);
      if (activated) W::store(activated + i, mp_silu<W>(v), stream);
    });
    return;
  }
  const T* by_out = s.by_out ? static_cast<const T*>(s.by_out) + first : nullptr;
  const T* by_activated = s.by_activated ? static_cast<const T*>(s.by_activated) + first : nullptr;
  T *by_a = static_cast<T*>(s.by_a) + first, *by_b = s.by_b ? static_cast<T*>(s.by_b) + first : nullptr;
  stream = stream && streams(by_a, 0) && (!by_b || streams(by_b, 0));
  each(last - first, [&](auto w, int64_t i) {
    using W = decltype(w);
    auto g = by_out ? W::load(by_out + i) : W::constant(0);
    if (by_activated) g = W::fma(W::load(by_activated + i), mp_silu_slope<W>(W::load(out + i)), g);
    if (passes) g = W::keep(read_bits<W>(passes, i), g);
    W::store(by_a + i, g * W::constant(s.weight_a), stream);
    if (by_b) W::store(by_b + i, g * W::constant(s.weight_b), stream);
  });
}

// Elements [from, to) of one side of a row; pointers are to the row's first element of that side.
template <class T>
void cat_part(const CatSilu& s, bool stream, float scale, const T* x, int64_t in_row, T* by_x, int64_t from,
              int64_t to) {
  if (from >= to) return;
  if (!s.by_a) {
    T *out = static_cast<T*>(s.out) + in_row + from, *activated = static_cast<T*>(s.activated) + in_row + from;
    x += from;
    each(to - from, [&](auto w, int64_t i) {
      using W = decltype(w);
      const auto v = W::load(x + i) * W::constant(scale);
      W::store(out + i, v, stream);
      W::store(activated + i, mp_silu<W>(v), stream);
    });
    return;
  }
  const T* out = static_cast<const T*>(s.out) + in_row + from;
  const T* by_out = s.by_out ? static_cast<const T*>(s.by_out) + in_row + from : nullptr;
  const T* by_activated = s.by_activated ? static_cast<const T*>(s.by_activated) + in_row + from : nullptr;
  by_x += from;
  each(to - from, [&](auto w, int64_t i) {
    using W = decltype(w);
    auto g = by_out ? W::load(by_out + i) : W::constant(0);
    if (by_activated) g = W::fma(W::load(by_activated + i), mp_silu_slope<W>(W::load(out + i)), g);
    W::store(by_x + i, g * W::constant(scale), stream);
  });
}

// Work items are chunks of rows.
template <class T>
void cat_chunks(const CatSilu& s, bool stream, int64_t begin, int64_t end) {
  const int64_t row = s.first + s.second, chunks = (row + element_chunk - 1) / element_chunk;
  T *by_a = static_cast<T*>(s.by_a), *by_b = static_cast<T*>(s.by_b);
  if (s.by_a) {
    stream = stream && streams(by_a, s.first) && streams(by_b, s.second);
  } else {
    const bool aligned = s.first % Wide::lanes == 0 && s.second % Wide::lanes == 0;
    stream = stream && aligned && streams(static_cast<T*>(s.out), 0) && streams(static_cast<T*>(s.activated), 0);
  }
  for (int64_t item = begin; item < end; ++item) {
    const int64_t r = item / chunks, from = item % chunks * element_chunk;
    const int64_t to = from + element_chunk < row ? from + element_chunk : row;
    const T *a = static_cast<const T*>(s.a) + r * s.first, *b = static_cast<const T*>(s.b) + r * s.second;
    cat_part(s, stream, s.scale_a, a, r * row, by_a + r * s.first, from, to < s.first ? to : s.first);
    cat_part(s, stream, s.scale_b, b, r * row + s.first, by_b + r * s.second, from > s.first ? from - s.first : 0,
             to - s.first);
  }
}

// Work items are samples.
template <class In, class Out>
void ones(const OnesChannel& s, int64_t begin, int64_t end) {
  const int64_t n = s.pixels, c = s.channels;
  for (int64_t sample = begin; sample < end; ++sample) {
    const float scale = s.scale[sample];
    const int64_t narrow = sample * c * n, wide = sample * (c + 1) * n;
    if (s.by_x) {
      const In* from = static_cast<const In*>(s.by_out) + wide;
      Out* to = static_cast<Out*>(s.by_x) + narrow;
      for (int64_t i = 0; i < c * n; ++i) {
        to[i] = from_float<Out>(scale * to_float(from[s.channels_last ? i / c * (c + 1) + i % c : i]));
      }
      continue;
    }
    const In* from = static_cast<const In*>(s.x) + narrow;
    Out* to = static_cast<Out*>(s.out) + wide;
    const Out one = from_float<Out>(1.0f);
    if (s.channels_last) {
      for (int64_t p = 0; p < n; ++p, from += c, to += c + 1) {
        for (int64_t i = 0; i < c; ++i) to[i] = from_float<Out>(scale * to_float(from[i]));
        to[c] = one;
      }
    } else {
      for (int64_t i = 0; i < c * n; ++i) to[i] = from_float<Out>(scale * to_float(from[i]));
      for (int64_t i = c * n; i < (c + 1) * n; ++i) to[i] = one;
    }
  }
}

}  // namespace
}  // namespace diffratio::cpu
