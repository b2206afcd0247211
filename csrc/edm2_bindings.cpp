// The EDM2 operations for torch: schemas, memory-safety checks, allocation, dispatch.
// diffratio_fast/ops/edm2.py checks the same arguments first, with longer messages.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "common/philox.h"
#include "cpu/edm2.h"
#if defined(DIFFRATIO_WITH_CUDA) && __has_include("cuda/edm2/launch.h")
#define DR_EDM2_CUDA
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/edm2/launch.h"
#endif

namespace diffratio {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// Runs a launcher of the CPU or CUDA backend, by the device of the tensor.
template <class Arguments>
void run(const Tensor& on, const Arguments& a,
         void (*cpu_launch)(const cpu::Level&, const Arguments&, cpu::ParallelFor),
#if defined(DR_EDM2_CUDA)
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

#if defined(DR_EDM2_CUDA)
#define DR_CUDA_BACKEND(f) (&cuda::f)
#else
#define DR_CUDA_BACKEND(f) nullptr
#endif

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::float32;
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    default: TORCH_CHECK_TYPE(false, "tensors must be float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

bool is_channels_last(const Tensor& x) {
  return x.dim() == 4 && !x.is_contiguous() && x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// x in one of the two layouts.
Tensor dense(const Tensor& x) { return is_channels_last(x) ? x : x.contiguous(); }

// x in the layout of `like`, of the same shape, type and device.
Tensor dense_as(const char* name, const Tensor& x, const Tensor& like) {
  TORCH_CHECK_VALUE(x.sizes() == like.sizes(), name, " must be ", like.sizes(), ", got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(), ", got ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(x.device() == like.device(), name, " must be on ", like.device());
  return is_channels_last(like) ? x.contiguous(at::MemoryFormat::ChannelsLast) : x.contiguous();
}

Optional dense_as(const char* name, const Optional& x, const Tensor& like) {
  return x ? Optional(dense_as(name, *x, like)) : Optional();
}

const void* pointer(const Optional& x) { return x ? x->const_data_ptr() : nullptr; }

void check_image(const Tensor& x) { TORCH_CHECK_VALUE(x.dim() == 4, "images must be [N, C, H, W], got ", x.sizes()); }

// Each of an image's vectors over channels, as [outer][channels][inner].
PixelNorm norm_of(const Tensor& x) {
  PixelNorm a{};
  a.type = type_of(x);
  const int64_t pixels = x.size(2) * x.size(3);
  const bool last = is_channels_last(x);
  a.outer = last ? x.size(0) * pixels : x.size(0);
  a.channels = x.size(1);
  a.inner = last ? 1 : pixels;
  TORCH_CHECK_VALUE(a.channels <= cpu::max_norm_channels, "at most ", cpu::max_norm_channels, " channels, got ",
                    a.channels);
  a.x = x.const_data_ptr();
  return a;
}

std::tuple<Tensor, Tensor> pixel_norm_silu(const Tensor& x_) {
  check_image(x_);
  const c10::OptionalDeviceGuard guard(x_.device());
  const Tensor x = dense(x_);
  Tensor normalized = at::empty_like(x), activated = at::empty_like(x);
  if (x.numel() == 0) return {normalized, activated};
  PixelNorm a = norm_of(x);
  a.normalized = normalized.mutable_data_ptr();
  a.activated = activated.mutable_data_ptr();
  run<PixelNorm>(x, a, &cpu::pixel_norm, DR_CUDA_BACKEND(pixel_norm));
  return {normalized, activated};
}

Tensor pixel_norm_silu_backward(const Tensor& x_, const Optional& by_normalized_, const Optional& by_activated_) {
  check_image(x_);
  const c10::OptionalDeviceGuard guard(x_.device());
  const Tensor x = dense(x_);
  const Optional by_normalized = dense_as("by_normalized", by_normalized_, x);
  const Optional by_activated = dense_as("by_activated", by_activated_, x);
  Tensor by_x = at::empty_like(x);
  if (x.numel() == 0) return by_x;
  PixelNorm a = norm_of(x);
  a.by_normalized = pointer(by_normalized);
  a.by_activated = pointer(by_activated);
  a.by_x = by_x.mutable_data_ptr();
  run<PixelNorm>(x, a, &cpu::pixel_norm, DR_CUDA_BACKEND(pixel_norm));
  return by_x;
}

// Shared arguments of forward and backward of scale_silu, with the tensors that own the memory.
struct Scaled {
  Tensor x, condition, rng, index;
  ScaleSilu a{};

  Scaled(const Tensor& x_, const Tensor& condition_, const Optional& rng_, const Optional& index_, double dropout,
         int64_t purpose, int64_t substep, int64_t layer) {
    check_image(x_);
    x = dense(x_);
    TORCH_CHECK_VALUE(condition_.dim() == 2 && condition_.size(0) == x.size(0) && condition_.size(1) == x.size(1),
                      "condition must be [N, C] = [", x.size(0), ", ", x.size(1), "], got ", condition_.sizes());
    TORCH_CHECK_TYPE(condition_.scalar_type() == x.scalar_type(), "condition must be ", x.scalar_type());
    TORCH_CHECK_VALUE(condition_.device() == x.device(), "condition must be on ", x.device());
    TORCH_CHECK_VALUE(x.size(1) <= cpu::max_scale_channels, "at most ", cpu::max_scale_channels, " channels, got ",
                      x.size(1));
    condition = condition_.contiguous();
    a.type = type_of(x);
    a.batch = x.size(0);
    a.channels = x.size(1);
    a.pixels = x.size(2) * x.size(3);
    a.channels_last = is_channels_last(x);
    a.x = x.const_data_ptr();
    a.condition = condition.const_data_ptr();
    TORCH_CHECK_VALUE(dropout >= 0 && dropout < 1, "dropout must be at least 0 and below 1, got ", dropout);
    if (dropout == 0) return;
    TORCH_CHECK_VALUE(rng_ && index_, "dropout needs rng and index");
    TORCH_CHECK_VALUE(
        rng_->scalar_type() == at::kLong && rng_->sizes() == at::IntArrayRef({2}) && rng_->device() == x.device(),
        "rng must be int64 [2] on ", x.device());
    TORCH_CHECK_VALUE(index_->scalar_type() == at::kLong && index_->sizes() == at::IntArrayRef({a.batch}) &&
                          index_->device() == x.device(),
                      "index must be int64 [N] on ", x.device());
    TORCH_CHECK_VALUE(purpose >= 0 && purpose < 256 && substep >= 0 && substep < 256 && layer >= 0 && layer < 65536,
                      "purpose and substep must be 0 to 255, layer 0 to 65535");
    TORCH_CHECK_VALUE(a.channels * a.pixels <= int64_t{1} << 34, "at most 2^34 values per sample");
    rng = rng_->contiguous();
    index = index_->contiguous();
    a.mask.rng = rng.const_data_ptr<int64_t>();
    a.mask.index = index.const_data_ptr<int64_t>();
    a.mask.stream = stream_word(purpose, substep, layer);
    a.mask.least = static_cast<uint32_t>(std::nearbyint(dropout * 65536.0));
    a.mask.gain = static_cast<float>(1.0 / (1.0 - dropout));
  }
};

Tensor scale_silu(const Tensor& x_, const Tensor& condition, const Optional& rng, const Optional& index, double dropout,
                  int64_t purpose, int64_t substep, int64_t layer) {
  const c10::OptionalDeviceGuard guard(x_.device());
  Scaled s(x_, condition, rng, index, dropout, purpose, substep, layer);
  Tensor out = at::empty_like(s.x);
  s.a.out = out.mutable_data_ptr();
  if (out.numel()) run<ScaleSilu>(s.x, s.a, &cpu::scale_silu, DR_CUDA_BACKEND(scale_silu));
  return out;
}

std::tuple<Tensor, Tensor> scale_silu_backward(const Tensor& by_out_, const Tensor& x_, const Tensor& condition,
                                               const Optional& rng, const Optional& index, double dropout,
                                               int64_t purpose, int64_t substep, int64_t layer) {
  const c10::OptionalDeviceGuard guard(x_.device());
  Scaled s(x_, condition, rng, index, dropout, purpose, substep, layer);
  const Tensor by_out = dense_as("gradient", by_out_, s.x);
  Tensor by_x = at::empty_like(s.x), by_condition = at::empty_like(s.condition);
  if (s.x.numel() == 0) return {by_x, by_condition.zero_()};
  Tensor partial = at::empty({s.a.batch, s.a.chunks(), s.a.channels}, s.x.options().dtype(at::kFloat));
  s.a.by_out = by_out.const_data_ptr();
  s.a.by_x = by_x.mutable_data_ptr();
  s.a.by_condition = by_condition.mutable_data_ptr();
  s.a.partial = partial.mutable_data_ptr<float>();
  run<ScaleSilu>(s.x, s.a, &cpu::scale_silu, DR_CUDA_BACKEND(scale_silu));
  return {by_x, by_condition};
}

SumClamp sum_of(const Tensor& like, double t, double clip) {
  TORCH_CHECK_VALUE(t >= 0 && t <= 1, "t must be between 0 and 1, got ", t);
  TORCH_CHECK_VALUE(clip > 0, "clip must be positive, got ", clip);
  SumClamp a{};
  a.type = type_of(like);
  a.count = like.numel();
  const double size = std::sqrt((1 - t) * (1 - t) + t * t);
  a.weight_a = static_cast<float>((1 - t) / size);
  a.weight_b = static_cast<float>(t / size);
  a.clip = static_cast<float>(clip);
  return a;
}

int64_t mask_bytes(const Tensor& x, double clip) { return std::isinf(clip) ? 0 : (x.numel() + 7) / 8; }

std::tuple<Tensor, Tensor, Tensor> sum_clamp(const Tensor& a_, const Tensor& b_, double t, double clip, bool silu) {
  const c10::OptionalDeviceGuard guard(a_.device());
  const Tensor a = dense(a_), b = dense_as("b", b_, a);
  SumClamp s = sum_of(a, t, clip);
  Tensor out = at::empty_like(a), activated = silu ? at::empty_like(a) : at::empty({0}, a.options());
  Tensor passes = at::empty({mask_bytes(a, clip)}, a.options().dtype(at::kByte));
  s.a = a.const_data_ptr();
  s.b = b.const_data_ptr();
  s.out = out.mutable_data_ptr();
  s.activated = silu ? activated.mutable_data_ptr() : nullptr;
  s.passes = passes.numel() ? passes.mutable_data_ptr<uint8_t>() : nullptr;
  if (s.count) run<SumClamp>(a, s, &cpu::sum_clamp, DR_CUDA_BACKEND(sum_clamp));
  return {out, activated, passes};
}

std::tuple<Tensor, Tensor> sum_clamp_backward(const Optional& by_out_, const Optional& by_activated_,
                                              const Optional& out_, const Tensor& passes_, double t, double clip,
                                              bool channels_last) {
  TORCH_CHECK_VALUE(by_out_ || by_activated_, "a gradient is missing");
  TORCH_CHECK_VALUE(!by_activated_ || out_, "out is missing");
  // The bits are in the memory order of the forward result.
  const Tensor& given = out_ ? *out_ : *by_out_;
  TORCH_CHECK_VALUE(!channels_last || given.dim() == 4, "channels_last tensors are images");
  const Tensor like = given.contiguous(channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const c10::OptionalDeviceGuard guard(like.device());
  const Optional by_out = dense_as("by_out", by_out_, like),
                 by_activated = dense_as("by_activated", by_activated_, like);
  SumClamp s = sum_of(like, t, clip);
  TORCH_CHECK_VALUE(passes_.scalar_type() == at::kByte && passes_.device() == like.device() &&
                        passes_.sizes() == at::IntArrayRef({mask_bytes(like, clip)}),
                    "passes must be uint8 [", mask_bytes(like, clip), "] on ", like.device());
  const Tensor passes = passes_.contiguous();
  Tensor by_a = at::empty_like(like), by_b = at::empty_like(like);
  s.out = const_cast<void*>(like.const_data_ptr());
  s.passes = passes.numel() ? const_cast<uint8_t*>(passes.const_data_ptr<uint8_t>()) : nullptr;
  s.by_out = pointer(by_out);
  s.by_activated = pointer(by_activated);
  s.by_a = by_a.mutable_data_ptr();
  s.by_b = by_b.mutable_data_ptr();
  if (s.count) run<SumClamp>(like, s, &cpu::sum_clamp, DR_CUDA_BACKEND(sum_clamp));
  return {by_a, by_b};
}

Tensor mp_silu(const Tensor& x_) {
  const c10::OptionalDeviceGuard guard(x_.device());
  const Tensor x = dense(x_);
  Tensor activated = at::empty_like(x);
  SumClamp s = sum_of(x, 0, INFINITY);
  s.a = x.const_data_ptr();
  s.activated = activated.mutable_data_ptr();
  if (s.count) run<SumClamp>(x, s, &cpu::sum_clamp, DR_CUDA_BACKEND(sum_clamp));
  return activated;
}

Tensor mp_silu_backward(const Tensor& gradient_, const Tensor& x_) {
  const c10::OptionalDeviceGuard guard(x_.device());
  const Tensor x = dense(x_), gradient = dense_as("gradient", gradient_, x);
  Tensor by_x = at::empty_like(x);
  SumClamp s = sum_of(x, 0, INFINITY);
  s.out = const_cast<void*>(x.const_data_ptr());
  s.by_activated = gradient.const_data_ptr();
  s.by_a = by_x.mutable_data_ptr();
  if (s.count) run<SumClamp>(x, s, &cpu::sum_clamp, DR_CUDA_BACKEND(sum_clamp));
  return by_x;
}

// Joining `first` channels with the rest of `out`'s.
CatSilu cat_of(const Tensor& out, int64_t first, double t) {
  TORCH_CHECK_VALUE(t >= 0 && t <= 1, "t must be between 0 and 1, got ", t);
  const int64_t second = out.size(1) - first, pixels = out.size(2) * out.size(3);
  TORCH_CHECK_VALUE(first > 0 && second > 0, "both tensors must have channels");
  CatSilu s{};
  s.type = type_of(out);
  const bool last = is_channels_last(out);
  s.rows = last ? out.size(0) * pixels : out.size(0);
  s.first = last ? first : first * pixels;
  s.second = last ? second : second * pixels;
  const double width = std::sqrt(static_cast<double>(first + second) / ((1 - t) * (1 - t) + t * t));
  s.scale_a = static_cast<float>(width * (1 - t) / std::sqrt(static_cast<double>(first)));
  s.scale_b = static_cast<float>(width * t / std::sqrt(static_cast<double>(second)));
  return s;
}

std::tuple<Tensor, Tensor> cat_silu(const Tensor& a_, const Tensor& b_, double t) {
  check_image(a_);
  check_image(b_);
  TORCH_CHECK_VALUE(a_.size(0) == b_.size(0) && a_.size(2) == b_.size(2) && a_.size(3) == b_.size(3),
                    "tensors must agree but for channels, got ", a_.sizes(), " and ", b_.sizes());
  TORCH_CHECK_TYPE(a_.scalar_type() == b_.scalar_type(), "tensors must have one dtype");
  TORCH_CHECK_VALUE(a_.device() == b_.device(), "tensors must be on one device");
  const c10::OptionalDeviceGuard guard(a_.device());
  const bool last = is_channels_last(a_) || is_channels_last(b_);
  const auto format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor a = a_.contiguous(format), b = b_.contiguous(format);
  Tensor out = at::empty({a.size(0), a.size(1) + b.size(1), a.size(2), a.size(3)}, a.options().memory_format(format));
  Tensor activated = at::empty_like(out);
  CatSilu s = cat_of(out, a.size(1), t);
  s.a = a.const_data_ptr();
  s.b = b.const_data_ptr();
  s.out = out.mutable_data_ptr();
  s.activated = activated.mutable_data_ptr();
  if (out.numel()) run<CatSilu>(out, s, &cpu::cat_silu, DR_CUDA_BACKEND(cat_silu));
  return {out, activated};
}

std::tuple<Tensor, Tensor> cat_silu_backward(const Tensor& out_, const Optional& by_out_, const Optional& by_activated_,
                                             int64_t first, double t) {
  check_image(out_);
  const c10::OptionalDeviceGuard guard(out_.device());
  const Tensor out = dense(out_);
  const Optional by_out = dense_as("by_out", by_out_, out), by_activated = dense_as("by_activated", by_activated_, out);
  CatSilu s = cat_of(out, first, t);
  const auto format = is_channels_last(out) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const auto side = [&](int64_t channels) {
    return at::empty({out.size(0), channels, out.size(2), out.size(3)}, out.options().memory_format(format));
  };
  Tensor by_a = side(first), by_b = side(out.size(1) - first);
  s.out = const_cast<void*>(out.const_data_ptr());
  s.by_out = pointer(by_out);
  s.by_activated = pointer(by_activated);
  s.by_a = by_a.mutable_data_ptr();
  s.by_b = by_b.mutable_data_ptr();
  if (out.numel()) run<CatSilu>(out, s, &cpu::cat_silu, DR_CUDA_BACKEND(cat_silu));
  return {by_a, by_b};
}

OnesChannel ones_of(const Tensor& narrow, const Tensor& scale) {
  TORCH_CHECK_VALUE(scale.scalar_type() == at::kFloat && scale.device() == narrow.device() && scale.is_contiguous() &&
                        scale.sizes() == at::IntArrayRef({narrow.size(0)}),
                    "scale must be float32 [N] on ", narrow.device());
  OnesChannel a{};
  a.batch = narrow.size(0);
  a.channels = narrow.size(1);
  a.pixels = narrow.size(2) * narrow.size(3);
  a.scale = scale.const_data_ptr<float>();
  return a;
}

Tensor ones_channel(const Tensor& x_, const Tensor& scale_, at::ScalarType dtype) {
  check_image(x_);
  const c10::OptionalDeviceGuard guard(x_.device());
  const Tensor x = dense(x_), scale = scale_.contiguous();
  OnesChannel a = ones_of(x, scale);
  a.channels_last = is_channels_last(x);
  const auto format = a.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  Tensor out =
      at::empty({x.size(0), x.size(1) + 1, x.size(2), x.size(3)}, x.options().dtype(dtype).memory_format(format));
  a.type = type_of(x);
  a.out_type = type_of(out);
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  if (out.numel()) run<OnesChannel>(x, a, &cpu::ones_channel, DR_CUDA_BACKEND(ones_channel));
  return out;
}

Tensor ones_channel_backward(const Tensor& by_out_, const Tensor& scale_, at::ScalarType dtype) {
  check_image(by_out_);
  TORCH_CHECK_VALUE(by_out_.size(1) > 0, "the gradient must have a channel of ones");
  const c10::OptionalDeviceGuard guard(by_out_.device());
  const Tensor by_out = dense(by_out_), scale = scale_.contiguous();
  const bool last = is_channels_last(by_out);
  const auto format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  Tensor by_x = at::empty({by_out.size(0), by_out.size(1) - 1, by_out.size(2), by_out.size(3)},
                          by_out.options().dtype(dtype).memory_format(format));
  OnesChannel a = ones_of(by_x, scale);
  a.channels_last = last;
  a.type = type_of(by_out);
  a.out_type = type_of(by_x);
  a.by_out = by_out.const_data_ptr();
  a.by_x = by_x.mutable_data_ptr();
  if (by_x.numel()) run<OnesChannel>(by_x, a, &cpu::ones_channel, DR_CUDA_BACKEND(ones_channel));
  return by_x;
}

QkvNorm qkv_of(const Tensor& qkv) {
  TORCH_CHECK_VALUE(qkv.dim() == 5 && qkv.size(2) == 3, "qkv must be [N, tokens, 3, heads, size], got ", qkv.sizes());
  QkvNorm a{};
  a.type = type_of(qkv);
  a.batch = qkv.size(0);
  a.tokens = qkv.size(1);
  a.heads = qkv.size(3);
  a.size = qkv.size(4);
  a.qkv = qkv.const_data_ptr();
  return a;
}

std::tuple<Tensor, Tensor, Tensor> qkv_norm(const Tensor& qkv_) {
  const c10::OptionalDeviceGuard guard(qkv_.device());
  const Tensor qkv = qkv_.contiguous();
  QkvNorm a = qkv_of(qkv);
  std::array<Tensor, 3> out;
  for (int role = 0; role < 3; ++role) {
    out[role] = at::empty({a.batch, a.heads, a.tokens, a.size}, qkv.options());
    a.out[role] = out[role].mutable_data_ptr();
  }
  if (qkv.numel()) run<QkvNorm>(qkv, a, &cpu::qkv_norm, DR_CUDA_BACKEND(qkv_norm));
  return {out[0], out[1], out[2]};
}

Tensor qkv_norm_backward(const Tensor& qkv_, const Tensor& by_query, const Tensor& by_key, const Tensor& by_value) {
  const c10::OptionalDeviceGuard guard(qkv_.device());
  const Tensor qkv = qkv_.contiguous();
  QkvNorm a = qkv_of(qkv);
  std::array<Tensor, 3> held = {by_query, by_key, by_value};
  for (int role = 0; role < 3; ++role) {
    Tensor& g = held[role];
    TORCH_CHECK_VALUE(g.sizes() == at::IntArrayRef({a.batch, a.heads, a.tokens, a.size}) && g.device() == qkv.device(),
                      "a gradient must be [N, heads, tokens, size] on ", qkv.device(), ", got ", g.sizes());
    TORCH_CHECK_TYPE(g.scalar_type() == qkv.scalar_type(), "a gradient must be ", qkv.scalar_type());
    if (g.stride(3) != 1) g = g.contiguous();
    a.by_out[role] = g.const_data_ptr();
    for (int i = 0; i < 3; ++i) a.stride[role][i] = g.stride(i);
  }
  Tensor by_qkv = at::empty_like(qkv);
  a.by_qkv = by_qkv.mutable_data_ptr();
  if (qkv.numel()) run<QkvNorm>(qkv, a, &cpu::qkv_norm, DR_CUDA_BACKEND(qkv_norm));
  return by_qkv;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(diffratio, m) {
  m.def("pixel_norm_silu(Tensor x) -> (Tensor, Tensor)");
  m.def("pixel_norm_silu_backward(Tensor x, Tensor? by_normalized, Tensor? by_activated) -> Tensor");
  m.def(
      "scale_silu(Tensor x, Tensor condition, Tensor? rng, Tensor? index, float dropout, int purpose, int substep, "
      "int layer) -> Tensor");
  m.def(
      "scale_silu_backward(Tensor gradient, Tensor x, Tensor condition, Tensor? rng, Tensor? index, float dropout, "
      "int purpose, int substep, int layer) -> (Tensor, Tensor)");
  m.def("sum_clamp(Tensor a, Tensor b, float t, float clip, bool silu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sum_clamp_backward(Tensor? by_out, Tensor? by_activated, Tensor? out, Tensor passes, float t, float clip, "
      "bool channels_last) -> "
      "(Tensor, Tensor)");
  m.def("mp_silu(Tensor x) -> Tensor");
  m.def("mp_silu_backward(Tensor gradient, Tensor x) -> Tensor");
  m.def("cat_silu(Tensor a, Tensor b, float t) -> (Tensor, Tensor)");
  m.def("cat_silu_backward(Tensor out, Tensor? by_out, Tensor? by_activated, int first, float t) -> (Tensor, Tensor)");
  m.def("ones_channel(Tensor x, Tensor scale, ScalarType dtype) -> Tensor");
  m.def("ones_channel_backward(Tensor gradient, Tensor scale, ScalarType dtype) -> Tensor");
  m.def("qkv_norm(Tensor qkv) -> (Tensor, Tensor, Tensor)");
  m.def("qkv_norm_backward(Tensor qkv, Tensor by_query, Tensor by_key, Tensor by_value) -> Tensor");
}

#define DR_IMPLEMENT(m)                                          \
  m.impl("pixel_norm_silu", &pixel_norm_silu);                   \
  m.impl("pixel_norm_silu_backward", &pixel_norm_silu_backward); \
  m.impl("scale_silu", &scale_silu);                             \
  m.impl("scale_silu_backward", &scale_silu_backward);           \
  m.impl("sum_clamp", &sum_clamp);                               \
  m.impl("sum_clamp_backward", &sum_clamp_backward);             \
  m.impl("mp_silu", &mp_silu);                                   \
  m.impl("mp_silu_backward", &mp_silu_backward);                 \
  m.impl("cat_silu", &cat_silu);                                 \
  m.impl("cat_silu_backward", &cat_silu_backward);               \
  m.impl("ones_channel", &ones_channel);                         \
  m.impl("ones_channel_backward", &ones_channel_backward);       \
  m.impl("qkv_norm", &qkv_norm);                                 \
  m.impl("qkv_norm_backward", &qkv_norm_backward)

TORCH_LIBRARY_IMPL(diffratio, CPU, m) { DR_IMPLEMENT(m); }
#if defined(DR_EDM2_CUDA)
TORCH_LIBRARY_IMPL(diffratio, CUDA, m) { DR_IMPLEMENT(m); }
#endif

}  // namespace diffratio
