// ldmatrix and mma, executed for the whole warp by its last lane.
#include "../../csrc/common/types.h"
#include "banks.h"
#include "machine.h"
#include "ptx_host.h"

namespace diffratio::ptx {

using namespace simt;

namespace {

struct RowsOperand {
  uint32_t row;
  uint32_t* r;
};

template <int matrices, bool transposed>
void do_ldmatrix(Warp& warp, void* const* operands, const Site& site) {
  SharedMemory& shared = warp.lanes[0]->home->shared;
  const auto operand = [&](int lane) { return static_cast<RowsOperand*>(operands[lane]); };
  for (int i = 0; i < matrices; ++i) {
    uint32_t rows[8];
    for (int j = 0; j < 8; ++j) {
      const int lane = 8 * i + j;
      rows[j] = operand(lane)->row;
      uint16_t row[8];
      // It is not defined which lane reads, so the writer must be ordered with the lane that gives the address and with
      // the one that receives the value: even a lane's own store must be followed by a warp_sync.
      shared.read(*warp.lanes[lane], rows[j], row, 16, site);
      for (int k = 0; k < 8; ++k) {
        const int receiver = transposed ? 4 * k + j / 2 : 4 * j + k / 2, half = transposed ? j % 2 : k % 2;
        shared.read(*warp.lanes[receiver], rows[j] + 2 * k, &row[k], 2, site);
        uint32_t& r = operand(receiver)->r[i];
        r = half ? (r & 0xffffu) | static_cast<uint32_t>(row[k]) << 16 : (r & 0xffff0000u) | row[k];
      }
    }
    count_accesses(rows, 8, 16, site);
  }
}

struct ProductOperand {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

void do_mma(Warp&, void* const* operands, const Site&) {
  float a[16][16], b[16][8], d[16][8];
  const auto each = [&](auto visit) {
    for (int lane = 0; lane < 32; ++lane) visit(*static_cast<ProductOperand*>(operands[lane]), lane / 4, lane % 4 * 2);
  };
  each([&](const ProductOperand& o, int group, int pair) {
    for (int i = 0; i < 4; ++i) {  // rows group and group + 8, then eight columns on
      a[group + i % 2 * 8][pair + i / 2 * 8] = low_bf16(o.a[i]);
      a[group + i % 2 * 8][pair + i / 2 * 8 + 1] = high_bf16(o.a[i]);
      d[group + i / 2 * 8][pair + i % 2] = o.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = low_bf16(o.b[i]);
      b[pair + i * 8 + 1][group] = high_bf16(o.b[i]);
    }
  });
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  each([&](const ProductOperand& o, int group, int pair) {
    for (int i = 0; i < 4; ++i) o.d[i] = d[group + i / 2 * 8][pair + i % 2];
  });
}

template <int matrices, bool transposed>
void ldmatrix(uint32_t* r, uint32_t row, const Site& site) {
  RowsOperand operand{row, r};
  collective(transposed ? "ldmatrix_trans" : "ldmatrix", all_lanes, true, &operand, do_ldmatrix<matrices, transposed>,
             site);
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, Site site) { ldmatrix<4, false>(r, row, site); }
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row, Site site) { ldmatrix<4, true>(r, row, site); }
void ldmatrix_x2(uint32_t (&r)[2], uint32_t row, Site site) { ldmatrix<2, false>(r, row, site); }
void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row, Site site) { ldmatrix<2, true>(r, row, site); }

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  ProductOperand operand{d, a, {b0, b1}};
  collective("mma_bf16", all_lanes, true, &operand, do_mma, site);
}

uint32_t pack_bf16(float low, float high) {
  return from_float<BFloat16>(low).bits | static_cast<uint32_t>(from_float<BFloat16>(high).bits) << 16;
}

}  // namespace diffratio::ptx
