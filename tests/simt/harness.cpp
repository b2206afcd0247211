#include "harness.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>

#include "banks.h"
#include "sync_points.h"

namespace simt {
namespace {

struct Outcome {
  std::string kind, text;  // empty if all is well
};

Outcome run(const Case& c, Mode mode) {
  try {
    const std::string difference = c.run(mode);
    return difference.empty() ? Outcome{} : Outcome{"wrong result", "wrong result: " + difference};
  } catch (const Error& e) {
    return {e.kind, e.what()};
  }
}

int check(const std::vector<Case>& cases, const std::vector<Planted>& planted) {
  int failures = 0, runs = 0;
  for (const Case& c : cases) {
    for (Mode mode : modes) {
      const Outcome outcome = run(c, mode);
      ++runs;
      if (outcome.kind.empty()) continue;
      ++failures;
      std::printf("FAILED %s in %s\n%s\n", c.name.c_str(), to_string(mode).c_str(), outcome.text.c_str());
    }
  }
  for (const Planted& p : planted) {
    std::map<std::string, int> kinds;
    for (Mode mode : modes) {
      const Outcome outcome = run(p.bug, mode);
      ++kinds[outcome.kind];
      ++runs;
      if (("|" + p.expected + "|").find("|" + outcome.kind + "|") != std::string::npos) continue;
      ++failures;
      std::printf("NOT CAUGHT %s in %s as %s, but: %s\n", p.bug.name.c_str(), to_string(mode).c_str(),
                  p.expected.c_str(), outcome.kind.empty() ? "nothing" : outcome.text.c_str());
    }
    std::printf("planted %s", p.bug.name.c_str());
    for (const auto& [kind, n] : kinds) std::printf("; %s %d", kind.empty() ? "nothing" : kind.c_str(), n);
    std::printf("\n");
  }
  std::printf("%d runs, %d failures\n", runs, failures);
  return failures != 0;
}

// Whether some case fails under the active mutation; counts the kinds of failure.
bool caught(const std::vector<const Case*>& cases, Mode mode, std::map<std::string, int>& kinds) {
  for (const Case* c : cases) {
    const Outcome outcome = run(*c, mode);
    if (outcome.kind.empty()) continue;
    ++kinds[outcome.kind];
    return true;
  }
  return false;
}

int mutate(const std::vector<Case>& cases) {
  std::vector<std::vector<const Case*>> users;  // of each point
  for (const Case& c : cases) {
    forget_executed();
    if (!run(c, Mode{}).kind.empty()) return check(cases, {});  // mutations need a suite that passes
    users.resize(sync_points().size());
    for (std::size_t i = 0; i < users.size(); ++i) {
      if (sync_points()[i].executed) users[i].push_back(&c);
    }
  }
  const std::size_t count = sync_points().size();  // not of the mutants, which may reach other lines
  int missed = 0, mutants = 0;
  for (std::size_t i = 0; i < count; ++i) {
    for (Change how : {Change::remove, Change::weaken}) {
      if (how == Change::weaken && sync_points()[i].pending < 0) continue;
      change(i, how);
      std::map<std::string, int> kinds;
      int modes_that_catch = 0;
      for (Mode mode : modes) modes_that_catch += caught(users[i], mode, kinds);
      change(0, Change::none);
      ++mutants;
      missed += modes_that_catch == 0;
      std::printf("%s %s %s: caught in %d of %zu modes", modes_that_catch ? "mutant" : "NOT CAUGHT mutant",
                  how == Change::remove ? "without" : "one group fewer in", to_string(sync_points()[i]).c_str(),
                  modes_that_catch, std::size(modes));
      for (const auto& [kind, n] : kinds) std::printf("; %s %d", kind.c_str(), n);
      std::printf("\n");
    }
  }
  std::printf("%d mutants, %d not caught\n", mutants, missed);
  return missed != 0 || mutants == 0;
}

int show(const std::vector<Case>& cases, const std::vector<Planted>& planted, const char* name, const char* mode_name) {
  std::vector<Case> all = cases;
  for (const Planted& p : planted) all.push_back(p.bug);
  for (const Case& c : all) {
    for (Mode mode : modes) {
      if (c.name != name || to_string(mode) != mode_name) continue;
      count_banks = true;
      const Outcome outcome = run(c, mode);
      std::printf("%s%s\n", bank_report().c_str(), outcome.kind.empty() ? "passed" : outcome.text.c_str());
      return !outcome.kind.empty();
    }
  }
  std::printf("modes: forward, backward or ahead, then /issue or /wait; cases:\n");
  for (const Case& c : all) std::printf("  %s\n", c.name.c_str());
  return 2;
}

}  // namespace

int main_of(int argc, char** argv, const std::vector<Case>& cases, const std::vector<Planted>& planted) {
  if (argc == 2 && !std::strcmp(argv[1], "check")) return check(cases, planted);
  if (argc == 2 && !std::strcmp(argv[1], "mutate")) return mutate(cases);
  if (argc == 4 && !std::strcmp(argv[1], "show")) return show(cases, planted, argv[2], argv[3]);
  std::printf("usage: %s check | mutate | show CASE MODE\n", argv[0]);
  return 2;
}

std::string compare(const std::vector<float>& got, const std::vector<double>& expected, double tolerance) {
  double largest = 0;
  for (double e : expected) largest = std::fmax(largest, std::fabs(e));
  if (got.size() != expected.size() || !(largest > 0)) return "nothing to compare";
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double difference = std::fabs(got[i] - expected[i]);
    if (!(difference <= tolerance * largest)) {
      return "element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", should be " +
             std::to_string(expected[i]);
    }
  }
  return "";
}

}  // namespace simt
