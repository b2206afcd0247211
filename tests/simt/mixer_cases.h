// Uses of the ratio kernels, against the CPU implementation.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "../../csrc/cpu/mixer.h"
#include "../../csrc/cuda/ratio/mixer_launch.h"
#include "../../csrc/cuda/ratio/mixer_pack.cuh"
#include "global_memory.h"
#include "harness.h"

// So that the kernel in two parts also runs at a small size.
template <>
inline constexpr bool diffratio::cuda::may_have_parts<64> = true;

namespace mixer_cases {

using namespace diffratio;

inline void serial(int64_t count, int64_t, cpu::Body body, const void* context) { body(context, 0, count); }

struct Random {
  uint32_t state = 1;
  float next() { return static_cast<float>(static_cast<int32_t>(state = state * 1664525u + 1013904223u)) * 0x1p-31f; }
  std::vector<float> uniform(int64_t n, float scale) {
    std::vector<float> x(n);
    for (float& v : x) v = next() * scale;
    return x;
  }
};

// Values that bf16 represents, so that rounding the weights adds no error and tolerances can be tight.
inline void round_to_bf16(std::vector<float>& x) {
  for (float& v : x) v = to_float(from_float<BFloat16>(v));
}

inline std::vector<BFloat16> as_bf16(const std::vector<float>& x) {
  std::vector<BFloat16> y;
  for (float v : x) y.push_back(from_float<BFloat16>(v));
  return y;
}

struct Config {
  MixerSizes sizes;
  int batch, draws;
  int blocks;  // that the device can run at once
  cuda::Pass pass;
  Objective objective;
  bool noise;
  cuda::Form form = cuda::Form::several;
  int slice = 1 << 20;        // units
  Type type = Type::float32;  // of images and weights
  int divergence = 0;
  int parts = 1;  // at least
};

// Runs launches on the shim.
struct Launcher {
  simt::Mode mode;
  int blocks;
  template <class Kernel>
  int resident(Kernel, int, uint32_t) const {
    return blocks;
  }
  template <class Kernel, class... Arguments>
  int launch(const cuda::Launch& l, Kernel kernel, const Arguments&... arguments) {
    simt::launch({l.name, {static_cast<unsigned>(l.blocks)}, static_cast<unsigned>(l.threads), l.shared, l.cooperative},
                 mode, [&] { kernel(arguments...); });
    return 0;
  }
};

// Memory of exactly that many bytes, at a multiple of 128, full of NaN.
struct Memory {
  explicit Memory(int64_t bytes)
      : data(static_cast<unsigned char*>(std::aligned_alloc(128, (bytes + 127) / 128 * 128))) {
    std::memset(data.get(), 0xff, (bytes + 127) / 128 * 128);
  }
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<unsigned char, Free> data;
};

struct Outputs {
  std::vector<float> log_ratio, image, conditioning[2], weight[weights];
  float loss = NAN;
};

// The inputs of a call: the same numbers for both implementations.
struct Problem {
  explicit Problem(const Config& config) : g(config) {
    const MixerSizes& s = g.sizes;
    Random random;
    const float scale[weights] = {1.7f / std::sqrt(float(s.vector())),
                                  0.5f,
                                  1.7f / std::sqrt(float(s.tokens)),
                                  0.3f,
                                  2.4f / std::sqrt(float(s.width)),
                                  1.7f / std::sqrt(float(s.hidden)),
                                  3.0f / std::sqrt(float(s.tokens * s.width)),
                                  1.5f / std::sqrt(float(s.width))};
    const int64_t counts[weights] = {s.width * s.vector(),
                                     s.tokens * s.width,
                                     s.depth * s.tokens * s.tokens,
                                     s.depth * s.tokens,
                                     s.depth * s.hidden * s.width,
                                     s.depth * s.width * s.hidden,
                                     s.tokens * s.width,
                                     s.energy ? s.width * s.vector() : 0};
    for (int i = 0; i < weights; ++i) {
      weight[i] = random.uniform(counts[i], scale[i]);
      round_to_bf16(weight[i]);
      weight_bf16[i] = as_bf16(weight[i]);
    }
    halves = g.objective == Objective::logistic ? 2 : 1;
    for (int half = 0; half < halves; ++half) {
      images[half] = random.uniform(g.batch * s.image(), 1.0f);
      if (g.type == Type::bfloat16) round_to_bf16(images[half]);
      images_bf16[half] = as_bf16(images[half]);
      conditioning[half] = random.uniform(g.batch * g.draws * s.conditioning(), 0.7f);
    }
    sigma = random.uniform(g.batch * g.draws, 0.5f);
    for (float& v : sigma) v += 0.7f;
    upstream = random.uniform(g.batch * g.draws, 1.0f);
    for (int i = 0; i < g.batch; ++i) index.push_back(0x1fffffff0 + 3 * i);
  }

  Outputs outputs() const {
    Outputs o;
    const MixerSizes& s = g.sizes;
    o.log_ratio.assign(halves * g.batch * g.draws, NAN);
    if (needs_image()) o.image.assign(g.batch * s.image(), NAN);
    for (int half = 0; half < halves && g.pass == cuda::Pass::weights; ++half) {
      o.conditioning[half].assign(g.batch * s.conditioning(), NAN);
    }
    for (int i = 0; i < weights && g.pass == cuda::Pass::weights; ++i) o.weight[i].assign(weight[i].size(), NAN);
    return o;
  }

  bool needs_image() const { return g.pass == cuda::Pass::image || g.objective == Objective::given; }

  Outputs by_cpu() const {
    Outputs o = outputs();
    cpu::Mixer m{};
    m.sizes = g.sizes;
    for (int i = 0; i < weights; ++i) m.weight[i] = weight[i].data();
    m.sigma_data = 0.5f;
    m.inputs.batch = g.batch;
    m.inputs.draws = g.draws;
    m.inputs.halves = halves;
    for (int half = 0; half < halves; ++half) {
      m.inputs.images[half] = images[half].data();
      m.inputs.conditioning[half] = conditioning[half].data();
      m.noise.streams[half] = stream_word(3 + half, 1, 0);
      if (g.pass == cuda::Pass::weights) m.results.conditioning_gradient[half] = o.conditioning[half].data();
    }
    m.inputs.sigma = sigma.data();
    m.noise.rng = g.noise ? rng : nullptr;
    m.noise.index = index.data();
    m.objective.kind = g.objective;
    m.objective.upstream = upstream.data();
    m.objective.divergence = static_cast<Divergence>(g.divergence);
    m.results.log_ratio = o.log_ratio.data();
    m.results.image_gradient = needs_image() ? o.image.data() : nullptr;
    for (int i = 0; i < weights && g.pass == cuda::Pass::weights; ++i) m.weight_gradient[i] = o.weight[i].data();
    int count;
    const cpu::Level& level = cpu::levels(&count)[0];
    const cpu::MixerLayout l = cpu::mixer_layout(level, m);
    Memory packed(4 * l.packed_floats), work(4 * l.workspace_floats), sums(4 * l.groups * l.gradient_floats + 1);
    cpu::run_mixer(level, m, l, reinterpret_cast<float*>(packed.data.get()), reinterpret_cast<float*>(work.data.get()),
                   l.groups ? reinterpret_cast<float*>(sums.data.get()) : nullptr, 1, serial);
    double loss = 0;
    for (std::size_t i = 0; i < o.log_ratio.size(); ++i) {
      const double x = i < o.log_ratio.size() / 2 ? -o.log_ratio[i] : o.log_ratio[i];
      loss += std::log1p(std::exp(x));
    }
    o.loss = static_cast<float>(loss / g.batch);
    return o;
  }

  template <int width>
  Outputs by_kernels(simt::Mode mode) const {
    using namespace diffratio::cuda;
    Outputs o = outputs();
    std::vector<BFloat16> weight_gradients[weights];
    Launcher launcher{mode, g.blocks};
    MixerCall c{};
    c.packing = packing_of(g.sizes);
    c.packing.parts = std::max(c.packing.parts, g.parts);
    c.staging = staging_of(c.packing);
    const Memory packed(c.packing.bytes);
    PackCall pack{c.packing, {}, g.type, packed.data.get()};
    for (int i = 0; i < weights; ++i) {
      pack.weight[i] = g.type == Type::float32 ? static_cast<const void*>(weight[i].data()) : weight_bf16[i].data();
    }
    launcher.launch({"pack", 2, pack_threads, 0, false}, &pack_kernel, pack);
    c.packed = packed.data.get();
    c.sigma_data = 0.5f;
    c.inputs.batch = g.batch;
    c.inputs.draws = g.draws;
    c.inputs.halves = halves;
    c.inputs.type = g.type;
    for (int half = 0; half < halves; ++half) {
      c.inputs.images[half] =
          g.type == Type::float32 ? static_cast<const void*>(images[half].data()) : images_bf16[half].data();
      c.inputs.conditioning[half] = conditioning[half].data();
      c.noise.streams[half] = stream_word(3 + half, 1, 0);
      c.results.conditioning_gradient[half] = o.conditioning[half].data();
    }
    c.inputs.sigma = sigma.data();
    c.noise.rng = g.noise ? rng : nullptr;
    c.noise.index = index.data();
    c.objective.kind = g.objective;
    c.objective.upstream = upstream.data();
    c.objective.divergence = static_cast<Divergence>(g.divergence);
    c.results.log_ratio = o.log_ratio.data();
    c.results.image_gradient = needs_image() ? o.image.data() : nullptr;
    GradientCall gradients{};
    gradients.out_type = g.type;
    gradients.loss = g.objective == Objective::logistic ? &o.loss : nullptr;
    for (int i = 0; i < weights; ++i) {
      weight_gradients[i].resize(o.weight[i].size());
      gradients.out[i] = g.type == Type::float32 ? static_cast<void*>(o.weight[i].data()) : weight_gradients[i].data();
    }
    const MixerPlan plan = plan_mixer<width>(c, g.pass, int64_t{g.slice} * c.staging.bytes, g.form, launcher);
    const Memory workspace(plan.bytes);
    std::memset(workspace.data.get() + plan.counters, 0, counters_bytes);
    const simt::Watch watch(workspace.data.get() + counters_bytes, plan.bytes - counters_bytes, "workspace");
    run_mixer<width>(c, gradients, g.pass, plan, workspace.data.get(), launcher);
    for (int i = 0; i < weights && g.type == Type::bfloat16; ++i) {
      for (std::size_t j = 0; j < o.weight[i].size(); ++j) o.weight[i][j] = to_float(weight_gradients[i][j]);
    }
    return o;
  }

  Config g;
  int halves;
  std::vector<float> weight[weights], images[2], conditioning[2], sigma, upstream;
  std::vector<BFloat16> weight_bf16[weights], images_bf16[2];
  std::vector<int64_t> index;
  int64_t rng[2] = {-0x123456789abcdef, 0x700000005};
};

// Error of rounding activations to bf16, relative to the largest value.
constexpr double tolerance = 1.5e-2;

inline std::string compare(const Problem& problem, const Outputs& got, const Outputs& expected) {
  const auto check = [](const char* name, const std::vector<float>& a, const std::vector<float>& b) -> std::string {
    if (b.empty()) return "";
    const std::string found = simt::compare(a, std::vector<double>(b.begin(), b.end()), tolerance);
    return found.empty() ? "" : std::string(name) + ": " + found;
  };
  static const char* const names[weights] = {"patch", "position", "mix", "mix_bias", "up", "down", "head", "energy"};
  std::string found = check("log ratio", got.log_ratio, expected.log_ratio);
  if (found.empty()) found = check("image", got.image, expected.image);
  for (int half = 0; half < 2 && found.empty(); ++half) {
    found = check("conditioning", got.conditioning[half], expected.conditioning[half]);
  }
  for (int i = 0; i < weights && found.empty(); ++i) found = check(names[i], got.weight[i], expected.weight[i]);
  if (found.empty() && problem.g.objective == Objective::logistic) found = check("loss", {got.loss}, {expected.loss});
  return found;
}

inline simt::Case mixer(std::string name, const Config& config) {
  auto problem = std::make_shared<Problem>(config);
  auto expected = std::make_shared<Outputs>(problem->by_cpu());
  return {name, [=](simt::Mode mode) {
            const int width = cuda::padded_width(config.sizes.width);
            const Outputs got = width == 64    ? problem->by_kernels<64>(mode)
                                : width == 128 ? problem->by_kernels<128>(mode)
                                               : problem->by_kernels<256>(mode);
            return compare(*problem, got, *expected);
          }};
}

}  // namespace mixer_cases
