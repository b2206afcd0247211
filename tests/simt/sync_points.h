// Every line at which a kernel synchronizes, and a switch that skips one of them: a test does so for each in turn
// and requires that something fails.
#pragma once

#include <string>
#include <vector>

#include "error.h"

namespace simt {

struct SyncPoint {
  const char* operation;
  Site site;
  int pending;    // of copy_wait; else -1
  bool executed;  // since forget_executed()
};
std::string to_string(const SyncPoint& point);  // "copy_wait<1> at gemm.cuh:57"

// All that have been executed so far by this program.
const std::vector<SyncPoint>& sync_points();
void forget_executed();

// none: no change. remove: the operation is skipped. weaken: copy_wait waits for one group fewer.
enum class Change { none, remove, weaken };
void change(std::size_t point, Change change);

// For the operations themselves: whether it is skipped; and how many groups a copy_wait may leave pending.
bool left_out(const char* operation, const Site& site, int pending = -1);
int pending_groups(int pending, const Site& site);

}  // namespace simt
