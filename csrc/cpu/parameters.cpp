// The CPU backend of the parameter operations: distribution of work to threads. Arithmetic: parameters_level.cpp.
#include "parameters.h"

#include <cmath>
#include <cstring>

namespace diffratio::cpu {

extern const ParametersLevel parameters_portable;
#if defined(DR_HAVE_X86)
extern const ParametersLevel parameters_avx2;
extern const ParametersLevel parameters_avx512;
#endif

namespace {

constexpr int64_t grain = 16384;  // minimum elements per thread

const ParametersLevel& kernels(const Level& level) {
#if defined(DR_HAVE_X86)
  if (std::strcmp(level.name, "avx512") == 0) return parameters_avx512;
  if (std::strcmp(level.name, "avx2") == 0) return parameters_avx2;
#else
  (void)level;
#endif
  return parameters_portable;
}

}  // namespace

void normalize_weight(const Level& level, const NormalizeWeight& a, ParallelFor parallel_for) {
  if (a.rows == 0 || a.length == 0) return;
  parallel_for(a.rows, (grain + a.length - 1) / a.length, kernels(level).normalize_weight, &a);
}

void adam(const Level& level, const Adam& a, ParallelFor parallel_for) {
  const AdamSettings& s = a.settings;
  float* partial = a.partial;
  for (int64_t i = 0; i < a.count; ++i) {
    AdamRows r{};
    r.settings = s;
    r.tensor = a.tensors[i];
    r.partial = partial;
    const double step = *r.tensor.step;
    r.rate = s.rate.get();
    r.step_size = static_cast<float>(r.rate / (1 - std::pow(static_cast<double>(s.beta1), step)));
    r.correction = static_cast<float>(1 / std::sqrt(1 - std::pow(static_cast<double>(s.beta2), step)));
    for (int k = 0; k < s.averages; ++k) r.average_weight[k] = s.average_weight[k].get();
    if (r.tensor.rows && r.tensor.length) {
      parallel_for(r.tensor.rows, (grain + r.tensor.length - 1) / r.tensor.length, kernels(level).adam, &r);
    }
    double sum = 0;
    for (int64_t row = 0; row < r.tensor.rows; ++row) sum += partial[row];
    a.squares[i] = static_cast<float>(sum);
    partial += r.tensor.rows;
  }
}

}  // namespace diffratio::cpu
