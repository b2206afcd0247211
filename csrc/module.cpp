// The Python module diffratio_fast._C. Importing it registers the operations with torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "bindings.h"
#include "common/divergences.h"
#include "cpu/noise.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* compiler = "clang " __clang_version__;
#else
constexpr const char* compiler = "gcc " __VERSION__;
#endif

py::dict build_info() {
  py::dict info;
  int count;
  const diffratio::cpu::Level* levels = diffratio::cpu::levels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(levels[i].name);
  info["compiler"] = compiler;
  info["torch_version"] = DIFFRATIO_TORCH_VERSION;
  info["cuda_archs"] = py::str(DIFFRATIO_CUDA_ARCHS).attr("split")();
  info["cuda_version"] = *DIFFRATIO_CUDA_VERSION ? py::object(py::str(DIFFRATIO_CUDA_VERSION)) : py::none();
  info["simd_levels"] = names;
  info["simd_level"] = diffratio::simd_level();
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["interface"] = diffratio::interface_version;
  return info;
}

std::array<uint32_t, 4> philox(const std::string& name, std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  const char* error = nullptr;
  const diffratio::cpu::Level* level = diffratio::cpu::choose_level(name.c_str(), &error);
  if (!level) throw py::value_error(name + ": " + error);
  std::array<uint32_t, 4> out;
  level->philox(counter.data(), key.data(), out.data());
  return out;
}

// The numbers of ops.ratio_checks.Layout.
using Layout = std::array<int64_t, 9>;

diffratio::MixerSizes sizes_of(const Layout& l) { return {l[0], l[1], l[2], l[3], l[4], l[5], l[6], l[7], l[8] != 0}; }

py::dict plan_ratio(const std::string& operation, const std::string& device, const Layout& layout, int64_t samples,
                    int64_t parallel) {
  const diffratio::RatioPlan plan = diffratio::plan_ratio(operation, device, sizes_of(layout), samples, parallel);
  py::dict result;
  result["packed"] = plan.packed;
  result["workspace"] = plan.workspace;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  diffratio::simd_level();  // a wrong DIFFRATIO_SIMD then raises an import error
  m.def("build_info", &build_info);
  m.def("use_simd_level", [](const std::string& name) { diffratio::use_simd_level(name.c_str()); });
  m.def("philox", &philox, "Philox4x32-10 of one raw counter and key, on the named SIMD level");
  m.def("plan_ratio", &plan_ratio, "Bytes that a ratio operation allocates besides its arguments and results");
  m.attr("divergences") =
      std::vector<std::string>(diffratio::divergence_names, diffratio::divergence_names + diffratio::divergences);
#if defined(DIFFRATIO_WITH_CUDA)
  m.def("ratio_kernels_fit", [](const std::string& operation, const Layout& layout, int device) {
    return diffratio::ratio_kernels_fit(operation, sizes_of(layout), device);
  });
  m.def("use_ratio_loss_form", &diffratio::use_ratio_loss_form);
#endif
}
