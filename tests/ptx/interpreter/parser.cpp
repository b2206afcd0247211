// PTX text to instructions with resolved operands. Unsupported text is an error and never skipped.
#include <cctype>
#include <map>
#include <set>
#include <sstream>

#include "machine.h"

namespace ptx {
namespace {

const Table& table() {
  static const Table t = [] {
    Table all;
    add_arithmetic(all);
    add_conversions(all);
    add_memory(all);
    add_warp_operations(all);
    return all;
  }();
  return t;
}

std::string trim(const std::string& s) {
  const std::size_t a = s.find_first_not_of(" \t\n\r"), b = s.find_last_not_of(" \t\n\r");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

// At commas, but not inside brackets.
std::vector<std::string> split_list(const std::string& s) {
  std::vector<std::string> parts;
  int depth = 0;
  std::string now;
  for (char c : s) {
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c == ',' && depth == 0)
      parts.push_back(trim(now)), now.clear();
    else
      now += c;
  }
  if (!trim(now).empty()) parts.push_back(trim(now));
  return parts;
}

// The elements of "{a, b}", or the one operand.
std::vector<std::string> vector_of(const std::string& s) {
  if (s[0] != '{') return {s};
  return split_list(s.substr(1, s.size() - 2));
}

bool begins(const std::string& s, const char* with) { return s.compare(0, std::strlen(with), with) == 0; }
bool is_wide(const std::string& type) { return type == "b64" || type == "u64" || type == "s64" || type == "f64"; }

// --- source places, from .loc ---

struct Place {
  int file = 0, line = 0, column = 0;
  auto operator<=>(const Place&) const = default;
};

// Where instructions come from, through inlined functions. Files have names only at the end of the PTX.
class Places {
 public:
  // .loc FILE LINE COLUMN[, function_name LABEL, inlined_at FILE LINE COLUMN]
  void read_loc(const std::string& statement) {
    std::istringstream in(statement);
    std::string dot;
    in >> dot >> now_.file >> now_.line >> now_.column;
    const std::size_t at = statement.find("inlined_at ");
    if (at == std::string::npos) {
      callers_.erase(now_);
      return;
    }
    Place caller;
    std::istringstream(statement.substr(at + 11)) >> caller.file >> caller.line >> caller.column;
    callers_[now_] = caller;
  }

  void read_file(const std::string& statement) {  // .file N "PATH"
    int number = 0;
    std::istringstream(statement.substr(5)) >> number;
    const std::size_t open = statement.find('"');
    files_[number] = statement.substr(open + 1, statement.rfind('"') - open - 1);
  }

  // The call stack of the current place, innermost first.
  std::vector<Place> stack() const {
    std::vector<Place> frames;
    for (Place p = now_; p.file && frames.size() < 16;) {
      frames.push_back(p);
      const auto caller = callers_.find(p);
      if (caller == callers_.end()) break;
      p = caller->second;
    }
    return frames;
  }

  // "FILE:LINE < LINE < FILE:LINE": frames outside of wrappers of instructions and of CUDA's own headers; a file is
  // named where it changes.
  std::string name(const std::vector<Place>& frames) const {
    std::string text, last;
    for (const Place& p : frames) {
      const auto file = files_.find(p.file);
      if (file == files_.end()) continue;
      const std::string& path = file->second;
      const std::string base = path.substr(path.rfind('/') + 1);
      const bool ours = path.find("csrc/") != std::string::npos || path.find("tests/") != std::string::npos;
      if (!ours || base == "ptx.cuh") continue;
      text += (text.empty() ? "" : " < ") + (base == last ? "" : base + ":") + std::to_string(p.line);
      last = base;
    }
    return text;
  }

  void begin_kernel() { now_ = {}, callers_.clear(); }

 private:
  Place now_;
  std::map<Place, Place> callers_;
  std::map<int, std::string> files_;
};

// --- one kernel ---

class KernelParser {
 public:
  explicit KernelParser(Kernel& kernel) : k_(kernel) { open_scope(); }

  void open_scope() { scopes_.emplace_back(); }
  void close_scope() { scopes_.pop_back(); }
  void label(const std::string& name) { labels_[name] = static_cast<u32>(k_.instructions.size()); }

  // .param .align 8 .b8 name[424]   or   .param .u64 name
  void parameter(const std::string& text) {
    u32 align = 0, size = 0;
    std::istringstream in(text);
    std::string word, type, name;
    while (in >> word) {
      if (word == ".param") continue;
      if (word == ".align")
        in >> align;
      else if (word[0] == '.' && type.empty())
        type = word;
      else if (word[0] != '.')
        name = word;
    }
    const auto has = [&](const char* bits) { return type.find(bits) != std::string::npos; };
    const u32 unit = has("64") ? 8 : has("32") ? 4 : has("16") ? 2 : 1;
    const std::size_t bracket = name.find('[');
    size = unit;
    if (bracket != std::string::npos) size = unit * std::stoi(name.substr(bracket + 1)), name = name.substr(0, bracket);
    if (!align) align = unit;
    u32& at = k_.parameter_bytes;
    at = (at + align - 1) / align * align;
    parameters_[name] = at;
    k_.parameters.push_back({at, size});
    at += size;
  }

  void declare(const std::string& statement) {  // .reg .b32 %r<26>
    std::istringstream in(statement);
    std::string dot, type, names;
    in >> dot >> type;
    std::getline(in, names);
    const bool wide = is_wide(type.substr(1));
    const Class kind = type == ".pred" ? Class::predicate : wide ? Class::wide : Class::narrow;
    for (const std::string& name : split_list(names)) {
      const std::size_t count = name.find('<');
      if (count == std::string::npos) {
        scopes_.back()[name] = {allocate_register(wide), kind};
        continue;
      }
      for (int j = 0; j < std::stoi(name.substr(count + 1)); ++j) {
        scopes_.back()[name.substr(0, count) + std::to_string(j)] = {allocate_register(wide), kind};
      }
    }
  }

  void instruction(const std::string& whole, int line, const std::vector<Place>& stack) {
    line_ = line;
    Instruction i;
    i.line = line;
    std::string s = whole;
    if (s[0] == '@') {
      const std::size_t space = s.find_first_of(" \t");
      std::string guard = s.substr(1, space - 1);
      i.guarded = true;
      if (guard[0] == '!') i.negated = true, guard = guard.substr(1);
      i.guard = lookup(guard).first;
      s = trim(s.substr(space));
    }
    i.text = k_.keep(s);
    const std::string key = operands(i, s);
    const auto entry = table().find(key);
    if (entry == table().end()) bad("unknown instruction " + key + " in: " + s);
    i.handler = entry->second.handler, i.kind = entry->second.kind;
    if (i.kind == Kind::collective && i.guarded) bad("guarded collective");
    k_.instructions.push_back(i);
    stacks_.push_back(stack);
  }

  void finish(int line) {
    line_ = line;
    for (const auto& [index, name] : branches_) {
      const auto target = labels_.find(name);
      if (target == labels_.end()) bad("no label " + name);
      k_.instructions[index].target = target->second;
    }
    if (k_.instructions.empty() || k_.instructions.back().kind != Kind::leave) bad("does not end in ret");
    std::set<u32> read;
    for (const Instruction& i : k_.instructions) {
      for (int j = 0; j < i.source_count; ++j) read.insert(i.sources[j].mask);
      if (i.guarded) read.insert(i.guard.mask);
    }
    for (Instruction& i : k_.instructions) {
      if (begins(i.text, "atom") || begins(i.text, "red")) {
        i.result_is_read = i.result_count && read.count(i.results[0].mask);
      }
    }
  }

  void name_places(const Places& places) {
    for (std::size_t j = 0; j < stacks_.size(); ++j) {
      k_.instructions[j].place = k_.keep(places.name(stacks_[j]));
    }
  }

  [[noreturn]] void bad(const std::string& what) {
    fail(k_.module + ": " + k_.name + ": cannot parse line " + std::to_string(line_) + ": " + what);
  }

 private:
  enum class Class { predicate, narrow, wide };

  Operand allocate_register(bool wide) {
    const Operand o{k_.register_bytes, k_.register_count++};
    k_.register_bytes += wide ? 256 : 128;
    return o;
  }

  std::pair<Operand, Class> lookup(const std::string& name) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found != scope->end()) return found->second;
    }
    bad("no register " + name);
  }

  Operand constant(u64 value, bool wide) {
    const auto [it, fresh] = pool_.try_emplace({value, wide});
    if (fresh) {
      it->second = allocate_register(wide);
      k_.constants.push_back({it->second, value, wide});
    }
    return it->second;
  }

  Operand special(const std::string& name) {
    const auto [it, fresh] = specials_.try_emplace(name);
    if (fresh) {
      it->second = allocate_register(false);
      k_.specials.push_back({it->second, name});
    }
    return it->second;
  }

  // An operand that is read as 64 bits, or not.
  Operand source(const std::string& s, bool wide) {
    if (s[0] == '%') {
      for (const char* name : {"%tid", "%ctaid", "%ntid", "%nctaid", "%laneid"}) {
        if (begins(s, name)) return special(s);
      }
      const auto [o, kind] = lookup(s);
      if (kind != Class::predicate && (kind == Class::wide) != wide) bad("width of " + s);
      return o;
    }
    if (begins(s, "0f") || begins(s, "0F") || begins(s, "0d") || begins(s, "0D")) {
      return constant(std::stoull(s.substr(2), nullptr, 16), wide);
    }
    if (std::isdigit(s[0]) || s[0] == '-') {
      const u64 v = s[0] == '-' ? static_cast<u64>(std::stoll(s, nullptr, 0)) : std::stoull(s, nullptr, 0);
      return constant(wide ? v : v & 0xffffffffu, wide);
    }
    const auto p = parameters_.find(s);
    if (p != parameters_.end()) return constant(p->second, wide);
    if (s.find("shared_window") != std::string::npos) return constant(options.shared_base, wide);
    bad("operand " + s);
  }

  // [register + offset] or [symbol + offset]: the operand and the offset.
  std::pair<Operand, s32> address(const std::string& text, bool wide) {
    if (text[0] != '[') bad("address " + text);
    std::string s = trim(text.substr(1, text.size() - 2));
    s32 offset = 0;
    const std::size_t plus = s.find('+');
    if (plus != std::string::npos) offset = std::stoi(s.substr(plus + 1)), s = trim(s.substr(0, plus));
    return {source(s, wide), offset};
  }

  Class result(Instruction& i, const std::string& name) {
    if (name == "_") {
      i.results[i.result_count++] = allocate_register(true);
      return Class::narrow;
    }
    const auto [o, kind] = lookup(name);
    i.results[i.result_count++] = o;
    return kind;
  }
  void add_source(Instruction& i, const std::string& name, bool wide) {
    i.sources[i.source_count++] = source(name, wide);
  }
  void add_address(Instruction& i, const std::string& text, bool wide) {
    const auto [o, offset] = address(text, wide);
    i.sources[i.source_count++] = o, i.immediate = offset;
  }

  std::string operands(Instruction& i, const std::string& statement);
  std::string load(Instruction& i, const std::string& op, const std::vector<std::string>& arguments);
  std::string convert(Instruction& i, const std::string& op, const std::vector<std::string>& arguments);
  void arithmetic(Instruction& i, const std::vector<std::string>& parts, const std::vector<std::string>& arguments);

  Kernel& k_;
  int line_ = 0;
  std::vector<std::map<std::string, std::pair<Operand, Class>>> scopes_;
  std::map<std::string, u32> parameters_, labels_;
  std::vector<std::pair<std::size_t, std::string>> branches_;
  std::map<std::pair<u64, bool>, Operand> pool_;
  std::map<std::string, Operand> specials_;
  std::vector<std::vector<Place>> stacks_;
};

std::vector<std::string> parts_of(const std::string& op) {
  std::vector<std::string> parts;
  std::istringstream in(op);
  for (std::string part; std::getline(in, part, '.');) parts.push_back(part);
  return parts;
}

// Fills in the operands; returns the instruction's name in the table.
std::string KernelParser::operands(Instruction& i, const std::string& s) {
  const std::size_t space = s.find_first_of(" \t");
  const std::string op = s.substr(0, space);
  const auto a = split_list(space == std::string::npos ? "" : trim(s.substr(space)));
  const auto parts = parts_of(op);
  const std::string &base = parts[0], &last = parts.back();
  if (base == "bra") {
    branches_.push_back({k_.instructions.size(), a.at(0)});
  } else if (base == "ret" || base == "exit" || base == "membar" || base == "fence" || op == "cp.async.commit_group") {
  } else if (op == "bar.sync" || op == "bar.arrive") {
    if (a.size() == 2)
      add_source(i, a[0], false), add_source(i, a[1], false);
    else
      i.immediate = std::stoi(a.at(0));
  } else if (op == "bar.warp.sync") {
    add_source(i, a.at(0), false);
  } else if (op == "cp.async.wait_group") {
    i.second = std::stoi(a.at(0));
  } else if (base == "cp") {
    const auto [to, to_offset] = address(a.at(0), false);
    const auto [from, from_offset] = address(a.at(1), true);
    i.sources[i.source_count++] = to, i.sources[i.source_count++] = from;
    i.immediate = to_offset, i.target = static_cast<u32>(from_offset), i.second = std::stoi(a.at(2));
    if (a.size() > 3) add_source(i, a[3], false);
  } else if (base == "prefetchu") {
    add_address(i, a.at(0), true);
    k_.has_marks = true;
  } else if (base == "ld") {
    return load(i, op, a);
  } else if (base == "st") {
    add_address(i, a.at(0), parts[1] != "shared");
    for (const auto& v : vector_of(a.at(1))) add_source(i, v, is_wide(last));
  } else if (base == "ldmatrix") {
    for (const auto& v : vector_of(a.at(0))) result(i, v);
    add_address(i, a.at(1), false);
    const auto has = [&](const char* n) { return op.find(n) != std::string::npos; };
    if (i.result_count != (has(".x4") ? 4 : has(".x2") ? 2 : 1)) bad("ldmatrix");
  } else if (base == "mma") {
    for (const auto& v : vector_of(a.at(0))) result(i, v);
    for (int j = 1; j < 4; ++j) {
      for (const auto& v : vector_of(a.at(j))) add_source(i, v, false);
    }
    if (i.result_count != 4 || i.source_count != 10) bad("mma");
  } else if (base == "shfl") {
    const std::size_t bar = a.at(0).find('|');
    result(i, a[0].substr(0, bar));
    if (bar != std::string::npos) result(i, a[0].substr(bar + 1));
    for (int j = 1; j < 5; ++j) add_source(i, a.at(j), false);
  } else if (base == "atom" || base == "red") {
    if (base == "atom") result(i, a.at(0));
    add_address(i, a.at(a.size() - 2), true);
    add_source(i, a.back(), false);
  } else if (base == "setp") {
    result(i, a.at(0));
    for (std::size_t j = 1; j < a.size(); ++j) add_source(i, a[j], is_wide(last));
    if (a.size() != 3) bad("setp");
  } else if (base == "mov" && (a.at(0)[0] == '{' || a.at(1)[0] == '{')) {
    for (const auto& v : vector_of(a[0])) result(i, v);
    for (const auto& v : vector_of(a[1])) add_source(i, v, false);
    if (i.result_count + i.source_count != 3) bad("mov");
    return op + (a[0][0] == '{' ? ".unpack" : ".pack");
  } else if (base == "cvt") {
    return convert(i, op, a);
  } else {
    arithmetic(i, parts, a);
  }
  return op;
}

std::string KernelParser::load(Instruction& i, const std::string& op, const std::vector<std::string>& a) {
  const auto parts = parts_of(op);
  const bool wide = is_wide(parts.back());
  Class kind = Class::narrow;
  for (const auto& v : vector_of(a.at(0))) kind = result(i, v);
  add_address(i, a.at(1), parts[1] != "shared");
  if (kind != Class::wide && wide) bad("narrow destination");
  return kind == Class::wide && !wide ? op + ".64" : op;
}

std::string KernelParser::convert(Instruction& i, const std::string& op, const std::vector<std::string>& a) {
  const auto parts = parts_of(op);
  const bool wide = is_wide(parts.back());
  const Class kind = result(i, a.at(0));
  if ((kind == Class::wide) != is_wide(parts[parts.size() - 2])) bad("width of the destination");
  // "Operand size exceeding instruction-type size": a wider source is chopped to the type.
  const bool chopped = a.at(1)[0] == '%' && a.size() == 2 && !wide && lookup(a[1]).second == Class::wide;
  for (std::size_t j = 1; j < a.size(); ++j) add_source(i, a[j], wide || chopped);
  return chopped ? op + ".chopped" : op;
}

// First the destination; shifts and .wide have sources of other widths.
void KernelParser::arithmetic(Instruction& i, const std::vector<std::string>& parts,
                              const std::vector<std::string>& a) {
  const std::string &base = parts[0], &last = parts.back();
  const bool widening = parts.size() > 1 && parts[1] == "wide";
  const Class want = last == "pred" ? Class::predicate : is_wide(last) || widening ? Class::wide : Class::narrow;
  if (result(i, a.at(0)) != want) bad("width of the destination");
  for (std::size_t j = 1; j < a.size(); ++j) {
    bool wide = is_wide(last);
    if ((base == "shl" || base == "shr") && j == 2) wide = false;
    if (widening && j == 3) wide = true;
    add_source(i, a[j], wide);
  }
}

// --- a module ---

class ModuleParser {
 public:
  ModuleParser(Module& module, const std::string& name) : module_(module), name_(name) {}

  void read(const std::string& text) {
    std::istringstream in(text);
    for (std::string raw; std::getline(in, raw);) {
      ++line_;
      const std::string s = trim(raw.substr(0, raw.find("//")));
      if (!s.empty()) read_line(s);
    }
    for (auto& parser : finished_) parser->name_places(places_);
  }

 private:
  void read_line(const std::string& s) {
    if (begins(s, ".file")) return places_.read_file(s);
    if (begins(s, ".loc")) return places_.read_loc(s);
    if (!kernel_) return begin_kernel(s);
    if (in_parameters_) {
      in_parameters_ = s != ")";
      if (in_parameters_) parser_->parameter(s.back() == ',' ? s.substr(0, s.size() - 1) : s);
      return;
    }
    if (depth_ > 0) return body(s);
    if (begins(s, ".maxntid")) kernel_->most_threads = std::stoi(s.substr(9));
    if (s == "{") depth_ = 1;
  }

  void begin_kernel(const std::string& s) {
    if (s.find(".func") != std::string::npos) fail(name_ + ": .func is not supported");
    const std::size_t entry = s.find(".entry");
    if (entry == std::string::npos) return;
    kernel_ = std::make_shared<Kernel>();
    kernel_->module = name_;
    const std::size_t open = s.find('(');
    kernel_->name = trim(s.substr(entry + 6, open - entry - 6));
    parser_ = std::make_unique<KernelParser>(*kernel_);
    places_.begin_kernel();
    in_parameters_ = open != std::string::npos && s.find(')') == std::string::npos;
    depth_ = 0;
  }

  void body(const std::string& s) {
    for (std::size_t at = 0; at < s.size();) {
      if (pending_.empty()) {
        if (s[at] == ' ' || s[at] == '\t') {
          ++at;
          continue;
        }
        if (s[at] == '{') {
          ++depth_, ++at;
          parser_->open_scope();
          continue;
        }
        if (s[at] == '}') {
          ++at;
          if (--depth_ == 0) return end_kernel();
          parser_->close_scope();
          continue;
        }
        pending_line_ = line_;
      }
      const std::size_t end = s.find(';', at);
      const std::size_t colon = pending_.empty() && s[at] == '$' ? s.find(':', at) : std::string::npos;
      if (colon != std::string::npos && colon < end) {
        parser_->label(s.substr(at, colon - at));
        at = colon + 1;
        continue;
      }
      if (end == std::string::npos) {
        pending_ += s.substr(at) + " ";
        return;
      }
      const std::string statement = trim(pending_ + s.substr(at, end - at));
      pending_.clear();
      at = end + 1;
      if (begins(statement, ".reg"))
        parser_->declare(statement);
      else if (statement[0] != '.')
        parser_->instruction(statement, pending_line_, places_.stack());
      else if (!begins(statement, ".pragma"))
        parser_->bad(statement);
    }
  }

  void end_kernel() {
    parser_->finish(line_);
    module_.kernels[kernel_->name] = kernel_;
    finished_.push_back(std::move(parser_));
    kernel_.reset();
  }

  Module& module_;
  std::string name_, pending_;
  Places places_;
  std::shared_ptr<Kernel> kernel_;
  std::unique_ptr<KernelParser> parser_;
  std::vector<std::unique_ptr<KernelParser>> finished_;  // places are named after all files are read
  int line_ = 0, pending_line_ = 0, depth_ = 0;
  bool in_parameters_ = false;
};

}  // namespace

std::shared_ptr<Module> load_module(const std::string& text, const std::string& name) {
  auto module = std::make_shared<Module>();
  ModuleParser(*module, name).read(text);
  return module;
}

}  // namespace ptx
