// The RatioMixer on CUDA: padded sizes, the packed weights, the staged operands of the weight gradients.
//
// Padding with zeros changes no result: the padded rows of the head, of `mix` and of `down` are zero, so padded
// tokens and channels do not affect the log ratio, and their gradients are zero.
#pragma once

#include "../../common/mixer.h"
#include "../../common/types.h"

namespace diffratio::cuda {

constexpr int piece_bytes = 512;  // 16 x 16 bf16 as mma operand: 16 bytes for each lane of a warp

constexpr DR_HOST_DEVICE int round_up(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }

// Sizes of the padded network, and offsets of its parts in the packed weights (bytes). Matrices are in 16 x 16 pieces
// in the order in which a warp consumes them; each lane's 16 bytes are its part of the operand of mma.m16n8k16.
struct Packing {
  int channels, image_height, image_width, patch;  // images
  int real_tokens, real_width, real_hidden, real_vector, depth;
  int tokens, width, hidden, vector;  // padded
  int parts;                          // in which a thread block processes the tokens

  // fp32, in the order of accumulators: [tokens / 16][width / 8][lane][4].
  int64_t position, head;
  int64_t mix_bias;  // fp32 [depth][tokens]
  // As operand b: patch [vector / 16][width / 16], patch_t [width / 16][vector / 16].
  int64_t patch_w, patch_t;
  int64_t energy_w, energy_t;  // the same of energy
  bool energy;                 // whether there is an energy head
  // As operand a: [depth][tokens / 16][tokens / 16].
  int64_t mix, mix_t;
  // As operand b, for every 16 hidden units: up, down; and down_t, up, up_t. Each [width / 16] pieces.
  int64_t forward, backward;
  int64_t bytes;

  DR_HOST_DEVICE int conditioning() const { return real_width + depth * real_hidden; }
  DR_HOST_DEVICE int image() const { return channels * image_height * image_width; }
};

// Tokens of a warp: above 128 tokens 32, else 16, where the registers allow it.
constexpr DR_HOST_DEVICE int rows_of_warp(int64_t tokens) { return tokens > 128 ? 32 : 16; }

// The largest networks have no registers for an energy head: their kernels would spill.
constexpr DR_HOST_DEVICE bool may_have_energy_head(int64_t width) { return width <= 128; }

// 32 rows of 256 channels would need all registers of a warp, so it processes 16 rows of each half of the tokens.
constexpr DR_HOST_DEVICE int parts_of(int width, int64_t tokens) { return width * rows_of_warp(tokens) > 4096 ? 2 : 1; }

constexpr DR_HOST_DEVICE int padded_width(int64_t width) { return width <= 64 ? 64 : width <= 128 ? 128 : 256; }

// Hidden units at a time: 16 if the residual sum needs half of the registers, else 32.
constexpr DR_HOST_DEVICE int chunk_of(int width, int rows) { return width * rows >= 4096 ? 16 : 32; }

inline Packing packing_of(const MixerSizes& s) {
  Packing p{};
  p.channels = static_cast<int>(s.channels);
  p.image_height = static_cast<int>(s.image_height);
  p.image_width = static_cast<int>(s.image_width);
  p.patch = static_cast<int>(s.patch);
  p.real_tokens = static_cast<int>(s.tokens);
  p.real_width = static_cast<int>(s.width);
  p.real_hidden = static_cast<int>(s.hidden);
  p.real_vector = static_cast<int>(s.vector());
  p.depth = static_cast<int>(s.depth);
  p.tokens = round_up(s.tokens, rows_of_warp(s.tokens));
  p.width = padded_width(s.width);
  p.hidden = round_up(s.hidden, 32);
  p.vector = round_up(s.vector(), 16);
  p.parts = parts_of(p.width, s.tokens);
  const auto reserve = [&](int64_t bytes) {
    const int64_t at = p.bytes;
    p.bytes += (bytes + piece_bytes - 1) / piece_bytes * piece_bytes;  // pieces begin at multiples of their size
    return at;
  };
  const int64_t tokens = p.tokens, width = p.width, hidden = p.hidden, depth = p.depth;
  p.position = reserve(4 * tokens * width);
  p.head = reserve(4 * tokens * width);
  p.mix_bias = reserve(4 * depth * tokens);
  p.patch_w = reserve(2 * p.vector * width);
  p.patch_t = reserve(2 * p.vector * width);
  p.energy = s.energy;
  p.energy_w = reserve(s.energy ? 2 * p.vector * width : 0);
  p.energy_t = reserve(s.energy ? 2 * p.vector * width : 0);
  p.mix = reserve(2 * depth * tokens * tokens);
  p.mix_t = reserve(2 * depth * tokens * tokens);
  p.forward = reserve(2 * 2 * depth * hidden * width);
  p.backward = reserve(3 * 2 * depth * hidden * width);
  return p;
}

// One unit (sample of a half) of the operands of the weight gradients, bf16 but for `rows`; offsets in bytes. Columns
// of data from accumulators are permuted within groups, see `permuted`.
struct Staging {
  int64_t h, m, g,
      gm;         // [depth][tokens][width]: a layer's input, mixed tokens, and the gradients of its output and of m
  int64_t a, gu;  // [depth][tokens][hidden]: hidden units after silu, gradient before it
  int64_t last, first;  // [tokens][width]: gradient of the head, of the first layer's input
  int64_t z;            // [tokens][vector]: patch vectors, in their own order
  int64_t rows;         // fp32 [depth][tokens]: sums of gm over channels
  int64_t bytes;
};

inline Staging staging_of(const Packing& p) {
  Staging s{};
  const int64_t wide = int64_t{2} * p.tokens * p.width, hidden = int64_t{2} * p.tokens * p.hidden, depth = p.depth;
  s.m = 0;
  s.h = s.m + depth * wide;
  s.g = s.h + depth * wide;
  s.gm = s.g + depth * wide;
  s.a = s.gm + depth * wide;
  s.gu = s.a + depth * hidden;
  s.last = s.gu + depth * hidden;
  s.first = s.last + wide;
  s.z = s.first + wide;
  s.rows = s.z + int64_t{2} * p.tokens * p.vector;
  s.bytes = (s.rows + 4 * depth * p.tokens + 127) / 128 * 128;
  return s;
}

// Of a thread block that computes image gradients: m of every layer of the network (Staging begins with it too).
DR_HOST_DEVICE int64_t checkpoint_bytes(const Packing& p) { return int64_t{2} * p.depth * p.tokens * p.width; }

// Of a thread block that processes the tokens in parts: the fp32 accumulators of all parts.
DR_HOST_DEVICE int64_t parked_bytes(const Packing& p) { return p.parts > 1 ? int64_t{4} * p.tokens * p.width : 0; }

// The factor of the energy head: 1 / sqrt(N) for images of N numbers.
DR_HOST_DEVICE float energy_scale(const Packing& p) {
  return 1.0f / Scalar::square_root(static_cast<float>(p.image()));
}

// Tokens that a warp holds at a time.
DR_HOST_DEVICE int rows_of_warp(const Packing& p) {
  return p.parts > 1 || p.width > 128 ? 16 : rows_of_warp(p.real_tokens);
}

// The position of column `i` in a staged row: within groups of 32 (or 16) columns, first by lane of a quad, then by
// 8 x 8 tile. So the elements of a group that one lane holds are contiguous.
DR_HOST_DEVICE int permuted(int i, int group) {
  return i / group * group + i % 8 / 2 * (group / 4) + i % group / 8 * 2 + i % 2;
}

// Sums of the weight gradients, fp32 in padded, permuted sizes; offsets in floats of one of `splits` copies.
struct Sums {
  int64_t patch, energy;   // [width][vector]
  int64_t mix, up, down;   // [depth] x [tokens][tokens], [hidden][width], [width][hidden]
  int64_t position, head;  // [tokens][width]
  int64_t mix_bias;        // [depth][tokens]
  int64_t floats;
};

DR_HOST_DEVICE Sums sums_of(const Packing& p) {
  Sums s{};
  const int64_t tokens = p.tokens, width = p.width, hidden = p.hidden, depth = p.depth;
  s.patch = 0;
  s.energy = s.patch + width * p.vector;
  s.mix = s.energy + (p.energy ? width * p.vector : 0);
  s.up = s.mix + depth * tokens * tokens;
  s.down = s.up + depth * hidden * width;
  s.position = s.down + depth * hidden * width;
  s.head = s.position + tokens * width;
  s.mix_bias = s.head + tokens * width;
  s.floats = s.mix_bias + (depth * tokens + 31) / 32 * 32;
  return s;
}

// Buffers within the call's workspace (MixerPlan has their places).
struct MixerWorkspace {
  unsigned char* operands;  // image gradient: checkpoints of each thread block; weight gradients: Staging of each unit
  unsigned char* parked;    // [thread blocks] x parked_bytes
  float* columns;           // weight gradients: [thread blocks][parts * warps][width + depth * hidden]
};

// Arguments of the kernels that process units, one sample of a half each. All pointers are to device memory.
struct MixerCall : RatioCall {
  Packing packing;
  Staging staging;
  const unsigned char* packed;
  MixerWorkspace workspace;
  int first_unit, units;  // of halves * batch, in this launch
};

// Arguments of the kernels that turn staged operands into weight gradients.
struct GradientCall {
  float* sums;  // [splits] x Sums
  int splits;
  bool first_slice;    // sums are written, not added to
  void* out[weights];  // the gradients, in the shapes of the weights
  Type out_type;       // float32 or bfloat16
  float* loss;         // or null
};

struct PackCall {
  Packing packing;
  const void* weight[weights];  // contiguous
  Type type;                    // float32 or bfloat16
  unsigned char* packed;
};

inline bool shape_exists(const MixerSizes& s) {
  return (!s.energy || may_have_energy_head(s.width)) && s.tokens <= 256 && s.width <= 256 && s.vector() <= 64 &&
         s.image() < int64_t{1} << 30 && s.hidden < 1 << 20 && s.depth < 1 << 16;
}

}  // namespace diffratio::cuda
