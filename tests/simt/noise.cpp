// The CUDA noise kernels, executed on the CPU, against the CPU implementation: bit for bit, at odd sizes, unaligned
// addresses, all types, few blocks and every schedule. Built with the address and undefined-behavior sanitizers, which
// detect accesses outside the exactly sized buffers and misaligned 16-byte accesses.
#include "simt.h"

#include "../../csrc/cpu/noise.h"
#include "../../csrc/cuda/noise/noise_kernel.cuh"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

using namespace diffratio;

namespace {

int comparisons = 0;
bool sabotage = false;  // give the kernels another step: the comparison must fail

// An exactly sized buffer that starts `offset` elements beyond a multiple of 16 bytes.
struct Buffer {
  Buffer(int64_t count, Type type, int64_t offset)
      : bytes(count * size_of(type)), skip(offset * size_of(type)), memory(new unsigned char[bytes + skip]) {
    if (reinterpret_cast<uintptr_t>(memory.get()) % 16) std::abort();
    std::memset(memory.get(), 0xa5, bytes + skip);
  }
  unsigned char* data() { return memory.get() + skip; }
  int64_t bytes, skip;
  std::unique_ptr<unsigned char[]> memory;
};

uint32_t noise_of_test() {
  static uint32_t state = 1;
  return state = state * 1664525u + 1013904223u;
}

void fill(Buffer& b, Type type) {
  const int64_t n = b.bytes / size_of(type);
  for (int64_t i = 0; i < n; ++i) {
    const float v = (static_cast<float>(noise_of_test() >> 8) * 0x1p-24f - 0.5f) * (i % 7 == 0 ? 4000.0f : 2.0f);
    const double d = v;
    const BFloat16 h = from_float<BFloat16>(v);
    const Float16 f = from_float<Float16>(v);
    const void* source = type == Type::float32    ? static_cast<const void*>(&v)
                         : type == Type::float64  ? &d
                         : type == Type::bfloat16 ? static_cast<const void*>(&h)
                                                  : &f;
    std::memcpy(b.data() + i * size_of(type), source, size_of(type));
  }
}

const cpu::Level& portable() {
  int count;
  return cpu::levels(&count)[0];
}

void serial(int64_t count, int64_t, cpu::Body body, const void* context) { body(context, 0, count); }

[[noreturn]] void fail(const char* what, const AddNoise& a, unsigned grid) {
  std::printf("%s differs: batch %ld size %ld inputs %d types %d -> %d scale %d grid %u\n", what, long(a.batch),
              long(a.size), a.inputs, int(a.in_type), int(a.out_type), a.scale != nullptr, grid);
  std::exit(1);
}

void check_add_noise(Type in, Type out, int inputs, int64_t batch, int64_t size, int64_t offset, bool scaled,
                     bool normals, unsigned grid, simt::Schedule schedule, bool shared = false) {
  const int64_t rng[2] = {-0x123456789abcdef, 0x700000005};
  const int64_t index[5] = {0, 0xffffffff, 0x100000003, 77, -5};
  AddNoise a{};
  a.rng = rng;
  a.index = index;
  a.batch = batch;
  a.size = size;
  a.inputs = inputs;
  a.in_type = in;
  a.out_type = out;
  const Type compute = in == Type::float64 ? Type::float64 : Type::float32;
  Buffer x[2] = {{batch * size, in, offset}, {batch * size, in, offset}};
  Buffer sigma(batch, compute, 0), scale(batch, compute, 0);
  fill(sigma, compute);
  fill(scale, compute);
  for (int i = 0; i < inputs; ++i) {
    fill(x[i], in);
    a.streams[i] = stream_word(shared ? 3 : 3 + i, 1, 2);
    a.x0[i] = normals ? nullptr : x[i].data();
  }
  a.sigma = sigma.data();
  a.scale = scaled ? scale.data() : nullptr;

  Buffer expected(inputs * batch * size, out, offset), got(inputs * batch * size, out, offset);
  a.out = expected.data();
  cpu::add_noise(portable(), a, serial);
  a.out = got.data();
  const int64_t other_rng[2] = {rng[0], rng[1] + 1};
  if (sabotage) a.rng = other_rng;
  const bool in_aligned = normals || cuda::inputs_aligned(a), out_aligned = cuda::is_aligned(a.out, size, out);
  cuda::visit_types(a, [&](auto* in_null, auto* out_null, auto constant) {
    using In = std::remove_pointer_t<decltype(in_null)>;
    using Out = std::remove_pointer_t<decltype(out_null)>;
    simt::launch({"add_noise", {grid}, cuda::threads}, {schedule}, [&] {
      cuda::add_noise_kernel<In, Out, decltype(constant)::normals_only>(a, in_aligned, out_aligned);
    });
    return 0;
  });
  if (std::memcmp(expected.data(), got.data(), expected.bytes)) fail("add_noise", a, grid);
  ++comparisons;
}

void check_words(int64_t batch, int64_t count, unsigned grid) {
  const int64_t rng[2] = {5, 6};
  const int64_t index[3] = {1, 2, 0x1ffffffff};
  Buffer expected(batch * count, Type::float64, 0), got(batch * count, Type::float64, 0);
  Words w{rng, index, batch, count, stream_word(9, 8, 7), reinterpret_cast<int64_t*>(expected.data())};
  cpu::random_words(portable(), w, serial);
  w.out = reinterpret_cast<int64_t*>(got.data());
  simt::launch({"random_words", {grid}, cuda::threads}, {}, [&] { cuda::random_words_kernel(w); });
  if (std::memcmp(expected.data(), got.data(), expected.bytes)) {
    std::printf("random_words differs: batch %ld count %ld grid %u\n", long(batch), long(count), grid);
    std::exit(1);
  }
  ++comparisons;
}

// The 64-bit branch of divide(), which no kernel reaches at the size of a test.
void check_divide() {
  const int64_t n[] = {0, 1, 7, 0xffffffff, 0x100000000, 0x7fffffffffff}, d[] = {1, 3, 8, 65537};
  for (int64_t a : n) {
    for (int64_t b : d) {
      int64_t remainder;
      const bool wide = a >= int64_t{1} << 32;
      if (cuda::divide(a, b, wide, remainder) != a / b || remainder != a % b) {
        std::printf("divide differs: %ld / %ld\n", long(a), long(b));
        std::exit(1);
      }
      ++comparisons;
    }
  }
}

}  // namespace

int main(int argc, char**) {
  sabotage = argc > 1;
  const Type small[] = {Type::float32, Type::bfloat16, Type::float16};
  const int64_t sizes[] = {1, 3, 4, 8, 20, 31, 64, 1001, 4104};
  for (unsigned grid = 1; grid <= 3; ++grid) {
    for (int64_t size : sizes) {
      for (int64_t offset = 0; offset < 2; ++offset) {
        for (Type in : small) {
          for (Type out : small) {
            const auto schedule = static_cast<simt::Schedule>(size % 3);
            check_add_noise(in, out, 2, 3, size, offset, offset == 0, false, grid, schedule);
          }
        }
        check_add_noise(Type::float64, Type::float64, 2, 5, size, offset, true, false, grid, simt::Schedule::forward);
        check_add_noise(Type::float32, Type::bfloat16, 2, 5, size, offset, true, false, grid, simt::Schedule::backward,
                        true);
        check_add_noise(Type::bfloat16, Type::float32, 2, 3, size, offset, false, false, grid, simt::Schedule::forward,
                        true);
        check_add_noise(Type::float32, Type::float32, 1, 5, size, offset, false, true, grid, simt::Schedule::backward);
      }
      check_words(3, size, grid);
    }
  }
  check_divide();
  std::printf("%d comparisons\n", comparisons);
}
