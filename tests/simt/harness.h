// A program that runs kernels under every schedule, and without each of their synchronizations in turn.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

// One use of a kernel: launches it and returns the difference from the expected result, or an empty string.
struct Case {
  std::string name;
  std::function<std::string(Mode)> run;
};

// A case that must fail in every mode, and how: kinds of Error or "wrong result". "race|uninitialized"
// accepts either kind, where it depends on the order.
struct Planted {
  Case bug;
  std::string expected;
};

// The programs' main():
//   check            every case in every mode must pass, every planted bug must be caught as expected in every mode
//   mutate           without each synchronization that a case executes, in turn, something must fail
//   show CASE MODE   one case or planted bug, for example `show gemm ahead/wait`: prints the report and
//                    the bank conflicts in shared memory
// The exit status is 0 if all results are as expected.
int main_of(int argc, char** argv, const std::vector<Case>& cases, const std::vector<Planted>& planted = {});

// The largest |got - expected| over the largest |expected| is at most `tolerance`, and nothing is NaN; otherwise
// returns a text.
std::string compare(const std::vector<float>& got, const std::vector<double>& expected, double tolerance);

}  // namespace simt
