// The parameter operations for torch: schemas, memory-safety checks, allocation, dispatch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "bindings.h"
#include "cpu/parameters.h"
#if defined(DIFFRATIO_WITH_CUDA) && __has_include("cuda/parameters/launch.h")
#define DR_PARAMETERS_CUDA
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/parameters/launch.h"
#endif

namespace diffratio {
namespace {

using at::Tensor;

template <class Arguments>
void run(const Tensor& on, const Arguments& a,
         void (*cpu_launch)(const cpu::Level&, const Arguments&, cpu::ParallelFor),
#if defined(DR_PARAMETERS_CUDA)
         cudaError_t (*cuda_launch)(const Arguments&, cudaStream_t)) {
  if (on.is_cuda()) {
    const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    auto* stream = static_cast<cudaStream_t>(guard.getStreamNativeHandle(guard.getStream(on.device())));
    const cudaError_t error = cuda_launch(a, stream);
    TORCH_CHECK(error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
    return;
  }
#else
         std::nullptr_t) {
#endif
  (void)on;
  cpu_launch(cpu_level(), a, &parallel_for);
}

#if defined(DR_PARAMETERS_CUDA)
#define DR_CUDA_BACKEND(f) (&cuda::f)
#else
#define DR_CUDA_BACKEND(f) nullptr
#endif

Type type_of(at::ScalarType t) {
  switch (t) {
    case at::kFloat: return Type::float32;
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    default: TORCH_CHECK_TYPE(false, "normalized weights are float32, bfloat16 or float16, not ", t);
  }
}

// Rows lie one after the other in memory: contiguous, or channels_last.
bool has_rows(const Tensor& t) {
  return t.is_contiguous() || (t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast));
}

NormalizeWeight weight_of(const Tensor& weight) {
  TORCH_CHECK_TYPE(weight.scalar_type() == at::kFloat, "weights must be float32, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() >= 2 && has_rows(weight), "weights must be dense [out, in, ...], got ",
                    weight.sizes());
  NormalizeWeight a{};
  a.rows = weight.size(0);
  a.length = a.rows ? weight.numel() / a.rows : 0;
  a.weight = weight.const_data_ptr<float>();
  return a;
}

Tensor normalize_weight(const Tensor& weight_, at::ScalarType dtype) {
  const c10::OptionalDeviceGuard guard(weight_.device());
  const Tensor weight = has_rows(weight_) ? weight_ : weight_.contiguous();
  NormalizeWeight a = weight_of(weight);
  a.type = type_of(dtype);
  Tensor normalized = at::empty_like(weight, weight.options().dtype(dtype));
  a.normalized = normalized.mutable_data_ptr();
  if (normalized.numel()) run<NormalizeWeight>(weight, a, &cpu::normalize_weight, DR_CUDA_BACKEND(normalize_weight));
  return normalized;
}

Tensor normalize_weight_backward(const Tensor& gradient_, const Tensor& weight_) {
  const c10::OptionalDeviceGuard guard(weight_.device());
  const Tensor weight = has_rows(weight_) ? weight_ : weight_.contiguous();
  NormalizeWeight a = weight_of(weight);
  TORCH_CHECK_VALUE(gradient_.sizes() == weight.sizes() && gradient_.device() == weight.device(), "gradient must be ",
                    weight.sizes(), " on ", weight.device(), ", got ", gradient_.sizes());
  const Tensor gradient = gradient_.contiguous(weight.suggest_memory_format());
  a.type = type_of(gradient.scalar_type());
  Tensor by_weight = at::empty_like(weight);
  a.gradient = gradient.const_data_ptr();
  a.by_weight = by_weight.mutable_data_ptr<float>();
  if (by_weight.numel()) run<NormalizeWeight>(weight, a, &cpu::normalize_weight, DR_CUDA_BACKEND(normalize_weight));
  return by_weight;
}

// A float32 tensor laid out as `like`, changed in place.
float* state_of(const char* name, const Tensor& t, const Tensor& like) {
  TORCH_CHECK_VALUE(t.sizes() == like.sizes() && t.strides() == like.strides() && t.device() == like.device(), name,
                    " must be laid out as the weight: ", like.sizes(), ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, name, " must be float32, got ", t.scalar_type());
  return t.mutable_data_ptr<float>();
}

Number number(double value, const std::optional<Tensor>& tensor, at::Device device) {
  if (!tensor) return {nullptr, static_cast<float>(value)};
  TORCH_CHECK_VALUE(tensor->numel() == 1 && tensor->scalar_type() == at::kFloat && tensor->device() == device,
                    "a number in memory must be one float32 on ", device);
  return {tensor->const_data_ptr<float>(), 0.0f};
}

Tensor adam_step(at::TensorList weights, at::TensorList gradients, at::TensorList first, at::TensorList second,
                 at::TensorList steps, at::TensorList averages, at::TensorList normalized, at::IntArrayRef normalize,
                 double rate, const std::optional<Tensor>& rate_tensor, at::ArrayRef<double> average_weights,
                 at::TensorList average_tensors, double beta1, double beta2, double eps, double decay, bool decoupled) {
  const size_t count = weights.size();
  TORCH_CHECK_VALUE(count > 0, "there are no weights");
  TORCH_CHECK_VALUE(gradients.size() == count && first.size() == count && second.size() == count &&
                        steps.size() == count && normalized.size() == count && normalize.size() == count,
                    "lists must be as long as the weights: ", count);
  const size_t kept = average_weights.size();
  TORCH_CHECK_VALUE(kept <= max_averages, "at most ", int{max_averages}, " averages, got ", kept);
  TORCH_CHECK_VALUE(averages.size() == kept * count, "averages must hold one tensor for each weight and average");
  TORCH_CHECK_VALUE(average_tensors.empty() || average_tensors.size() == kept, "one number for each average");
  const at::Device device = weights[0].device();
  const c10::OptionalDeviceGuard guard(device);
  Adam a{};
  AdamSettings& s = a.settings;
  s.rate = number(rate, rate_tensor, device);
  s.averages = static_cast<int>(kept);
  for (size_t k = 0; k < kept; ++k) {
    s.average_weight[k] = number(
        average_weights[k], average_tensors.empty() ? std::nullopt : std::optional<Tensor>(average_tensors[k]), device);
  }
  s.beta1 = static_cast<float>(beta1);
  s.beta2 = static_cast<float>(beta2);
  s.epsilon = static_cast<float>(eps);
  s.decay = static_cast<float>(decay);
  s.decoupled = decoupled;
  s.type = Type::float32;
  std::vector<AdamTensor> tensors(count);
  std::vector<Tensor> held;  // gradients in the weights' layout
  int64_t rows = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& weight = weights[i];
    AdamTensor& t = tensors[i];
    TORCH_CHECK_VALUE(weight.device() == device, "weights must be on one device");
    TORCH_CHECK_VALUE(has_rows(weight), "weights must be dense, got strides ", weight.strides());
    t.weight = state_of("weight", weight, weight);
    TORCH_CHECK_VALUE(gradients[i].sizes() == weight.sizes() && gradients[i].device() == device, "gradient must be ",
                      weight.sizes(), ", got ", gradients[i].sizes());
    TORCH_CHECK_TYPE(gradients[i].scalar_type() == at::kFloat, "gradient must be float32");
    held.push_back(gradients[i].strides() == weight.strides() ? gradients[i]
                                                              : at::empty_like(weight).copy_(gradients[i]));
    t.gradient = held.back().const_data_ptr<float>();
    t.first = state_of("first moment", first[i], weight);
    t.second = state_of("second moment", second[i], weight);
    TORCH_CHECK_VALUE(steps[i].numel() == 1 && steps[i].scalar_type() == at::kFloat && steps[i].device() == device,
                      "step must be one float32 on ", device);
    t.step = steps[i].const_data_ptr<float>();
    for (size_t k = 0; k < kept; ++k) t.average[k] = state_of("average", averages[k * count + i], weight);
    t.normalize = normalize[i] && weight.numel();
    const int64_t n = weight.numel();
    if (t.normalize) {
      TORCH_CHECK_VALUE(weight.dim() >= 2, "a normalized weight must be [out, in, ...]");
      t.rows = weight.size(0);
      t.length = n / t.rows;
    } else {  // rows of the largest power of two up to plain_row that divides it
      t.length = n < cpu::plain_row ? n : n & -n;
      while (t.length > cpu::plain_row) t.length /= 2;
      if (t.length < 64) t.length = n;
      t.rows = n ? n / t.length : 0;
    }
    if (t.normalize && normalized[i].numel()) {
      TORCH_CHECK_VALUE(normalized[i].sizes() == weight.sizes() && normalized[i].strides() == weight.strides() &&
                            normalized[i].device() == device,
                        "normalized must be laid out as the weight");
      s.type = type_of(normalized[i].scalar_type());
      t.normalized = normalized[i].mutable_data_ptr();
    }
    rows += t.rows;
  }
  Tensor squares = at::empty({static_cast<int64_t>(count)}, weights[0].options()),
         partial = at::empty({rows}, weights[0].options());
  a.tensors = tensors.data();
  a.count = static_cast<int64_t>(count);
  a.squares = squares.mutable_data_ptr<float>();
  a.partial = partial.mutable_data_ptr<float>();
  run<Adam>(weights[0], a, &cpu::adam, DR_CUDA_BACKEND(adam));
  for (at::TensorList changed : {weights, first, second, averages, normalized}) {
    for (const Tensor& t : changed) t.unsafeGetTensorImpl()->bump_version();
  }
  return squares;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(diffratio, m) {
  m.def("normalize_weight(Tensor weight, ScalarType dtype) -> Tensor");
  m.def("normalize_weight_backward(Tensor gradient, Tensor weight) -> Tensor");
  m.def(
      "adam_step(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, Tensor[] steps, "
      "Tensor(d!)[] averages, Tensor(e!)[] normalized, int[] normalize, float rate, Tensor? rate_tensor, "
      "float[] average_weights, Tensor[] average_tensors, float beta1, float beta2, float eps, float decay, "
      "bool decoupled) -> Tensor");
}

#define DR_IMPLEMENT(m)                                            \
  m.impl("normalize_weight", &normalize_weight);                   \
  m.impl("normalize_weight_backward", &normalize_weight_backward); \
  m.impl("adam_step", &adam_step)

TORCH_LIBRARY_IMPL(diffratio, CPU, m) { DR_IMPLEMENT(m); }
#if defined(DR_PARAMETERS_CUDA)
TORCH_LIBRARY_IMPL(diffratio, CUDA, m) { DR_IMPLEMENT(m); }
#endif

}  // namespace diffratio
