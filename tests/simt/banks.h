// An optional statistic: bank conflicts of the lanes of a warp in shared memory, for each line of the kernel.
#pragma once

#include <cstdint>
#include <string>

#include "clocks.h"

namespace simt {

extern bool count_banks;  // off at first: it costs time and memory

// An access of one lane; the n-th accesses of all lanes of a warp on one line count as one instruction.
void count_access(const Accessor& who, uint32_t address, uint32_t bytes, const Site& site);
// An access of several lanes that is known to be one instruction's.
void count_accesses(const uint32_t* addresses, int lanes, uint32_t bytes, const Site& site);

// A line for each place: the number of passes of its accesses, and their number without conflicts.
std::string bank_report();

}  // namespace simt
