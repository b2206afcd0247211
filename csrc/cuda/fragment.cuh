// Which element of a matrix each lane of a warp addresses for ldmatrix and holds after mma.m16n8k16.
#pragma once

#include "../common/host_device.h"

namespace diffratio::fragment {

struct Element {
  int row, column;
};

// The row start that `lane` addresses so that ldmatrix_x4 of a 16 x 16 piece, [m][k] in memory, gives the operand a
// of mma. The same map with ldmatrix_x4_trans on [k][n] gives b of columns 0 to 7 in r[0], r[1], 8 to 15 in r[2], r[3].
DR_DEVICE Element a_row(int lane) { return {lane % 16, lane / 16 * 8}; }

// The same for ldmatrix_x4 of a 16 x 16 piece that lies as [n][k]: b of columns 0 to 7 in r[0], r[1], 8 to 15 in
// r[2], r[3].
DR_DEVICE Element b_row(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8}; }

// Accumulators d[0], d[1] are this element and the next in its row; d[2], d[3] are eight rows below.
DR_DEVICE Element accumulator(int lane) { return {lane / 4, lane % 4 * 2}; }

}  // namespace diffratio::fragment
