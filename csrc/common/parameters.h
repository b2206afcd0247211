// Arguments of the parameter operations, the same for every backend (diffratio_fast/ops/reference_parameters.py is
// the definition). Weights are matrices [rows][length]: a row has the weights of one output.
#pragma once

#include "integers.h"
#include "types.h"

namespace diffratio {

constexpr float weight_epsilon = 1e-4f;  // added to a row's root mean square
constexpr int max_averages = 4;

// normalized = weight / ((epsilon + rms of its row) sqrt(length)). Backward (by_weight set): gradient of that type.
struct NormalizeWeight {
  Type type;  // of normalized, and of gradient
  int64_t rows, length;
  const float* weight;
  void* normalized;
  const void* gradient;
  float* by_weight;
};

// One tensor of an Adam step, float32. If it is normalized, its rows are divided by their root mean square after the
// update, and `normalized` (may be null) gets the result of NormalizeWeight for the new weight.
struct AdamTensor {
  const float* gradient;
  float* weight;
  float* first;
  float* second;
  const float* step;  // updates, this one included
  float* average[max_averages];
  void* normalized;
  int64_t rows, length;
  bool normalize;
};

// A number by value, or in device memory for a captured graph.
struct Number {
  const float* pointer;
  float value;
  DR_HOST_DEVICE float get() const { return pointer ? *pointer : value; }
};

struct AdamSettings {
  Number rate;
  Number average_weight[max_averages];  // average += weight (parameter - average), before rows are normalized
  float beta1, beta2, epsilon, decay;
  bool decoupled;  // AdamW: decay acts on the weight, else it adds to the gradient
  int averages;
  Type type;  // of normalized
};

struct Adam {
  AdamSettings settings;
  const AdamTensor* tensors;  // in host memory
  int64_t count;
  float* squares;  // [count]: sums of squares of the gradients
  float* partial;  // a float for each row of each tensor, one tensor after the other
};

}  // namespace diffratio
