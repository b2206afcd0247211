// The project's own launchers (csrc/cuda/launch.h) for Python, as csrc/*_bindings.cpp call them.
#include "cuda/launch.h"

#include <algorithm>
#include <cstring>

#include "common/philox.h"
#include "device.h"

using namespace diffratio;

extern "C" {

uint32_t launch_stream_word(int64_t purpose, int64_t substep, int64_t draw) {
  return stream_word(purpose, substep, draw);
}

int launch_add_noise(const int64_t* rng, const int64_t* index, int64_t batch, int64_t size, int inputs,
                     const uint32_t* streams, void** x0, void* sigma, void* scale, void* out, int in_type,
                     int out_type) {
  ptx::device::clear_error();
  AddNoise a{};
  a.rng = rng, a.index = index, a.batch = batch, a.size = size, a.inputs = inputs;
  for (int i = 0; i < inputs; ++i) a.streams[i] = streams[i], a.x0[i] = x0 ? x0[i] : nullptr;
  a.sigma = sigma, a.scale = scale, a.out = out;
  a.in_type = static_cast<Type>(in_type), a.out_type = static_cast<Type>(out_type);
  return cuda::add_noise(a, nullptr);
}

int launch_random_words(const int64_t* rng, const int64_t* index, int64_t batch, int64_t count, uint32_t stream,
                        int64_t* out) {
  ptx::device::clear_error();
  Words w{};
  w.rng = rng, w.index = index, w.batch = batch, w.count = count, w.stream = stream, w.out = out;
  return cuda::random_words(w, nullptr);
}

static constexpr int network_weights = 7;  // of a RatioMixer without an energy head

// channels, height, width, patch, tokens, C, depth, hidden
static MixerSizes sizes_of(const int64_t* s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]}; }

int64_t launch_packed_bytes(const int64_t* sizes) { return cuda::packing_of(sizes_of(sizes)).bytes; }

int launch_pack_weights(const int64_t* sizes, int type, void** weight, void* packed) {
  ptx::device::clear_error();
  cuda::PackCall c{};
  c.packing = cuda::packing_of(sizes_of(sizes));
  for (int i = 0; i < network_weights; ++i) c.weight[i] = weight[i];
  c.type = static_cast<Type>(type);
  c.packed = static_cast<unsigned char*>(packed);
  return cuda::pack_weights(c, nullptr);
}

// A call of a ratio operation, as in ../operations.py. The second part holds results.
struct MixerArguments {
  int64_t sizes[8];
  void* packed;
  float sigma_data;
  int batch, draws, halves, type;
  void* images[2];
  void* sigma;
  void* conditioning[2];
  void* rng;
  void* index;
  uint32_t streams[2];
  int objective, divergence, pass, form, out_type;
  void* upstream;
  void* log_ratio;
  void* image_gradient;
  void* conditioning_gradient[2];
  void* out[network_weights];
  void* loss;
  int64_t workspace_limit, slice_units;  // slice_units, if not 0: the workspace is for this many units
  void* kept;                            // if kept_bytes: the staged operands of the last slice are copied there
  int64_t kept_bytes;
  // results
  int blocks, threads, shared, product_blocks, slice, splits, one_launch, unused;
  int64_t workspace_bytes, unit_bytes;
  int64_t staging[10];  // m h g gm a gu last first z rows
  int padded[4];        // tokens, width, hidden, vector
};

int64_t launch_mixer_arguments_bytes() { return sizeof(MixerArguments); }

static cuda::MixerCall call_of(const MixerArguments& d) {
  cuda::MixerCall m{};
  m.sizes = sizes_of(d.sizes);
  m.sigma_data = d.sigma_data;
  m.inputs.batch = d.batch, m.inputs.draws = d.draws, m.inputs.halves = d.halves;
  m.inputs.type = static_cast<Type>(d.type);
  m.inputs.sigma = static_cast<const float*>(d.sigma);
  m.noise.rng = static_cast<const int64_t*>(d.rng);
  m.noise.index = static_cast<const int64_t*>(d.index);
  m.objective.kind = static_cast<Objective>(d.objective);
  m.objective.divergence = static_cast<Divergence>(d.divergence);
  m.objective.upstream = static_cast<const float*>(d.upstream);
  m.results.log_ratio = static_cast<float*>(d.log_ratio);
  m.results.image_gradient = static_cast<float*>(d.image_gradient);
  for (int h = 0; h < 2; ++h) {
    m.inputs.images[h] = d.images[h];
    m.inputs.conditioning[h] = static_cast<const float*>(d.conditioning[h]);
    m.noise.streams[h] = d.streams[h];
    m.results.conditioning_gradient[h] = static_cast<float*>(d.conditioning_gradient[h]);
  }
  m.packing = cuda::packing_of(m.sizes);
  m.staging = cuda::staging_of(m.packing);
  m.packed = static_cast<const unsigned char*>(d.packed);
  return m;
}

// The plan's values, for the caller.
static void describe(const cuda::MixerPlan& plan, const cuda::MixerCall& m, MixerArguments& d) {
  const cuda::Staging& t = m.staging;
  d.blocks = plan.blocks, d.threads = plan.threads, d.shared = static_cast<int>(plan.shared);
  d.product_blocks = plan.product_blocks, d.slice = plan.slice, d.splits = plan.splits;
  d.one_launch = plan.one_launch, d.workspace_bytes = plan.bytes, d.unit_bytes = t.bytes;
  const int64_t places[10] = {t.m, t.h, t.g, t.gm, t.a, t.gu, t.last, t.first, t.z, t.rows};
  std::copy_n(places, 10, d.staging);
  const int padded[4] = {m.packing.tokens, m.packing.width, m.packing.hidden, m.packing.vector};
  std::copy_n(padded, 4, d.padded);
}

int launch_mixer(MixerArguments* d) {
  ptx::device::clear_error();
  const cuda::MixerCall m = call_of(*d);
  cuda::GradientCall g{};
  for (int i = 0; i < network_weights; ++i) g.out[i] = d->out[i];
  g.out_type = static_cast<Type>(d->out_type);
  g.loss = static_cast<float*>(d->loss);
  const auto pass = static_cast<cuda::Pass>(d->pass);
  const int64_t limit = d->slice_units ? d->slice_units * m.staging.bytes : d->workspace_limit;
  const cuda::MixerPlan plan = cuda::plan_mixer(m, pass, limit, static_cast<cuda::Form>(d->form));
  describe(plan, m, *d);
  if (plan.blocks <= 0) {
    ptx::device::error = "the kernels do not fit the device";
    return -1;
  }
  void* workspace = ptx::allocate(plan.bytes, "workspace", false);
  uint64_t offsets[5];
  int parts = 0;
  for (int64_t x : {plan.counters, plan.parked, plan.operands, plan.columns, plan.sums}) {
    if (x < plan.bytes) offsets[parts++] = x;
  }
  ptx::split(workspace, offsets, parts);
  const int error = cuda::run_mixer(m, g, pass, plan, static_cast<unsigned char*>(workspace), nullptr);
  if (d->kept_bytes && pass == cuda::Pass::weights) {
    const int64_t bytes = std::min<int64_t>(d->kept_bytes, plan.slice * m.staging.bytes);
    std::memcpy(d->kept, static_cast<unsigned char*>(workspace) + plan.operands, bytes);
  }
  ptx::release(workspace);
  return error;
}
}
