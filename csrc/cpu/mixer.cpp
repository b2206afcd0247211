// The CPU implementation of the ratio operations: layouts, packing of the weights, distribution of the work, sums of
// the weight gradients. The arithmetic is in mixer_level.cpp.
#include "mixer.h"

#include <algorithm>
#include <cstring>

namespace diffratio::cpu {

extern const MixerLevel mixer_portable;
#if defined(DR_HAVE_X86)
extern const MixerLevel mixer_avx2;
extern const MixerLevel mixer_avx512;
#endif

namespace {

constexpr int64_t max_groups = 16;

const MixerLevel& kernels(const Level& level) {
#if defined(DR_HAVE_X86)
  if (std::strcmp(level.name, "avx512") == 0) return mixer_avx512;
  if (std::strcmp(level.name, "avx2") == 0) return mixer_avx2;
#else
  (void)level;
#endif
  return mixer_portable;
}

int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Copies a strided matrix [rows, columns] to [columns / width][padded rows][width], padded with zeros.
void pack(const float* from, int64_t rows, int64_t columns, int64_t row, int64_t column, int64_t padded_rows,
          int64_t padded_columns, int64_t width, float* to) {
  for (int64_t n = 0; n < padded_columns; n += width) {
    const int64_t count = std::clamp<int64_t>(columns - n, 0, width);
    for (int64_t k = 0; k < padded_rows; ++k, to += width) {
      const int64_t valid = k < rows ? count : 0;
      const float* source = from + k * row + n * column;
      for (int64_t j = 0; j < valid; ++j) to[j] = source[j * column];
      for (int64_t j = valid; j < width; ++j) to[j] = 0.0f;
    }
  }
}

// The inverse of pack, without the padding.
void unpack(const float* from, int64_t rows, int64_t columns, int64_t padded_rows, int64_t width, float* to) {
  for (int64_t n = 0; n < columns; n += width) {
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t count = std::min(width, columns - n);
      std::memcpy(to + k * columns + n, from + (n / width * padded_rows + k) * width, sizeof(float) * count);
    }
  }
}

// Runs body(i) for i in [0, count) in parallel.
template <class F>
void each(ParallelFor parallel_for, int64_t count, int64_t grain, const F& body) {
  parallel_for(
      count, grain,
      [](const void* context, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
      },
      &body);
}

void pack_weights(const Mixer& m, const MixerLayout& l, float* packed, ParallelFor parallel_for) {
  const MixerSizes& s = m.sizes;
  const int64_t t = s.tokens, c = s.width, h = s.hidden, p = s.vector(), T = l.tokens, C = l.width, H = l.hidden;
  const bool back = m.has_backward();
  const auto to = [&](Packed name, int64_t layer, int64_t size) { return packed + l.packed[name] + layer * size; };
  each(parallel_for, s.depth + 1, 1, [&](int64_t layer) {
    if (layer == s.depth) {
      pack(m.weight[w_patch], p, c, 1, p, p, C, l.panel, to(p_patch, 0, 0));
      pack(m.weight[w_position], t, c, c, 1, T, C, l.panel, to(p_position, 0, 0));
      pack(m.weight[w_head], t, c, c, 1, T, C, l.panel, to(p_head, 0, 0));
      if (back) pack(m.weight[w_patch], c, p, p, 1, C, l.vector, l.vector_panel, to(p_patch_t, 0, 0));
      if (!s.energy) return;
      pack(m.weight[w_energy], p, c, 1, p, p, C, l.panel, to(p_energy, 0, 0));
      if (back) pack(m.weight[w_energy], c, p, p, 1, C, l.vector, l.vector_panel, to(p_energy_t, 0, 0));
      return;
    }
    const float *mix = m.weight[w_mix] + layer * t * t, *up = m.weight[w_up] + layer * h * c;
    const float* down = m.weight[w_down] + layer * c * h;
    pack(mix, t, t, t, 1, T, T, T, to(p_mix, layer, T * T));
    pack(m.weight[w_mix_bias] + layer * t, 1, t, t, 1, 1, T, T, to(p_mix_bias, layer, T));
    pack(up, c, h, 1, c, C, H, l.panel, to(p_up, layer, C * H));
    pack(down, h, c, 1, h, H, C, l.panel, to(p_down, layer, C * H));
    if (!back) return;
    pack(mix, t, t, 1, t, T, T, T, to(p_mix_t, layer, T * T));
    pack(up, h, c, c, 1, H, C, l.panel, to(p_up_t, layer, C * H));
    pack(down, c, h, h, 1, C, H, l.panel, to(p_down_t, layer, C * H));
  });
}

void unpack_gradients(const Mixer& m, const MixerLayout& l, const float* sums, ParallelFor parallel_for) {
  const MixerSizes& s = m.sizes;
  const int64_t t = s.tokens, c = s.width, h = s.hidden, p = s.vector(), T = l.tokens, C = l.width, H = l.hidden;
  const auto from = [&](Weight name, int64_t layer, int64_t size) { return sums + l.gradient[name] + layer * size; };
  each(parallel_for, s.depth + 1, 1, [&](int64_t layer) {
    float* const* out = m.weight_gradient;
    if (layer == s.depth) {
      unpack(from(w_patch, 0, 0), c, p, C, l.vector_panel, out[w_patch]);
      unpack(from(w_position, 0, 0), t, c, T, l.panel, out[w_position]);
      unpack(from(w_head, 0, 0), t, c, T, l.panel, out[w_head]);
      if (s.energy) unpack(from(w_energy, 0, 0), c, p, C, l.vector_panel, out[w_energy]);
      return;
    }
    unpack(from(w_mix, layer, T * T), t, t, T, l.token_panel, out[w_mix] + layer * t * t);
    unpack(from(w_mix_bias, layer, T), 1, t, 1, T, out[w_mix_bias] + layer * t);
    unpack(from(w_up, layer, C * H), h, c, H, l.panel, out[w_up] + layer * h * c);
    unpack(from(w_down, layer, C * H), c, h, C, l.panel, out[w_down] + layer * c * h);
  });
}

}  // namespace

MixerLayout mixer_layout(const Level& level, const Mixer& m) {
  const MixerLevel& k = kernels(level);
  const MixerSizes& s = m.sizes;
  const bool back = m.has_backward(), gradients = m.has_weight_gradients();
  MixerLayout l{};
  l.lanes = k.lanes;
  l.panel = 2 * k.lanes;
  l.tokens = rounded(s.tokens, 16);
  l.width = rounded(s.width, l.panel);
  l.hidden = rounded(s.hidden, l.panel);
  l.vector_panel = s.vector() <= l.lanes ? l.lanes : l.panel;
  l.vector = rounded(s.vector(), l.vector_panel);
  l.token_panel = l.tokens % l.panel ? l.lanes : l.panel;
  const int64_t tc = l.tokens * l.width, tt = s.depth * l.tokens * l.tokens, ch = s.depth * l.width * l.hidden;
  const int64_t cp = l.width * l.vector, pc = s.vector() * l.width;
  const int64_t pieces[packs] = {pc,
                                 tc,
                                 tt,
                                 s.depth * l.tokens,
                                 ch,
                                 ch,
                                 tc,
                                 back ? tt : 0,
                                 back ? ch : 0,
                                 back ? ch : 0,
                                 back ? cp : 0,
                                 s.energy ? pc : 0,
                                 s.energy && back ? cp : 0};
  for (int i = 0; i < packs; ++i) {
    l.packed[i] = l.packed_floats;
    l.packed_floats += rounded(pieces[i], 16);
  }
  const int64_t sums[weights] = {cp, tc, tt, s.depth * l.tokens, ch, ch, tc, s.energy ? cp : 0};
  for (int i = 0; gradients && i < weights; ++i) {
    l.gradient[i] = l.gradient_floats;
    l.gradient_floats += rounded(sums[i], 16);
  }
  l.groups = gradients ? std::min(max_groups, m.samples()) : 0;
  l.workspace_floats = k.workspace_floats(m, l);
  return l;
}

void run_mixer(const Level& level, const Mixer& m, const MixerLayout& l, float* packed, float* workspace,
               float* gradients, int64_t workers, ParallelFor parallel_for) {
  const MixerLevel& k = kernels(level);
  const int64_t items = m.samples();
  pack_weights(m, l, packed, parallel_for);
  each(parallel_for, workers, 1, [&](int64_t worker) {
    float* own = workspace + worker * l.workspace_floats;
    if (!gradients) {
      k.samples(level, m, l, packed, own, nullptr, items * worker / workers, items * (worker + 1) / workers);
      return;
    }
    for (int64_t group = l.groups * worker / workers; group < l.groups * (worker + 1) / workers; ++group) {
      k.samples(level, m, l, packed, own, gradients + group * l.gradient_floats, items * group / l.groups,
                items * (group + 1) / l.groups);
    }
  });
  if (!gradients) return;
  constexpr int64_t chunk = 4096;
  each(parallel_for, (l.gradient_floats + chunk - 1) / chunk, 1, [&](int64_t piece) {
    const int64_t end = std::min((piece + 1) * chunk, l.gradient_floats);
    for (int64_t group = 1; group < l.groups; ++group) {
      const float* more = gradients + group * l.gradient_floats;
      for (int64_t i = piece * chunk; i < end; ++i) gradients[i] += more[i];
    }
  });
  unpack_gradients(m, l, gradients, parallel_for);
}

}  // namespace diffratio::cpu
