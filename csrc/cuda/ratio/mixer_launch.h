// Launch parameters of the ratio operations: shapes, grids, slices, workspace. The Launcher is a template argument, so
// that tests run this code without a GPU:
//   int resident(kernel, int threads, uint32_t shared)    blocks of it that can run at once on the device
//   cudaError_t launch(Launch, kernel, arguments...)
#pragma once

#include "mixer_gradients.cuh"
#include "mixer_plan.h"

namespace diffratio::cuda {

struct Launch {
  const char* name;
  int blocks, threads;
  uint32_t shared;
  bool cooperative;
};

// Widths whose samples may come in parts.
template <int width>
constexpr bool may_have_parts = width > 128;

// Calls visit(Shape) for the width and the tokens of a network.
template <int width, class Visit>
auto visit_rows(const Packing& p, Visit visit) {
  if constexpr (may_have_parts<width>) {
    if (p.parts == 2) return visit(Shape<width, 16, 2>());
  }
  if constexpr (width < 256) {
    if (rows_of_warp(p) == 32) return visit(Shape<width, 32>());
  }
  return visit(Shape<width, 16>());
}

template <class S>
uint32_t shared_bytes(const Packing& p, Pass pass, bool one_launch) {
  return mixer_shared_bytes<S>(pass, p.tokens) + (one_launch ? product_shared_bytes : 0);
}

// Shared memory of a thread block on sm_80 and sm_90, and the amount that the largest networks need.
constexpr uint32_t shared_limit_80 = 163 * 1024, shared_limit_90 = 227 * 1024;
static_assert(mixer_shared_bytes<Shape<64, 32>>(Pass::weights, 256) + product_shared_bytes <= shared_limit_80);
static_assert(mixer_shared_bytes<Shape<128, 32>>(Pass::weights, 256) <= shared_limit_80);
static_assert(mixer_shared_bytes<Shape<128, 32>>(Pass::weights, 256) + product_shared_bytes <= shared_limit_90);
static_assert(mixer_shared_bytes<Shape<256, 16>>(Pass::weights, 64) <= shared_limit_80);
static_assert(mixer_shared_bytes<Shape<256, 16>>(Pass::weights, 128) <= shared_limit_90);
static_assert(mixer_shared_bytes<Shape<256, 16, 2>>(Pass::weights, 256) <= shared_limit_90);

// One cooperative launch is faster if its blocks have the four warps of a product tile. With a larger product of
// channels and rows its registers spill.
template <class S>
constexpr bool may_be_one_launch = S::width * S::rows < 4096 && S::parts == 1;

template <int width, class Launcher>
MixerPlan plan_mixer(const MixerCall& c, Pass pass, int64_t workspace_limit, Form form, const Launcher& launcher) {
  return visit_rows<width>(c.packing, [&](auto shape) {
    using S = decltype(shape);
    const Packing& p = c.packing;
    MixerPlan plan{};
    plan.threads = p.tokens / (S::rows * S::parts) * 32;
    const int units = c.inputs.halves * c.inputs.batch;
    int resident = 0;
    if (pass == Pass::weights) {
      if constexpr (may_be_one_launch<S>) {
        if (form != Form::several && (form == Form::one_launch || plan.threads >= 128)) {
          plan.shared = shared_bytes<S>(p, pass, true);
          resident = launcher.resident(&ratio_loss_kernel<S>, plan.threads, plan.shared);
          plan.one_launch = resident > 0;
        }
      }
      if (!plan.one_launch) {
        plan.shared = shared_bytes<S>(p, pass, false);
        resident = launcher.resident(&mixer_kernel<S, Pass::weights>, plan.threads, plan.shared);
      }
    } else {
      plan.shared = shared_bytes<S>(p, pass, false);
      resident = pass == Pass::forward ? launcher.resident(&mixer_kernel<S, Pass::forward>, plan.threads, plan.shared)
                                       : launcher.resident(&mixer_kernel<S, Pass::image>, plan.threads, plan.shared);
    }
    plan.blocks = resident < units || plan.one_launch ? resident : units;  // 0: it does not fit the device

    if (pass == Pass::weights) {
      plan.product_blocks =
          plan.one_launch ? plan.blocks : launcher.resident(&gradient_kernel, gradient_threads, product_shared_bytes);
    }
    plan_workspace(plan, p, pass, units, workspace_limit);
    return plan;
  });
}

// Launches the plan. `workspace`: plan.bytes, of which the counters are zero.
template <int width, class Launcher>
auto run_mixer(MixerCall c, GradientCall g, Pass pass, const MixerPlan& plan, unsigned char* workspace,
               Launcher& launcher) {
  return visit_rows<width>(c.packing, [&](auto shape) {
    using S = decltype(shape);
    const int units = c.inputs.halves * c.inputs.batch;
    auto* counters = reinterpret_cast<uint32_t*>(workspace + plan.counters);
    c.workspace.operands = workspace + plan.operands;
    c.workspace.parked = workspace + plan.parked;
    c.workspace.columns = reinterpret_cast<float*>(workspace + plan.columns);
    c.first_unit = 0;
    c.units = units;
    const Launch samples{"mixer", plan.blocks, plan.threads, plan.shared, plan.one_launch};
    if (pass == Pass::forward) return launcher.launch(samples, &mixer_kernel<S, Pass::forward>, c);
    if (pass == Pass::image) return launcher.launch(samples, &mixer_kernel<S, Pass::image>, c);
    g.sums = reinterpret_cast<float*>(workspace + plan.sums);
    g.splits = plan.splits;
    if constexpr (may_be_one_launch<S>) {
      if (plan.one_launch) return launcher.launch(samples, &ratio_loss_kernel<S>, c, g, plan.slice, counters);
    }
    const Launch products{"gradient", plan.product_blocks, gradient_threads, product_shared_bytes, false};
    auto error = decltype(launcher.launch(products, &finish_kernel, c, g))();
    for (int first = 0; first < units && !error; first += plan.slice) {
      c.first_unit = first;
      c.units = units - first < plan.slice ? units - first : plan.slice;
      g.first_slice = first == 0;
      error = launcher.launch(samples, &mixer_kernel<S, Pass::weights>, c);
      if (!error) error = launcher.launch(products, &gradient_kernel, c, g);
    }
    return error ? error
                 : launcher.launch({"finish", plan.product_blocks, gradient_threads, 0, false}, &finish_kernel, c, g);
  });
}

}  // namespace diffratio::cuda
