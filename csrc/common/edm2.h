// Arguments of the EDM2 operations, the same for every backend (diffratio_fast/ops/reference_edm2.py is the
// definition). All pointers are to memory of the backend's device. Images have one of two layouts:
// contiguous [batch][channels][pixels], or channels_last [batch][pixels][channels].
#pragma once

#include "integers.h"
#include "types.h"

namespace diffratio {

constexpr float norm_epsilon = 1e-4f;       // added to a root mean square
constexpr float silu_gain = 1.0f / 0.596f;  // EDM2, Eq. 81
constexpr int64_t pixel_chunk = 256;        // pixels per partial sum in ScaleSilu::partial

// normalized = x / (epsilon + rms over channels), activated = mp_silu(normalized).
// Backward (by_x set): either upstream may be null, which means zero.
struct PixelNorm {
  Type type;
  int64_t outer, channels, inner;  // [outer][channels][inner]; channels_last: inner is 1
  const void* x;
  void* normalized;
  void* activated;
  const void* by_normalized;
  const void* by_activated;
  void* by_x;
};

// Dropout masks of the noise contract: element e of a sample (in contiguous order) is kept if its 16 random bits are
// at least `least`. Elements [0, half) use the low 16 bits of words [0, half), the other elements the high 16 bits.
struct DropoutMask {
  const int64_t* rng;    // [2]: seed, step; null: nothing is dropped
  const int64_t* index;  // [batch]
  uint32_t stream;
  uint32_t least;  // 0 to 2^16
  float gain;      // 1 / (1 - probability)
};

// out = mask gain mp_silu(x (condition + 1)); condition [batch][channels].
// Backward (by_x set): by_condition is the sum over pixels, through `partial` [batch][chunks][channels].
struct ScaleSilu {
  Type type;
  int64_t batch, channels, pixels;
  bool channels_last;
  const void* x;
  const void* condition;
  DropoutMask mask;
  void* out;
  const void* by_out;
  void* by_x;
  void* by_condition;
  float* partial;

  DR_HOST_DEVICE int64_t chunks() const { return channels_last ? (pixels + pixel_chunk - 1) / pixel_chunk : 1; }
};

// out = clamp(weight_a a + weight_b b, -clip, clip), activated = mp_silu(out) if it is not null.
// Bit i % 8 of passes[i / 8]: whether element i was not clamped; passes is null if clip is infinite.
// Backward (by_a set): either upstream may be null; `out` is read only if by_activated is not null.
// For mp_silu alone, b, out and by_b are null.
struct SumClamp {
  Type type;
  int64_t count;
  float weight_a, weight_b, clip;
  const void* a;
  const void* b;
  void* out;
  void* activated;
  uint8_t* passes;
  const void* by_out;
  const void* by_activated;
  void* by_a;
  void* by_b;
};

// Rows [a | b], scaled: out = [scale_a a | scale_b b], activated = mp_silu(out).
// Backward (by_a set): either upstream may be null.
struct CatSilu {
  Type type;
  int64_t rows, first, second;  // elements of a row of a and of b
  float scale_a, scale_b;
  const void* a;
  const void* b;
  void* out;
  void* activated;
  const void* by_out;
  const void* by_activated;
  void* by_a;
  void* by_b;
};

// out = [scale x | 1] along channels; scale float32 [batch]. Backward (by_x set): by_x = scale by_out without the last
// channel; type is then that of by_out, out_type that of by_x.
struct OnesChannel {
  Type type, out_type;
  int64_t batch, channels, pixels;
  bool channels_last;
  const void* x;
  const float* scale;
  void* out;
  const void* by_out;
  void* by_x;
};

// qkv [batch][tokens][3][heads][size] to three tensors [batch][heads][tokens][size] of vectors x / (epsilon + rms).
// Backward (by_qkv set): the upstreams have the given strides (in elements), the last dimension's is 1.
struct QkvNorm {
  Type type;
  int64_t batch, tokens, heads, size;
  const void* qkv;
  void* out[3];
  const void* by_out[3];
  int64_t stride[3][3];  // [role]: batch, heads, tokens
  void* by_qkv;
};

}  // namespace diffratio
