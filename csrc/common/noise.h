// Arguments of the noise operations, the same for every backend. All pointers are to memory of the backend's device: a
// captured CUDA graph reads the seed and step at replay.
#pragma once

#include "integers.h"
#include "types.h"

namespace diffratio {

constexpr int max_inputs = 8;

// out[i][b] = (x0[i][b] + sigma[b] eps) scale[b] over arrays [inputs][batch][size], eps from stream i. If all
// streams are equal, eps is generated once for all inputs. sigma and scale are double for float64 images, else float;
// scale may be null (1). If x0[0] is null, out gets the normals in float32, and sigma and scale are not read.
struct AddNoise {
  const int64_t* rng;    // [2]: seed, step
  const int64_t* index;  // [batch]
  int64_t batch;
  int64_t size;
  int inputs;
  uint32_t streams[max_inputs];  // stream_word() of each input
  const void* x0[max_inputs];    // each [batch][size], contiguous
  const void* sigma;
  const void* scale;
  void* out;  // [inputs][batch][size]
  Type in_type;
  Type out_type;

  // Inputs that share each generated eps.
  DR_HOST_DEVICE int sharing() const {
    for (int i = 1; i < inputs; ++i) {
      if (streams[i] != streams[0]) return 1;
    }
    return inputs;
  }
};

// out: int64 [batch][count]; element i is word i % 4 of counter i / 4.
struct Words {
  const int64_t* rng;
  const int64_t* index;
  int64_t batch;
  int64_t count;
  uint32_t stream;
  int64_t* out;
};

}  // namespace diffratio
