#include "flags.h"

#include <charconv>

#include "errors.h"

namespace powerinfer {

namespace {

template <typename Number>
void set_number(const std::string& name, const std::string& kind, const std::string& text, Number* target) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, *target);
  if (error != std::errc() || stop != end) {
    throw Error(ErrorKind::kUsage, name + " takes " + kind + ", got \"" + text + "\"");
  }
}

}  // namespace

void Flags::add(const std::string& name, const std::string& value, const std::string& help, std::string* target) {
  flags_.push_back({name, value, help, [target](const std::string& text) { *target = text; }});
}

void Flags::add(const std::string& name, const std::string& value, const std::string& help, int* target) {
  flags_.push_back({name, value, help, [=](const std::string& text) { set_number(name, "an integer", text, target); }});
}

void Flags::add(const std::string& name, const std::string& value, const std::string& help, double* target) {
  flags_.push_back({name, value, help, [=](const std::string& text) { set_number(name, "a number", text, target); }});
}

void Flags::add(const std::string& name, const std::string& help, bool* target) {
  flags_.push_back({name, "", help, [target](const std::string&) { *target = true; }});
}

bool Flags::parse(int argc, const char* const* argv) {
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i];
    if (name == "--help" || name == "-h") return true;
    std::string value;
    const size_t equals = name.find('=');
    const bool joined = equals != std::string::npos;
    if (joined) value = name.substr(equals + 1), name.resize(equals);
    const Flag* flag = nullptr;
    for (const Flag& known : flags_) {
      if (known.name == name) flag = &known;
    }
    if (!flag) throw Error(ErrorKind::kUsage, "unknown argument \"" + name + "\"; " + program_ + " --help lists the flags");
    if (flag->value.empty()) {
      if (joined) throw Error(ErrorKind::kUsage, name + " takes no value");
    } else if (!joined) {
      if (i + 1 == argc) throw Error(ErrorKind::kUsage, name + " takes a value: " + flag->value);
      value = argv[++i];
    }
    flag->set(value);
  }
  return false;
}

std::string Flags::help() const {
  std::string text = program_ + ": " + purpose_ + "\n\n";
  for (const Flag& flag : flags_) {
    std::string left = "  " + flag.name + (flag.value.empty() ? "" : " " + flag.value);
    left.resize(std::max<size_t>(left.size() + 2, 32), ' ');
    text += left + flag.help + "\n";
  }
  return text + "  --help                        this text\n";
}

}  // namespace powerinfer
