// Operations of a whole warp: ldmatrix, mma, shuffles, barriers, branches.
#include <cmath>

#include "machine.h"

namespace ptx {
namespace {

float number(u32 b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

// "ldmatrix": thread 8 i + j gives the address of row j of matrix i; thread t gets of each matrix row t / 4, elements
// 2 (t % 4) and the next; with .trans, those of the transposed matrix.
template <bool trans>
void ldmatrix(Warp& w, const Instruction& i, u32 m) {
  int count = i.result_count;
  u32 used = count == 4 ? ~0u : count == 2 ? 0xffff : 0xff;
  need_written(w, i, i.sources[0], used, "address");
  u16 e[4][8][8];
  u32 addresses[32] = {};
  for (int k = 0; k < count; ++k)
    for (int row = 0; row < 8; ++row) {
      int l = k * 8 + row;
      u32 a = w.r<u32>(i.sources[0])[l] + i.immediate;
      addresses[l] = a;
      std::memcpy(e[k][row], shared_at(w, i, l, a, 16, false, 32), 16);
    }
  count_shared(i, addresses, used, 16);
  for (int k = 0; k < count; ++k) {
    alignas(64) u32 t[32];
    LANES {
      int row = l / 4, column = l % 4 * 2;
      u32 low = trans ? e[k][column][row] : e[k][row][column],
          high = trans ? e[k][column + 1][row] : e[k][row][column + 1];
      t[l] = low | high << 16;
    }
    put<u32>(w, i.results[k], t, m, ~0u);
  }
}

// "mma.m16n8k16" with bf16: groupID = lane >> 2, thread in group = lane % 4. A: a0 a1 (register 0) in row groupID,
// a2 a3 (1) in row groupID + 8, columns 2 t and the next; registers 2 and 3 the same, eight columns further. B: b0 b1
// (0) rows 2 t and the next, b2 b3 (1) eight rows further, column groupID. C: c0 c1 row groupID, c2 c3 row groupID + 8,
// columns 2 t and the next.
void mma(Warp& w, const Instruction& i, u32 m) {
  for (int j = 0; j < 6; ++j) need_written(w, i, i.sources[j], m, "operand of mma");
  for (int j = 6; j < 10; ++j) need_written(w, i, i.sources[j], m, "accumulator of mma");
  alignas(64) float A[16][16], B[16][8], C[16][8];
  const u32* a[4];
  const u32* b[2];
  const float* c[4];
  for (int j = 0; j < 4; ++j) a[j] = w.r<u32>(i.sources[j]), c[j] = w.r<float>(i.sources[6 + j]);
  for (int j = 0; j < 2; ++j) b[j] = w.r<u32>(i.sources[4 + j]);
  LANES {
    int g = l >> 2, t = l & 3;
    for (int x = 0; x < 8; ++x) {  // a0 ... a7
      int row = (x < 2 || (x >= 4 && x < 6)) ? g : g + 8;
      int column = t * 2 + (x & 1) + (x >= 4 ? 8 : 0);
      u32 v = a[x / 2][l];
      A[row][column] = number(x & 1 ? v & 0xffff0000u : v << 16);
    }
    for (int x = 0; x < 4; ++x) {
      int row = t * 2 + (x & 1) + (x >= 2 ? 8 : 0);
      u32 v = b[x / 2][l];
      B[row][g] = number(x & 1 ? v & 0xffff0000u : v << 16);
    }
    for (int x = 0; x < 4; ++x) C[x < 2 ? g : g + 8][t * 2 + (x & 1)] = c[x][l];
  }
  if (!options.coarse_sums) {
    for (int r = 0; r < 16; ++r) {
      alignas(64) double sum[8];
      for (int n = 0; n < 8; ++n) sum[n] = C[r][n];
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < 8; ++n) sum[n] += double(A[r][k]) * B[k][n];
      for (int n = 0; n < 8; ++n) C[r][n] = float(sum[n]);
    }
  } else {  // fp32 sums of four products at a time, truncated toward zero, as a coarse tensor core might
    for (int r = 0; r < 16; ++r)
      for (int n = 0; n < 8; ++n) {
        float sum = C[r][n];
        for (int k = 0; k < 16; k += 4) {
          double s = sum;
          for (int j = 0; j < 4; ++j) s += double(A[r][k + j]) * B[k + j][n];
          float f = float(s);
          if (std::fabs(double(f)) > std::fabs(s)) f = std::nextafterf(f, 0.0f);
          sum = f;
        }
        C[r][n] = sum;
      }
  }
  alignas(64) float d[4][32];
  LANES {
    int g = l >> 2, t = l & 3;
    for (int x = 0; x < 4; ++x) d[x][l] = C[x < 2 ? g : g + 8][t * 2 + (x & 1)];
  }
  for (int j = 0; j < 4; ++j) put<float>(w, i.results[j], d[j], m, ~0u);
}

// "shfl.sync": d|p, a, b, c, membermask; c holds a clamp (bits 0 to 4) and a segment mask (bits 8 to 12).
enum class Shuffle { index, up, down, butterfly };

template <Shuffle mode>
void shuffle(Warp& w, const Instruction& i, u32 m) {
  const u32 *a = w.r<u32>(i.sources[0]), *b = w.r<u32>(i.sources[1]), *c = w.r<u32>(i.sources[2]),
            *member = w.r<u32>(i.sources[3]);
  alignas(64) u32 t[32];
  u32 p = 0, def = 0;
  LANES {
    t[l] = 0;
    if (!(m >> l & 1)) continue;
    if (!(member[l] >> l & 1)) fail("shfl.sync by a lane that is not in its mask: " + where(w, i, l));
    u32 bval = b[l] & 31, cval = c[l] & 31, mask = c[l] >> 8 & 31;
    u32 max = (l & mask) | (cval & ~mask), min = l & mask;
    u32 j = 0;
    bool in;
    switch (mode) {
      case Shuffle::index:
        j = min | (bval & ~mask);
        in = j <= max;
        break;
      case Shuffle::up:
        j = l - bval;
        in = s32(j) >= s32(max);
        break;
      case Shuffle::down:
        j = l + bval;
        in = j <= max;
        break;
      case Shuffle::butterfly: j = l ^ bval; in = j <= max;
    }
    if (!in) j = l;
    if (!(member[l] >> j & 1) || !(m >> j & 1))
      fail("shfl.sync reads a lane that does not take part: " + where(w, i, l));
    t[l] = a[j];
    p |= u32(in) << l;
    def |= (w.written[i.sources[0].mask] >> j & 1) << l;
  }
  put<u32>(w, i.results[0], t, m, def);
  if (i.result_count > 1) put_predicate(w, i.results[1], p, m, ~0u);
}

}  // namespace

#define COLLECTIVE(...)                                                         \
  Entry {                                                                       \
    [](Warp& w, const Instruction& i, u32 m) { __VA_ARGS__; }, Kind::collective \
  }
#define CONTROL(kind)                                 \
  Entry {                                             \
    [](Warp&, const Instruction&, u32) {}, Kind::kind \
  }

void add_warp_operations(Table& t) {
  for (const std::string n : {"x4", "x2", "x1"}) {
    t["ldmatrix.sync.aligned.m8n8." + n + ".shared.b16"] = COLLECTIVE(ldmatrix<false>(w, i, m));
    t["ldmatrix.sync.aligned.m8n8." + n + ".trans.shared.b16"] = COLLECTIVE(ldmatrix<true>(w, i, m));
  }
  t["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = COLLECTIVE(mma(w, i, m));
  t["shfl.sync.idx.b32"] = COLLECTIVE(shuffle<Shuffle::index>(w, i, m));
  t["shfl.sync.up.b32"] = COLLECTIVE(shuffle<Shuffle::up>(w, i, m));
  t["shfl.sync.down.b32"] = COLLECTIVE(shuffle<Shuffle::down>(w, i, m));
  t["shfl.sync.bfly.b32"] = COLLECTIVE(shuffle<Shuffle::butterfly>(w, i, m));
  t["bar.sync"] = t["bar.arrive"] = t["barrier.sync"] = CONTROL(block_barrier);
  t["bar.warp.sync"] = CONTROL(warp_barrier);
  t["bra"] = t["bra.uni"] = CONTROL(branch);
  t["ret"] = t["exit"] = CONTROL(leave);
}

}  // namespace ptx
