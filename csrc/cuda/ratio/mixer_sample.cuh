// The image of one sample and the packed weights of a warp: patch vectors, embedding, image gradient.
#pragma once

#include "../noise/noise_values.cuh"
#include "mixer_tiles.cuh"

namespace diffratio::cuda {

template <class S>
class MixerSample {
 protected:
  DR_DEVICE explicit MixerSample(const MixerCall& call) : c(call), p(call.packing) {}

  // Patch vectors of the noised image into the tile's first columns, zeros where they are padded.
  DR_DEVICE void load_patches(int half, int sample, int draw, float sigma) const {
    const float scale = c_in(sigma);
    const int size = p.image(), side = p.image_width / p.patch;
    const int64_t offset = static_cast<int64_t>(sample) * size;
    const Key key = c.noise.rng ? read_key(c.noise.rng) : Key{};
    const int64_t index = c.noise.rng ? c.noise.index[sample] : 0;
    const uint32_t stream = c.noise.streams[half] + static_cast<uint32_t>(draw);
    for (int i = thread() * 4; i < size; i += threads() * 4) {
      float eps[4] = {};
      if (c.noise.rng) four_normals(key, static_cast<uint32_t>(i / 4), index, stream, eps);
      int x = i % p.image_width, y = i / p.image_width % p.image_height, channel = i / p.image_width / p.image_height;
      int column = x % p.patch, token = y / p.patch * side + x / p.patch;
      int start = (channel * p.patch + y % p.patch) * p.patch;
      DR_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (i + j >= size) break;
        const float x0 = c.inputs.type == Type::float32
                             ? static_cast<const float*>(c.inputs.images[half])[offset + i + j]
                             : to_float(static_cast<const BFloat16*>(c.inputs.images[half])[offset + i + j]);
        const float noised_x = c.noise.rng ? noised(x0, sigma, eps[j], scale) : x0 * scale;
        tile.store(token, start + column, from_float<BFloat16>(noised_x));
        if (++x == p.image_width) {  // a row ends within the four elements
          x = 0;
          if (++y == p.image_height) y = 0, ++channel;
          column = 0, token = y / p.patch * side, start = (channel * p.patch + y % p.patch) * p.patch;
        } else if (++column == p.patch) {
          column = 0, ++token;
        }
      }
    }
    const BFloat16 zero{0};
    const int spare = p.vector - p.real_vector;
    for (int i = thread(); i < p.tokens * spare; i += threads()) tile.store(i / spare, p.real_vector + i % spare, zero);
    for (int i = thread(); i < (p.tokens - p.real_tokens) * p.real_vector; i += threads()) {
      tile.store(p.real_tokens + i / p.real_vector, i % p.real_vector, zero);
    }
  }

  // h = z patch^T + position + e
  DR_DEVICE void embed(Accumulator<S>& h) const {
    load_accumulators(h, p.position);
    int column = own_column();
    if constexpr (S::parts > 1) ptx::hide(column);  // otherwise 32 addresses stay in registers between parts
    DR_UNROLL
    for (int n = 0; n < S::columns; ++n) {
      const float e0 = conditioning(n * 8 + column, p.real_width, 0);
      const float e1 = conditioning(n * 8 + column + 1, p.real_width, 0);
      DR_UNROLL
      for (int i = 0; i < S::tiles; ++i) {
        h[i][n][0] += e0, h[i][n][1] += e1;
        h[i][n][2] += e0, h[i][n][3] += e1;
      }
    }
    for (int k = 0; k < p.vector / 16; ++k) {
      uint32_t a[S::tiles][4];
      load_operand<S>(a, tile, first(), k);
      DR_UNROLL
      for (int n = 0; n < S::width / 16; ++n) {
        uint32_t b[4];
        load_packed(b, p.patch_w, k * (S::width / 16) + n);
        multiply(h, 2 * n, a, b);
      }
    }
  }

  // Calls visit(n, q) with columns 16 n ... of q = z energy^T, for the patch vectors z in the tile.
  template <class Visit>
  DR_DEVICE void for_energy_columns(const Visit& visit) const {
    DR_UNROLL
    for (int n = 0; n < S::width / 16; ++n) {
      float q[S::tiles][2][4] = {};
      DR_UNROLL_NOT
      for (int k = 0; k < p.vector / 16; ++k) {
        uint32_t a[S::tiles][4], b[4];
        load_operand<S>(a, tile, first(), k);
        load_packed(b, p.energy_w, k * (S::width / 16) + n);
        multiply(q, 0, a, b);
      }
      visit(n, q);
    }
  }

  // dx = scale unpatch(G matrix) for a packed [width, vector] matrix, or += with `add`. A thread writes the same
  // elements in every call.
  DR_DEVICE void write_image_gradient(const Accumulator<S>& g, int64_t matrix, int sample, float scale,
                                      bool add) const {
    float* out = c.results.image_gradient + static_cast<int64_t>(sample) * p.image();
    const int side = p.image_width / p.patch, square = p.patch * p.patch;
    for (int n = 0; n < p.vector / 16; ++n) {
      float d[S::tiles][2][4] = {};
      DR_UNROLL
      for (int k = 0; k < S::width / 16; ++k) {
        uint32_t a[S::tiles][4], b[4];
        DR_UNROLL
        for (int i = 0; i < S::tiles; ++i) to_operand(a[i], g[i], k);
        load_packed(b, matrix, k * (p.vector / 16) + n);
        multiply(d, 0, a, b);
      }
      DR_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int v = n * 16 + j / 2 * 8 + own_column() + j % 2;
        if (v >= p.real_vector) continue;
        const int channel = v / square, row = v % square / p.patch, column = v % p.patch;
        DR_UNROLL
        for (int i = 0; i < S::tiles * 2; ++i) {
          const int token = own_row() + i * 8;
          if (token >= p.real_tokens) continue;
          const int y = token / side * p.patch + row, x = token % side * p.patch + column;
          float* to = out + (static_cast<int64_t>(channel) * p.image_height + y) * p.image_width + x;
          const float value = scale * d[i / 2][j / 2][i % 2 * 2 + j % 2];
          ptx::store(to, add ? ptx::load(to) + value : value);
        }
      }
    }
  }

  // --- parameters ----------------------------------------------------------------------------------------------

  DR_DEVICE void scale(Accumulator<S>& d, float by) const {
    DR_UNROLL
    for (int i = 0; i < S::tiles; ++i) {
      DR_UNROLL
      for (int n = 0; n < S::columns; ++n) {
        DR_UNROLL
        for (int j = 0; j < 4; ++j) d[i][n][j] *= by;
      }
    }
  }

  // Number i of `count` conditioning numbers from `begin` on, zero beyond.
  DR_DEVICE float conditioning(int i, int count, int begin) const { return i < count ? e[begin + i] : 0.0f; }

  // The hidden biases of a chunk.
  DR_DEVICE void start_hidden(Hidden<S>& u, int layer, int chunk) const {
    const int begin = p.real_width + layer * p.real_hidden;
    DR_UNROLL
    for (int n = 0; n < S::chunk / 8; ++n) {
      DR_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float bias = conditioning(chunk * S::chunk + n * 8 + own_column() + j, p.real_hidden, begin);
        DR_UNROLL
        for (int i = 0; i < S::tiles; ++i) u[i][n][j] = u[i][n][j + 2] = bias;
      }
    }
  }

  // This lane's part of a packed matrix in the order of accumulators.
  DR_DEVICE Vector16 accumulators(int64_t matrix, int i, int n) const {
    const int place = ((first() / 16 + i) * S::columns + n) * 32 + lane();
    // Not as Cache::constant: the compiler would keep the head in registers from its first use to its second.
    return ptx::load16(c.packed + matrix + static_cast<int64_t>(place) * 16);
  }

  DR_DEVICE void load_accumulators(Accumulator<S>& d, int64_t matrix) const {
    DR_UNROLL
    for (int i = 0; i < S::tiles; ++i) {
      DR_UNROLL
      for (int n = 0; n < S::columns; ++n) {
        const Vector16 x = accumulators(matrix, i, n);
        DR_UNROLL
        for (int j = 0; j < 4; ++j) d[i][n][j] = Scalar::as_float(x.v[j]);
      }
    }
  }

  DR_DEVICE void load_packed(uint32_t (&b)[4], int64_t matrix, int piece) const {
    unpack(b, ptx::load16<ptx::Cache::constant>(c.packed + matrix + static_cast<int64_t>(piece) * piece_bytes +
                                                lane() * 16));
  }

  // A layer's mixing matrix, from this warp's rows on.
  DR_DEVICE const unsigned char* mix_rows(int64_t matrix, int layer) const {
    const int steps = p.tokens / 16;
    return c.packed + matrix + (static_cast<int64_t>(layer) * steps + first() / 16) * steps * piece_bytes;
  }

  // --- places --------------------------------------------------------------------------------------------------

  static DR_DEVICE int threads() { return static_cast<int>(blockDim.x); }
  static DR_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
  static DR_DEVICE int lane() { return thread() % 32; }
  // Of this warp's tokens in the part.
  DR_DEVICE int first() const { return (thread() / 32 + (S::parts > 1 ? part * (threads() / 32) : 0)) * S::rows; }
  // Of this lane in the accumulators.
  DR_DEVICE int own_row() const { return first() + lane() / 4; }
  static DR_DEVICE int own_column() { return lane() % 4 * 2; }
  DR_DEVICE float c_in(float sigma) const {
    return 1.0f / Scalar::square_root(sigma * sigma + c.sigma_data * c.sigma_data);
  }

  // Kernel parameters are in constant memory and need no registers; all registers are in use.
  const MixerCall& c;
  const Packing& p;
  const float* e = nullptr;  // conditioning of the current unit
  int part = 0;              // of the tokens, that the accumulators hold
  Activations<S> tile;
};

}  // namespace diffratio::cuda
