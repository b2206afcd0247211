// The noise operations for torch: schemas, memory-safety checks, allocation, dispatch to a backend.
// diffratio_fast/ops/noise_checks.py checks the same arguments first and has the messages for users.
#include "bindings.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/philox.h"
#include "cpu/noise.h"
#if defined(DIFFRATIO_WITH_CUDA)
#include <c10/core/impl/VirtualGuardImpl.h>

#include "cuda/launch.h"
#endif

namespace diffratio {
namespace {

std::atomic<const cpu::Level*> level_in_use{nullptr};

const cpu::Level& level() {
  const cpu::Level* level = level_in_use.load(std::memory_order_acquire);
  if (!level) {
    use_simd_level(std::getenv("DIFFRATIO_SIMD"));
    level = level_in_use.load(std::memory_order_acquire);
  }
  return *level;
}

Type type_of(at::ScalarType t) {
  switch (t) {
    case at::kFloat: return Type::float32;
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    case at::kDouble: return Type::float64;
    default: TORCH_CHECK_TYPE(false, "images must be float32, bfloat16, float16 or float64, got ", t);
  }
}

void check_stream(const at::Tensor& rng, const at::Tensor& index, int64_t purpose, int64_t substep, int64_t draw) {
  TORCH_CHECK_VALUE(rng.scalar_type() == at::kLong && rng.dim() == 1 && rng.size(0) == 2, "rng must be int64 [2]");
  TORCH_CHECK_VALUE(index.scalar_type() == at::kLong && index.dim() == 1, "index must be int64 [N]");
  TORCH_CHECK_VALUE(index.device() == rng.device(), "index and rng must be on one device");
  TORCH_CHECK_VALUE(purpose >= 0 && purpose < 256, "purpose must be 0 to 255");
  TORCH_CHECK_VALUE(substep >= 0 && substep < 256, "substep must be 0 to 255");
  TORCH_CHECK_VALUE(draw >= 0 && draw < 65536, "draw must be 0 to 65535");
}

void check_size(int64_t n) { TORCH_CHECK_VALUE(n >= 0 && n <= int64_t{1} << 34, "at most 2^34 values per sample"); }

// Runs the CPU or CUDA implementation, by the device of `on`.
template <class Arguments>
void run([[maybe_unused]] const at::Tensor& on, const Arguments& a,
         void (*on_cpu)(const cpu::Level&, const Arguments&, cpu::ParallelFor),
#if defined(DIFFRATIO_WITH_CUDA)
         cudaError_t (*on_cuda)(const Arguments&, cudaStream_t)) {
  if (on.is_cuda()) {
    // Get the stream without libc10_cuda: one build then works with a CPU and a CUDA build of torch.
    const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    auto* stream = static_cast<cudaStream_t>(guard.getStreamNativeHandle(guard.getStream(on.device())));
    const cudaError_t error = on_cuda(a, stream);
    TORCH_CHECK(error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
    return;
  }
#else
         std::nullptr_t) {
#endif
  on_cpu(level(), a, &parallel_for);
}

#if defined(DIFFRATIO_WITH_CUDA)
#define DR_ON_CUDA(f) (&cuda::f)
#else
#define DR_ON_CUDA(f) nullptr
#endif

at::Tensor random_words(const at::Tensor& rng_, const at::Tensor& index_, int64_t purpose, c10::SymInt count_,
                        int64_t substep, int64_t draw) {
  check_stream(rng_, index_, purpose, substep, draw);
  const int64_t count = count_.guard_int(__FILE__, __LINE__);
  check_size(count);
  const c10::OptionalDeviceGuard guard(rng_.device());
  const at::Tensor rng = rng_.contiguous(), index = index_.contiguous();
  at::Tensor out = at::empty({index.size(0), count}, index.options());
  Words a{};
  a.rng = rng.const_data_ptr<int64_t>();
  a.index = index.const_data_ptr<int64_t>();
  a.batch = index.size(0);
  a.count = count;
  a.stream = stream_word(purpose, substep, draw);
  a.out = out.mutable_data_ptr<int64_t>();
  run<Words>(rng, a, &cpu::random_words, DR_ON_CUDA(random_words));
  return out;
}

at::Tensor normal(const at::Tensor& rng_, const at::Tensor& index_, c10::SymIntArrayRef shape_, int64_t purpose,
                  int64_t substep, int64_t draw) {
  check_stream(rng_, index_, purpose, substep, draw);
  const c10::OptionalDeviceGuard guard(rng_.device());
  const at::Tensor rng = rng_.contiguous(), index = index_.contiguous();
  std::vector<int64_t> shape{index.size(0)};
  int64_t size = 1;
  for (const c10::SymInt& n : shape_) {
    shape.push_back(n.guard_int(__FILE__, __LINE__));
    check_size(shape.back());
    size *= shape.back();
    check_size(size);
  }
  at::Tensor out = at::empty(shape, index.options().dtype(at::kFloat));
  AddNoise a{};
  a.rng = rng.const_data_ptr<int64_t>();
  a.index = index.const_data_ptr<int64_t>();
  a.batch = index.size(0);
  a.size = size;
  a.inputs = 1;
  a.streams[0] = stream_word(purpose, substep, draw);
  a.out = out.mutable_data_ptr<float>();
  run<AddNoise>(rng, a, &cpu::add_noise, DR_ON_CUDA(add_noise));
  return out;
}

template <class T>
bool has_nan(const at::Tensor& t) {
  const T* p = t.const_data_ptr<T>();
  for (int64_t i = 0; i < t.numel(); ++i) {
    if (std::isnan(p[i])) return true;
  }
  return false;
}

at::Tensor add_noise(at::TensorList x0, const at::Tensor& sigma_, const at::Tensor& rng_, const at::Tensor& index_,
                     at::IntArrayRef purposes, int64_t substep, int64_t draw, const std::optional<at::Tensor>& scale_,
                     at::ScalarType dtype) {
  const int64_t inputs = static_cast<int64_t>(x0.size());
  TORCH_CHECK_VALUE(inputs >= 1 && inputs <= max_inputs, "1 to ", max_inputs, " inputs, got ", inputs);
  TORCH_CHECK_VALUE(static_cast<int64_t>(purposes.size()) == inputs, "one purpose per input");
  for (int64_t purpose : purposes) check_stream(rng_, index_, purpose, substep, draw);
  const at::Tensor& first = x0[0];
  TORCH_CHECK_VALUE(first.dim() >= 1, "inputs must be [B, ...]");
  const int64_t batch = first.size(0);
  const at::ScalarType compute = first.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto check_column = [&](const char* name, const at::Tensor& t) {
    TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) == batch, name, " must have one value per sample");
    TORCH_CHECK_VALUE(t.device() == first.device(), name, " must be on the device of x0");
    TORCH_CHECK_TYPE(t.scalar_type() == compute, name, " must be ", compute);
  };
  check_column("sigma", sigma_);
  if (scale_) check_column("scale", *scale_);
  TORCH_CHECK_VALUE(index_.size(0) == batch, "index must have one entry per sample");
  TORCH_CHECK_VALUE(index_.device() == first.device(), "index must be on the device of x0");
  for (const at::Tensor& x : x0) {
    TORCH_CHECK_VALUE(
        x.sizes() == first.sizes() && x.scalar_type() == first.scalar_type() && x.device() == first.device(),
        "inputs must have one shape, dtype and device");
  }
  TORCH_CHECK_TYPE((compute == at::kDouble) == (dtype == at::kDouble), "float64 inputs give float64, others do not");

  const c10::OptionalDeviceGuard guard(first.device());
  const at::Tensor rng = rng_.contiguous(), index = index_.contiguous(), sigma = sigma_.contiguous();
  const at::Tensor scale = scale_ ? scale_->contiguous() : at::Tensor();
  AddNoise a{};
  a.rng = rng.const_data_ptr<int64_t>();
  a.index = index.const_data_ptr<int64_t>();
  a.batch = batch;
  a.size = 1;
  std::vector<int64_t> shape = first.sizes().vec();
  for (size_t i = 1; i < shape.size(); ++i) a.size *= shape[i];
  check_size(a.size);
  a.inputs = static_cast<int>(inputs);
  std::vector<at::Tensor> held;  // contiguous copies, until the launch
  for (int64_t i = 0; i < inputs; ++i) {
    held.push_back(x0[i].contiguous());
    a.x0[i] = held.back().const_data_ptr();
    a.streams[i] = stream_word(purposes[i], substep, draw);
  }
  a.sigma = sigma.const_data_ptr();
  a.scale = scale.defined() ? scale.const_data_ptr() : nullptr;
  a.in_type = type_of(first.scalar_type());
  a.out_type = type_of(dtype);
  shape[0] *= inputs;
  at::Tensor out = at::empty(shape, first.options().dtype(dtype));
  a.out = out.mutable_data_ptr();
  if (out.numel() == 0) return out;  // a null pointer of an empty input would mean "normals only"
  if (first.is_cpu()) {
    TORCH_CHECK_VALUE(!(compute == at::kDouble ? has_nan<double>(sigma) : has_nan<float>(sigma)), "sigma contains NaN");
  }
  run<AddNoise>(first, a, &cpu::add_noise, DR_ON_CUDA(add_noise));
  return out;
}

}  // namespace

const cpu::Level& cpu_level() { return level(); }

const char* simd_level() { return level().name; }

void parallel_for(int64_t count, int64_t grain, cpu::Body body, const void* context) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

void use_simd_level(const char* name) {
  const char* error = nullptr;
  const cpu::Level* level = cpu::choose_level(name, &error);
  if (!level) throw std::runtime_error(std::string("DIFFRATIO_SIMD: no level '") + name + "': " + error);
  level_in_use.store(level, std::memory_order_release);
}

TORCH_LIBRARY(diffratio, m) {
  m.def("random_words(Tensor rng, Tensor index, int purpose, SymInt count, int substep, int draw) -> Tensor");
  m.def("normal(Tensor rng, Tensor index, SymInt[] shape, int purpose, int substep, int draw) -> Tensor");
  m.def(
      "add_noise(Tensor[] x0, Tensor sigma, Tensor rng, Tensor index, int[] purposes, int substep, int draw, "
      "Tensor? scale, ScalarType dtype) -> Tensor");
}

#define DR_IMPLEMENT(m)                  \
  m.impl("random_words", &random_words); \
  m.impl("normal", &normal);             \
  m.impl("add_noise", &add_noise)

TORCH_LIBRARY_IMPL(diffratio, CPU, m) { DR_IMPLEMENT(m); }
#if defined(DIFFRATIO_WITH_CUDA)
TORCH_LIBRARY_IMPL(diffratio, CUDA, m) { DR_IMPLEMENT(m); }
#endif

}  // namespace diffratio
