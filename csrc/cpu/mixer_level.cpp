// The RatioMixer for one SIMD level. CMake compiles this file once per level, with that level's flags and DR_LEVEL set
// to its name. One sample at a time: forward pass, objective, backward pass (mixer.h).
#include <cmath>
#include <cstring>

#include "../common/divergences.h"
#include "gemm.h"
#include "mixer.h"

namespace diffratio::cpu {
namespace {

constexpr float residual = mixer_residual;
constexpr int64_t noise_chunk = 2048;  // elements of a work item of Level::add_noise

// Allocates consecutive pieces of a buffer. With a null buffer it only counts.
struct Pieces {
  float* next;
  int64_t used = 0;
  float* take(int64_t floats) {
    const int64_t rounded = (floats + 15) / 16 * 16;
    float* piece = next ? next + used : nullptr;
    used += rounded;
    return piece;
  }
};

// Activations of the current sample. With weight gradients, every layer keeps its input, mixed tokens and hidden units;
// otherwise all layers share one buffer of each. With a backward pass, the slope silu' is kept for every layer.
struct Workspace {
  float *image, *noised, *z, *h, *m, *a, *slope, *e, *g, *gu, *gm, *transposed_h, *dz, *sums, *head;
  int64_t layer_h, layer_m, layer_a, layer_slope;  // floats from one layer to the next
  int64_t floats;

  Workspace(const Mixer& c, const MixerLayout& l, float* buffer) {
    const int64_t th = l.tokens * l.hidden, tc = l.tokens * l.width;
    const bool back = c.has_backward(), all = c.has_weight_gradients();
    Pieces pieces{buffer};
    const auto stack = [&](int64_t size, bool each, int64_t count, int64_t* stride) {
      *stride = each ? size : 0;
      return pieces.take(each ? size * count : size);
    };
    noised = pieces.take(c.sizes.image());
    z = pieces.take(l.tokens * l.vector);
    h = stack(tc, all, c.sizes.depth + 1, &layer_h);
    m = stack(tc, all, c.sizes.depth, &layer_m);
    a = stack(th, all, c.sizes.depth, &layer_a);
    slope = stack(back ? th : 0, true, c.sizes.depth, &layer_slope);
    e = pieces.take(l.width + c.sizes.depth * l.hidden);
    g = pieces.take(back ? tc : 0);
    gu = pieces.take(back ? th : 0);
    gm = pieces.take(back ? tc : 0);
    dz = pieces.take(back ? l.tokens * l.vector : 0);
    transposed_h = pieces.take(all ? tc : 0);
    sums = pieces.take(l.width > l.hidden ? l.width : l.hidden);
    head = pieces.take(c.sizes.energy ? tc : 0);
    floats = pieces.used;
  }
};

int64_t workspace_floats(const Mixer& call, const MixerLayout& layout) {
  return Workspace(call, layout, nullptr).floats;
}

template <int N>
constexpr int registers(const V (&)[tile_rows][N]) {
  return N;
}

// A panelled matrix [rows, columns] as the left factor of a product, and its transpose.
Left panelled(const float* x, int64_t rows) { return {x, panel, panel, rows * panel}; }
Left transposed(const float* x, int64_t rows) { return {x, 0, 0, rows * panel}; }

// A group's sums += transpose(x) y, summed over tokens. x is [T, rows] panelled, y [T, columns] in panels of `width`.
void accumulate(const MixerLayout& l, const float* x, const float* y, int64_t rows, int64_t columns, int64_t width,
                float* sum) {
  product_of<true>(width, rows, columns / width, l.tokens, transposed(x, l.tokens), y,
                   [=](int64_t i, int64_t n, const auto& tile) {
                     constexpr int N = sizeof tile[0] / sizeof(V);
                     float* out = sum + (n * rows + i) * N * lanes;
                     for (int r = 0; r < tile_rows; ++r) {
                       for (int j = 0; j < N; ++j, out += lanes) store(out, load(out) + tile[r][j]);
                     }
                   });
}

// out[c] = sum over tokens of x [T, columns].
void column_sums(const MixerLayout& l, const float* x, int64_t columns, float* out) {
  for (int64_t n = 0; n < columns / panel; ++n) {
    V first = {}, second = {};
    for (int64_t t = 0; t < l.tokens; ++t, x += panel) {
      first += load(x);
      second += load(x + lanes);
    }
    store(out + n * panel, first);
    store(out + n * panel + lanes, second);
  }
}

float horizontal(V v) {
  float sum = 0;
  for (int i = 0; i < lanes; ++i) sum += v[i];
  return sum;
}

// Patch vectors of c_in x, [T, P] in panels of l.vector_panel. The padding is zero beforehand.
void load_patches(const MixerSizes& s, const MixerLayout& l, const float* x, float c_in, float* z) {
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t y = 0; y < s.image_height; ++y) {
      const int64_t first = y / s.patch * (s.image_width / s.patch);
      for (int64_t w = 0; w < s.image_width; ++w, ++x) {
        const int64_t t = first + w / s.patch, p = (c * s.patch + y % s.patch) * s.patch + w % s.patch;
        z[(p / l.vector_panel * l.tokens + t) * l.vector_panel + p % l.vector_panel] = c_in * *x;
      }
    }
  }
}

// The transposed operation: image gradient += c_in times the gradient by the patch vectors.
void add_patches(const MixerSizes& s, const MixerLayout& l, const float* dz, float c_in, float* x) {
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t y = 0; y < s.image_height; ++y) {
      const int64_t first = y / s.patch * (s.image_width / s.patch);
      for (int64_t w = 0; w < s.image_width; ++w, ++x) {
        const int64_t t = first + w / s.patch, p = (c * s.patch + y % s.patch) * s.patch + w % s.patch;
        *x += c_in * dz[(p / l.vector_panel * l.tokens + t) * l.vector_panel + p % l.vector_panel];
      }
    }
  }
}

// Transposes [T, C], panelled, to [C, T] in panels of l.token_panel.
void transpose(const MixerLayout& l, const float* h, float* out) {
  const int64_t step = l.token_panel;
  for (int64_t c = 0; c < l.width; ++c) {
    const float* from = h + c / panel * l.tokens * panel + c % panel;
    for (int64_t t = 0; t < l.tokens; t += step) {
      float* to = out + (t / step * l.width + c) * step;
      for (int64_t i = 0; i < step; ++i) to[i] = from[(t + i) * panel];
    }
  }
}

// Copies the conditioning to its padded layout.
void pad_conditioning(const MixerSizes& s, const MixerLayout& l, const float* e, float* out) {
  std::memcpy(out, e, sizeof(float) * s.width);
  for (int64_t b = 0; b < s.depth; ++b) {
    std::memcpy(out + l.width + b * l.hidden, e + s.width + b * s.hidden, sizeof(float) * s.hidden);
  }
}

float energy_scale(const MixerSizes& s) { return 1.0f / std::sqrt(static_cast<float>(s.image())); }

float forward(const Mixer& call, const MixerLayout& l, const float* packed, const Workspace& w) {
  const int64_t T = l.tokens, C = l.width, H = l.hidden, depth = call.sizes.depth;
  const bool back = call.has_backward();
  const auto weight = [&](Packed name, int64_t layer, int64_t size) { return packed + l.packed[name] + layer * size; };
  const float *position = weight(p_position, 0, 0), *e = w.e;
  float* h = w.h;
  product<2, false>(T, C / panel, call.sizes.vector(), {w.z, l.vector_panel, l.vector_panel, T * l.vector_panel},
                    weight(p_patch, 0, 0), [=](int64_t i, int64_t n, const auto& tile) {
                      for (int r = 0; r < tile_rows; ++r) {
                        for (int j = 0; j < 2; ++j) {
                          const int64_t at = (n * T + i + r) * panel + j * lanes;
                          store(h + at, tile[r][j] + load(position + at) + load(e + n * panel + j * lanes));
                        }
                      }
                    });
  for (int64_t layer = 0; layer < depth; ++layer) {
    float *m = w.m + layer * w.layer_m, *a = w.a + layer * w.layer_a, *slope = w.slope + layer * w.layer_slope;
    float* next = w.h + (layer + 1) * w.layer_h;
    const float *bias = weight(p_mix_bias, layer, T), *hidden = e + C + layer * H;
    product<2, false>(T, C / panel, T, {weight(p_mix, layer, T * T), T, T, 0}, h,
                      [=](int64_t i, int64_t n, const auto& tile) {
                        for (int r = 0; r < tile_rows; ++r) {
                          for (int j = 0; j < 2; ++j) {
                            const int64_t at = (n * T + i + r) * panel + j * lanes;
                            store(m + at, load(h + at) + (tile[r][j] + bias[i + r]));
                          }
                        }
                      });
    product<2, false>(T, H / panel, C, panelled(m, T), weight(p_up, layer, C * H),
                      [=](int64_t i, int64_t n, const auto& tile) {
                        for (int r = 0; r < tile_rows; ++r) {
                          for (int j = 0; j < 2; ++j) {
                            const int64_t at = (n * T + i + r) * panel + j * lanes;
                            const V u = tile[r][j] + load(hidden + n * panel + j * lanes), s = sigmoid(u);
                            store(a + at, u * s);
                            if (back) store(slope + at, s * (1.0f + u * (1.0f - s)));
                          }
                        }
                      });
    product<2, false>(T, C / panel, H, panelled(a, T), weight(p_down, layer, C * H),
                      [=](int64_t i, int64_t n, const auto& tile) {
                        for (int r = 0; r < tile_rows; ++r) {
                          for (int j = 0; j < 2; ++j) {
                            const int64_t at = (n * T + i + r) * panel + j * lanes;
                            store(next + at, residual * (load(m + at) + tile[r][j]));
                          }
                        }
                      });
    h = next;
  }
  const float* head = weight(p_head, 0, 0);
  if (call.sizes.energy) {  // <z, h energy> is <z energy^T, h>: the head of this sample is head + z energy^T / sqrt(N)
    const float scale = energy_scale(call.sizes), *shared = head;
    float* own = w.head;
    product<2, false>(T, C / panel, call.sizes.vector(), {w.z, l.vector_panel, l.vector_panel, T * l.vector_panel},
                      weight(p_energy, 0, 0), [=](int64_t i, int64_t n, const auto& tile) {
                        for (int r = 0; r < tile_rows; ++r) {
                          for (int j = 0; j < 2; ++j) {
                            const int64_t at = (n * T + i + r) * panel + j * lanes;
                            store(own + at, load(shared + at) + scale * tile[r][j]);
                          }
                        }
                      });
    head = own;
  }
  double sum = 0;
  for (int64_t row = 0; row < T * C / panel; row += 16) {  // padded T C is a multiple of 16 rows
    V part = {};
    for (int64_t at = row * panel; at < (row + 16) * panel; at += lanes) part += load(h + at) * load(head + at);
    sum += static_cast<double>(horizontal(part));
  }
  return static_cast<float>(sum);
}

// Propagates the objective's derivative by the log ratio to every gradient whose destination is not null.
void backward(const Mixer& call, const MixerLayout& l, const float* packed, const Workspace& w, float by_log_ratio,
              float c_in, float* image, float* conditioning, float* group) {
  const MixerSizes& s = call.sizes;
  const int64_t T = l.tokens, C = l.width, H = l.hidden;
  const auto weight = [&](Packed name, int64_t layer, int64_t size) { return packed + l.packed[name] + layer * size; };
  const auto sums = [&](Weight name, int64_t layer, int64_t size) { return group + l.gradient[name] + layer * size; };
  const float* head = s.energy ? w.head : weight(p_head, 0, 0);
  float *g = w.g, *gu = w.gu, *gm = w.gm;
  // image gradient += c_in times g matrix, unpatched
  const auto add_to_image = [&](const float* matrix) {
    float* dz = w.dz;
    product_of<false>(l.vector_panel, T, l.vector / l.vector_panel, C, panelled(g, T), matrix,
                      [=](int64_t i, int64_t n, const auto& tile) {
                        constexpr int N = sizeof tile[0] / sizeof(V);
                        float* out = dz + (n * T + i) * N * lanes;
                        for (int r = 0; r < tile_rows; ++r) {
                          for (int j = 0; j < N; ++j, out += lanes) store(out, tile[r][j]);
                        }
                      });
    add_patches(s, l, dz, c_in, image);
  };
  if (s.energy) {
    const float *h = w.h + s.depth * w.layer_h, factor = by_log_ratio * energy_scale(s);
    for (int64_t at = 0; at < T * C; at += lanes) store(g + at, factor * load(h + at));
    if (group) accumulate(l, g, w.z, C, l.vector, l.vector_panel, sums(w_energy, 0, 0));
    if (image) add_to_image(weight(p_energy_t, 0, 0));
  }
  if (group) {
    const float* h = w.h + s.depth * w.layer_h;
    float* out = sums(w_head, 0, 0);
    for (int64_t at = 0; at < T * C; at += lanes) store(out + at, load(out + at) + by_log_ratio * load(h + at));
  }
  // g: gradient by a layer's output before the residual factor
  for (int64_t at = 0; at < T * C; at += lanes) store(g + at, residual * by_log_ratio * load(head + at));
  for (int64_t layer = s.depth - 1; layer >= 0; --layer) {
    const float* slope = w.slope + layer * w.layer_slope;
    product<2, false>(T, H / panel, C, panelled(g, T), weight(p_down_t, layer, C * H),
                      [=](int64_t i, int64_t n, const auto& tile) {
                        for (int r = 0; r < tile_rows; ++r) {
                          for (int j = 0; j < 2; ++j) {
                            const int64_t at = (n * T + i + r) * panel + j * lanes;
                            store(gu + at, tile[r][j] * load(slope + at));
                          }
                        }
                      });
    product<2, false>(T, C / panel, H, panelled(gu, T), weight(p_up_t, layer, C * H),
                      [=](int64_t i, int64_t n, const auto& tile) {
                        for (int r = 0; r < tile_rows; ++r) {
                          for (int j = 0; j < 2; ++j) {
                            const int64_t at = (n * T + i + r) * panel + j * lanes;
                            store(gm + at, load(g + at) + tile[r][j]);
                          }
                        }
                      });
    if (group) {
      const float *h = w.h + layer * w.layer_h, *m = w.m + layer * w.layer_m, *a = w.a + layer * w.layer_a;
      accumulate(l, g, a, C, H, panel, sums(w_down, layer, C * H));
      accumulate(l, gu, m, H, C, panel, sums(w_up, layer, C * H));
      transpose(l, h, w.transposed_h);
      float* mix = sums(w_mix, layer, T * T);
      product_of<false>(l.token_panel, T, T / l.token_panel, C, panelled(gm, T), w.transposed_h,
                        [=](int64_t i, int64_t n, const auto& tile) {
                          constexpr int N = sizeof tile[0] / sizeof(V);
                          float* out = mix + (n * T + i) * N * lanes;
                          for (int r = 0; r < tile_rows; ++r) {
                            for (int j = 0; j < N; ++j, out += lanes) store(out, load(out) + tile[r][j]);
                          }
                        });
      float* bias = sums(w_mix_bias, layer, T);
      for (int64_t t = 0; t < T; ++t) {
        V sum = {};
        for (int64_t n = 0; n < C / panel; ++n) {
          sum += load(gm + (n * T + t) * panel) + load(gm + (n * T + t) * panel + lanes);
        }
        bias[t] += horizontal(sum);
      }
    }
    if (conditioning) {
      column_sums(l, gu, H, w.sums);
      std::memcpy(conditioning + s.width + layer * s.hidden, w.sums, sizeof(float) * s.hidden);
    }
    const float factor = layer ? residual : 1.0f;
    product<2, false>(T, C / panel, T, {weight(p_mix_t, layer, T * T), T, T, 0}, gm,
                      [=](int64_t i, int64_t n, const auto& tile) {
                        for (int r = 0; r < tile_rows; ++r) {
                          for (int j = 0; j < 2; ++j) {
                            const int64_t at = (n * T + i + r) * panel + j * lanes;
                            store(g + at, factor * (load(gm + at) + tile[r][j]));
                          }
                        }
                      });
  }
  if (conditioning) {
    column_sums(l, g, C, w.sums);
    std::memcpy(conditioning, w.sums, sizeof(float) * s.width);
  }
  if (group) {
    float* position = sums(w_position, 0, 0);
    for (int64_t at = 0; at < T * C; at += lanes) store(position + at, load(position + at) + load(g + at));
    accumulate(l, g, w.z, C, l.vector, l.vector_panel, sums(w_patch, 0, 0));
  }
  if (image) add_to_image(weight(p_patch_t, 0, 0));
}

float by_log_ratio(const Mixer& call, int half, int64_t place, float log_ratio) {
  const double l = log_ratio;
  switch (call.objective.kind) {
    case Objective::given: return call.objective.upstream[place];
    case Objective::score:
      return -call.objective.upstream[place] * divergence_factor(call.objective.divergence, log_ratio) /
             call.inputs.draws;
    case Objective::logistic:
      return static_cast<float>((half ? 1 : -1) / (1 + std::exp(half ? -l : l)) / call.inputs.batch);
    default: return 0.0f;
  }
}

void samples(const Level& level, const Mixer& call, const MixerLayout& l, const float* packed, float* workspace,
             float* group, int64_t begin, int64_t end) {
  const MixerSizes& s = call.sizes;
  const Workspace w(call, l, workspace);
  std::memset(w.z, 0, sizeof(float) * l.tokens * l.vector);
  std::memset(w.e, 0, sizeof(float) * (l.width + s.depth * l.hidden));
  if (group) std::memset(group, 0, sizeof(float) * l.gradient_floats);
  for (int64_t item = begin; item < end; ++item) {
    const int half = static_cast<int>(item / call.inputs.batch);
    const int64_t sample = item % call.inputs.batch;
    float* image = call.results.image_gradient ? call.results.image_gradient + sample * s.image() : nullptr;
    if (image) std::memset(image, 0, sizeof(float) * s.image());
    for (int64_t draw = 0; draw < call.inputs.draws; ++draw) {
      const int64_t place = sample * call.inputs.draws + draw;
      const float sigma = call.inputs.sigma[place];
      const float c_in = 1.0f / std::sqrt(sigma * sigma + call.sigma_data * call.sigma_data);
      const float* x = static_cast<const float*>(call.inputs.images[half]) + sample * s.image();
      if (call.noise.rng) {
        AddNoise noise{};
        noise.rng = call.noise.rng;
        noise.index = call.noise.index + sample;
        noise.batch = 1;
        noise.size = s.image();
        noise.inputs = 1;
        noise.streams[0] = call.noise.streams[half] + static_cast<uint32_t>(draw);
        noise.x0[0] = x;
        noise.sigma = &sigma;
        noise.out = w.noised;
        level.add_noise(&noise, 0, (s.image() + noise_chunk - 1) / noise_chunk);
        x = w.noised;
      }
      [[maybe_unused]] const FlushSubnormals guard;  // after the noise, whose bits are part of its contract
      load_patches(s, l, x, c_in, w.z);
      pad_conditioning(s, l, call.inputs.conditioning[half] + place * s.conditioning(), w.e);
      const float log_ratio = forward(call, l, packed, w);
      call.results.log_ratio[half * call.inputs.batch * call.inputs.draws + place] = log_ratio;
      if (!call.has_backward()) continue;
      float* conditioning = call.results.conditioning_gradient[half];
      if (conditioning) conditioning += place * s.conditioning();
      backward(call, l, packed, w, by_log_ratio(call, half, place, log_ratio), c_in, image, conditioning, group);
    }
  }
}

}  // namespace

#define DR_JOIN_(a, b) a##b
#define DR_JOIN(a, b) DR_JOIN_(a, b)
extern const MixerLevel DR_JOIN(mixer_, DR_LEVEL);
const MixerLevel DR_JOIN(mixer_, DR_LEVEL) = {lanes, workspace_floats, samples};

}  // namespace diffratio::cpu
