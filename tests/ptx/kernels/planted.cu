// Kernels with one bug each, which the simulator must report in every mode: this proves that it detects them. Each is a
// struct with a `run`; those that are correct pass in every mode.
#include <cstdio>
#include <cstring>

#include "csrc/cuda/ptx.cuh"

namespace diffratio::planted {

constexpr int threads = 96;  // three warps
constexpr uint32_t shared_bytes = 4096;

DR_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DR_DEVICE int lane() { return thread() % 32; }
DR_DEVICE int in_next_warp() { return (thread() + 32) % threads; }

// Memory of a launch: values are written to `out`, so that the compiler does not remove them.
struct Memory {
  float* in;       // 2 * 4 * threads
  float* out;      // 4 * threads for each block
  uint32_t* word;  // 4 counters, zero
};
DR_DEVICE void keep(const Memory& m, float value) { m.out[blockIdx.x * 4 * threads + thread()] = value; }

// --- barriers --------------------------------------------------------------------------------------------------

enum class Barriers { no_read, no_reuse, no_end, all };

// Neighbors in another warp exchange values, twice in each of three samples.
template <Barriers missing>
struct Exchange {
  static DR_DEVICE void run(const Memory& m) {
    ptx::SharedArena arena;
    const auto x = arena.take<float>(threads);
    float sum = 0;
#pragma unroll 1
    for (int sample = 0; sample < 3; ++sample) {
      x.store(thread(), 1.0f + sample);
      if (missing != Barriers::no_read) ptx::block_sync();
      sum += x.load(in_next_warp());
      if (missing != Barriers::no_reuse) ptx::block_sync();
      x.store(thread(), 2.0f + sample);
      ptx::block_sync();
      sum += x.load(in_next_warp());
      ptx::forget_shared();
      if (missing != Barriers::no_end) ptx::block_sync();
    }
    keep(m, sum);
  }
};

struct BarrierInHalfABlock {
  static DR_DEVICE void run(const Memory& m) {
    if (thread() < 64) ptx::block_sync();
    keep(m, 0);
  }
};
struct BarriersInBothBranches {  // allowed by the hardware, not by the language
  static DR_DEVICE void run(const Memory& m) {
    if (thread() < 64) {
      keep(m, 1);
      ptx::block_sync();
    } else {
      keep(m, 2);
      ptx::block_sync();
    }
    keep(m, 3);
  }
};
struct ExitBeforeBarrier {
  static DR_DEVICE void run(const Memory& m) {
    if (thread() == 95) return;
    ptx::block_sync();
    keep(m, 0);
  }
};
struct CountsDiffer {
  static DR_DEVICE void run(const Memory& m) {
    ptx::barrier_sync(1, thread() < 32 ? 64 : 96);
    keep(m, 0);
  }
};
struct NeverFull {
  static DR_DEVICE void run(const Memory& m) {
    ptx::barrier_sync(2, 128);
    keep(m, 0);
  }
};
struct BarrierOfOthers {  // orders warps 0 and 1, and warp 2 reads too
  static DR_DEVICE void run(const Memory& m) {
    ptx::SharedArena arena;
    const auto x = arena.take<float>(1);
    if (thread() == 0) x.store(0, 1.0f);
    if (thread() < 64) ptx::barrier_sync(1, 64);
    keep(m, x.load(0));
  }
};

enum class Within { nothing, shuffle, warp_sync };

// Passes values to a neighbor in the warp, or in the block.
template <Within order, bool block>
struct HandOver {
  static DR_DEVICE void run(const Memory& m) {
    ptx::SharedArena arena;
    const auto x = arena.take<float>(threads);
    x.store(thread(), 1.0f);
    float other = 0;
    if (order == Within::warp_sync) ptx::warp_sync();
    if (order == Within::shuffle) other = ptx::shuffle_xor(m.in[thread()], 1);
    keep(m, other + x.load(block ? in_next_warp() : thread() ^ 1));
  }
};
struct TwoWriters {
  static DR_DEVICE void run(const Memory&) {
    ptx::SharedArena arena;
    const auto x = arena.take<float>(1);
    if (lane() == 0) x.store(0, 1.0f);
  }
};

// --- asynchronous copies ---------------------------------------------------------------------------------------

enum class Copies { no_commit, no_wait, wrong_count, wait_after_barrier, none_but_own, never_waited, onto_read, all };

template <Copies wrong>
struct Copying {
  static DR_DEVICE void run(const Memory& m) {
    ptx::SharedArena arena;
    const auto x = arena.take<float>(2 * 4 * threads);
    for (int group = 0; group < 2; ++group) {
      const int first = 4 * (group * threads + thread());
      ptx::copy_async(x.address(first), m.in + first);
      if (wrong != Copies::no_commit) ptx::copy_commit();
    }
    if (wrong == Copies::wait_after_barrier) ptx::block_sync();
    if (wrong == Copies::wrong_count)
      ptx::copy_wait<2>();
    else if (wrong != Copies::no_wait)
      ptx::copy_wait<1>();
    if (wrong != Copies::wait_after_barrier && wrong != Copies::none_but_own) ptx::block_sync();
    if (wrong != Copies::never_waited) keep(m, x.load(4 * in_next_warp()));
    if (wrong == Copies::onto_read) ptx::copy_async(x.address(4 * thread()), m.in);
    if (wrong != Copies::never_waited) {
      ptx::copy_commit();
      ptx::copy_wait<0>();
    }
  }
};

// --- bounds, life time, alignment ------------------------------------------------------------------------------

struct StoreOutOfBounds {
  static DR_DEVICE void run(const Memory&) {
    ptx::SharedArena arena;
    const auto x = arena.take<float>(threads);
    arena.take<float>(threads);
    x.store(thread() + 1, 1.0f);
  }
};
struct LoadOutOfBounds {
  static DR_DEVICE void run(const Memory& m) {
    ptx::SharedArena arena;
    const auto x = arena.take<float>(threads), y = arena.take<float>(threads);
    x.store(thread(), 1.0f);
    y.store(thread(), 1.0f);
    ptx::block_sync();
    keep(m, x.load(thread() + 1));
  }
};
struct CopyOutOfBounds {
  static DR_DEVICE void run(const Memory& m) {
    ptx::SharedArena arena;
    const auto x = arena.take<float>(4 * threads);
    arena.take<float>(threads);
    ptx::copy_async(x.address(4 * thread() + 4), m.in);
    ptx::copy_commit();
    ptx::copy_wait<0>();
  }
};
struct RowOutOfBounds {
  static DR_DEVICE void run(const Memory& m) {
    ptx::SharedArena arena;
    const auto x = arena.take<uint16_t>(8 * 8);
    for (int i = thread(); i < 64; i += threads) x.store(i, uint16_t{0});
    ptx::block_sync();
    uint32_t r[4];
    ptx::ldmatrix_x4(r, x.address(lane() * 8));
    keep(m, static_cast<float>(r[3]));
  }
};
template <int shift>
struct ShiftedRow {
  static DR_DEVICE void run(const Memory& m) {
    ptx::SharedArena arena;
    const auto x = arena.take<uint16_t>(9 * 8);
    for (int i = thread(); i < 72; i += threads) x.store(i, uint16_t{0});
    ptx::block_sync();
    uint32_t r[2];
    ptx::ldmatrix_x2(r, x.address(lane() % 8 * 8 + shift));
    keep(m, static_cast<float>(r[0]));
  }
};
struct MisalignedPair {
  static DR_DEVICE void run(const Memory&) {
    ptx::SharedArena arena;
    const auto x = arena.take<uint16_t>(2 * threads);
    x.store(2 * thread() + (thread() == 3), uint32_t{0});
  }
};
struct NeverWritten {
  static DR_DEVICE void run(const Memory& m) {
    ptx::SharedArena arena;
    keep(m, arena.take<float>(threads).load(thread()));
  }
};
struct OfTheLastSample {
  static DR_DEVICE void run(const Memory& m) {
    ptx::SharedArena arena;
    const auto x = arena.take<float>(threads);
    x.store(thread(), m.in[thread()]);
    ptx::forget_shared();
    keep(m, x.load(thread()));
  }
};
struct MoreThanTheLaunchHas {
  static DR_DEVICE void run(const Memory&) {
    ptx::SharedArena arena;
    arena.take<float>(1024);
    arena.take<float>(1);
  }
};
struct GlobalOutOfBounds {
  static DR_DEVICE void run(const Memory& m) { keep(m, m.in[2 * 4 * threads + thread() - threads + 1]); }
};

// --- whole warps -----------------------------------------------------------------------------------------------

template <bool other_half>
struct HalfAWarpMultiplies {
  static DR_DEVICE void run(const Memory& m) {
    float d[4] = {};
    const uint32_t a[4] = {1, 2, 3, 4};
    if (lane() < 16) {
      ptx::mma_bf16(d, a, 0, 0);
      keep(m, d[0]);
    } else if (other_half) {
      ptx::mma_bf16(d, a, 1, 1);
      keep(m, d[1] + 1);
    }
  }
};

// --- global memory ---------------------------------------------------------------------------------------------

template <bool between_blocks>
struct ThroughGlobalMemory {
  static DR_DEVICE void run(const Memory& m) {
    const int n = 4 * threads, offset = static_cast<int>(blockIdx.x) * n;
    m.out[offset + thread()] = 1.0f;
    if (between_blocks) ptx::block_sync();
    m.out[offset + 2 * threads + thread()] = m.out[(between_blocks ? n - offset : offset) + in_next_warp()];
  }
};

// A count of threads that the last block to arrive reads: with fences, every block's part is in it.
template <bool fences>
struct Counting {
  static DR_DEVICE void run(const Memory& m) {
    if (lane() == 0) atomicAdd(m.word, 1u);
    if (fences) __threadfence();
    ptx::block_sync();
    if (thread() != 0) return;
    if (fences) __threadfence();
    if (atomicAdd(m.word + 1, 1u) + 1 == gridDim.x) {
      if (fences) __threadfence();
      const uint32_t count = atomicAdd(m.word, 0u);
      m.word[2] = count == gridDim.x * (threads / 32);
    }
  }
};

// Data of every block that the last one to arrive reads.
template <bool before, bool after>
struct LastBlock {
  static DR_DEVICE void run(const Memory& m) {
    if (thread() != 0) return;
    float* mine = m.out + blockIdx.x * 4 * threads;
    *mine = 1.0f;
    if (before) __threadfence();
    if (atomicAdd(m.word, 1u) + 1 != gridDim.x) return;
    if (after) __threadfence();
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += m.out[b * 4 * threads];
    m.word[2] = sum == static_cast<float>(gridDim.x);
  }
};

template <class Bug>
__global__ void __launch_bounds__(threads) planted_kernel(const Memory m) {
  Bug::run(m);
}

// --- the table -------------------------------------------------------------------------------------------------

struct Entry {
  const char* name;
  const char* expected;  // kinds of reports, one of which it must be; empty: none
  int blocks;
  bool cooperative;
  void (*kernel)(const Memory);
};

const Entry entries[] = {
    {"exchange", "", 1, false, &planted_kernel<Exchange<Barriers::all>>},
    {"copies", "", 1, false, &planted_kernel<Copying<Copies::all>>},
    {"aligned rows", "", 1, false, &planted_kernel<ShiftedRow<0>>},
    {"a count with fences", "counted", 3, true, &planted_kernel<Counting<true>>},
    {"the last block with fences", "counted", 3, true, &planted_kernel<LastBlock<true, true>>},
    {"no barrier before a read", "race|uninitialized", 1, false, &planted_kernel<Exchange<Barriers::no_read>>},
    {"no barrier before a buffer's reuse", "race", 1, false, &planted_kernel<Exchange<Barriers::no_reuse>>},
    {"no barrier at the end of a sample", "race", 1, false, &planted_kernel<Exchange<Barriers::no_end>>},
    {"a barrier in half a block", "deadlock", 1, false, &planted_kernel<BarrierInHalfABlock>},
    {"barriers in both branches", "divergence", 1, false, &planted_kernel<BarriersInBothBranches>},
    {"a thread exits before a barrier", "deadlock", 1, false, &planted_kernel<ExitBeforeBarrier>},
    {"a named barrier's counts differ", "barrier", 1, false, &planted_kernel<CountsDiffer>},
    {"a named barrier is never full", "deadlock", 1, false, &planted_kernel<NeverFull>},
    {"a named barrier that the reader does not share", "race|uninitialized", 1, false,
     &planted_kernel<BarrierOfOthers>},
    {"no warp_sync around a warp's staging", "race|uninitialized", 1, false,
     &planted_kernel<HandOver<Within::nothing, false>>},
    {"warp_sync instead of block_sync", "race|uninitialized", 1, false,
     &planted_kernel<HandOver<Within::warp_sync, true>>},
    {"a shuffle instead of warp_sync", "race", 1, false, &planted_kernel<HandOver<Within::shuffle, false>>},
    {"two writers", "race", 1, false, &planted_kernel<TwoWriters>},
    {"no commit", "copy in flight|unfinished copy", 1, false, &planted_kernel<Copying<Copies::no_commit>>},
    {"no wait", "copy in flight", 1, false, &planted_kernel<Copying<Copies::no_wait>>},
    {"a wait for too few groups", "copy in flight", 1, false, &planted_kernel<Copying<Copies::wrong_count>>},
    {"a wait after the barrier", "race|copy in flight", 1, false, &planted_kernel<Copying<Copies::wait_after_barrier>>},
    {"a wait without a barrier", "race|copy in flight|uninitialized", 1, false,
     &planted_kernel<Copying<Copies::none_but_own>>},
    {"a copy never waited for", "unfinished copy", 1, false, &planted_kernel<Copying<Copies::never_waited>>},
    {"a copy onto what others read", "race|copy in flight", 1, false, &planted_kernel<Copying<Copies::onto_read>>},
    {"a store out of bounds", "out of bounds", 1, false, &planted_kernel<StoreOutOfBounds>},
    {"a load out of bounds", "out of bounds", 1, false, &planted_kernel<LoadOutOfBounds>},
    {"a copy out of bounds", "out of bounds", 1, false, &planted_kernel<CopyOutOfBounds>},
    {"a row of ldmatrix out of bounds", "out of bounds", 1, false, &planted_kernel<RowOutOfBounds>},
    {"a row of ldmatrix off by one", "misaligned", 1, false, &planted_kernel<ShiftedRow<1>>},
    {"a pair at an odd element", "misaligned", 1, false, &planted_kernel<MisalignedPair>},
    {"never written", "uninitialized", 1, false, &planted_kernel<NeverWritten>},
    {"left from the last sample", "stale", 1, false, &planted_kernel<OfTheLastSample>},
    {"more shared memory than the launch has", "out of bounds", 1, false, &planted_kernel<MoreThanTheLaunchHas>},
    {"global memory out of bounds", "out of bounds", 1, false, &planted_kernel<GlobalOutOfBounds>},
    {"half a warp multiplies", "divergence", 1, false, &planted_kernel<HalfAWarpMultiplies<false>>},
    {"a product in both branches", "divergence", 1, false, &planted_kernel<HalfAWarpMultiplies<true>>},
    {"a race in global memory", "race|uninitialized", 1, false, &planted_kernel<ThroughGlobalMemory<false>>},
    {"a race between blocks", "race|uninitialized", 2, false, &planted_kernel<ThroughGlobalMemory<true>>},
    {"a race between blocks that are alive", "race|uninitialized", 2, true, &planted_kernel<ThroughGlobalMemory<true>>},
    {"a count without fences", "miscounted|race", 3, true, &planted_kernel<Counting<false>>},
    {"no fence before a count", "race", 3, true, &planted_kernel<LastBlock<false, true>>},
    {"no fence after a count", "race", 3, true, &planted_kernel<LastBlock<true, false>>},
};

}  // namespace diffratio::planted

using namespace diffratio::planted;

extern "C" {

int planted_count() { return sizeof entries / sizeof entries[0]; }
const char* planted_name(int i) { return entries[i].name; }
const char* planted_expected(int i) { return entries[i].expected; }
int planted_blocks(int i) { return entries[i].blocks; }

int planted_launch(int i, float* in, float* out, uint32_t* word) {
  const Memory m{in, out, word};
  void* arguments[] = {const_cast<Memory*>(&m)};
  const void* kernel = reinterpret_cast<const void*>(entries[i].kernel);
  if (entries[i].cooperative) {
    return cudaLaunchCooperativeKernel(kernel, entries[i].blocks, threads, arguments, shared_bytes, nullptr);
  }
  return cudaLaunchKernel(kernel, entries[i].blocks, threads, arguments, shared_bytes, nullptr);
}
}
