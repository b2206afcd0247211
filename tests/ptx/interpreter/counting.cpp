// Statistics of executed instructions, and mutation of synchronizations.
#include <set>

#include "machine.h"

namespace ptx {

// Wavefronts of a shared access of n bytes a lane: 4 bytes are served for all lanes together, 8 for half a warp, 16 for
// a quarter; among those, distinct words of one bank are served one by one.
void count_shared(const Instruction& i, const u32* address, u32 mask, u32 n) {
  if (!options.statistics) return;
  int groups = n <= 4 ? 1 : n == 8 ? 2 : 4, per = 32 / groups;
  u64 wavefronts = 0, fewest = 0;
  for (int g = 0; g < groups; ++g) {
    int count[32] = {};
    std::set<u32> distinct;
    for (int l = g * per; l < (g + 1) * per; ++l) {
      if (!(mask >> l & 1)) continue;
      for (u32 b = 0; b < std::max(n, 4u); b += 4) {
        u32 word = (address[l] + b) / 4, bank = word % 32;
        if (!distinct.insert(word).second) continue;
        ++count[bank];
      }
    }
    int most = 0;
    for (int c : count) most = std::max(most, c);
    wavefronts += most;
    fewest += (distinct.size() + 31) / 32;
  }
  ++i.accesses;
  i.wavefronts += wavefronts;
  i.fewest += fewest;
}
// 32-byte sectors and 128-byte lines of a global access of n bytes a lane.
void count_global(const Instruction& i, const u64* address, u32 mask, u32 n) {
  if (!options.statistics) return;
  std::set<u64> sectors, lines;
  LANES if (mask >> l & 1) {
    sectors.insert(address[l] / 32);
    if ((address[l] + n - 1) / 32 != address[l] / 32) sectors.insert((address[l] + n - 1) / 32);
    lines.insert(address[l] / 128);
    i.bytes += n;
  }
  if (sectors.empty()) return;
  ++i.requests;
  i.sectors += sectors.size();
  i.lines += lines.size();
}

std::vector<Statistic> take_statistics(Kernel& k) {
  std::vector<Statistic> found;
  for (Instruction& i : k.instructions) {
    if (!i.warps) continue;
    found.push_back({k.name, i.text, i.place, i.line, i.warps, i.lanes, i.accesses, i.wavefronts, i.fewest, i.requests,
                     i.sectors, i.lines, i.bytes});
    i.warps = i.lanes = i.accesses = i.wavefronts = i.fewest = i.requests = i.sectors = i.lines = i.bytes = 0;
  }
  return found;
}

namespace {

bool starts_with(const Instruction& i, const char* text) { return !std::strncmp(i.text, text, std::strlen(text)); }

bool is_synchronization(const Instruction& i) {
  return i.kind == Kind::block_barrier || i.kind == Kind::warp_barrier || starts_with(i, "cp.async.commit") ||
         starts_with(i, "cp.async.wait") || starts_with(i, "membar") || starts_with(i, "fence");
}

std::string place_of(const Instruction& i) { return *i.place ? i.place : format("PTX line %d", i.line); }

std::string operation_of(const Instruction& i) { return std::string(i.text).substr(0, std::strcspn(i.text, " \t")); }

void change(Kernel& k, Instruction& i) { k.changed.push_back({&i - k.instructions.data(), i}); }

}  // namespace

std::vector<Synchronization> synchronizations(Kernel& k) {
  std::map<std::pair<std::string, std::string>, u64> found;
  for (const Instruction& i : k.instructions) {
    if (is_synchronization(i)) found[{place_of(i), operation_of(i)}] += i.warps;
  }
  std::vector<Synchronization> result;
  for (const auto& [key, executions] : found) result.push_back({key.first, key.second, executions});
  return result;
}

void remove_synchronization(Kernel& k, const std::string& place, const std::string& operation) {
  for (Instruction& i : k.instructions) {
    if (!is_synchronization(i) || place_of(i) != place || operation_of(i) != operation) continue;
    change(k, i);
    i.kind = Kind::ordinary;
    i.handler = [](Warp&, const Instruction&, u32) {};
    i.source_count = 0;
  }
}

void weaken_wait(Kernel& k, const std::string& place) {
  for (Instruction& i : k.instructions) {
    if (!starts_with(i, "cp.async.wait_group") || place_of(i) != place) continue;
    change(k, i);
    ++i.second;
  }
}

void restore(Kernel& k) {
  for (auto& [index, original] : k.changed) k.instructions[index] = original;
  k.changed.clear();
}

}  // namespace ptx
