// Uses of the reference kernels, with their results in double precision.
#pragma once

#include "../global_memory.h"
#include "../harness.h"
#include "gemm.cuh"
#include "mix.cuh"
#include "operations.cuh"
#include "reduce.cuh"
#include "relay.cuh"
#include "share.cuh"

namespace reference_cases {

using namespace diffratio;
using namespace diffratio::reference;

// Uniform in (-1, 1), and the values that bf16 has.
struct Random {
  uint32_t state;
  float next() { return static_cast<float>(static_cast<int32_t>(state = state * 1664525u + 1013904223u)) * 0x1p-31f; }
  std::vector<BFloat16> bf16(std::size_t n, float scale = 1) {
    std::vector<BFloat16> x(n);
    for (auto& v : x) v = from_float<BFloat16>(next() * scale);
    return x;
  }
};

template <class Maps = GemmMaps>
simt::Case gemm(int samples, int m, int n, int k, unsigned blocks, std::string name = "gemm") {
  return {name, [=](simt::Mode mode) {
            Random random{static_cast<uint32_t>(m * n * k)};
            const auto a = random.bf16(static_cast<std::size_t>(samples) * m * k);
            const auto b = random.bf16(static_cast<std::size_t>(samples) * n * k);
            std::vector<float> c(static_cast<std::size_t>(samples) * m * n, NAN);
            const Gemm g{a.data(), b.data(), c.data(), samples, m, n, k};
            simt::launch({"gemm", {blocks}, gemm_threads, gemm_shared_bytes}, mode, [&] { gemm_kernel<Maps>(g); });
            std::vector<double> expected(c.size());
            for (int s = 0; s < samples; ++s) {
              for (int i = 0; i < m; ++i) {
                for (int j = 0; j < n; ++j) {
                  double sum = 0;
                  for (int l = 0; l < k; ++l) {
                    sum += static_cast<double>(to_float(a[(s * m + i) * k + l])) * to_float(b[(s * n + j) * k + l]);
                  }
                  expected[(s * m + i) * n + j] = sum;
                }
              }
            }
            return simt::compare(c, expected, 1e-6);
          }};
}

inline simt::Case reduce(int samples, int size, unsigned blocks) {
  return {"reduce", [=](simt::Mode mode) {
            Random random{7};
            std::vector<float> x(static_cast<std::size_t>(samples) * size), out(samples, NAN);
            std::vector<double> expected(samples);
            for (int i = 0; i < samples * size; ++i) expected[i / size] += x[i] = random.next() + 0.5f;
            const Reduce r{x.data(), out.data(), samples, size};
            simt::launch({"reduce", {blocks}, reduce_threads, reduce_shared_bytes}, mode, [&] { reduce_kernel(r); });
            return simt::compare(out, expected, 1e-6);
          }};
}

template <int tokens, int channels>
simt::Case mix(int samples, unsigned blocks) {
  return {"mix", [=](simt::Mode mode) {
            Random random{11};
            const auto x = random.bf16(samples * tokens * channels), m = random.bf16(tokens * tokens, 0.3f),
                       w = random.bf16(channels * channels, 0.3f);
            std::vector<float> out(x.size(), NAN);
            const Mix g{x.data(), m.data(), w.data(), out.data(), samples};
            simt::launch({"mix", {blocks}, mix_threads<tokens>, mix_shared_bytes(tokens, channels)}, mode,
                         [&] { mix_kernel<tokens, channels>(g); });
            std::vector<double> expected(x.size());
            std::vector<double> y(tokens * channels);
            for (int s = 0; s < samples; ++s) {
              const BFloat16* xs = &x[s * tokens * channels];
              for (int t = 0; t < tokens; ++t) {
                for (int c = 0; c < channels; ++c) {
                  double sum = to_float(xs[t * channels + c]);
                  for (int k = 0; k < tokens; ++k) sum += to_float(m[t * tokens + k]) * to_float(xs[k * channels + c]);
                  y[t * channels + c] = sum;
                }
              }
              for (int t = 0; t < tokens; ++t) {
                for (int c = 0; c < channels; ++c) {
                  double sum = y[t * channels + c];
                  for (int k = 0; k < channels; ++k) {
                    sum += static_cast<double>(to_float(w[c * channels + k])) *
                           to_float(from_float<BFloat16>(static_cast<float>(y[t * channels + k])));
                  }
                  expected[(s * tokens + t) * channels + c] = sum;
                }
              }
            }
            // y is rounded to bf16 between the stages: a value near a tie may be rounded in the other direction.
            return simt::compare(out, expected, 2e-3);
          }};
}

inline simt::Case relay(int rounds) {
  return {"relay", [=](simt::Mode mode) {
            Random random{13};
            std::vector<float> x(rounds * relay_width), out(relay_width, NAN);
            std::vector<double> expected(relay_width);
            for (int i = 0; i < rounds * relay_width; ++i) expected[i % relay_width] += x[i] = random.next();
            const Relay r{x.data(), out.data(), rounds};
            simt::launch({"relay", {1}, relay_threads, relay_shared_bytes}, mode, [&] { relay_kernel(r); });
            return simt::compare(out, expected, 1e-6);
          }};
}

inline simt::Case share(int size, unsigned blocks) {
  return {"share", [=](simt::Mode mode) {
            Random random{17};
            std::vector<float> x(size), out(size, NAN), partial(blocks, NAN);
            uint32_t arrived = 0;
            double total = 0;
            for (float& v : x) total += v = random.next() + 2;
            std::vector<double> expected;
            for (float v : x) expected.push_back(v / total);
            simt::Watch watch(partial.data(), blocks * sizeof(float), "partial");
            const Share s{x.data(), out.data(), partial.data(), &arrived, size};
            simt::launch({"share", {blocks}, 32, 0, true}, mode, [&] { share_kernel(s); });
            return simt::compare(out, expected, 1e-6);
          }};
}

inline simt::Case operations() {
  return {"operations", [](simt::Mode mode) -> std::string {
            alignas(16) BFloat16 x[64];
            for (int i = 0; i < 64; ++i) x[i] = {static_cast<uint16_t>(i)};  // only the bits matter
            alignas(16) uint32_t out[32][operations_out];
            const Operations o{x, out[0]};
            simt::launch({"operations", {1}, 32, operations_shared_bytes}, mode, [&] { operations_kernel(o); });
            const auto pair = [](int low, int high) { return static_cast<uint32_t>(low | high << 16); };
            for (int lane = 0; lane < 32; ++lane) {
              const int row = lane / 4, column = lane % 4 * 2;
              const uint32_t expected[operations_out] = {
                  pair(row * 8 + column, row * 8 + column + 1),
                  pair((7 - row) * 8 + column, (7 - row) * 8 + column + 1),
                  pair(column * 8 + row, (column + 1) * 8 + row),
                  pair((7 - column) * 8 + row, (6 - column) * 8 + row),
                  105u,
                  100u + (lane ^ 3),
                  100u + (lane < 28 ? lane + 4 : lane),
                  lane % 4 ? 0u : pair(0, 1),
                  static_cast<uint32_t>(lane),
                  256u,
                  pair(2 * lane, 2 * lane + 1),
                  lane < 16 ? 102u : 0u,
              };
              for (int i = 0; i < operations_out; ++i) {
                if (out[lane][i] != expected[i]) {
                  return "word " + std::to_string(i) + " of lane " + std::to_string(lane) + " is " +
                         std::to_string(out[lane][i]) + ", should be " + std::to_string(expected[i]);
                }
              }
            }
            return "";
          }};
}

// Odd grids, partial tiles, one and several samples per block, one to five steps of depth.
inline std::vector<simt::Case> all() {
  return {gemm(2, 48, 80, 80, 3),
          gemm(3, 16, 16, 16, 1),
          gemm(1, 64, 32, 32, 5),
          gemm(5, 16, 48, 48, 2),
          reduce(5, 300, 2),
          reduce(3, 1, 1),
          mix<32, 16>(5, 2),
          mix<64, 64>(3, 1),
          relay(5),
          share(100, 3),
          operations()};
}

}  // namespace reference_cases
