// The simulator for Python (../simulator.py, by ctypes): options, device memory, reports, statistics, mutation, and
// launches of kernels by name.
#include "device.h"

namespace {
std::string text;  // of the latest call that returns text: valid until the next

const char* give(const std::string& s) {
  text = s;
  return text.c_str();
}
const char* give_lines(const std::vector<std::string>& lines) {
  text.clear();
  for (const std::string& line : lines) text += line + "\n";
  return text.c_str();
}

// Kernels that were loaded, by part of their names; number `which` of those that have it.
ptx::Kernel* find(const char* part, int which) {
  for (auto& module : ptx::device::modules()) {
    for (auto& [name, kernel] : module->kernels) {
      if (name.find(part) != std::string::npos && which-- == 0) return kernel.get();
    }
  }
  return nullptr;
}
}  // namespace

extern "C" {

struct SimulatorOptions {  // as in ../simulator.py
  int schedule, late_copies, late_atomics, approximate, coarse_sums, races, statistics;
  int multiprocessors, most_blocks, shared_per_block, shared_per_multiprocessor, shared_base;
  uint64_t seed;
};
void simulator_options(const SimulatorOptions* o) {
  auto& p = ptx::options;
  p.schedule = static_cast<ptx::Schedule>(o->schedule);
  p.late_copies = o->late_copies, p.late_atomics = o->late_atomics;
  p.approximate = o->approximate, p.coarse_sums = o->coarse_sums;
  p.races = o->races, p.statistics = o->statistics, p.seed = o->seed;
  p.shared_base = o->shared_base;  // of kernels that are loaded later
  auto& d = ptx::device::properties;
  d.multiprocessors = o->multiprocessors, d.most_blocks = o->most_blocks;
  d.shared_per_block = o->shared_per_block, d.shared_per_multiprocessor = o->shared_per_multiprocessor;
}

void* simulator_allocate(uint64_t bytes, const char* name, int valid) { return ptx::allocate(bytes, name, valid); }
void simulator_adopt(void* p, uint64_t bytes, const char* name, int valid) { ptx::adopt(p, bytes, name, valid); }
void simulator_split(void* p, uint64_t at) { ptx::split(p, &at, 1); }
void simulator_release(void* p) { ptx::release(p); }
uint64_t simulator_count_invalid(void* p, uint64_t bytes) { return ptx::count_invalid(p, bytes); }

void simulator_clear() { ptx::device::clear_error(); }
const char* simulator_error() { return ptx::device::error.c_str(); }
const char* simulator_notes() { return give_lines(ptx::take_notes()); }
const char* simulator_launches() { return give_lines(ptx::device::take_launches()); }

// 0, or 1 with an error.
int simulator_load(const char* ptx_text, const char* name) {
  try {
    ptx::device::load(ptx_text, name);
    return 0;
  } catch (const std::exception& e) {
    ptx::device::error = e.what();
    return 1;
  }
}
int simulator_launch(const char* kernel, int blocks, int threads, uint64_t shared, int cooperative, void** arguments) {
  ptx::device::clear_error();
  try {
    ptx::device::launch(kernel, blocks, threads, shared, cooperative, arguments);
    return 0;
  } catch (const std::exception& e) {
    ptx::device::error = e.what();
    return 1;
  }
}

// Lines of tab-separated fields, the instruction last.
const char* simulator_statistics() {
  text.clear();
  for (auto& module : ptx::device::modules()) {
    for (auto& [name, kernel] : module->kernels) {
      for (const ptx::Statistic& s : ptx::take_statistics(*kernel)) {
        text += s.kernel + "\t" + s.place + "\t" + std::to_string(s.line);
        for (uint64_t v :
             {s.warps, s.lanes, s.accesses, s.wavefronts, s.fewest, s.requests, s.sectors, s.lines, s.bytes}) {
          text += "\t" + std::to_string(v);
        }
        text += "\t" + s.instruction + "\n";
      }
    }
  }
  return text.c_str();
}

// Names of the loaded kernels that contain `part`.
const char* simulator_kernels(const char* part) {
  std::vector<std::string> names;
  for (auto& module : ptx::device::modules()) {
    for (auto& [name, kernel] : module->kernels) {
      if (name.find(part) != std::string::npos) names.push_back(name);
    }
  }
  return give_lines(names);
}

// Lines PLACE \t OPERATION \t EXECUTIONS of a loaded kernel.
const char* simulator_synchronizations(const char* kernel) {
  std::vector<std::string> lines;
  if (auto* k = find(kernel, 0)) {
    for (const auto& s : ptx::synchronizations(*k)) {
      lines.push_back(s.place + "\t" + s.operation + "\t" + std::to_string(s.executions));
    }
  }
  return give_lines(lines);
}
void simulator_remove(const char* kernel, const char* place, const char* operation) {
  if (auto* k = find(kernel, 0)) ptx::remove_synchronization(*k, place, operation);
}
void simulator_weaken(const char* kernel, const char* place) {
  if (auto* k = find(kernel, 0)) ptx::weaken_wait(*k, place);
}
void simulator_restore(const char* kernel) {
  if (auto* k = find(kernel, 0)) ptx::restore(*k);
}
}
