// The ratio operations for torch: schemas, memory-safety checks, allocation, dispatch to a backend.
// diffratio_fast/ops/ratio_checks.py checks the same arguments first and has the messages for users.
//
// Nothing here synchronizes with a GPU, so the operations may be captured in CUDA graphs.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "common/divergences.h"
#include "cpu/mixer.h"
#include "cuda/ratio/mixer_plan.h"
#include "ratio_checks.h"
#if defined(DIFFRATIO_WITH_CUDA)
#include <c10/core/impl/VirtualGuardImpl.h>

#include <atomic>

#include "cuda/launch.h"
#endif

namespace diffratio {
namespace {

using Tensors = std::vector<at::Tensor>;
using Packed = std::optional<at::Tensor>;

int as_int(int64_t n) {
  TORCH_CHECK_VALUE(n <= std::numeric_limits<int>::max() / 2, "too many samples: ", n);
  return static_cast<int>(n);
}

at::Tensor empty_floats(at::IntArrayRef shape, at::Device device) {
  return at::empty(shape, at::TensorOptions().device(device).dtype(at::kFloat));
}

Type type_of(const at::Tensor& t) { return t.scalar_type() == at::kFloat ? Type::float32 : Type::bfloat16; }

// --- backends ------------------------------------------------------------------------------------------------------
//
// A backend owns `call`, its form of a RatioCall, and provides
//   device                        its type of device
//   pack(weights)                 the result of pack_weights
//   image_type, gradient_type     the types in which it reads images and writes weight gradients
//   set_weights, set_gradients    pointers to weights and weight gradients; set_weights appends to `held` every tensor
//                                 that must live until the call has run
//   set_loss                      where the logistic loss goes
//   run(device)                   executes the call

class Cpu {
 public:
  static constexpr c10::DeviceType device = c10::DeviceType::CPU;
  cpu::Mixer call{};

  // The weights are packed within each call, for the SIMD level in use.
  static at::Tensor pack(at::TensorList weights) { return at::empty({0}, weights[0].options().dtype(at::kByte)); }
  static at::ScalarType image_type(const at::Tensor&) { return at::kFloat; }
  static at::ScalarType gradient_type(const at::Tensor&) { return at::kFloat; }

  void set_weights(at::TensorList weights, const Packed&, Tensors& held) {
    for (size_t i = 0; i < weights.size(); ++i) {
      held.push_back(weights[i].to(at::kFloat).contiguous());
      call.weight[i] = held.back().const_data_ptr<float>();
    }
  }
  void set_gradients(const Tensors& gradients) {
    for (size_t i = 0; i < gradients.size(); ++i) call.weight_gradient[i] = gradients[i].mutable_data_ptr<float>();
  }
  void set_loss(const at::Tensor& loss) { loss_ = loss.mutable_data_ptr<float>(); }

  void run(at::Device) {
    const cpu::Level& level = cpu_level();
    const cpu::MixerLayout layout = cpu::mixer_layout(level, call);
    const int64_t items = layout.groups ? layout.groups : call.samples();
    const int64_t workers = std::min<int64_t>(items, at::get_num_threads());
    const auto buffer = [](int64_t count) { return empty_floats({count}, at::kCPU); };
    at::Tensor packed = buffer(layout.packed_floats), workspace = buffer(workers * layout.workspace_floats);
    at::Tensor sums = buffer(layout.groups * layout.gradient_floats);
    cpu::run_mixer(level, call, layout, packed.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(),
                   layout.groups ? sums.mutable_data_ptr<float>() : nullptr, workers, &parallel_for);
    if (loss_) *loss_ = logistic_loss();
  }

 private:
  float logistic_loss() const {
    const int64_t batch = call.inputs.batch;
    double sum = 0;
    for (int64_t i = 0; i < 2 * batch; ++i) {
      const double x = i < batch ? -call.results.log_ratio[i] : call.results.log_ratio[i];
      sum += (x > 0 ? x : 0.0) + std::log1p(std::exp(-std::abs(x)));  // softplus
    }
    return static_cast<float>(sum / static_cast<double>(batch));
  }

  float* loss_ = nullptr;
};

#if defined(DIFFRATIO_WITH_CUDA)

std::atomic<cuda::Form> form_in_use{cuda::Form::automatic};
std::atomic<int64_t> workspace_limit{default_workspace_limit};

class Cuda {
 public:
  static constexpr c10::DeviceType device = c10::DeviceType::CUDA;
  cuda::MixerCall call{};

  static at::Tensor pack(at::TensorList weights) {
    // Any image that fits these weights: the packed form does not depend on it.
    const int64_t tokens = weights[w_position].dim() == 2 ? weights[w_position].size(0) : 0;
    const at::Tensor image = at::empty({0, weights[w_patch].size(1), 1, tokens}, weights[w_patch].options());
    return pack_for(weights, sizes_of(weights, image));
  }
  static at::ScalarType image_type(const at::Tensor& images) { return images.scalar_type(); }
  static at::ScalarType gradient_type(const at::Tensor& weight) { return weight.scalar_type(); }

  void set_weights(at::TensorList weights, const Packed& packed, Tensors& held) {
    TORCH_CHECK_VALUE(cuda::shape_exists(call.sizes), "no kernel for ", call.sizes.tokens, " tokens of ",
                      call.sizes.width, " channels, patches of ", call.sizes.vector());
    call.packing = cuda::packing_of(call.sizes);
    call.staging = cuda::staging_of(call.packing);
    held.push_back(packed ? packed->contiguous() : pack_for(weights, call.sizes));
    const at::Tensor& p = held.back();
    TORCH_CHECK_VALUE(
        p.scalar_type() == at::kByte && p.device() == weights[0].device() && p.numel() == call.packing.bytes,
        "packed must be the result of pack_weights for these weights");
    call.packed = p.const_data_ptr<uint8_t>();
    TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(call.packed) % 16 == 0,
                      "packed must start at a multiple of 16 bytes");
  }
  void set_gradients(const Tensors& gradients) {
    for (size_t i = 0; i < gradients.size(); ++i) gradients_.out[i] = gradients[i].mutable_data_ptr();
    gradients_.out_type = type_of(gradients[0]);
  }
  void set_loss(const at::Tensor& loss) { gradients_.loss = loss.mutable_data_ptr<float>(); }

  void run(at::Device on) {
    const cuda::Pass pass = gradients_.out[0]             ? cuda::Pass::weights
                            : call.results.image_gradient ? cuda::Pass::image
                                                          : cuda::Pass::forward;
    const cuda::MixerPlan plan = cuda::plan_mixer(call, pass, workspace_limit.load(), form_in_use.load());
    TORCH_CHECK(plan.blocks > 0, "the RatioMixer's kernels need ", plan.shared,
                " bytes of shared memory, more than this GPU has");
    at::Tensor workspace = at::empty({plan.bytes}, at::TensorOptions().device(on).dtype(at::kByte));
    succeed(cuda::run_mixer(call, gradients_, pass, plan, workspace.mutable_data_ptr<uint8_t>(), stream_of(on)));
  }

 private:
  static at::Tensor pack_for(at::TensorList weights, const MixerSizes& sizes) {
    cuda::PackCall call{};
    call.packing = cuda::packing_of(sizes);
    call.type = type_of(weights[0]);
    Tensors held;
    for (size_t i = 0; i < weights.size(); ++i) {
      held.push_back(weights[i].contiguous());
      call.weight[i] = held.back().const_data_ptr();
    }
    at::Tensor packed = at::empty({call.packing.bytes}, weights[0].options().dtype(at::kByte));
    call.packed = packed.mutable_data_ptr<uint8_t>();
    succeed(cuda::pack_weights(call, stream_of(weights[0].device())));
    return packed;
  }

  // Use c10, not libc10_cuda: one build then works with a CPU and a CUDA build of torch.
  static cudaStream_t stream_of(at::Device device) {
    const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    return static_cast<cudaStream_t>(guard.getStreamNativeHandle(guard.getStream(device)));
  }
  static void succeed(cudaError_t error) {
    TORCH_CHECK(error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
  }

  cuda::GradientCall gradients_{};
};

#endif

// --- calls ---------------------------------------------------------------------------------------------------------

// A call under construction, with the tensors that its pointers refer to.
template <class Backend>
class Call : public Backend {
 public:
  using Backend::call;

  // conditioning and sigma are [B, draws, ...] or, for one draw, [B, ...].
  Call(at::TensorList weights, at::TensorList images, const at::Tensor& sigma, at::TensorList conditioning,
       int64_t draws, double sigma_data, const Packed& packed)
      : device_(images[0].device()) {
    TORCH_CHECK_VALUE(device_.type() == Backend::device, "images must be on the device of the other arguments");
    call.sizes = sizes_of(weights, images[0]);
    call.sigma_data = static_cast<float>(sigma_data);
    MixerInputs& inputs = call.inputs;
    inputs.batch = as_int(images[0].size(0));
    inputs.draws = as_int(draws);
    inputs.halves = static_cast<int>(images.size());
    as_int(images[0].size(0) * draws * inputs.halves);
    std::vector<int64_t> shape{inputs.batch};
    if (sigma.dim() == 2) shape.push_back(draws);
    check("sigma", sigma, shape, device_);
    inputs.sigma = hold(sigma);
    shape.push_back(call.sizes.conditioning());
    for (int half = 0; half < inputs.halves; ++half) {
      check("images", images[half], images[0].sizes().vec(), device_);
      TORCH_CHECK_TYPE(images[half].scalar_type() == images[0].scalar_type(), "images must have one dtype");
      check("conditioning", conditioning[half], shape, device_);
      held_.push_back(images[half].to(Backend::image_type(images[half])).contiguous());
      inputs.images[half] = held_.back().const_data_ptr();
      inputs.type = type_of(held_.back());
      inputs.conditioning[half] = hold(conditioning[half]);
    }
    this->set_weights(weights, packed, held_);
  }

  at::Device device() const { return device_; }

  const float* hold(const at::Tensor& t) {
    held_.push_back(t.to(at::kFloat).contiguous());
    return held_.back().template const_data_ptr<float>();
  }

  void add_noise(const at::Tensor& rng, const at::Tensor& index, at::IntArrayRef purposes, int64_t substep) {
    const MixerInputs& inputs = call.inputs;
    check_noise(rng, index, purposes, substep, inputs.batch, inputs.draws, inputs.halves, device_);
    held_.push_back(rng.contiguous());
    call.noise.rng = held_.back().template const_data_ptr<int64_t>();
    held_.push_back(index.contiguous());
    call.noise.index = held_.back().template const_data_ptr<int64_t>();
    for (int half = 0; half < inputs.halves; ++half) {
      call.noise.streams[half] = stream_word(purposes[half], substep, 0);
    }
  }

  Tensors want_weight_gradients(at::TensorList weights) {
    Tensors gradients;
    for (const at::Tensor& weight : weights) {
      gradients.push_back(at::empty(weight.sizes(), weight.options().dtype(Backend::gradient_type(weight))));
    }
    this->set_gradients(gradients);
    return gradients;
  }

  void run() {
    if (call.inputs.batch > 0) Backend::run(device_);
  }

 private:
  at::Device device_;
  Tensors held_;
};

void cast(Tensors& gradients, at::TensorList weights) {
  for (size_t i = 0; i < gradients.size(); ++i) gradients[i] = gradients[i].to(weights[i].scalar_type());
}

// --- operations ----------------------------------------------------------------------------------------------------

template <class Backend>
at::Tensor pack_weights(at::TensorList weights) {
  TORCH_CHECK_VALUE((weights.size() == diffratio::weights || weights.size() == w_energy) && weights[w_patch].dim() == 2,
                    "weights must be those of a RatioMixer");
  const c10::OptionalDeviceGuard guard(weights[0].device());
  return Backend::pack(weights);
}

template <class Backend>
at::Tensor log_ratio(at::TensorList weights, const at::Tensor& noised, const at::Tensor& sigma,
                     const at::Tensor& conditioning, double sigma_data, const Packed& packed) {
  const c10::OptionalDeviceGuard guard(noised.device());
  Call<Backend> c(weights, {noised}, sigma, {conditioning}, 1, sigma_data, packed);
  at::Tensor out = empty_floats(sigma.sizes(), c.device());
  c.call.results.log_ratio = out.mutable_data_ptr<float>();
  c.run();
  return out;
}

template <class Backend>
std::tuple<at::Tensor, Tensors, at::Tensor> log_ratio_backward(const at::Tensor& upstream, at::TensorList weights,
                                                               const at::Tensor& noised, const at::Tensor& sigma,
                                                               const at::Tensor& conditioning, double sigma_data,
                                                               const Packed& packed) {
  const c10::OptionalDeviceGuard guard(noised.device());
  Call<Backend> c(weights, {noised}, sigma, {conditioning}, 1, sigma_data, packed);
  check("upstream", upstream, {c.call.inputs.batch}, c.device());
  at::Tensor values = empty_floats(sigma.sizes(), c.device()), image = empty_floats(noised.sizes(), c.device());
  at::Tensor by_conditioning = empty_floats(conditioning.sizes(), c.device());
  Tensors gradients = c.want_weight_gradients(weights);
  if (c.call.inputs.batch == 0) {
    for (at::Tensor& g : gradients) g.zero_();
  }
  c.call.objective.kind = Objective::given;
  c.call.objective.upstream = c.hold(upstream);
  c.call.results.log_ratio = values.mutable_data_ptr<float>();
  c.call.results.image_gradient = image.mutable_data_ptr<float>();
  c.call.results.conditioning_gradient[0] = by_conditioning.mutable_data_ptr<float>();
  c.run();
  cast(gradients, weights);
  return {image.to(noised.scalar_type()), gradients, by_conditioning.to(conditioning.scalar_type())};
}

template <class Backend>
std::tuple<at::Tensor, at::Tensor> score_difference(at::TensorList weights, const at::Tensor& fake,
                                                    const at::Tensor& sigma, const at::Tensor& conditioning,
                                                    const at::Tensor& weight, const at::Tensor& rng,
                                                    const at::Tensor& index, int64_t divergence, int64_t purpose,
                                                    int64_t substep, double sigma_data, const Packed& packed) {
  TORCH_CHECK_VALUE(sigma.dim() == 2 && sigma.size(1) > 0, "sigma must be [B, K]");
  TORCH_CHECK_VALUE(divergence >= 0 && divergence < divergences, "no such divergence: ", divergence);
  const c10::OptionalDeviceGuard guard(fake.device());
  Call<Backend> c(weights, {fake}, sigma, {conditioning}, sigma.size(1), sigma_data, packed);
  c.add_noise(rng, index, {purpose}, substep);
  check("weight", weight, sigma.sizes().vec(), c.device());
  at::Tensor gradient = empty_floats(fake.sizes(), c.device()), values = empty_floats(sigma.sizes(), c.device());
  c.call.objective.kind = Objective::score;
  c.call.objective.divergence = static_cast<Divergence>(divergence);
  c.call.objective.upstream = c.hold(weight);
  c.call.results.log_ratio = values.mutable_data_ptr<float>();
  c.call.results.image_gradient = gradient.mutable_data_ptr<float>();
  c.run();
  return {gradient, values};
}

template <class Backend>
std::tuple<at::Tensor, at::Tensor, at::Tensor, Tensors, at::Tensor, at::Tensor> ratio_loss(
    at::TensorList weights, const at::Tensor& real, const at::Tensor& fake, const at::Tensor& sigma,
    const at::Tensor& conditioning_real, const at::Tensor& conditioning_fake, const at::Tensor& rng,
    const at::Tensor& index, at::IntArrayRef purposes, int64_t substep, double sigma_data, const Packed& packed) {
  const c10::OptionalDeviceGuard guard(real.device());
  Call<Backend> c(weights, {real, fake}, sigma, {conditioning_real, conditioning_fake}, 1, sigma_data, packed);
  const int64_t batch = c.call.inputs.batch;
  TORCH_CHECK_VALUE(batch > 0, "the loss of no samples is not defined");
  c.add_noise(rng, index, purposes, substep);
  at::Tensor values = empty_floats({2, batch}, c.device()), loss = empty_floats({}, c.device());
  at::Tensor by_real = empty_floats(conditioning_real.sizes(), c.device());
  at::Tensor by_fake = empty_floats(conditioning_fake.sizes(), c.device());
  Tensors gradients = c.want_weight_gradients(weights);
  c.call.objective.kind = Objective::logistic;
  c.call.results.log_ratio = values.mutable_data_ptr<float>();
  c.call.results.conditioning_gradient[0] = by_real.mutable_data_ptr<float>();
  c.call.results.conditioning_gradient[1] = by_fake.mutable_data_ptr<float>();
  c.set_loss(loss);
  c.run();
  cast(gradients, weights);
  return {loss,
          values[0].clone(),
          values[1].clone(),
          gradients,
          by_real.to(conditioning_real.scalar_type()),
          by_fake.to(conditioning_fake.scalar_type())};
}

template <class Backend>
void implement(torch::Library& m) {
  m.impl("pack_weights", &pack_weights<Backend>);
  m.impl("log_ratio", &log_ratio<Backend>);
  m.impl("log_ratio_backward", &log_ratio_backward<Backend>);
  m.impl("score_difference", &score_difference<Backend>);
  m.impl("ratio_loss", &ratio_loss<Backend>);
}

// --- plans ---------------------------------------------------------------------------------------------------------

RatioPlan cpu_plan(const MixerSizes& sizes, cuda::Pass pass, int samples, int64_t threads) {
  float any = 0;
  cpu::Mixer call{};
  call.sizes = sizes;
  call.inputs.batch = samples;
  call.inputs.halves = call.inputs.draws = 1;
  if (pass != cuda::Pass::forward) call.objective.kind = Objective::given;
  if (pass == cuda::Pass::weights) call.weight_gradient[0] = &any;
  const cpu::MixerLayout l = cpu::mixer_layout(cpu_level(), call);
  const int64_t workers = std::min<int64_t>(threads, l.groups ? l.groups : samples);
  return {4 * l.packed_floats, 4 * (workers * l.workspace_floats + l.groups * l.gradient_floats)};
}

RatioPlan cuda_plan(const MixerSizes& sizes, cuda::Pass pass, int samples, int64_t blocks) {
  const cuda::Packing packing = cuda::packing_of(sizes);
  cuda::MixerPlan plan{};
  plan.blocks = static_cast<int>(std::min<int64_t>(blocks, samples));
  plan.product_blocks = static_cast<int>(blocks);
  cuda::plan_workspace(plan, packing, pass, samples, default_workspace_limit);
  return {packing.bytes, plan.bytes};
}

cuda::Pass pass_of(const std::string& operation) {
  if (operation == "log_ratio") return cuda::Pass::forward;
  if (operation == "score_difference") return cuda::Pass::image;
  if (operation == "ratio_loss" || operation == "log_ratio_backward") return cuda::Pass::weights;
  throw std::invalid_argument("no such operation: " + operation);
}

}  // namespace

RatioPlan plan_ratio(const std::string& operation, const std::string& device, const MixerSizes& sizes, int64_t samples,
                     int64_t parallel) {
  const auto plan = device == "cuda" ? &cuda_plan : &cpu_plan;
  return plan(sizes, pass_of(operation), as_int(samples), parallel);
}

#if defined(DIFFRATIO_WITH_CUDA)

bool ratio_kernels_fit(const std::string& operation, const MixerSizes& sizes, int device) {
  if (!cuda::shape_exists(sizes)) return false;
  const c10::DeviceGuard guard(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
  cuda::MixerCall call{};
  call.sizes = sizes;
  call.packing = cuda::packing_of(sizes);
  call.staging = cuda::staging_of(call.packing);
  call.inputs.batch = call.inputs.draws = call.inputs.halves = 1;
  return cuda::plan_mixer(call, pass_of(operation), 0, cuda::Form::automatic).blocks > 0;
}

void use_ratio_loss_form(const std::string& name, int64_t workspace_bytes) {
  const char* const names[] = {"automatic", "one launch", "several"};
  for (int i = 0; i < 3; ++i) {
    if (name == names[i]) {
      form_in_use.store(static_cast<cuda::Form>(i));
      workspace_limit.store(workspace_bytes);
      return;
    }
  }
  throw std::invalid_argument("no such form: " + name);
}

#endif

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
      "Tensor index, int divergence, int purpose, int substep, float sigma_data, Tensor? packed) -> (Tensor, Tensor)");
  m.def(
      "ratio_loss(Tensor[] weights, Tensor real, Tensor fake, Tensor sigma, Tensor conditioning_real, "
      "Tensor conditioning_fake, Tensor rng, Tensor index, int[] purposes, int substep, float sigma_data, "
      "Tensor? packed) -> (Tensor, Tensor, Tensor, Tensor[], Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(diffratio, CPU, m) { implement<Cpu>(m); }
#if defined(DIFFRATIO_WITH_CUDA)
TORCH_LIBRARY_IMPL(diffratio, CUDA, m) { implement<Cuda>(m); }
#endif

}  // namespace diffratio
