// Errors that reach the user as one line, and the exit status that each kind ends the process with.
#pragma once

#include <stdexcept>
#include <string>

namespace powerinfer {

enum class ErrorKind : int {
  kFailed = 1,     // anything else that went wrong while running
  kUsage = 2,      // a flag or its value
  kModel = 3,      // model file missing, malformed, truncated or of an unsupported kind
  kListen = 4,     // the address or port cannot be listened on
  kMemory = 5,     // not enough memory for the model or its KV cache
  kRequest = 400,  // a request that cannot be served as it is; never ends the process
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }
  int exit_status() const { return kind_ == ErrorKind::kRequest ? 1 : static_cast<int>(kind_); }

 private:
  ErrorKind kind_;
};

inline Error model_error(const std::string& message) { return Error(ErrorKind::kModel, message); }
inline Error request_error(const std::string& message) { return Error(ErrorKind::kRequest, message); }

}  // namespace powerinfer
