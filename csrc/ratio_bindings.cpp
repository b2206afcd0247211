// The ratio operations as torch sees them: schemas, checks that keep memory safe, allocation. People are told more,
// and sooner, by diffratio_fast/ops/ratio_checks.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "common/divergences.h"
#include "cpu/mixer.h"
#include "ratio_checks.h"

namespace diffratio {
namespace {

using cpu::Mixer;
using Tensors = std::vector<at::Tensor>;

// A call under construction, with the float32 contiguous tensors that its pointers point into.
struct Call {
  Mixer mixer{};
  Tensors held;

  float* hold(const at::Tensor& t) {
    held.push_back(t.to(at::kFloat).contiguous());
    return held.back().mutable_data_ptr<float>();
  }
};

// What all operations share; conditioning and sigma are [B, draws, ...] or, for one draw, [B, ...].
Call begin(at::TensorList weights, at::TensorList images, const at::Tensor& sigma, at::TensorList conditioning,
           int64_t draws, double sigma_data) {
  Call call;
  Mixer& m = call.mixer;
  m.sizes = sizes_of(weights, images[0]);
  m.sigma_data = static_cast<float>(sigma_data);
  m.batch = images[0].size(0);
  m.draws = draws;
  m.halves = static_cast<int>(images.size());
  std::vector<int64_t> shape{m.batch};
  if (sigma.dim() == 2) shape.push_back(draws);
  check("sigma", sigma, shape, at::kCPU);
  m.sigma = call.hold(sigma);
  shape.push_back(m.sizes.conditioning());
  for (int half = 0; half < m.halves; ++half) {
    check("images", images[half], images[0].sizes().vec(), at::kCPU);
    check("conditioning", conditioning[half], shape, at::kCPU);
    m.images[half] = call.hold(images[half]);
    m.conditioning[half] = call.hold(conditioning[half]);
  }
  for (int i = 0; i < diffratio::weights; ++i) m.weight[i] = call.hold(weights[i]);
  return call;
}

void add_noise(Call& call, const at::Tensor& rng, const at::Tensor& index, at::IntArrayRef purposes, int64_t substep) {
  Mixer& m = call.mixer;
  check_noise(rng, index, purposes, substep, m.batch, m.draws, m.halves, at::kCPU);
  call.held.push_back(rng.contiguous());
  m.rng = call.held.back().const_data_ptr<int64_t>();
  call.held.push_back(index.contiguous());
  m.index = call.held.back().const_data_ptr<int64_t>();
  for (int half = 0; half < m.halves; ++half) {
    m.streams[half] = stream_word(purposes[half], substep, 0);
  }
}

Tensors weight_gradients(Call& call, at::TensorList weights) {
  Tensors gradients;
  for (int i = 0; i < diffratio::weights; ++i) {
    gradients.push_back(at::empty(weights[i].sizes(), weights[i].options().dtype(at::kFloat)));
    call.mixer.weight_gradient[i] = gradients.back().mutable_data_ptr<float>();
  }
  return gradients;
}

void run(const Call& call, const at::Tensor& like) {
  const Mixer& m = call.mixer;
  if (m.batch == 0) return;
  const cpu::Level& level = cpu_level();
  const cpu::MixerLayout l = cpu::mixer_layout(level, m);
  const int64_t items = l.groups ? l.groups : m.batch * m.halves;
  const int64_t workers = std::min<int64_t>(items, at::get_num_threads());
  const auto buffer = [&](int64_t floats) { return at::empty({floats}, like.options().dtype(at::kFloat)); };
  at::Tensor packed = buffer(l.packed_floats), workspace = buffer(workers * l.workspace_floats);
  at::Tensor sums = buffer(l.groups * l.gradient_floats);
  cpu::mixer(level, m, l, packed.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(),
             l.groups ? sums.mutable_data_ptr<float>() : nullptr, workers, &parallel_for);
}

at::Tensor like_float(const at::Tensor& t, at::IntArrayRef shape) {
  return at::empty(shape, t.options().dtype(at::kFloat));
}

void cast(Tensors& gradients, at::TensorList weights) {
  for (size_t i = 0; i < gradients.size(); ++i) gradients[i] = gradients[i].to(weights[i].scalar_type());
}

// The CPU twin packs within each call, for the SIMD level in use; `packed` says nothing to it.
using Packed = std::optional<at::Tensor>;

at::Tensor pack_weights(at::TensorList weights) {
  TORCH_CHECK_VALUE(weights.size() == diffratio::weights, "weights must be ", int{diffratio::weights}, " tensors");
  return at::empty({0}, weights[0].options().dtype(at::kByte));
}

at::Tensor log_ratio(at::TensorList weights, const at::Tensor& noised, const at::Tensor& sigma,
                     const at::Tensor& conditioning, double sigma_data, const Packed&) {
  Call call = begin(weights, {noised}, sigma, {conditioning}, 1, sigma_data);
  at::Tensor out = like_float(sigma, sigma.sizes());
  call.mixer.log_ratio = out.mutable_data_ptr<float>();
  run(call, noised);
  return out;
}

std::tuple<at::Tensor, Tensors, at::Tensor> log_ratio_backward(const at::Tensor& upstream, at::TensorList weights,
                                                               const at::Tensor& noised, const at::Tensor& sigma,
                                                               const at::Tensor& conditioning, double sigma_data,
                                                               const Packed&) {
  Call call = begin(weights, {noised}, sigma, {conditioning}, 1, sigma_data);
  check("upstream", upstream, {call.mixer.batch}, at::kCPU);
  at::Tensor values = like_float(sigma, sigma.sizes()), image = like_float(noised, noised.sizes());
  at::Tensor by_conditioning = like_float(conditioning, conditioning.sizes());
  Tensors gradients = weight_gradients(call, weights);
  if (call.mixer.batch == 0) {
    for (at::Tensor& g : gradients) g.zero_();
  }
  call.mixer.objective = Objective::given;
  call.mixer.upstream = call.hold(upstream);
  call.mixer.log_ratio = values.mutable_data_ptr<float>();
  call.mixer.image_gradient = image.mutable_data_ptr<float>();
  call.mixer.conditioning_gradient[0] = by_conditioning.mutable_data_ptr<float>();
  run(call, noised);
  cast(gradients, weights);
  return {image.to(noised.scalar_type()), gradients, by_conditioning.to(conditioning.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> score_difference(at::TensorList weights, const at::Tensor& fake,
                                                                const at::Tensor& sigma, const at::Tensor& conditioning,
                                                                const at::Tensor& weight, const at::Tensor& rng,
                                                                const at::Tensor& index, int64_t divergence,
                                                                int64_t purpose, int64_t substep, double sigma_data,
                                                                const Packed&) {
  TORCH_CHECK_VALUE(sigma.dim() == 2 && sigma.size(1) > 0, "sigma must be [B, K]");
  TORCH_CHECK_VALUE(divergence >= 0 && divergence < divergences, "no such divergence: ", divergence);
  Call call = begin(weights, {fake}, sigma, {conditioning}, sigma.size(1), sigma_data);
  add_noise(call, rng, index, {purpose}, substep);
  check("weight", weight, sigma.sizes().vec(), at::kCPU);
  at::Tensor gradient = like_float(fake, fake.sizes()), values = like_float(sigma, sigma.sizes());
  call.mixer.objective = Objective::score;
  call.mixer.divergence = static_cast<int>(divergence);
  call.mixer.upstream = call.hold(weight);
  call.mixer.log_ratio = values.mutable_data_ptr<float>();
  call.mixer.image_gradient = gradient.mutable_data_ptr<float>();
  run(call, fake);
  int64_t clamped = 0;
  for (int64_t i = 0; i < values.numel(); ++i) {
    bool outside;
    divergence_factor(call.mixer.divergence, call.mixer.log_ratio[i], &outside);
    clamped += outside;
  }
  at::Tensor fraction = like_float(sigma, {});
  *fraction.mutable_data_ptr<float>() = static_cast<float>(clamped) / static_cast<float>(values.numel());
  return {gradient, values, fraction};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, Tensors, at::Tensor, at::Tensor> ratio_loss(
    at::TensorList weights, const at::Tensor& real, const at::Tensor& fake, const at::Tensor& sigma,
    const at::Tensor& conditioning_real, const at::Tensor& conditioning_fake, const at::Tensor& rng,
    const at::Tensor& index, at::IntArrayRef purposes, int64_t substep, double sigma_data, const Packed&) {
  Call call = begin(weights, {real, fake}, sigma, {conditioning_real, conditioning_fake}, 1, sigma_data);
  const int64_t batch = call.mixer.batch;
  TORCH_CHECK_VALUE(batch > 0, "the loss of no samples is not defined");
  add_noise(call, rng, index, purposes, substep);
  at::Tensor values = like_float(sigma, {2, batch});
  at::Tensor by_real = like_float(conditioning_real, conditioning_real.sizes());
  at::Tensor by_fake = like_float(conditioning_fake, conditioning_fake.sizes());
  Tensors gradients = weight_gradients(call, weights);
  call.mixer.objective = Objective::logistic;
  call.mixer.log_ratio = values.mutable_data_ptr<float>();
  call.mixer.conditioning_gradient[0] = by_real.mutable_data_ptr<float>();
  call.mixer.conditioning_gradient[1] = by_fake.mutable_data_ptr<float>();
  run(call, real);
  double sum = 0;
  for (int64_t i = 0; i < 2 * batch; ++i) {
    const double x = i < batch ? -call.mixer.log_ratio[i] : call.mixer.log_ratio[i];
    sum += (x > 0 ? x : 0.0) + std::log1p(std::exp(-std::abs(x)));  // softplus
  }
  at::Tensor loss = like_float(sigma, {});
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum / static_cast<double>(batch));
  cast(gradients, weights);
  return {loss,
          values[0].clone(),
          values[1].clone(),
          gradients,
          by_real.to(conditioning_real.scalar_type()),
          by_fake.to(conditioning_fake.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(diffratio, m) {
  m.def("pack_weights(Tensor[] weights) -> Tensor");
  m.def(
      "log_ratio(Tensor[] weights, Tensor noised, Tensor sigma, Tensor conditioning, float sigma_data, "
      "Tensor? packed) -> Tensor");
  m.def(
      "log_ratio_backward(Tensor upstream, Tensor[] weights, Tensor noised, Tensor sigma, Tensor conditioning, "
      "float sigma_data, Tensor? packed) -> (Tensor, Tensor[], Tensor)");
  m.def(
      "score_difference(Tensor[] weights, Tensor fake, Tensor sigma, Tensor conditioning, Tensor weight, Tensor rng, "
      "Tensor index, int divergence, int purpose, int substep, float sigma_data, Tensor? packed) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "ratio_loss(Tensor[] weights, Tensor real, Tensor fake, Tensor sigma, Tensor conditioning_real, "
      "Tensor conditioning_fake, Tensor rng, Tensor index, int[] purposes, int substep, float sigma_data, "
      "Tensor? packed) -> "
      "(Tensor, Tensor, Tensor, Tensor[], Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(diffratio, CPU, m) {
  m.impl("pack_weights", &pack_weights);
  m.impl("log_ratio", &log_ratio);
  m.impl("log_ratio_backward", &log_ratio_backward);
  m.impl("score_difference", &score_difference);
  m.impl("ratio_loss", &ratio_loss);
}

}  // namespace diffratio
