// Weight gradients from the staged operands: products over all tokens of many samples. One thread block computes each
// tile of the results and sums it in a fixed order. The gradients are deterministic and need no atomics.
#pragma once

#include "../../common/divergences.h"
#include "mixer_kernel.cuh"

namespace diffratio::cuda {

// Sums over k of x y. Either [k][m] and [k][n] in memory (k: tokens), or [m][k] and [n][k] (k: channels).
struct Product {
  int64_t x, y;  // offsets of the operands in a unit's Staging
  int m, n, k;
  int x_stride, y_stride;  // elements from row to row
  bool by_rows;            // [m][k] and [n][k]
  int64_t out;             // offset in Sums of [m][n]
};

DR_DEVICE int products_of(const MixerCall& c) { return 1 + 3 * c.packing.depth + (c.packing.energy ? 1 : 0); }

// patch, for every layer mix, up and down, then energy.
DR_DEVICE Product product_of(const MixerCall& c, int number) {
  const Packing& p = c.packing;
  const Sums sums = sums_of(p);
  if (number == 0)
    return {c.staging.first, c.staging.z, p.width, p.vector, p.tokens, p.width, p.vector, false, sums.patch};
  if (number == products_of(c) - 1 && p.energy) {
    return {c.staging.last, c.staging.z, p.width, p.vector, p.tokens, p.width, p.vector, false, sums.energy};
  }
  const int layer = (number - 1) / 3;
  const int64_t wide = int64_t{2} * p.tokens * p.width * layer, hidden = int64_t{2} * p.tokens * p.hidden * layer;
  const int64_t weight = static_cast<int64_t>(p.hidden) * p.width * layer;
  switch ((number - 1) % 3) {
    case 0:
      return {c.staging.gm + wide,
              c.staging.h + wide,
              p.tokens,
              p.tokens,
              p.width,
              p.width,
              p.width,
              true,
              sums.mix + static_cast<int64_t>(p.tokens) * p.tokens * layer};
    case 1:
      return {c.staging.gu + hidden, c.staging.m + wide, p.hidden, p.width, p.tokens, p.hidden, p.width, false,
              sums.up + weight};
    default:
      return {c.staging.g + wide, c.staging.a + hidden, p.width, p.hidden, p.tokens, p.width, p.hidden, false,
              sums.down + weight};
  }
}

constexpr int product_depth = 32;  // of k at a time
// Elements of an operand's stage, in either layout, rows padded against bank conflicts.
constexpr int product_stage = product_rows * (product_depth + 8);
static_assert(product_depth * (product_rows + 8) <= product_stage);
constexpr uint32_t product_shared_bytes = 2 * 2 * product_stage * 2;

// The part of one thread block in the sums over the staged units.
class GradientBlock {
 public:
  DR_DEVICE GradientBlock(const MixerCall& call, const GradientCall& gradients, ptx::SharedArena& arena)
      : c(call), g(gradients) {
    x = arena.take<BFloat16>(2 * product_stage, "x");
    y = arena.take<BFloat16>(2 * product_stage, "y");
    const int warps = static_cast<int>(blockDim.x) / 32;
    down = warps >= 8 ? 4 : warps >= 2 ? 2 : 1;  // warps of the tile, 32 x 32 each; any others only copy
    right = warps >= 4 ? 2 : 1;
  }

  // `units` of them; `first_slice`: the sums are written, not added to.
  DR_DEVICE void run(int units, bool first_slice) {
    int job = 0;  // over products, splits and tiles, distributed over thread blocks
    for (int number = 0; number < products_of(c); ++number) {
      const Product product = product_of(c, number);
      const int rows = (product.m + 32 * down - 1) / (32 * down), columns = (product.n + 32 * right - 1) / (32 * right);
      for (int i = 0; i < rows * columns * g.splits; ++i, ++job) {
        if (job % gridDim.x != blockIdx.x) continue;
        const int tile = i / g.splits;
        multiply_tile(product, tile / columns * 32 * down, tile % columns * 32 * right, i % g.splits, units,
                      first_slice);
      }
    }
    add_vectors(units, first_slice);
  }

 private:
  // The operand's k from `k` on, `width` rows or columns of it from `first` on, zeros beyond.
  DR_DEVICE void fetch(const ptx::Shared<BFloat16>& to, const unsigned char* from, int stride, int first, int count,
                       int width, int k, int depth, bool by_rows, ptx::Site site = DR_HERE) const {
    const int inner = by_rows ? product_depth : width, padded = inner + 8;  // of a row in shared memory
    const int pieces = (by_rows ? width : product_depth) * inner / 8;
    for (int i = static_cast<int>(threadIdx.x); i < pieces; i += static_cast<int>(blockDim.x)) {
      const int row = i / (inner / 8), column = i % (inner / 8) * 8;
      const int m = first + (by_rows ? row : column), l = k + (by_rows ? column : row);
      const bool there = m < count && l < depth;  // counts are multiples of 8
      const int64_t offset =
          there ? (by_rows ? static_cast<int64_t>(m) * stride + l : static_cast<int64_t>(l) * stride + m) : 0;
      ptx::copy_async(to.address(row * padded + column), from + offset * 2, there ? 16 : 0, site);
    }
  }

  DR_DEVICE void multiply_tile(const Product& p, int row, int column, int split, int units, bool first_slice) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const bool works = warp < down * right;
    const int my_row = warp / right * 32, my_column = warp % right * 32;
    const int begin = units * split / g.splits, end = units * (split + 1) / g.splits;
    const int steps = (p.k + product_depth - 1) / product_depth, total = (end - begin) * steps;
    const auto fetch_step = [&](int step, ptx::Site site) {
      const unsigned char* unit = c.workspace.operands + (begin + step / steps) * c.staging.bytes;
      const int k = step % steps * product_depth, stage = step % 2 * product_stage;
      fetch(x.part(stage, product_stage), unit + p.x, p.x_stride, row, p.m, 32 * down, k, p.k, p.by_rows, site);
      fetch(y.part(stage, product_stage), unit + p.y, p.y_stride, column, p.n, 32 * right, k, p.k, p.by_rows, site);
      ptx::copy_commit(site);
    };

    float d[2][4][4] = {};
    if (total > 0) fetch_step(0, DR_HERE);
    for (int step = 0; step < total; ++step) {
      ptx::copy_wait<0>();
      ptx::block_sync();  // all copies of this step are complete, and the other stage is free
      if (step + 1 < total) fetch_step(step + 1, DR_HERE);
      if (!works) continue;
      const auto xs = x.part(step % 2 * product_stage, product_stage),
                 ys = y.part(step % 2 * product_stage, product_stage);
      DR_UNROLL
      for (int k = 0; k < product_depth; k += 16) {
        uint32_t a[2][4], b[4];
        DR_UNROLL
        for (int i = 0; i < 2; ++i) load_x(a[i], xs, my_row + i * 16, k, p.by_rows, lane);
        DR_UNROLL
        for (int n = 0; n < 2; ++n) {
          load_y(b, ys, my_column + n * 16, k, p.by_rows, lane);
          multiply(d, 2 * n, a, b);
        }
      }
    }
    if (works) add(p, row + my_row, column + my_column, split, first_slice, d);
    ptx::forget_shared();
    ptx::block_sync();  // before the next tile's first copies
  }

  // Operand a of rows `m` ..., and b of columns `n` ..., from `k` on, in either layout.
  DR_DEVICE void load_x(uint32_t (&a)[4], const ptx::Shared<BFloat16>& from, int m, int k, bool by_rows,
                        int lane) const {
    if (by_rows) {
      const auto at = fragment::a_row(lane);
      ptx::ldmatrix_x4(a, from.address((m + at.row) * (product_depth + 8) + k + at.column));
    } else {
      const auto at = fragment::b_row(lane);
      ptx::ldmatrix_x4_trans(a, from.address((k + at.row) * (32 * down + 8) + m + at.column));
    }
  }
  DR_DEVICE void load_y(uint32_t (&b)[4], const ptx::Shared<BFloat16>& from, int n, int k, bool by_rows,
                        int lane) const {
    if (by_rows) {
      const auto at = fragment::b_row(lane);
      ptx::ldmatrix_x4(b, from.address((n + at.row) * (product_depth + 8) + k + at.column));
    } else {
      const auto at = fragment::a_row(lane);
      ptx::ldmatrix_x4_trans(b, from.address((k + at.row) * (32 * right + 8) + n + at.column));
    }
  }

  DR_DEVICE void add(const Product& p, int row, int column, int split, bool first_slice,
                     const float (&d)[2][4][4]) const {
    float* out = g.sums + split * sums_of(c.packing).floats + p.out;
    const auto mine = fragment::accumulator(static_cast<int>(threadIdx.x) % 32);
    DR_UNROLL
    for (int i = 0; i < 2; ++i) {
      DR_UNROLL
      for (int n = 0; n < 4; ++n) {
        DR_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int r = row + i * 16 + mine.row + j / 2 * 8, k = column + n * 8 + mine.column + j % 2;
          if (r < p.m && k < p.n) add_to(out + static_cast<int64_t>(r) * p.n + k, d[i][n][j], first_slice);
        }
      }
    }
  }

  // The same thread in every slice.
  static DR_DEVICE void add_to(float* sum, float value, bool first_slice) {
    ptx::store(sum, first_slice ? value : ptx::load(sum) + value);
  }

  // Sums over units that are not products: position, head and mix_bias.
  DR_DEVICE void add_vectors(int units, bool first_slice) const {
    const Packing& p = c.packing;
    const Sums sums = sums_of(p);
    const int wide = p.tokens * p.width / 8, rows = p.depth * p.tokens;
    const int first = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x),
              step = static_cast<int>(gridDim.x * blockDim.x);
    for (int i = first; i < 2 * wide; i += step) {
      const unsigned char* from = c.workspace.operands + (i < wide ? c.staging.first : c.staging.last) + i % wide * 16;
      float sum[8] = {};
      for (int unit = 0; unit < units; ++unit) {
        const ptx::Vector16 x = ptx::load16<ptx::Cache::l2>(from + unit * c.staging.bytes);
        DR_UNROLL
        for (int j = 0; j < 4; ++j) sum[2 * j] += ptx::low_bf16(x.v[j]), sum[2 * j + 1] += ptx::high_bf16(x.v[j]);
      }
      float* out = g.sums + (i < wide ? sums.position : sums.head) + i % wide * 8;
      DR_UNROLL
      for (int j = 0; j < 8; ++j) add_to(out + j, sum[j], first_slice);
    }
    for (int i = first; i < rows / 4; i += step) {
      float sum[4] = {};
      for (int unit = 0; unit < units; ++unit) {
        const ptx::Vector16 x =
            ptx::load16<ptx::Cache::l2>(c.workspace.operands + unit * c.staging.bytes + c.staging.rows + i * 16);
        DR_UNROLL
        for (int j = 0; j < 4; ++j) sum[j] += Scalar::as_float(x.v[j]);
      }
      DR_UNROLL
      for (int j = 0; j < 4; ++j) add_to(g.sums + sums.mix_bias + i * 4 + j, sum[j], first_slice);
    }
  }

  const MixerCall& c;
  const GradientCall& g;
  ptx::Shared<BFloat16> x, y;
  int down, right;
};

// --- results -------------------------------------------------------------------------------------------------------

// The index in Sums of element (row, column) of matrix `layer` of a weight. Rows and columns that are channels, and
// hidden units, were staged in the order of `permuted`.
DR_DEVICE int64_t place_in_sums(const Packing& p, const Sums& s, int weight, int layer, int row, int column) {
  const int group = chunk_of(p.width, rows_of_warp(p.real_tokens));
  switch (weight) {
    case w_patch: return s.patch + static_cast<int64_t>(permuted(row, 32)) * p.vector + column;
    case w_energy: return s.energy + static_cast<int64_t>(permuted(row, 32)) * p.vector + column;
    case w_position: return s.position + static_cast<int64_t>(row) * p.width + permuted(column, 32);
    case w_mix: return s.mix + (static_cast<int64_t>(layer) * p.tokens + row) * p.tokens + column;
    case w_mix_bias: return s.mix_bias + static_cast<int64_t>(row) * p.tokens + column;
    case w_up:
      return s.up + (static_cast<int64_t>(layer) * p.hidden + permuted(row, group)) * p.width + permuted(column, 32);
    case w_down:
      return s.down + (static_cast<int64_t>(layer) * p.width + permuted(row, 32)) * p.hidden + permuted(column, group);
    default: return s.head + static_cast<int64_t>(row) * p.width + permuted(column, 32);
  }
}

// Gradients in the shapes and type of the weights.
DR_DEVICE void write_gradients(const MixerCall& c, const GradientCall& g) {
  const Packing& p = c.packing;
  const Sums sums = sums_of(p);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  DR_UNROLL
  for (int weight = 0; weight < weights; ++weight) {
    if (weight == w_energy && !p.energy) break;
    const bool over_patches = weight == w_patch || weight == w_energy;
    const bool product = over_patches || weight == w_mix || weight == w_up || weight == w_down;
    const int layers = weight == w_mix || weight == w_up || weight == w_down ? p.depth : 1;
    const int rows = over_patches || weight == w_down ? p.real_width
                     : weight == w_mix_bias           ? p.depth
                     : weight == w_up                 ? p.real_hidden
                                                      : p.real_tokens;
    const int columns = over_patches                              ? p.real_vector
                        : weight == w_mix || weight == w_mix_bias ? p.real_tokens
                        : weight == w_down                        ? p.real_hidden
                                                                  : p.real_width;
    for (int64_t i = first; i < static_cast<int64_t>(layers) * rows * columns; i += step) {
      const int column = static_cast<int>(i % columns), row = static_cast<int>(i / columns % rows);
      const int layer = static_cast<int>(i / columns / rows);
      const float* from = g.sums + place_in_sums(p, sums, weight, layer, row, column);
      float sum = ptx::load(from);
      for (int split = 1; product && split < g.splits; ++split) sum += ptx::load(from + split * sums.floats);
      if (weight == w_energy) sum *= energy_scale(p);
      if (g.out_type == Type::float32)
        static_cast<float*>(g.out[weight])[i] = sum;
      else
        static_cast<BFloat16*>(g.out[weight])[i] = from_float<BFloat16>(sum);
    }
  }
}

// mean softplus(-l) of half 0 plus mean softplus(l) of half 1, by the first warp of the first block.
DR_DEVICE void write_loss(const MixerCall& c, float* loss) {
  if (blockIdx.x != 0 || threadIdx.x >= 32) return;
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * c.inputs.batch; i += 32) {
    const float l = ptx::load(c.results.log_ratio + i), x = i < c.inputs.batch ? -l : l;
    sum += (x > 0 ? x : 0.0f) + log_one_plus(exponential(x > 0 ? -x : x));
  }
  sum = column_sum(quad_sum(sum)) / static_cast<float>(c.inputs.batch);
  if (threadIdx.x == 0) *loss = sum;
}

// --- kernels -------------------------------------------------------------------------------------------------------

constexpr int gradient_threads = 256;

static __global__ void __launch_bounds__(gradient_threads) gradient_kernel(const MixerCall c, const GradientCall g) {
  ptx::SharedArena arena;
  GradientBlock products(c, g, arena);
  products.run(c.units, g.first_slice);
}

static __global__ void __launch_bounds__(gradient_threads) finish_kernel(const MixerCall c, const GradientCall g) {
  write_gradients(c, g);
  if (g.loss) write_loss(c, g.loss);
}

// The complete operation in one cooperative launch: slices of `slice` units, one after the other. `arrived`: zero.
template <class S>
__global__ void __launch_bounds__(S::most_threads, 1)
    ratio_loss_kernel(const MixerCall c, const GradientCall g, int slice, uint32_t* arrived) {
  ptx::SharedArena arena;
  MixerBlock<S, Pass::weights> samples(c, arena);
  GradientBlock products(c, g, arena);
  for (int begin = 0; begin < c.units; begin += slice) {
    const int units = c.units - begin < slice ? c.units - begin : slice;
    mixer_units<S, Pass::weights>(c, samples, begin, begin + units);
    ptx::grid_sync(arrived);  // operands of all thread blocks
    products.run(units, begin == 0);
    ptx::grid_sync(arrived);  // sums of all thread blocks; the operands may be overwritten
  }
  write_gradients(c, g);
  if (g.loss) write_loss(c, g.loss);
}

}  // namespace diffratio::cuda
