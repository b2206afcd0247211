// Kernel bodies of the noise operations. tests/simt also compiles them for the host, with its own threadIdx and
// blockIdx: this file must not use anything that exists only on a GPU.
#pragma once

#include "noise_values.cuh"

namespace diffratio::cuda {

constexpr int threads = 256;
constexpr int unit = 8;  // elements of a thread at a time: two counters, 16 bytes of a 16-bit type

template <class T>
struct alignas(16) Pack {
  static constexpr int count = 16 / sizeof(T);
  T v[count];
};

template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

DR_HOST_DEVICE double to_float(double x) { return x; }
using diffratio::to_float;

// `unit` elements at p. `aligned`: all of them exist and p is a multiple of 16 bytes.
template <class T, class C>
DR_HOST_DEVICE void load(const T* p, int valid, bool aligned, C (&x)[unit]) {
  if (aligned) {
    DR_UNROLL
    for (int i = 0; i < unit / Pack<T>::count; ++i) {
      const Pack<T> pack = reinterpret_cast<const Pack<T>*>(p)[i];
      DR_UNROLL
      for (int j = 0; j < Pack<T>::count; ++j) x[i * Pack<T>::count + j] = to_float(pack.v[j]);
    }
  } else {
    DR_UNROLL
    for (int i = 0; i < unit; ++i) x[i] = i < valid ? to_float(p[i]) : C(0);
  }
}

DR_HOST_DEVICE void convert(float x, float& out) { out = x; }
DR_HOST_DEVICE void convert(float x, BFloat16& out) { out = from_float<BFloat16>(x); }
DR_HOST_DEVICE void convert(float x, Float16& out) { out = from_float<Float16>(x); }
DR_HOST_DEVICE void convert(double x, double& out) { out = x; }

template <class T, class C>
DR_HOST_DEVICE void store(T* p, int valid, bool aligned, const C (&x)[unit]) {
  if (aligned) {
    DR_UNROLL
    for (int i = 0; i < unit / Pack<T>::count; ++i) {
      Pack<T> pack;
      DR_UNROLL
      for (int j = 0; j < Pack<T>::count; ++j) convert(x[i * Pack<T>::count + j], pack.v[j]);
      reinterpret_cast<Pack<T>*>(p)[i] = pack;
    }
  } else {
    DR_UNROLL
    for (int i = 0; i < unit; ++i) {
      if (i < valid) convert(x[i], p[i]);
    }
  }
}

DR_HOST_DEVICE double noised(double x, double sigma, float eps, double scale) {
  return (x + sigma * static_cast<double>(eps)) * scale;  // compiled without contraction
}

// n / d and the remainder; 64-bit division is slow on a GPU, so it is used only for large numbers (`wide`).
DR_HOST_DEVICE int64_t divide(int64_t n, int64_t d, bool wide, int64_t& remainder) {
  if (wide) {
    remainder = n % d;
    return n / d;
  }
  const uint32_t q = static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
  remainder = n - q * d;
  return q;
}

// One thread computes `unit` consecutive elements of one sample of one input, then advances by the size of the grid.
// If all inputs share their eps, it computes these elements of every input. normals_only: x0, sigma and scale are
// null, and the normals are the result.
template <class In, class Out, bool normals_only>
__global__ void __launch_bounds__(threads) add_noise_kernel(const AddNoise a, bool in_aligned, bool out_aligned) {
  using C = typename Compute<In>::type;
  const Key key = read_key(a.rng);
  const int sharing = a.sharing();
  const int64_t units = (a.size + unit - 1) / unit;  // of a row; a row is a sample of a group of `sharing` inputs
  const int64_t total = units * a.batch * (a.inputs / sharing);
  const bool wide = total >= int64_t{1} << 32;
  for (int64_t u = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; u < total;
       u += static_cast<int64_t>(gridDim.x) * threads) {
    int64_t in_row, sample;
    const int64_t row = divide(u, units, wide, in_row);
    const int first_input = static_cast<int>(divide(row, a.batch, wide, sample)) * sharing;
    const int64_t first = in_row * unit;
    const int valid = static_cast<int>(a.size - first < unit ? a.size - first : unit);

    float eps[unit];
    DR_UNROLL
    for (int i = 0; i < unit / 4; ++i) {
      uint32_t state[4] = {static_cast<uint32_t>(first / 4 + i), key.step, static_cast<uint32_t>(a.index[sample]),
                           a.streams[first_input]};
      philox4x32_10<Scalar>(state, key.low, key.high);
      box_muller<Scalar>(state[0], state[1], eps[4 * i], eps[4 * i + 1]);
      box_muller<Scalar>(state[2], state[3], eps[4 * i + 2], eps[4 * i + 3]);
    }
    const bool full = valid == unit;
    for (int input = first_input; input < first_input + sharing; ++input) {
      Out* out = static_cast<Out*>(a.out) + (input * a.batch + sample) * a.size + first;
      if constexpr (normals_only) {
        store(out, valid, full && out_aligned, eps);
      } else {
        const C sigma = static_cast<const C*>(a.sigma)[sample];
        const C scale = a.scale ? static_cast<const C*>(a.scale)[sample] : C(1);
        C x[unit];
        load(static_cast<const In*>(a.x0[input]) + sample * a.size + first, valid, full && in_aligned, x);
        DR_UNROLL
        for (int i = 0; i < unit; ++i) x[i] = noised(x[i], sigma, eps[i], scale);
        store(out, valid, full && out_aligned, x);
      }
    }
  }
}

// One thread computes the four words of one counter.
static __global__ void __launch_bounds__(threads) random_words_kernel(const Words a) {
  const Key key = read_key(a.rng);
  const int64_t counters = (a.count + 3) / 4;
  const int64_t total = counters * a.batch;
  const bool wide = total >= int64_t{1} << 32;
  for (int64_t u = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; u < total;
       u += static_cast<int64_t>(gridDim.x) * threads) {
    int64_t counter;
    const int64_t sample = divide(u, counters, wide, counter);
    uint32_t state[4] = {static_cast<uint32_t>(counter), key.step, static_cast<uint32_t>(a.index[sample]), a.stream};
    philox4x32_10<Scalar>(state, key.low, key.high);
    int64_t* out = a.out + sample * a.count + counter * 4;
    DR_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (counter * 4 + j < a.count) out[j] = state[j];
    }
  }
}

// Whether every unit of an array whose rows have `size` elements starts at a multiple of 16 bytes.
inline bool is_aligned(const void* p, int64_t size, Type type) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && size * size_of(type) % 16 == 0;
}

inline bool inputs_aligned(const AddNoise& a) {
  bool aligned = true;
  for (int i = 0; i < a.inputs; ++i) aligned = aligned && is_aligned(a.x0[i], a.size, a.in_type);
  return aligned;
}

// Calls visit(in, out, normals_only) with an In*, an Out* and a constant for the types of `a`.
template <bool value>
struct Constant {
  static constexpr bool normals_only = value;
};

template <class In, class Visit>
auto visit_out(const AddNoise& a, Visit visit) {
  switch (a.out_type) {
    case Type::bfloat16: return visit(static_cast<In*>(nullptr), static_cast<BFloat16*>(nullptr), Constant<false>());
    case Type::float16: return visit(static_cast<In*>(nullptr), static_cast<Float16*>(nullptr), Constant<false>());
    default: return visit(static_cast<In*>(nullptr), static_cast<float*>(nullptr), Constant<false>());
  }
}

template <class Visit>
auto visit_types(const AddNoise& a, Visit visit) {
  if (!a.x0[0]) return visit(static_cast<float*>(nullptr), static_cast<float*>(nullptr), Constant<true>());
  switch (a.in_type) {
    case Type::float64: return visit(static_cast<double*>(nullptr), static_cast<double*>(nullptr), Constant<false>());
    case Type::bfloat16: return visit_out<BFloat16>(a, visit);
    case Type::float16: return visit_out<Float16>(a, visit);
    default: return visit_out<float>(a, visit);
  }
}

}  // namespace diffratio::cuda
