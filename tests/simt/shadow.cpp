#include "shadow.h"

namespace simt {

constexpr uint64_t cell_bytes = 2;  // the smallest element

void Shadow::reset(uint64_t bytes, bool initialized, Describe describe) {
  describe_ = std::move(describe);
  cells_.resize((bytes + cell_bytes - 1) / cell_bytes);
  for (Cell& cell : cells_) {
    cell.reads.clear();  // keeps the allocated memory: this is called for every block
    cell.written = cell.in_flight = false;
    cell.initialized = initialized;
  }
}

void Shadow::race(const Accessor& who, const char* now, const Site& site, const Access& other, const char* then,
                  uint64_t offset) const {
  std::string text = describe_(offset) + "\n  " + thread_name(who.thread) + " " + now + " at " + to_string(site) +
                     "\n  " + thread_name(other.thread);
  if (other.block != who.block) text += " of block number " + std::to_string(other.block);
  throw Error("race", text + " " + then + " at " + to_string(other.site) + "\n  and no barrier orders the two");
}

void Shadow::read(const Accessor& who, uint64_t offset, uint64_t bytes, bool may_be_old, const Site& site) {
  for (uint64_t i = offset / cell_bytes; i < (offset + bytes + cell_bytes - 1) / cell_bytes; ++i) {
    Cell& cell = cells_[i];
    if (cell.in_flight) race(who, "reads", site, cell.write, "has a copy in flight there, issued", i * cell_bytes);
    if (cell.written && !cell.write.before(who)) race(who, "reads", site, cell.write, "wrote", i * cell_bytes);
    if (!cell.initialized) {
      throw Error("uninitialized", describe_(i * cell_bytes) + "\n  " + thread_name(who.thread) + " reads at " +
                                       to_string(site) + " what nobody has written yet");
    }
    if (cell.written && cell.sample != who.sample && !may_be_old) {
      throw Error("stale", describe_(i * cell_bytes) + "\n  " + thread_name(who.thread) + " reads at " +
                               to_string(site) + ", in sample " + std::to_string(who.sample) + ", what " +
                               thread_name(cell.write.thread) + " wrote at " + to_string(cell.write.site) +
                               " in sample " + std::to_string(cell.sample));
    }
    // An access ordered after this read is ordered after the earlier reads: those are not stored.
    std::size_t kept = 0;
    for (std::size_t r = 0; r < cell.reads.size(); ++r) {
      if (!cell.reads[r].before(who)) cell.reads[kept++] = cell.reads[r];
    }
    cell.reads.resize(kept);
    cell.reads.emplace_back(who, site);
  }
}

void Shadow::check_write(const Cell& cell, const Accessor& who, uint64_t offset, const Site& site,
                         const char* what) const {
  if (cell.in_flight) race(who, what, site, cell.write, "has a copy in flight there, issued", offset);
  if (cell.written && !cell.write.before(who)) race(who, what, site, cell.write, "wrote", offset);
  for (const Access& read : cell.reads) {
    if (!read.before(who)) race(who, what, site, read, "reads", offset);
  }
}

void Shadow::write(const Accessor& who, uint64_t offset, uint64_t bytes, const Site& site) {
  for (uint64_t i = offset / cell_bytes; i < (offset + bytes + cell_bytes - 1) / cell_bytes; ++i) {
    Cell& cell = cells_[i];
    check_write(cell, who, i * cell_bytes, site, "writes");
    cell.write = Access(who, site);
    cell.reads.clear();
    cell.sample = who.sample;
    cell.written = cell.initialized = true;
  }
}

void Shadow::copy_begins(const Accessor& who, uint64_t offset, uint64_t bytes, const Site& site) {
  for (uint64_t i = offset / cell_bytes; i < (offset + bytes) / cell_bytes; ++i) {
    Cell& cell = cells_[i];
    check_write(cell, who, i * cell_bytes, site, "copies there, asynchronously,");
    cell.write = Access(who, site);
    cell.reads.clear();
    cell.in_flight = true;
  }
}

void Shadow::copy_lands(const Accessor& who, uint64_t offset, uint64_t bytes, const Site& site) {
  for (uint64_t i = offset / cell_bytes; i < (offset + bytes) / cell_bytes; ++i) {
    cells_[i].in_flight = false;
  }
  write(who, offset, bytes, site);
}

}  // namespace simt
