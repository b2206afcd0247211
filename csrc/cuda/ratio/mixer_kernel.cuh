// The ratio operations, one sample at a time: noise, the network, its log ratio, and the backward pass to the image
// gradient or to the operands of the weight gradients (mixer_gradients.cuh computes the weight gradients).
//
// A thread block processes one sample at a time, a warp 16 or 32 of its tokens. The residual sum (forward) and its
// gradient (backward) stay in the warps' accumulators in fp32. `tile` has a bf16 copy, for other warps and as operand
// of the next product. A product over channels needs only the warp's own tokens. The product over tokens needs all of
// them, so there is a barrier before and after it. Weights are copied asynchronously, one chunk of hidden units at a
// time, one chunk ahead. The backward pass recomputes the hidden units from m.
//
// If the accumulators of all tokens would need more than half of the registers, they are split in two parts (`parts`
// 2). One part is saved in global memory; each stage of a layer processes one part, then the other.
#pragma once

#include "../../common/divergences.h"
#include "mixer_plan.h"
#include "mixer_sample.cuh"

namespace diffratio::cuda {

template <class S>
constexpr uint32_t mixer_shared_bytes(Pass pass, int tokens) {
  const uint32_t chunk = pass == Pass::forward ? S::forward_chunk : S::backward_chunk;
  const uint32_t checkpoint = pass == Pass::forward || S::parts > 1 ? 0 : tokens * S::width * 2;
  return tokens * S::stride * 2 + 2 * chunk + checkpoint + S::most_threads / 32 * 4;
}

template <class S, Pass pass>
class MixerBlock : MixerSample<S> {
  using Base = MixerSample<S>;
  using Base::c, Base::p, Base::e, Base::tile, Base::part;
  using Base::threads, Base::thread, Base::lane, Base::first, Base::own_row;
  static constexpr bool back = pass != Pass::forward, staged = pass == Pass::weights;
  static constexpr int stage_size = (back ? S::backward_chunk : S::forward_chunk) / 2;
  static constexpr int unrolled =
      staged && S::width * S::rows >= 4096 ? 1 : 2;  // larger values need too many registers
  struct alignas(8) Pair {
    uint32_t left, right;  // of columns 0 to 7 and 8 to 15
  };

 public:
  DR_DEVICE MixerBlock(const MixerCall& call, ptx::SharedArena& arena) : Base(call) {
    const auto activations = arena.take<BFloat16>(p.tokens * S::stride, "activations");
    tile = Activations<S>(activations);
    stages = arena.take<BFloat16>(2 * stage_size, "weights");
    sums = arena.take<float>(S::most_threads / 32, "sums");
    if constexpr (back && S::parts == 1) checkpoint = arena.take<BFloat16>(p.tokens * S::width, "m");
  }

  // One unit and draw, from the image to every result that is not null. `operands`: this unit's Staging, or the
  // checkpoints of this thread block.
  DR_DEVICE void run(int half, int sample, int draw, unsigned char* operands) {
    const int64_t level = static_cast<int64_t>(sample) * c.inputs.draws + draw;
    e = c.inputs.conditioning[half] + level * p.conditioning();
    prefetch_stage(0);  // overlaps with the noise
    this->load_patches(half, sample, draw, c.inputs.sigma[level]);
    ptx::block_sync();  // the patch vectors of all warps are in the tile

    Accumulator<S> h;
    DR_UNROLL_NOT
    for (part = 0;; ++part) {
      this->embed(h);
      if constexpr (staged) stage_patches(operands);
      ptx::warp_sync();  // before this warp's tokens replace their patch vectors
      if (part + 1 == S::parts) break;
      publish_rows(h, 0, operands);
      park(h);
    }
    for (int layer = 0; layer < p.depth; ++layer) forward(h, layer, operands);
    if (with_energy()) {  // reload the patch vectors: no warp needs the tile now
      ptx::block_sync();
      this->load_patches(half, sample, draw, c.inputs.sigma[level]);
      ptx::block_sync();
    }
    const float log_ratio = read_head(h);
    if (thread() == 0)
      ptx::store(c.results.log_ratio + static_cast<int64_t>(half) * c.inputs.batch * c.inputs.draws + level, log_ratio);
    if constexpr (back) {
      const float slope = by_log_ratio(half, sample, level, log_ratio);
      if constexpr (staged) {
        // h holds the last layer's output; the head's gradient is its product with the slope.
        for_each_part(h, [&](int) {
          this->scale(h, slope);
          stage_rows<S>(operands + c.staging.last, first(), h);
        });
      }
      if (with_energy() && c.results.image_gradient) {
        // a staged h is already multiplied by the slope
        const float scale = (staged ? 1.0f : slope) * energy_scale(p) * this->c_in(c.inputs.sigma[level]);
        for_each_part(h, [&](int) { this->write_image_gradient(h, p.energy_t, sample, scale, draw > 0); });
      }
      start_backward(h, slope);
      for (int layer = p.depth - 1; layer >= 0; --layer) backward(h, layer, operands);
      if constexpr (staged) finish_operands(h, half, level, operands);
      if (c.results.image_gradient) {
        const float scale = this->c_in(c.inputs.sigma[level]);
        const bool add = draw > 0 || with_energy();
        for_each_part(h, [&](int) { this->write_image_gradient(h, p.patch_t, sample, scale, add); });
      }
    }
    ptx::forget_shared();
    ptx::block_sync();  // before the next sample's patch vectors and weights
  }

 private:
  // --- parts ---------------------------------------------------------------------------------------------------

  // Calls visit(i) for each part in turn. The first is in the accumulators already.
  template <class Visit>
  DR_DEVICE void for_each_part(Accumulator<S>& d, Visit visit) {
    DR_UNROLL_NOT
    for (int i = 0;; ++i) {
      visit(i);
      if (i + 1 == S::parts) break;
      swap_parts(d);
    }
  }

  // Saves the part in the accumulators to global memory and loads the other part.
  DR_DEVICE void swap_parts(Accumulator<S>& d) {
    park(d);
    part ^= 1;
    const unsigned char* from = parked();
    DR_UNROLL
    for (int i = 0; i < S::tiles * S::columns; ++i) {
      const Vector16 x = ptx::load16(from + int64_t{16} * i * threads());
      DR_UNROLL
      for (int j = 0; j < 4; ++j) d[i / S::columns][i % S::columns][j] = Scalar::as_float(x.v[j]);
    }
  }

  // Copies the accumulators to global memory, for this thread only.
  DR_DEVICE void park(const Accumulator<S>& d) const {
    unsigned char* to = parked();
    DR_UNROLL
    for (int i = 0; i < S::tiles * S::columns; ++i) {
      Vector16 x;
      DR_UNROLL
      for (int j = 0; j < 4; ++j) x.v[j] = Scalar::as_bits(d[i / S::columns][i % S::columns][j]);
      ptx::store16(to + int64_t{16} * i * threads(), x);
    }
  }

  DR_DEVICE unsigned char* parked() const {
    const int64_t vectors = S::tiles * S::columns * threads();
    return c.workspace.parked + 16 * ((blockIdx.x * S::parts + part) * vectors + thread());
  }

  // --- weights -------------------------------------------------------------------------------------------------

  // Starts the copy of chunk `number` of the weights. Chunks are numbered in the order of use: forward from the first
  // layer on, then backward from the last; a layer's chunks once for each part.
  DR_DEVICE void prefetch_stage(int number, ptx::Site site = DR_HERE) {
    const int forward_steps = p.depth * S::parts * chunks();
    const bool backward = number >= forward_steps;
    const int bytes = backward ? S::backward_chunk : S::forward_chunk;
    const int step = number - forward_steps, in_layer = step % chunks(), layer = step / (S::parts * chunks());
    const int64_t chunk = backward        ? (p.depth - 1 - layer) * chunks() + in_layer
                          : S::parts == 1 ? number
                                          : number / (S::parts * chunks()) * chunks() + number % chunks();
    const unsigned char* from = c.packed + (backward ? p.backward : p.forward) + chunk * bytes;
    for (int i = thread() * 16; i < bytes; i += threads() * 16) {
      ptx::copy_async(stages.address(number % 2 * stage_size + i / 2), from + i, site);
    }
    ptx::copy_commit(site);
  }

  // Waits for chunk `number`, synchronizes the thread block and starts the copy of the next chunk.
  DR_DEVICE ptx::Shared<BFloat16> acquire_stage(int number, ptx::Site site = DR_HERE) {
    ptx::copy_wait<0>(site);
    ptx::block_sync(site);
    if (number + 1 < (back ? 2 : 1) * p.depth * S::parts * chunks()) prefetch_stage(number + 1, site);
    return stages.part(number % 2 * stage_size, stage_size);
  }

  // --- forward -------------------------------------------------------------------------------------------------

  // A layer, from its h; all parts of h but this one are in the tile.
  DR_DEVICE void forward(Accumulator<S>& h, int layer, unsigned char* operands) {
    publish_rows(h, layer, operands);
    ptx::block_sync();  // the tokens of all warps are in the tile
    for_each_part(h, [&](int) { add_mixed(h, layer); });
    for_each_part(h, [&](int i) {
      add_channels(h, layer, i, operands);
      if (i + 1 < S::parts && layer + 1 < p.depth) publish_rows(h, layer + 1, operands);
    });
  }

  // Publishes this warp's rows of a layer's h to the thread block.
  DR_DEVICE void publish_rows(const Accumulator<S>& h, int layer, unsigned char* operands) {
    store_rows<S>(tile, first(), h);
    if constexpr (staged) stage_rows<S>(operands + c.staging.h + layer * wide(), first(), h);
  }

  // m = h + mix h + mix_bias
  DR_DEVICE void add_mixed(Accumulator<S>& h, int layer) const {
    const float* bias = reinterpret_cast<const float*>(c.packed + p.mix_bias) + layer * p.tokens;
    DR_UNROLL
    for (int i = 0; i < S::tiles; ++i) {
      const float upper = bias[own_row() + i * 16], lower = bias[own_row() + i * 16 + 8];
      DR_UNROLL
      for (int n = 0; n < S::columns; ++n) {
        h[i][n][0] += upper, h[i][n][1] += upper;
        h[i][n][2] += lower, h[i][n][3] += lower;
      }
    }
    mix_tokens<S>(h, this->mix_rows(p.mix, layer), p.tokens / 16, tile);
  }

  // h = 0.7 (m + silu(m up^T + e) down^T), for part `i` in order.
  DR_DEVICE void add_channels(Accumulator<S>& h, int layer, int i, unsigned char* operands) {
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      const auto w = acquire_stage((layer * S::parts + i) * chunks() + chunk);
      if (chunk == 0) {  // all warps have read h
        store_rows<S>(tile, first(), h);
        if constexpr (back) {
          stage_rows<S>(operands + c.staging.m + layer * wide(), first(), h);
        }
        ptx::warp_sync();
      }
      Hidden<S> u;
      this->start_hidden(u, layer, chunk);
      DR_UNROLL
      for (int k = 0; k < S::width / 16; ++k) {
        uint32_t a[S::tiles][4];
        load_operand<S>(a, tile, first(), k);
        DR_UNROLL
        for (int j = 0; j < S::chunk / 16; ++j) {
          uint32_t b[4];
          load_piece(b, w, j * 2 * (S::width / 16) + k);
          multiply(u, 2 * j, a, b);
        }
      }
      Operand<S> a;
      DR_UNROLL
      for (int i = 0; i < S::tiles; ++i) {
        DR_UNROLL
        for (int n = 0; n < S::chunk / 8; ++n) {
          DR_UNROLL
          for (int j = 0; j < 4; ++j) u[i][n][j] *= sigmoid(u[i][n][j]);
        }
        DR_UNROLL
        for (int k = 0; k < S::chunk / 16; ++k) to_operand(a[i][k], u[i], k);
      }
      from_hidden<S>(h, a, w, 2, 1);
    }
    this->scale(h, mixer_residual);
    ptx::warp_sync();  // before this warp's tokens are replaced in the tile
  }

  DR_DEVICE bool with_energy() const { return S::may_have_energy && p.energy; }

  // The sum over (head + z energy^T / sqrt(N)) * h, the same in all threads.
  DR_DEVICE float read_head(Accumulator<S>& h) {
    float sum = 0;
    for_each_part(h, [&](int) {
      DR_UNROLL
      for (int i = 0; i < S::tiles; ++i) {
        DR_UNROLL
        for (int n = 0; n < S::columns; ++n) {
          const Vector16 w = this->accumulators(p.head, i, n);
          DR_UNROLL
          for (int j = 0; j < 4; ++j) sum = Scalar::fma(Scalar::as_float(w.v[j]), h[i][n][j], sum);
        }
      }
      if (with_energy()) sum = Scalar::fma(energy_scale(p), energy_of(h), sum);
    });
    sum = column_sum(quad_sum(sum));
    if (lane() == 0) sums.store(thread() / 32, sum);
    ptx::block_sync();
    float total = 0;
    for (int warp = 0; warp < threads() / 32; ++warp) total += sums.load(warp);
    return total;
  }

  // The sum over z energy^T * h, this lane's share.
  DR_DEVICE float energy_of(const Accumulator<S>& h) const {
    float sum = 0;
    this->for_energy_columns([&](int n, const float (&q)[S::tiles][2][4]) {
      DR_UNROLL
      for (int i = 0; i < S::tiles; ++i) {
        DR_UNROLL
        for (int j = 0; j < 8; ++j) sum = Scalar::fma(q[i][j / 4][j % 4], h[i][2 * n + j / 4][j % 4], sum);
      }
    });
    return sum;
  }

  // --- backward ------------------------------------------------------------------------------------------------

  DR_DEVICE float by_log_ratio(int half, int sample, int64_t level, float log_ratio) {
    switch (c.objective.kind) {
      case Objective::given: return c.objective.upstream[sample];
      case Objective::score: {
        const float factor = divergence_factor(c.objective.divergence, log_ratio);
        return -c.objective.upstream[level] * factor / static_cast<float>(c.inputs.draws);
      }
      default: {
        const float sign = half == 0 ? -1.0f : 1.0f;
        return sign / ((1.0f + exponential(-sign * log_ratio)) * static_cast<float>(c.inputs.batch));
      }
    }
  }

  // The gradient by the sum of the last layer, before its residual factor.
  DR_DEVICE void start_backward(Accumulator<S>& g, float slope) {
    DR_UNROLL_NOT
    for (int i = 0;; ++i) {
      this->load_accumulators(g, p.head);
      if (with_energy()) {
        const float scale = energy_scale(p);
        this->for_energy_columns([&](int n, const float (&q)[S::tiles][2][4]) {
          DR_UNROLL
          for (int i = 0; i < S::tiles; ++i) {
            DR_UNROLL
            for (int j = 0; j < 8; ++j) {
              float& to = g[i][2 * n + j / 4][j % 4];
              to = Scalar::fma(scale, q[i][j / 4][j % 4], to);
            }
          }
        });
      }
      this->scale(g, mixer_residual * slope);
      if (i + 1 == S::parts) break;
      park(g);
      part ^= 1;
    }
  }

  // From the gradient g by m + silu(u) down^T to that of the layer before.
  DR_DEVICE void backward(Accumulator<S>& g, int layer, unsigned char* operands) {
    for_each_part(g, [&](int i) { add_channels_backward(g, layer, i, operands); });
    if constexpr (S::parts == 2) {
      swap_parts(g);
      ptx::block_sync();  // all warps have read the checkpoints of m that these tokens replace
      store_rows<S>(tile, first(), g);
    }
    ptx::block_sync();  // the tokens of all warps are in the tile
    for_each_part(g, [&](int) {
      mix_tokens<S>(g, this->mix_rows(p.mix_t, layer), p.tokens / 16, tile);
      if (layer > 0) this->scale(g, mixer_residual);
    });
  }

  // gm = g + gu up, for part `i` in order.
  DR_DEVICE void add_channels_backward(Accumulator<S>& g, int layer, int i, unsigned char* operands) {
    const int64_t wide = int64_t{2} * p.tokens * S::width, hidden = int64_t{2} * p.tokens * p.hidden;
    if constexpr (S::parts == 1) load_checkpoint(operands + c.staging.m + layer * wide);
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      const auto w = acquire_stage(((2 * p.depth - 1 - layer) * S::parts + i) * chunks() + chunk);
      if (chunk == 0) {                 // all warps have read the tile
        if constexpr (S::parts == 2) {  // uses the rows of the other part, which are free now
          checkpoint = tile.rows((1 - part) * (p.tokens / 2), p.tokens / 2);
          load_checkpoint(operands + c.staging.m + layer * wide);
        }
        store_rows<S>(tile, first(), g);
        if constexpr (staged) stage_rows<S>(operands + c.staging.g + layer * wide, first(), g);
        ptx::warp_sync();
      }
      Hidden<S> ga = {}, u;
      this->start_hidden(u, layer, chunk);
      DR_UNROLL_TIMES(unrolled)
      for (int k = 0; k < S::width / 16; ++k) {
        uint32_t a[S::tiles][4], m[S::tiles][4], b[4];
        load_operand<S>(a, tile, first(), k);
        load_checkpointed(m, k);
        DR_UNROLL
        for (int j = 0; j < S::chunk / 16; ++j) {
          load_piece(b, w, j * 3 * (S::width / 16) + k);
          multiply(ga, 2 * j, a, b);
          load_piece(b, w, (j * 3 + 1) * (S::width / 16) + k);
          multiply(u, 2 * j, m, b);
        }
      }
      Operand<S> gu;
      DR_UNROLL
      for (int i = 0; i < S::tiles; ++i) {
        DR_UNROLL
        for (int n = 0; n < S::chunk / 8; ++n) {
          DR_UNROLL
          for (int j = 0; j < 4; ++j) {  // silu' = s + u s (1 - s)
            const float s = sigmoid(u[i][n][j]), silu = u[i][n][j] * s;
            ga[i][n][j] *= s + silu * (1.0f - s);
            u[i][n][j] = silu;
          }
        }
        DR_UNROLL
        for (int k = 0; k < S::chunk / 16; ++k) to_operand(gu[i][k], ga[i], k);
      }
      if constexpr (staged) {
        stage_hidden<S>(operands + c.staging.a + layer * hidden, first(), chunk * S::chunk, p.hidden, u);
        stage_hidden<S>(operands + c.staging.gu + layer * hidden, first(), chunk * S::chunk, p.hidden, ga);
        store_column_sums(columns_of_warp() + S::width + layer * p.hidden + chunk * S::chunk, ga);
      }
      from_hidden<S>(g, gu, w, 3, 2);
    }
    ptx::warp_sync();  // before this warp's tokens are replaced in the tile
    if (i + 1 == S::parts) store_rows<S>(tile, first(), g);
    if constexpr (staged) {
      stage_rows<S>(operands + c.staging.gm + layer * wide, first(), g);
      float* rows = reinterpret_cast<float*>(operands + c.staging.rows) + layer * p.tokens;
      DR_UNROLL
      for (int i = 0; i < S::tiles * 2; ++i) {
        float sum = 0;
        DR_UNROLL
        for (int n = 0; n < S::columns; ++n) sum += g[i / 2][n][i % 2 * 2] + g[i / 2][n][i % 2 * 2 + 1];
        sum = quad_sum(sum);
        if (lane() % 4 == 0) ptx::store(rows + own_row() + i * 8, sum);
      }
    }
  }

  // The operands that need the gradient by the first layer's input.
  DR_DEVICE void finish_operands(Accumulator<S>& g, int half, int64_t level, unsigned char* operands) {
    for_each_part(g, [&](int) {
      stage_rows<S>(operands + c.staging.first, first(), g);
      store_column_sums(columns_of_warp(), g);
    });
    ptx::block_sync();  // the sums of all warps
    const int size = S::width + p.depth * p.hidden, warps = p.tokens / S::rows,
              begin = static_cast<int>(blockIdx.x) * warps;
    float* out = c.results.conditioning_gradient[half] + level * p.conditioning();
    for (int i = thread(); i < p.conditioning(); i += threads()) {
      const int unit = i - p.real_width;
      const int column = unit < 0 ? i : S::width + unit / p.real_hidden * p.hidden + unit % p.real_hidden;
      float sum = 0;
      for (int warp = 0; warp < warps; ++warp) {
        sum += ptx::load(c.workspace.columns + static_cast<int64_t>(begin + warp) * size + column);
      }
      ptx::store(out + i, sum);
    }
  }

  // --- staging -------------------------------------------------------------------------------------------------

  // This warp's patch vectors, as they are.
  DR_DEVICE void stage_patches(unsigned char* operands) const {
    const int pieces = p.vector / 8;  // of a row, 16 bytes each
    for (int i = lane(); i < S::rows * pieces; i += 32) {
      const int row = first() + i / pieces, column = i % pieces * 8;
      ptx::store16(operands + c.staging.z + (static_cast<int64_t>(row) * p.vector + column) * 2,
                   tile.template load<Vector16>(row, column));
    }
  }

  DR_DEVICE float* columns_of_warp() const {
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (p.tokens / S::rows) + first() / S::rows;
    return c.workspace.columns + warp * (S::width + p.depth * p.hidden);
  }

  // Copies m of a layer, which this thread staged, to the thread's own part of shared memory.
  DR_DEVICE void load_checkpoint(const unsigned char* m) const {
    DR_UNROLL_TWICE
    for (int i = 0; i < S::tiles * 2; ++i) {
      const unsigned char* row = m + int64_t{2} * S::width * (own_row() + i * 8) + lane() % 4 * 16;
      DR_UNROLL
      for (int q = 0; q < S::width / 32; ++q) {
        const Vector16 x = ptx::load16(row + q * 64);
        checkpoint.store(slot(i, 2 * q), Pair{x.v[0], x.v[1]});
        checkpoint.store(slot(i, 2 * q + 1), Pair{x.v[2], x.v[3]});
      }
    }
  }

  // The operand a of columns 16 k ... of this warp's m.
  DR_DEVICE void load_checkpointed(uint32_t (&a)[S::tiles][4], int k) const {
    DR_UNROLL
    for (int i = 0; i < S::tiles; ++i) {
      DR_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Pair x = checkpoint.template load<Pair>(slot(2 * i + half, k));
        a[i][half] = x.left, a[i][half + 2] = x.right;
      }
    }
  }

  DR_DEVICE int slot(int i, int k) const { return ((i * (S::width / 16) + k) * threads() + thread()) * 4; }

  // Bytes of a layer in a staged [depth][tokens][width].
  DR_DEVICE int64_t wide() const { return int64_t{2} * p.tokens * S::width; }

  DR_DEVICE int chunks() const { return p.hidden / S::chunk; }

  ptx::Shared<BFloat16> stages, checkpoint;
  ptx::Shared<float> sums;
};

// Thread blocks process units (samples of a half) in turn.
template <class S, Pass pass>
DR_DEVICE void mixer_units(const MixerCall& c, MixerBlock<S, pass>& samples, int begin, int end) {
  for (int unit = begin + static_cast<int>(blockIdx.x); unit < end; unit += static_cast<int>(gridDim.x)) {
    unsigned char* operands = c.workspace.operands;
    if constexpr (pass == Pass::image) operands += blockIdx.x * checkpoint_bytes(c.packing);
    if constexpr (pass == Pass::weights) operands += (unit - begin) * c.staging.bytes;
    for (int draw = 0; draw < c.inputs.draws; ++draw)
      samples.run(unit / c.inputs.batch, unit % c.inputs.batch, draw, operands);
  }
}

template <class S, Pass pass>
__global__ void __launch_bounds__(S::most_threads, 1) mixer_kernel(const MixerCall c) {
  ptx::SharedArena arena;
  MixerBlock<S, pass> samples(c, arena);
  mixer_units<S, pass>(c, samples, c.first_unit, c.first_unit + c.units);
}

}  // namespace diffratio::cuda
