// An error that the shim reports, and its place.
#pragma once

#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>

namespace simt {

using Site = std::source_location;

// "gemm.cuh:57"
inline std::string to_string(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

inline bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::string_view(a.file_name()) == b.file_name();
}

struct Error : std::runtime_error {
  // kind: "race", "deadlock", ...: tests compare it. The message begins with it.
  Error(std::string kind, std::string text)
      : std::runtime_error(kind + ": " + text), kind(std::move(kind)), text(std::move(text)) {}
  std::string kind, text;
};

}  // namespace simt
