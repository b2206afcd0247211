#include "sync_points.h"

#include <cstring>

namespace simt {
namespace {

std::vector<SyncPoint> points;
std::size_t changed = 0;
Change how = Change::none;

std::size_t find(const char* operation, const Site& site, int pending) {
  for (std::size_t i = 0; i < points.size(); ++i) {
    SyncPoint& p = points[i];
    if (same(p.site, site) && p.pending == pending && !std::strcmp(p.operation, operation)) {
      p.executed = true;
      return i;
    }
  }
  points.push_back({operation, site, pending, true});
  return points.size() - 1;
}

}  // namespace

std::string to_string(const SyncPoint& point) {
  const std::string pending = point.pending < 0 ? "" : "<" + std::to_string(point.pending) + ">";
  return point.operation + pending + " at " + to_string(point.site);
}

const std::vector<SyncPoint>& sync_points() { return points; }

void forget_executed() {
  for (SyncPoint& p : points) p.executed = false;
}

void change(std::size_t point, Change change) {
  changed = point;
  how = change;
}

bool left_out(const char* operation, const Site& site, int pending) {
  return find(operation, site, pending) == changed && how == Change::remove;
}

int pending_groups(int pending, const Site& site) {
  return pending + (how == Change::weaken && find("copy_wait", site, pending) == changed);
}

}  // namespace simt
