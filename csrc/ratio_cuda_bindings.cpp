// The ratio operations on CUDA tensors: checks, allocation, launches. Nothing here synchronises, so the operations may
// be captured in CUDA graphs. CMake compiles this file only into modules with CUDA.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <atomic>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "common/divergences.h"
#include "cuda/launch.h"
#include "ratio_checks.h"

namespace diffratio {
namespace {

using cuda::Form;
using cuda::GradientCall;
using cuda::MixerCall;
using cuda::MixerPlan;
using cuda::Pass;
using Tensors = std::vector<at::Tensor>;
using Packed = std::optional<at::Tensor>;

std::atomic<int> form_in_use{0};
std::atomic<int64_t> workspace_limit{int64_t{256} << 20};

cudaStream_t stream_of(at::Device device) {
  const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  return static_cast<cudaStream_t>(guard.getStreamNativeHandle(guard.getStream(device)));
}

void succeed(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
}

Type type_of(const at::Tensor& t) { return t.scalar_type() == at::kFloat ? Type::float32 : Type::bfloat16; }

int as_int(int64_t n) {
  TORCH_CHECK_VALUE(n <= std::numeric_limits<int>::max() / 2, "too many samples: ", n);
  return static_cast<int>(n);
}

// sizes_of, of weights that are also of one type.
MixerSizes network_of(at::TensorList weights, const at::Tensor& images) {
  const MixerSizes sizes = sizes_of(weights, images);
  for (const at::Tensor& weight : weights) {
    TORCH_CHECK_TYPE(weight.scalar_type() == weights[0].scalar_type(), "weights must have one dtype");
  }
  return sizes;
}

at::Tensor pack(at::TensorList weights, const MixerSizes& sizes) {
  const at::Device device = weights[0].device();
  cuda::PackCall call{};
  call.packing = cuda::packing_of(sizes);
  call.type = type_of(weights[0]);
  Tensors held;
  for (int i = 0; i < diffratio::weights; ++i) {
    held.push_back(weights[i].contiguous());
    call.weight[i] = held.back().const_data_ptr();
  }
  at::Tensor packed = at::empty({call.packing.bytes}, weights[0].options().dtype(at::kByte));
  call.packed = packed.mutable_data_ptr<uint8_t>();
  succeed(cuda::pack_weights(call, stream_of(device)));
  return packed;
}

// A call under construction, with the tensors that its pointers point into.
struct Call {
  MixerCall mixer{};
  GradientCall gradients{};
  MixerSizes sizes;
  at::Device device = at::kCPU;
  Tensors held;

  const float* hold(const at::Tensor& t) {
    held.push_back(t.to(at::kFloat).contiguous());
    return held.back().const_data_ptr<float>();
  }

  at::Tensor empty(at::IntArrayRef shape) const {
    return at::empty(shape, at::TensorOptions().device(device).dtype(at::kFloat));
  }
};

Call begin(at::TensorList weights, at::TensorList images, const at::Tensor& sigma, at::TensorList conditioning,
           int64_t draws, double sigma_data, const Packed& packed) {
  Call call;
  MixerCall& m = call.mixer;
  call.device = images[0].device();
  TORCH_CHECK_VALUE(call.device.is_cuda(), "images must be on the GPU, as other arguments are");
  call.sizes = network_of(weights, images[0]);
  TORCH_CHECK_VALUE(cuda::shape_exists(call.sizes), "no kernel for ", call.sizes.tokens, " tokens of ",
                    call.sizes.width, " channels, patches of ", call.sizes.vector());
  m.packing = cuda::packing_of(call.sizes);
  m.staging = cuda::staging_of(m.packing);
  m.sigma_data = static_cast<float>(sigma_data);
  m.batch = as_int(images[0].size(0));
  m.draws = as_int(draws);
  m.halves = static_cast<int>(images.size());
  as_int(images[0].size(0) * draws * m.halves);
  m.type = type_of(images[0]);
  std::vector<int64_t> shape{m.batch};
  if (sigma.dim() == 2) shape.push_back(draws);
  check("sigma", sigma, shape, call.device);
  m.sigma = call.hold(sigma);
  shape.push_back(call.sizes.conditioning());
  for (int half = 0; half < m.halves; ++half) {
    check("images", images[half], images[0].sizes().vec(), call.device);
    TORCH_CHECK_TYPE(images[half].scalar_type() == images[0].scalar_type(), "images must have one dtype");
    check("conditioning", conditioning[half], shape, call.device);
    call.held.push_back(images[half].contiguous());
    m.images[half] = call.held.back().const_data_ptr();
    m.conditioning[half] = call.hold(conditioning[half]);
  }
  call.held.push_back(packed ? packed->contiguous() : pack(weights, call.sizes));
  const at::Tensor& p = call.held.back();
  TORCH_CHECK_VALUE(p.scalar_type() == at::kByte && p.device() == call.device && p.numel() == m.packing.bytes,
                    "packed must be what pack_weights made of these weights");
  m.packed = p.const_data_ptr<uint8_t>();
  return call;
}

void add_noise(Call& call, const at::Tensor& rng, const at::Tensor& index, at::IntArrayRef purposes, int64_t substep) {
  MixerCall& m = call.mixer;
  check_noise(rng, index, purposes, substep, m.batch, m.draws, m.halves, call.device);
  call.held.push_back(rng.contiguous());
  m.rng = call.held.back().const_data_ptr<int64_t>();
  call.held.push_back(index.contiguous());
  m.index = call.held.back().const_data_ptr<int64_t>();
  for (int half = 0; half < m.halves; ++half) m.streams[half] = stream_word(purposes[half], substep, 0);
}

void run(const Call& call, Pass pass) {
  if (call.mixer.batch == 0) return;
  const auto form = static_cast<Form>(form_in_use.load());
  const MixerPlan plan = cuda::plan_mixer(call.sizes, call.mixer, pass, workspace_limit.load(), form);
  TORCH_CHECK(plan.blocks > 0, "the RatioMixer's kernels need ", plan.shared,
              " bytes of shared memory, more than this GPU has");
  at::Tensor workspace = at::empty({plan.bytes}, at::TensorOptions().device(call.device).dtype(at::kByte));
  succeed(cuda::run_mixer(call.mixer, call.gradients, pass, plan, workspace.mutable_data_ptr<uint8_t>(),
                          stream_of(call.device)));
}

Tensors weight_gradients(Call& call, at::TensorList weights) {
  Tensors gradients;
  for (int i = 0; i < diffratio::weights; ++i) {
    gradients.push_back(at::empty(weights[i].sizes(), weights[i].options()));
    call.gradients.out[i] = gradients.back().mutable_data_ptr();
  }
  call.gradients.out_type = type_of(weights[0]);
  return gradients;
}

at::Tensor pack_weights(at::TensorList weights) {
  TORCH_CHECK_VALUE(weights.size() == diffratio::weights && weights[w_patch].dim() == 2,
                    "weights must be those of a RatioMixer");
  const c10::OptionalDeviceGuard guard(weights[0].device());
  // Any image that these weights fit: the packed form does not depend on it.
  const int64_t tokens = weights[w_position].dim() == 2 ? weights[w_position].size(0) : 0;
  const at::Tensor image = at::empty({0, weights[w_patch].size(1), 1, tokens}, weights[w_patch].options());
  TORCH_CHECK_VALUE(image.is_cuda(), "weights must be on the GPU");
  return pack(weights, network_of(weights, image));
}

at::Tensor log_ratio(at::TensorList weights, const at::Tensor& noised, const at::Tensor& sigma,
                     const at::Tensor& conditioning, double sigma_data, const Packed& packed) {
  const c10::OptionalDeviceGuard guard(noised.device());
  Call call = begin(weights, {noised}, sigma, {conditioning}, 1, sigma_data, packed);
  at::Tensor out = call.empty(sigma.sizes());
  call.mixer.log_ratio = out.mutable_data_ptr<float>();
  run(call, Pass::forward);
  return out;
}

std::tuple<at::Tensor, Tensors, at::Tensor> log_ratio_backward(const at::Tensor& upstream, at::TensorList weights,
                                                               const at::Tensor& noised, const at::Tensor& sigma,
                                                               const at::Tensor& conditioning, double sigma_data,
                                                               const Packed& packed) {
  const c10::OptionalDeviceGuard guard(noised.device());
  Call call = begin(weights, {noised}, sigma, {conditioning}, 1, sigma_data, packed);
  check("upstream", upstream, {call.mixer.batch}, call.device);
  at::Tensor values = call.empty(sigma.sizes()), image = call.empty(noised.sizes());
  at::Tensor by_conditioning = call.empty(conditioning.sizes());
  Tensors gradients = weight_gradients(call, weights);
  if (call.mixer.batch == 0) {
    for (at::Tensor& g : gradients) g.zero_();
  }
  call.mixer.objective = Objective::given;
  call.mixer.upstream = call.hold(upstream);
  call.mixer.log_ratio = values.mutable_data_ptr<float>();
  call.mixer.image_gradient = image.mutable_data_ptr<float>();
  call.mixer.conditioning_gradient[0] = by_conditioning.mutable_data_ptr<float>();
  run(call, Pass::weights);
  return {image.to(noised.scalar_type()), gradients, by_conditioning.to(conditioning.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> score_difference(at::TensorList weights, const at::Tensor& fake,
                                                                const at::Tensor& sigma, const at::Tensor& conditioning,
                                                                const at::Tensor& weight, const at::Tensor& rng,
                                                                const at::Tensor& index, int64_t divergence,
                                                                int64_t purpose, int64_t substep, double sigma_data,
                                                                const Packed& packed) {
  TORCH_CHECK_VALUE(sigma.dim() == 2 && sigma.size(1) > 0, "sigma must be [B, K]");
  TORCH_CHECK_VALUE(divergence >= 0 && divergence < divergences, "no such divergence: ", divergence);
  const c10::OptionalDeviceGuard guard(fake.device());
  Call call = begin(weights, {fake}, sigma, {conditioning}, sigma.size(1), sigma_data, packed);
  add_noise(call, rng, index, {purpose}, substep);
  check("weight", weight, sigma.sizes().vec(), call.device);
  at::Tensor gradient = call.empty(fake.sizes()), values = call.empty(sigma.sizes()), fraction = call.empty({});
  if (call.mixer.batch == 0) fraction.fill_(std::numeric_limits<double>::quiet_NaN());
  call.mixer.objective = Objective::score;
  call.mixer.divergence = static_cast<int>(divergence);
  call.mixer.upstream = call.hold(weight);
  call.mixer.log_ratio = values.mutable_data_ptr<float>();
  call.mixer.image_gradient = gradient.mutable_data_ptr<float>();
  call.mixer.clamped_fraction = fraction.mutable_data_ptr<float>();
  run(call, Pass::image);
  return {gradient, values, fraction};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, Tensors, at::Tensor, at::Tensor> ratio_loss(
    at::TensorList weights, const at::Tensor& real, const at::Tensor& fake, const at::Tensor& sigma,
    const at::Tensor& conditioning_real, const at::Tensor& conditioning_fake, const at::Tensor& rng,
    const at::Tensor& index, at::IntArrayRef purposes, int64_t substep, double sigma_data, const Packed& packed) {
  const c10::OptionalDeviceGuard guard(real.device());
  Call call = begin(weights, {real, fake}, sigma, {conditioning_real, conditioning_fake}, 1, sigma_data, packed);
  const int64_t batch = call.mixer.batch;
  TORCH_CHECK_VALUE(batch > 0, "the loss of no samples is not defined");
  add_noise(call, rng, index, purposes, substep);
  at::Tensor values = call.empty({2, batch}), loss = call.empty({});
  at::Tensor by_real = call.empty(conditioning_real.sizes()), by_fake = call.empty(conditioning_fake.sizes());
  Tensors gradients = weight_gradients(call, weights);
  call.mixer.objective = Objective::logistic;
  call.mixer.log_ratio = values.mutable_data_ptr<float>();
  call.mixer.conditioning_gradient[0] = by_real.mutable_data_ptr<float>();
  call.mixer.conditioning_gradient[1] = by_fake.mutable_data_ptr<float>();
  call.gradients.loss = loss.mutable_data_ptr<float>();
  run(call, Pass::weights);
  return {loss,
          values[0].clone(),
          values[1].clone(),
          gradients,
          by_real.to(conditioning_real.scalar_type()),
          by_fake.to(conditioning_fake.scalar_type())};
}

}  // namespace

bool ratio_kernels_fit(const MixerSizes& sizes, int device) {
  if (!cuda::shape_exists(sizes)) return false;
  const c10::DeviceGuard guard(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
  MixerCall call{};
  call.packing = cuda::packing_of(sizes);
  call.staging = cuda::staging_of(call.packing);
  call.batch = call.draws = call.halves = 1;
  return cuda::plan_mixer(sizes, call, Pass::weights, 0, Form::automatic).blocks > 0;
}

void use_ratio_loss_form(const std::string& name, int64_t workspace_bytes) {
  const char* const names[] = {"automatic", "one launch", "several"};
  for (int i = 0; i < 3; ++i) {
    if (name == names[i]) {
      form_in_use.store(i);
      workspace_limit.store(workspace_bytes);
      return;
    }
  }
  throw std::runtime_error("no such form: " + name);
}

TORCH_LIBRARY_IMPL(diffratio, CUDA, m) {
  m.impl("pack_weights", &pack_weights);
  m.impl("log_ratio", &log_ratio);
  m.impl("log_ratio_backward", &log_ratio_backward);
  m.impl("score_difference", &score_difference);
  m.impl("ratio_loss", &ratio_loss);
}

}  // namespace diffratio
