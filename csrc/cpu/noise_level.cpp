// The noise kernels of one SIMD level. CMake compiles this file once per level, with that level's flags and
// DR_LEVEL set to its name. Everything here is in an unnamed namespace or always inlined, so that the linker
// cannot merge the code of two levels.
#include "../common/normal.h"
#include "../common/philox.h"
#include "noise.h"
#include "several.h"

namespace diffratio::cpu {
namespace {

constexpr int stripe = 4 * Vector::lanes;  // normals of one register of counters
constexpr int64_t chunk = 2048;            // elements between the passes below: 8 KiB stay in the L1 cache
static_assert(chunk % (Vector::together * stripe) == 0);

struct Key {
  uint32_t low, high, step;
  explicit DR_HOST_DEVICE Key(const int64_t* rng)
      : low(static_cast<uint32_t>(rng[0])),
        high(static_cast<uint32_t>(static_cast<uint64_t>(rng[0]) >> 32)),
        step(static_cast<uint32_t>(rng[1])) {}
};

// The words of `groups` consecutive stripes from `counter` on: word j of stripe g at out[g * stripe + j * lanes].
template <int groups>
DR_HOST_DEVICE void random_stripes(const Key& key, uint32_t index, uint32_t stream, uint32_t counter, float* out) {
  using V = Several<Vector, groups>;
  typename V::Word state[4] = {V::counters(counter), V::word(key.step), V::word(index), V::word(stream)};
  philox4x32_10<V>(state, key.low, key.high);
  for (int g = 0; g < groups; ++g) {
    for (int j = 0; j < 4; ++j) {
      Vector::store(out + g * stripe + j * Vector::lanes, Vector::as_float(Vector::bits(state[j].r[g])));
    }
  }
}

// Calls take(i, n) for the normals i to i + stripe, in the four registers n, of elements first + i of a sample.
// `first` is a multiple of 4; the last stripe may end after `count`. There are two passes: each alone is small enough
// to keep several iterations in flight and all constants in registers. The first pass also calls prepare(i) for each
// stripe, to prefetch its memory while the execution units compute its words.
template <class Prepare, class Take>
DR_HOST_DEVICE void for_normals(const Key& key, uint32_t index, uint32_t stream, int64_t first, int64_t count,
                                const Prepare& prepare, const Take& take) {
  alignas(64) float words[chunk];
  const uint32_t counter = static_cast<uint32_t>(first / 4);
  constexpr int together = Vector::together;
  int64_t i = 0;
  for (; i + (together - 1) * stripe < count; i += together * stripe) {
    for (int g = 0; g < together; ++g) prepare(i + g * stripe);
    random_stripes<together>(key, index, stream, counter + static_cast<uint32_t>(i / 4), words + i);
  }
  for (; i < count; i += stripe) {
    prepare(i);
    random_stripes<1>(key, index, stream, counter + static_cast<uint32_t>(i / 4), words + i);
  }
  for (i = 0; i < count; i += stripe) {
    Vector::Bits w[4];
    for (int j = 0; j < 4; ++j) w[j] = Vector::as_bits(Vector::load(words + i + j * Vector::lanes));
    Vector::Float n[4];
    box_muller<Vector>(w[0], w[1], n[0], n[1]);
    box_muller<Vector>(w[2], w[3], n[2], n[3]);
    Vector::transpose(n);
    take(i, n);
  }
}

// The normals of at most a chunk; writes up to the next multiple of `stripe`.
void normals(const Key& key, uint32_t index, uint32_t stream, int64_t first, int64_t count, float* out) {
  const auto prepare = [](int64_t) {};
  for_normals(key, index, stream, first, count, prepare, [&](int64_t i, const Vector::Float(&n)[4]) {
    for (int j = 0; j < 4; ++j) Vector::store(out + i + j * Vector::lanes, n[j]);
  });
}

// The common case in one pass over memory: complete stripes of float32 images; `inputs` of them get the same eps.
template <int inputs>
void add_normals(const Key& key, uint32_t index, uint32_t stream, int64_t first, int64_t count,
                 const float* const (&x)[inputs], float sigma, float scale, float* const (&out)[inputs]) {
  const Vector::Float s = Vector::constant(sigma), c = Vector::constant(scale);
  const auto prepare = [&](int64_t i) {
    for (int input = 0; input < inputs; ++input) {
      for (int64_t k = 0; k < stripe; k += 16) {
        __builtin_prefetch(x[input] + i + k);
        __builtin_prefetch(out[input] + i + k, 1);
      }
    }
  };
  for_normals(key, index, stream, first, count, prepare, [&](int64_t i, const Vector::Float(&n)[4]) {
    for (int input = 0; input < inputs; ++input) {
      for (int j = 0; j < 4; ++j) {
        const int64_t at = i + j * Vector::lanes;
        Vector::store(out[input] + at, Vector::fma(s, n[j], Vector::load(x[input] + at)) * c);
      }
    }
  });
}

void widen(const void* x, Type type, int64_t at, int64_t n, float* out) {
  if (type == Type::bfloat16) {
    const BFloat16* p = static_cast<const BFloat16*>(x) + at;
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(p[i]);
  } else {
    const Float16* p = static_cast<const Float16*>(x) + at;
    int64_t i = 0;
    for (; i + Vector::lanes <= n; i += Vector::lanes) Vector::store(out + i, Vector::load(p + i));
    for (; i < n; ++i) out[i] = to_float(p[i]);
  }
}

void narrow(const float* x, int64_t n, void* out, Type type, int64_t at) {
  if (type == Type::bfloat16) {
    BFloat16* p = static_cast<BFloat16*>(out) + at;
    for (int64_t i = 0; i < n; ++i) p[i] = from_float<BFloat16>(x[i]);
  } else {
    Float16* p = static_cast<Float16*>(out) + at;
    int64_t i = 0;
    for (; i + Vector::lanes <= n; i += Vector::lanes) Vector::store(p + i, x + i);
    for (; i < n; ++i) p[i] = from_float<Float16>(x[i]);
  }
}

void combine(const float* __restrict__ x, const float* __restrict__ eps, float sigma, float scale, int64_t n,
             float* __restrict__ out) {
  for (int64_t i = 0; i < n; ++i) out[i] = Scalar::fma(sigma, eps[i], x[i]) * scale;
}

void combine(const double* __restrict__ x, const float* __restrict__ eps, double sigma, double scale, int64_t n,
             double* __restrict__ out) {
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] + sigma * static_cast<double>(eps[i])) * scale;
}

// Prefetches x before the normals are generated: memory access and arithmetic then overlap.
void prefetch(const void* x, Type type, int64_t at, int64_t n) {
  if (!x) return;
  const char* p = static_cast<const char*>(x) + at * size_of(type);
  for (int64_t i = 0; i < n * size_of(type); i += 64) __builtin_prefetch(p + i);
}

template <class T>
DR_HOST_DEVICE T value(const void* p, int64_t i, T otherwise) {
  return p ? static_cast<const T*>(p)[i] : otherwise;
}

// Elements [first, first + n) of a sample of one input, whose normals are in eps.
void combine_chunk(const AddNoise& a, int64_t input, int64_t sample, int64_t first, int64_t n, const float* eps) {
  const int64_t from = sample * a.size + first, to = input * a.batch * a.size + from;
  const void* x0 = a.x0[input];
  if (a.in_type == Type::float64) {
    combine(static_cast<const double*>(x0) + from, eps, value(a.sigma, sample, 0.0), value(a.scale, sample, 1.0), n,
            static_cast<double*>(a.out) + to);
    return;
  }
  const float sigma = value(a.sigma, sample, 0.0f), scale = value(a.scale, sample, 1.0f);
  alignas(64) float wide[chunk];
  const float* x = wide;
  if (a.in_type == Type::float32) {
    x = static_cast<const float*>(x0) + from;
  } else {
    widen(x0, a.in_type, from, n, wide);
  }
  if (a.out_type == Type::float32) {
    combine(x, eps, sigma, scale, n, static_cast<float*>(a.out) + to);
  } else {
    for (int64_t i = 0; i < n; ++i) wide[i] = Scalar::fma(sigma, eps[i], x[i]) * scale;
    narrow(wide, n, a.out, a.out_type, to);
  }
}

// Elements [first, first + n) of a sample of `inputs` inputs from `input` on, which share their eps.
void add_noise_chunk(const AddNoise& a, const Key& key, int64_t input, int64_t inputs, int64_t sample, int64_t first,
                     int64_t n) {
  const uint32_t index = static_cast<uint32_t>(a.index[sample]), stream = a.streams[input];
  const int64_t from = sample * a.size + first;
  alignas(64) float eps[chunk];
  if (!a.x0[input]) {
    normals(key, index, stream, first, n, eps);
    __builtin_memcpy(static_cast<float*>(a.out) + input * a.batch * a.size + from, eps, n * sizeof(float));
    return;
  }
  if (a.in_type == Type::float32 && a.out_type == Type::float32 && n % stripe == 0 && inputs <= 2) {
    const float sigma = value(a.sigma, sample, 0.0f), scale = value(a.scale, sample, 1.0f);
    const auto x = [&](int64_t i) { return static_cast<const float*>(a.x0[i]) + from; };
    const auto out = [&](int64_t i) { return static_cast<float*>(a.out) + i * a.batch * a.size + from; };
    if (inputs == 1) {
      add_normals<1>(key, index, stream, first, n, {x(input)}, sigma, scale, {out(input)});
    } else {
      add_normals<2>(key, index, stream, first, n, {x(input), x(input + 1)}, sigma, scale,
                     {out(input), out(input + 1)});
    }
    return;
  }
  for (int64_t i = input; i < input + inputs; ++i) prefetch(a.x0[i], a.in_type, from, n);
  normals(key, index, stream, first, n, eps);
  for (int64_t i = input; i < input + inputs; ++i) combine_chunk(a, i, sample, first, n, eps);
}

// Work items are chunks of samples of inputs (of groups of inputs that share their eps), in memory order.
void add_noise(const void* arguments, int64_t begin, int64_t end) {
  const AddNoise& a = *static_cast<const AddNoise*>(arguments);
  const Key key(a.rng);
  const int64_t chunks = (a.size + chunk - 1) / chunk, inputs = a.sharing();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % chunks * chunk;
    const int64_t row = item / chunks;  // group * batch + sample
    const int64_t n = a.size - first < chunk ? a.size - first : chunk;
    add_noise_chunk(a, key, row / a.batch * inputs, inputs, row % a.batch, first, n);
  }
}

// Work items are samples.
void words(const void* arguments, int64_t begin, int64_t end) {
  const Words& a = *static_cast<const Words*>(arguments);
  const Key key(a.rng);
  for (int64_t sample = begin; sample < end; ++sample) {
    int64_t* out = a.out + sample * a.count;
    for (int64_t i = 0; i < a.count; i += 4) {
      uint32_t state[4] = {static_cast<uint32_t>(i / 4), key.step, static_cast<uint32_t>(a.index[sample]), a.stream};
      philox4x32_10<Scalar>(state, key.low, key.high);
      for (int64_t j = i; j < i + 4 && j < a.count; ++j) out[j] = state[j - i];
    }
  }
}

void philox(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  Vector::Word state[4] = {Vector::counters(counter[0]), Vector::word(counter[1]), Vector::word(counter[2]),
                           Vector::word(counter[3])};
  philox4x32_10<Vector>(state, key[0], key[1]);
  for (int j = 0; j < 4; ++j) {
    float lanes[Vector::lanes];
    Vector::store(lanes, Vector::as_float(Vector::bits(state[j])));
    __builtin_memcpy(out + j, lanes, sizeof *out);
  }
}

bool supported() {
#if defined(DR_LEVEL_AVX512)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#elif defined(DR_LEVEL_AVX2)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return true;
#endif
}

}  // namespace

#define DR_JOIN_(a, b) a##b
#define DR_JOIN(a, b) DR_JOIN_(a, b)
#define DR_TEXT_(a) #a
#define DR_TEXT(a) DR_TEXT_(a)

extern const Level DR_JOIN(level_, DR_LEVEL);
const Level DR_JOIN(level_, DR_LEVEL) = {DR_TEXT(DR_LEVEL), supported, add_noise, words, philox};

}  // namespace diffratio::cpu
