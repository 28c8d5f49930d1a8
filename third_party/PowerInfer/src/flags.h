// Command-line flags: --name VALUE or --name=VALUE, and switches without a value.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace powerinfer {

class Flags {
 public:
  Flags(std::string program, std::string purpose) : program_(std::move(program)), purpose_(std::move(purpose)) {}

  void add(const std::string& name, const std::string& value, const std::string& help, std::string* target);
  void add(const std::string& name, const std::string& value, const std::string& help, int* target);
  void add(const std::string& name, const std::string& value, const std::string& help, double* target);
  void add(const std::string& name, const std::string& help, bool* target);  // a switch

  // Throws Error(kUsage) for what is no flag of these or has no fitting value. True: help was asked for and is in `help`.
  bool parse(int argc, const char* const* argv);
  std::string help() const;

 private:
  struct Flag {
    std::string name, value, help;
    std::function<void(const std::string&)> set;
  };
  std::string program_, purpose_;
  std::vector<Flag> flags_;
};

}  // namespace powerinfer
