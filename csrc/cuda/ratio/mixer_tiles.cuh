// Operations of a warp on its tokens: products in bf16 with fp32 accumulators, and copies of accumulators.
//
// A warp has `rows` tokens (one or two tiles of 16). Its accumulators of [rows, n] are float[rows / 16][n / 8][4] in
// the order of mma.m16n8k16. As bf16, two neighboring 16 x 8 tiles are the operand a of 16 more columns, so an
// activation stays in registers from one product to the next.
#pragma once

#include "../fragment.cuh"
#include "../ptx.cuh"
#include "mixer_layout.h"

namespace diffratio::cuda {

using ptx::Vector16;

template <int width_, int rows_, int parts_ = 1>
struct Shape {
  static constexpr int width = width_, rows = rows_;  // of a warp's residual sum
  static constexpr int parts = parts_;  // in which a thread block processes the tokens, one after the other
  static constexpr int chunk = chunk_of(width_, rows_);         // hidden units at a time
  static constexpr int tiles = rows / 16, columns = width / 8;  // of a warp's accumulators
  static constexpr int stride = width + 8;                      // of activations in shared memory: no bank conflicts
  static constexpr bool may_have_energy = may_have_energy_head(width);
  static constexpr int most_threads = 256;
  // Bytes of the weights of one chunk.
  static constexpr int forward_chunk = chunk * width * 2 * 2, backward_chunk = chunk * width * 2 * 3;
};

template <class S>
using Accumulator = float[S::tiles][S::columns][4];
template <class S>
using Hidden = float[S::tiles][S::chunk / 8][4];
template <class S>
using Operand = uint32_t[S::tiles][S::chunk / 16][4];  // a chunk of hidden units as operand a
template <class S>
using Activations = ptx::SharedTile<BFloat16, S::stride>;

// d += a b over 16 columns of b, a lane's part of which is `b`.
template <int tiles, int columns>
DR_DEVICE void multiply(float (&d)[tiles][columns][4], int column, const uint32_t (&a)[tiles][4],
                        const uint32_t (&b)[4]) {
  DR_UNROLL
  for (int i = 0; i < tiles; ++i) {
    ptx::mma_bf16(d[i][column], a[i], b[0], b[1]);
    ptx::mma_bf16(d[i][column + 1], a[i], b[2], b[3]);
  }
}

DR_DEVICE void unpack(uint32_t (&to)[4], const Vector16& from) {
  DR_UNROLL
  for (int i = 0; i < 4; ++i) to[i] = from.v[i];
}

// d += matrix x over tokens: `matrix` are pieces of operand a, [tiles][steps], x all tokens of the sample.
template <class S>
DR_DEVICE void mix_tokens(Accumulator<S>& d, const unsigned char* matrix, int steps, const Activations<S>& x) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto row = fragment::a_row(lane);
  const unsigned char* from = matrix + lane * 16;
  uint32_t a[S::tiles][4], next[S::tiles][4];
  const auto load = [&](int k) {
    DR_UNROLL
    for (int i = 0; i < S::tiles; ++i) {
      unpack(next[i], ptx::load16<ptx::Cache::constant>(from + static_cast<int64_t>(i * steps + k) * piece_bytes));
    }
  };
  load(0);
  for (int k = 0; k < steps; ++k) {
    DR_UNROLL
    for (int i = 0; i < S::tiles; ++i) {
      DR_UNROLL
      for (int j = 0; j < 4; ++j) a[i][j] = next[i][j];
    }
    if (k + 1 < steps) load(k + 1);
    DR_UNROLL
    for (int n = 0; n < S::width / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, x.address(k * 16 + row.row, n * 16 + row.column));
      multiply(d, 2 * n, a, b);
    }
  }
}

// The operand a of columns 16 k ... of this warp's tokens, which begin at row `first` of x.
template <class S>
DR_DEVICE void load_operand(uint32_t (&a)[S::tiles][4], const Activations<S>& x, int first, int k) {
  const auto row = fragment::a_row(static_cast<int>(threadIdx.x) % 32);
  DR_UNROLL
  for (int i = 0; i < S::tiles; ++i) ptx::ldmatrix_x4(a[i], x.address(first + i * 16 + row.row, k * 16 + row.column));
}

// Pieces of operand b in shared memory, in the order of the packed weights.
DR_DEVICE void load_piece(uint32_t (&b)[4], const ptx::Shared<BFloat16>& pieces, int piece) {
  unpack(b, pieces.load<Vector16>(piece * (piece_bytes / 2) + static_cast<int>(threadIdx.x) % 32 * 8));
}

// Accumulator tiles 2 k and 2 k + 1 as the operand a of columns 16 k ...
template <int columns>
DR_DEVICE void to_operand(uint32_t (&a)[4], const float (&d)[columns][4], int k) {
  DR_UNROLL
  for (int i = 0; i < 4; ++i) a[i] = ptx::pack_bf16(d[2 * k + i / 2][i % 2 * 2], d[2 * k + i / 2][i % 2 * 2 + 1]);
}

// d += x w over a chunk of hidden units: x a chunk as operand a, w pieces [chunk / 16][`parts`][width / 16], of which
// part `part` counts.
template <class S>
DR_DEVICE void from_hidden(Accumulator<S>& d, const Operand<S>& x, const ptx::Shared<BFloat16>& w, int parts,
                           int part) {
  DR_UNROLL
  for (int k = 0; k < S::chunk / 16; ++k) {
    uint32_t a[S::tiles][4];
    DR_UNROLL
    for (int i = 0; i < S::tiles; ++i) {
      DR_UNROLL
      for (int j = 0; j < 4; ++j) a[i][j] = x[i][k][j];
    }
    DR_UNROLL
    for (int n = 0; n < S::width / 16; ++n) {
      uint32_t b[4];
      load_piece(b, w, (k * parts + part) * (S::width / 16) + n);
      multiply(d, 2 * n, a, b);
    }
  }
}

// Rows `first` ... of x become d in bf16. Other lanes of the warp see them after a warp_sync.
template <class S>
DR_DEVICE void store_rows(const Activations<S>& x, int first, const Accumulator<S>& d, ptx::Site site = DR_HERE) {
  const auto mine = fragment::accumulator(static_cast<int>(threadIdx.x) % 32);
  DR_UNROLL
  for (int i = 0; i < S::tiles; ++i) {
    DR_UNROLL
    for (int n = 0; n < S::columns; ++n) {
      DR_UNROLL
      for (int half = 0; half < 2; ++half) {
        x.store(first + i * 16 + mine.row + half * 8, n * 8 + mine.column,
                ptx::pack_bf16(d[i][n][2 * half], d[i][n][2 * half + 1]), site);
      }
    }
  }
}

// A row's part that this lane holds, of 32 columns from tile 4 g on: contiguous in the order of `permuted`.
template <int columns>
DR_DEVICE Vector16 row_part(const float (&d)[columns][4], int g, int half) {
  Vector16 x;
  DR_UNROLL
  for (int i = 0; i < 4; ++i) x.v[i] = ptx::pack_bf16(d[4 * g + i][2 * half], d[4 * g + i][2 * half + 1]);
  return x;
}

// This warp's rows to global memory, bf16 [.., width] from row `first` on, columns permuted in groups of 32.
template <class S>
DR_DEVICE void stage_rows(unsigned char* to, int first, const Accumulator<S>& d) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  DR_UNROLL
  for (int i = 0; i < S::tiles; ++i) {
    DR_UNROLL
    for (int half = 0; half < 2; ++half) {
      unsigned char* row = to + int64_t{2} * S::width * (first + i * 16 + lane / 4 + half * 8) + lane % 4 * 16;
      DR_UNROLL
      for (int g = 0; g < S::width / 32; ++g) ptx::store16(row + g * 64, row_part(d[i], g, half));
    }
  }
}

// The same for a chunk of hidden units that begins at column `column` of rows of `hidden`; groups of the chunk's size.
template <class S>
DR_DEVICE void stage_hidden(unsigned char* to, int first, int column, int hidden, const Hidden<S>& d) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  DR_UNROLL
  for (int i = 0; i < S::tiles; ++i) {
    DR_UNROLL
    for (int half = 0; half < 2; ++half) {
      unsigned char* row = to + (static_cast<int64_t>(first + i * 16 + lane / 4 + half * 8) * hidden + column) * 2;
      if constexpr (S::chunk == 32) {
        ptx::store16(row + lane % 4 * 16, row_part(d[i], 0, half));
      } else {
        DR_UNROLL
        for (int n = 0; n < 2; ++n) {
          ptx::store(reinterpret_cast<uint32_t*>(row + lane % 4 * 8) + n,
                     ptx::pack_bf16(d[i][n][2 * half], d[i][n][2 * half + 1]));
        }
      }
    }
  }
}

DR_DEVICE float quad_sum(float x) {
  x += ptx::shuffle_xor(x, 1);
  return x + ptx::shuffle_xor(x, 2);
}

// The sum over the lanes that hold the same columns.
DR_DEVICE float column_sum(float x) {
  x += ptx::shuffle_xor(x, 4);
  x += ptx::shuffle_xor(x, 8);
  return x + ptx::shuffle_xor(x, 16);
}

// Sums of d's columns over this warp's rows, to out[8 n + 0 ...].
template <int tiles, int columns>
DR_DEVICE void store_column_sums(float* out, const float (&d)[tiles][columns][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  DR_UNROLL
  for (int n = 0; n < columns; ++n) {
    DR_UNROLL
    for (int j = 0; j < 2; ++j) {
      float sum = 0;
      DR_UNROLL
      for (int i = 0; i < tiles; ++i) sum += d[i][n][j] + d[i][n][j + 2];
      sum = column_sum(sum);
      if (lane < 4) ptx::store(out + n * 8 + lane * 2 + j, sum);
    }
  }
}

DR_DEVICE float sigmoid(float x) { return 0.5f + 0.5f * ptx::tanh_approximate(0.5f * x); }

}  // namespace diffratio::cuda
