// The simulated device of the stand-in for the CUDA runtime, and its launches.
#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "interpreter/interpreter.h"

namespace ptx::device {

struct Properties {
  int multiprocessors = 2, most_blocks = 1;  // blocks that fit a multiprocessor, at most
  int shared_per_block = 227 * 1024, shared_per_multiprocessor = 228 * 1024;
  int resident_blocks(int threads, std::size_t shared) const;
};
extern Properties properties;

extern std::string error;  // of the first call that failed since `clear_error`
void clear_error();
std::vector<std::string> take_launches();  // one line each

std::vector<std::shared_ptr<Module>>& modules();
// A module compiled by NVRTC: its kernels replace those with the same names in fat binaries.
void load(const std::string& text, const std::string& name);
// Launches a kernel of a loaded module by its name; checks shared memory as the runtime would.
void launch(const std::string& kernel, int blocks, int threads, std::size_t shared, bool cooperative, void** arguments);

}  // namespace ptx::device
