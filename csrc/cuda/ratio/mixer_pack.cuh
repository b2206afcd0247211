// Conversion of PyTorch weights to the packed weights of mixer_layout.h, once per optimizer step.
#pragma once

#include "../ptx.cuh"
#include "mixer_layout.h"

namespace diffratio::cuda {

constexpr int pack_threads = 256;

// Element (row, column) of matrix `layer` in a stack of [rows, columns], or of its transpose; zero beyond.
struct PackedMatrix {
  const void* data;
  int rows, columns;
  bool transposed;
};

DR_DEVICE float element(const PackCall& c, const PackedMatrix& m, int layer, int row, int column) {
  const int r = m.transposed ? column : row, k = m.transposed ? row : column;
  if (r >= m.rows || k >= m.columns) return 0.0f;
  const int64_t i = (static_cast<int64_t>(layer) * m.rows + r) * m.columns + k;
  return c.type == Type::float32 ? static_cast<const float*>(m.data)[i]
                                 : to_float(static_cast<const BFloat16*>(m.data)[i]);
}

// A lane's 16 bytes of the 16 x 16 piece of m that begins at (row, column), as operand a.
DR_DEVICE ptx::Vector16 as_a(const PackCall& c, const PackedMatrix& m, int layer, int row, int column, int lane) {
  ptx::Vector16 x;
  DR_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int r = row + lane / 4 + i % 2 * 8, k = column + lane % 4 * 2 + i / 2 * 8;
    x.v[i] = ptx::pack_bf16(element(c, m, layer, r, k), element(c, m, layer, r, k + 1));
  }
  return x;
}

// The same as operand b, of a product over m's rows.
DR_DEVICE ptx::Vector16 as_b(const PackCall& c, const PackedMatrix& m, int layer, int row, int column, int lane) {
  ptx::Vector16 x;
  DR_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int k = row + lane % 4 * 2 + i % 2 * 8, n = column + lane / 4 + i / 2 * 8;
    x.v[i] = ptx::pack_bf16(element(c, m, layer, k, n), element(c, m, layer, k + 1, n));
  }
  return x;
}

// Four numbers of a matrix in the order of accumulators.
DR_DEVICE ptx::Vector16 as_accumulators(const PackCall& c, const PackedMatrix& m, int row, int column, int lane) {
  ptx::Vector16 x;
  DR_UNROLL
  for (int i = 0; i < 4; ++i) {
    x.v[i] = Scalar::as_bits(element(c, m, 0, row + lane / 4 + i / 2 * 8, column + lane % 4 * 2 + i % 2));
  }
  return x;
}

// The 16 bytes at `at` of the packed weights.
DR_DEVICE ptx::Vector16 packed_at(const PackCall& c, int64_t at) {
  const Packing& p = c.packing;
  const int lane = static_cast<int>(at / 16 % 32), steps = p.tokens / 16, wide = p.width / 16;
  const int t = p.real_tokens, w = p.real_width, h = p.real_hidden;
  if (at < p.mix_bias) {  // position, head
    const bool is_head = at >= p.head;
    const int tile = static_cast<int>((at - (is_head ? p.head : p.position)) / piece_bytes);
    const PackedMatrix m{c.weight[is_head ? w_head : w_position], t, w, false};
    return as_accumulators(c, m, tile / (2 * wide) * 16, tile % (2 * wide) * 8, lane);
  }
  if (at < p.patch_w) {
    const PackedMatrix m{c.weight[w_mix_bias], p.depth, t, false};
    const int i = static_cast<int>((at - p.mix_bias) / 4);
    ptx::Vector16 x;
    DR_UNROLL
    for (int j = 0; j < 4; ++j) x.v[j] = Scalar::as_bits(element(c, m, 0, (i + j) / p.tokens, (i + j) % p.tokens));
    return x;
  }
  if (at < p.mix) {  // [C, P]
    const bool is_energy = at >= p.energy_w, transposed = at >= (is_energy ? p.energy_t : p.patch_t);
    const int64_t begin = is_energy ? (transposed ? p.energy_t : p.energy_w) : transposed ? p.patch_t : p.patch_w;
    const int piece = static_cast<int>((at - begin) / piece_bytes);
    const int columns = transposed ? p.vector / 16 : wide;
    const PackedMatrix m{c.weight[is_energy ? w_energy : w_patch], w, p.real_vector, !transposed};
    return as_b(c, m, 0, piece / columns * 16, piece % columns * 16, lane);
  }
  if (at < p.forward) {
    const bool transposed = at >= p.mix_t;
    const int64_t piece = (at - (transposed ? p.mix_t : p.mix)) / piece_bytes;
    const int layer = static_cast<int>(piece / (steps * steps)), inside = static_cast<int>(piece % (steps * steps));
    const PackedMatrix m{c.weight[w_mix], t, t, transposed};
    return as_a(c, m, layer, inside / steps * 16, inside % steps * 16, lane);
  }
  // For every 16 hidden units: up, down; or down_t, up, up_t. up [H, C] maps channels to hidden units.
  const bool backward = at >= p.backward;
  const int parts = backward ? 3 : 2;
  const int64_t piece = (at - (backward ? p.backward : p.forward)) / piece_bytes;
  const int column = static_cast<int>(piece % wide) * 16, part = static_cast<int>(piece / wide % parts);
  const int64_t group = piece / wide / parts;
  const int layer = static_cast<int>(group / (p.hidden / 16)), hidden = static_cast<int>(group % (p.hidden / 16)) * 16;
  if (layer >= p.depth) return {};
  const bool from_channels = backward ? part < 2 : part == 0;  // products over channels, else over hidden units
  const bool is_up = backward ? part > 0 : part == 0;
  const PackedMatrix m{c.weight[is_up ? w_up : w_down], is_up ? h : w, is_up ? w : h, is_up == from_channels};
  return from_channels ? as_b(c, m, layer, column, hidden, lane) : as_b(c, m, layer, hidden, column, lane);
}

static __global__ void __launch_bounds__(pack_threads) pack_kernel(const PackCall c) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * pack_threads * 16;
  for (int64_t at = (static_cast<int64_t>(blockIdx.x) * pack_threads + threadIdx.x) * 16; at < c.packing.bytes;
       at += step) {
    ptx::store16(c.packed + at, packed_at(c, at));
  }
}

}  // namespace diffratio::cuda
