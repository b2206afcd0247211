// Kernels with one bug each, which the shim must report in every mode: this proves that it detects them.
#include "global_memory.h"
#include "kernels/cases.h"

using namespace diffratio;
using simt::Case;
using simt::Mode;
using simt::Planted;

namespace {

constexpr unsigned threads = 96;  // three warps
int thread() { return static_cast<int>(threadIdx.x); }
int lane() { return thread() % 32; }

// A bug that is detected by its accesses, not by the result.
Planted planted(const char* name, const char* expected, std::function<void()> body, uint32_t shared_bytes = 4096,
                Dim3 grid = {}, bool cooperative = false) {
  return {{name,
           [=](Mode mode) {
             simt::launch({name, grid, threads, shared_bytes, cooperative}, mode, body);
             return std::string();
           }},
          expected};
}

// --- barriers --------------------------------------------------------------------------------------------------

enum class Barriers { no_read, no_reuse, no_end, all };

// Neighbors in another warp exchange values, twice in each of three samples.
template <Barriers missing>
void exchange() {
  ptx::SharedArena arena;
  const auto x = arena.take<float>(threads, "x");
  for (int sample = 0; sample < 3; ++sample) {
    x.store(thread(), 1.0f);
    if (missing != Barriers::no_read) ptx::block_sync();
    x.load((thread() + 32) % threads);
    if (missing != Barriers::no_reuse) ptx::block_sync();
    x.store(thread(), 2.0f);
    ptx::block_sync();
    x.load((thread() + 32) % threads);
    ptx::forget_shared();
    if (missing != Barriers::no_end) ptx::block_sync();
  }
}

void barrier_in_half_a_block() {
  if (thread() < 64) ptx::block_sync();
}

void barriers_in_both_branches() {  // allowed by the hardware, not by the language
  if (thread() < 64)
    ptx::block_sync();
  else
    ptx::block_sync();
}

void exit_before_barrier() {
  if (thread() == 95) return;
  ptx::block_sync();
}

void named_barrier_counts() { ptx::barrier_sync(1, thread() < 32 ? 64 : 96); }
void named_barrier_never_full() { ptx::barrier_sync(2, thread() < 32 ? 96 : 32); }

void named_barrier_of_others() {  // orders warps 0 and 1, and warp 2 reads too
  ptx::SharedArena arena;
  const auto x = arena.take<float>(1, "x");
  if (thread() == 0) x.store(0, 1.0f);
  if (thread() < 64) ptx::barrier_sync(1, 64);
  x.load(0);
}

void staging_without_warp_sync() {
  ptx::SharedArena arena;
  const auto x = arena.take<float>(threads, "x");
  x.store(thread(), 1.0f);
  x.load(thread() ^ 1);
}

void warp_sync_is_no_block_sync() {
  ptx::SharedArena arena;
  const auto x = arena.take<float>(threads, "x");
  x.store(thread(), 1.0f);
  ptx::warp_sync();
  x.load((thread() + 32) % threads);
}

void two_writers() {
  ptx::SharedArena arena;
  const auto x = arena.take<float>(1, "x");
  if (lane() == 0) x.store(0, 1.0f);
}

void shuffle_does_not_order() {
  ptx::SharedArena arena;
  const auto x = arena.take<float>(threads, "x");
  x.store(thread(), 1.0f);
  ptx::shuffle_xor(1.0f, 1);
  x.load(thread() ^ 1);
}

// --- asynchronous copies ---------------------------------------------------------------------------------------

enum class Copies { no_commit, no_wait, wrong_count, wait_after_barrier, none_but_own, never_waited, onto_read, all };
alignas(16) float source[2 * 4 * threads];

template <Copies wrong>
void copies() {
  ptx::SharedArena arena;
  const auto x = arena.take<float>(2 * 4 * threads, "x");
  for (int group = 0; group < 2; ++group) {
    const int first = 4 * (group * static_cast<int>(threads) + thread());
    ptx::copy_async(x.address(first), source + first);
    if (wrong != Copies::no_commit) ptx::copy_commit();
  }
  if (wrong == Copies::wait_after_barrier) ptx::block_sync();
  if (wrong == Copies::wrong_count)
    ptx::copy_wait<2>();
  else if (wrong != Copies::no_wait)
    ptx::copy_wait<1>();
  if (wrong != Copies::wait_after_barrier && wrong != Copies::none_but_own) ptx::block_sync();
  if (wrong != Copies::never_waited) x.load(4 * ((thread() + 32) % static_cast<int>(threads)));
  if (wrong == Copies::onto_read) ptx::copy_async(x.address(4 * thread()), source);
  if (wrong != Copies::never_waited) {
    ptx::copy_commit();
    ptx::copy_wait<0>();
  }
}

// --- lane maps -------------------------------------------------------------------------------------------------

struct WrongRows : reference::GemmMaps {  // the halves of b's 16 x 16 exchanged
  static fragment::Element b_row(int lane) { return fragment::a_row(lane); }
};
struct WrongAccumulator : reference::GemmMaps {
  static fragment::Element accumulator(int lane) { return {lane % 8, lane / 8 * 2}; }
};

// --- bounds, life time, alignment ------------------------------------------------------------------------------

void store_out_of_bounds() {
  ptx::SharedArena arena;
  const auto x = arena.take<float>(threads, "x");
  arena.take<float>(threads, "y");
  x.store(thread() + 1, 1.0f);
}

void part_out_of_bounds() {
  ptx::SharedArena arena;
  arena.take<float>(threads, "x").part(90, 7);
}

void copy_into_redzone() {  // by address, without the array's length
  ptx::SharedArena arena;
  const auto x = arena.take<float>(4 * threads, "x");
  arena.take<float>(threads, "y");
  ptx::copy_async(x.address(4 * thread() + 4), source);
  ptx::copy_commit();
  ptx::copy_wait<0>();
}

void row_in_redzone() {
  ptx::SharedArena arena;
  const auto x = arena.take<BFloat16>(8 * 8, "x");
  for (int i = thread(); i < 64; i += threads) x.store(i, BFloat16{0});
  ptx::block_sync();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, x.address(lane() * 8));
}

template <int shift>
void row_shifted() {
  ptx::SharedArena arena;
  const auto x = arena.take<BFloat16>(9 * 8, "x");
  for (int i = thread(); i < 72; i += threads) x.store(i, BFloat16{0});
  ptx::block_sync();
  uint32_t r[2];
  ptx::ldmatrix_x2(r, x.address(lane() % 8 * 8 + shift));
}

void pair_misaligned() {
  ptx::SharedArena arena;
  const auto x = arena.take<BFloat16>(2 * threads, "x");
  x.store(2 * thread() + (thread() == 3), uint32_t{0});
}

void never_written() {
  ptx::SharedArena arena;
  arena.take<float>(threads, "x").load(thread());
}

void of_the_last_sample() {
  ptx::SharedArena arena;
  const auto x = arena.take<float>(threads, "x");
  x.store(thread(), 1.0f);
  ptx::forget_shared();
  x.load(thread());
}

void more_than_the_launch_gives() {
  ptx::SharedArena arena;
  arena.take<float>(1024, "x");
  arena.take<float>(1, "y");
}

// --- whole warps -----------------------------------------------------------------------------------------------

void half_a_warp_multiplies() {
  float d[4] = {};
  const uint32_t a[4] = {};
  if (lane() < 16) ptx::mma_bf16(d, a, 0, 0);
}

void two_places_of_a_product() {
  float d[4] = {};
  const uint32_t a[4] = {};
  if (lane() < 16)
    ptx::mma_bf16(d, a, 0, 0);
  else
    ptx::mma_bf16(d, a, 0, 0);
}

// --- global memory ---------------------------------------------------------------------------------------------

float results[2 * threads];

template <bool between_blocks>
void through_global_memory() {
  const int n = static_cast<int>(threads), offset = static_cast<int>(blockIdx.x) * n;
  ptx::store(results + offset + thread(), 1.0f);
  if (between_blocks) ptx::block_sync();
  ptx::load(results + (between_blocks ? n - offset : offset) + (thread() + 32) % n);
}

Planted watched(Planted p) {
  const auto run = p.bug.run;
  p.bug.run = [run](Mode mode) {
    simt::Watch watch(results, sizeof results, "results");
    return run(mode);
  };
  return p;
}

// --- the modes -------------------------------------------------------------------------------------------------

// The modes: order of the threads, and time of completion of a copy.
std::string modes_differ(Mode mode) {
  std::vector<int> order;
  float landed = 0;
  simt::launch({"modes", {}, threads, 4096}, mode, [&] {
    ptx::SharedArena arena;
    const auto x = arena.take<float>(4 * threads, "x");
    source[4 * thread()] = 1;
    ptx::copy_async(x.address(4 * thread()), source + 4 * thread());
    source[4 * thread()] = 2;  // too late, or not
    order.push_back(thread());
    ptx::warp_sync();
    order.push_back(thread());
    ptx::copy_commit();
    ptx::copy_wait<0>();
    landed = x.load(4 * thread());
  });
  using simt::Schedule;
  const bool backward = mode.schedule == Schedule::backward;
  // 32 threads come to the warp_sync and the last of them goes on; then it is the turn of
  const int next = backward ? 63 : mode.schedule == Schedule::forward ? 32 : 0;
  if (order[0] != (backward ? 95 : 0)) return "thread " + std::to_string(order[0]) + " came first";
  if (order[33] != next) return "thread " + std::to_string(order[33]) + " came after the first warp";
  if (landed != (mode.landing == simt::Landing::issue ? 1 : 2)) return "the copy landed at another time";
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  const Case correct[] = {planted("exchange", "", exchange<Barriers::all>).bug,
                          planted("copies", "", copies<Copies::all>).bug,
                          planted("aligned rows", "", row_shifted<0>).bug,
                          {"modes", modes_differ}};
  const std::vector<Planted> bugs = {
      planted("no barrier before a read", "race|uninitialized", exchange<Barriers::no_read>),
      planted("no barrier before a buffer's reuse", "race", exchange<Barriers::no_reuse>),
      planted("no barrier at the end of a sample", "race", exchange<Barriers::no_end>),
      planted("a barrier in half a block", "deadlock", barrier_in_half_a_block),
      planted("barriers in both branches", "divergence", barriers_in_both_branches),
      planted("a thread exits before a barrier", "deadlock", exit_before_barrier),
      planted("a named barrier's counts differ", "divergence", named_barrier_counts),
      planted("a named barrier is never full", "divergence|deadlock", named_barrier_never_full),
      planted("a named barrier that the reader does not share", "race|uninitialized", named_barrier_of_others),
      planted("no warp_sync around a warp's staging", "race|uninitialized", staging_without_warp_sync),
      planted("warp_sync instead of block_sync", "race|uninitialized", warp_sync_is_no_block_sync),
      planted("two writers", "race", two_writers),
      planted("a shuffle instead of warp_sync", "race", shuffle_does_not_order),
      planted("no commit", "race", copies<Copies::no_commit>),
      planted("no wait", "race", copies<Copies::no_wait>),
      planted("a wait for too few groups", "race", copies<Copies::wrong_count>),
      planted("a wait after the barrier", "race", copies<Copies::wait_after_barrier>),
      planted("a wait without a barrier", "race|uninitialized", copies<Copies::none_but_own>),
      planted("a copy never waited for", "unfinished copy", copies<Copies::never_waited>),
      planted("a copy onto what others read", "race", copies<Copies::onto_read>),
      {reference_cases::gemm<WrongRows>(1, 32, 32, 32, 1, "wrong rows for ldmatrix"), "wrong result"},
      {reference_cases::gemm<WrongAccumulator>(1, 32, 32, 32, 1, "wrong map of accumulators"), "wrong result"},
      planted("a store out of bounds", "out of bounds", store_out_of_bounds),
      planted("a part out of bounds", "out of bounds", part_out_of_bounds),
      planted("a copy into a redzone", "out of bounds", copy_into_redzone),
      planted("a row of ldmatrix in a redzone", "out of bounds", row_in_redzone),
      planted("a row of ldmatrix off by one", "misaligned", row_shifted<1>),
      planted("a pair at an odd element", "misaligned", pair_misaligned),
      planted("never written", "uninitialized", never_written),
      planted("left from the last sample", "stale", of_the_last_sample),
      planted("more shared memory than the launch gives", "arena", more_than_the_launch_gives),
      planted("half a warp multiplies", "deadlock", half_a_warp_multiplies),
      planted("a product in both branches", "divergence", two_places_of_a_product),
      watched(planted("a race in global memory", "race", through_global_memory<false>)),
      watched(planted("a race between blocks", "race", through_global_memory<true>, 4096, {2})),
      watched(planted("a race between blocks that are alive", "race", through_global_memory<true>, 4096, {2}, true)),
  };
  return simt::main_of(argc, argv, {std::begin(correct), std::end(correct)}, bugs);
}
