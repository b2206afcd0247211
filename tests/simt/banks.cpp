#include "banks.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <vector>

namespace simt {

bool count_banks = false;

namespace {

struct Passes {
  uint64_t taken = 0, least = 0;
};
std::map<std::string, Passes> passes;

using Lane = std::tuple<std::string, unsigned, unsigned>;                   // place, block, thread
using Instruction = std::tuple<std::string, unsigned, unsigned, uint64_t>;  // place, block, warp, occurrence
std::map<Lane, uint64_t> occurrences;
struct Group {
  uint32_t bytes;
  std::vector<uint32_t> addresses;
};
std::map<Instruction, Group> groups;

}  // namespace

void count_accesses(const uint32_t* addresses, int lanes, uint32_t bytes, const Site& site) {
  if (!count_banks) return;
  Passes& p = passes[to_string(site)];
  const int at_once = static_cast<int>(128 / std::max(bytes, 4u));  // a pass serves 128 bytes
  for (int first = 0; first < lanes; first += at_once) {
    std::set<uint32_t> banks[32];  // the words requested from each bank: the same word is free
    for (int lane = first; lane < std::min(lanes, first + at_once); ++lane) {
      for (uint32_t word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; ++word) {
        banks[word % 32].insert(word);
      }
    }
    std::size_t most = 0;
    for (const auto& words : banks) most = std::max(most, words.size());
    p.taken += most;
    ++p.least;
  }
}

void count_access(const Accessor& who, uint32_t address, uint32_t bytes, const Site& site) {
  if (!count_banks) return;
  const std::string place = to_string(site);
  const uint64_t n = occurrences[{place, who.block, who.thread}]++;
  Group& group = groups[{place, who.block, who.thread / 32, n}];
  group.bytes = bytes;
  group.addresses.push_back(address);
  if (group.addresses.size() == 32) {
    count_accesses(group.addresses.data(), 32, bytes, site);
    groups.erase({place, who.block, who.thread / 32, n});
  }
}

std::string bank_report() {
  std::string text;
  for (const auto& [place, p] : passes) {
    text += "banks: " + place + ": " + std::to_string(p.taken) + " passes, " + std::to_string(p.least) +
            " without conflicts\n";
  }
  return text;
}

}  // namespace simt
