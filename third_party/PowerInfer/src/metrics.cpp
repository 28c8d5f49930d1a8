#include "metrics.h"

#include <algorithm>
#include <cstdio>

namespace powerinfer {
namespace {

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.15g", value);
  return text;
}

void comments(const std::string& name, const std::string& type, const std::string& help, std::string& out) {
  out += "# HELP " + name + " " + help + "\n# TYPE " + name + " " + type + "\n";
}

}  // namespace

void Histogram::add(double value) {
  const auto bound = std::lower_bound(bounds_.begin(), bounds_.end(), value);
  ++counts_[static_cast<size_t>(bound - bounds_.begin())];
  sum_ += value;
}

void Histogram::write(const std::string& name, const std::string& help, std::string& out) const {
  comments(name, "histogram", help, out);
  uint64_t total = 0;
  for (size_t i = 0; i < counts_.size(); ++i) {
    total += counts_[i];
    const std::string bound = i < bounds_.size() ? number(bounds_[i]) : "+Inf";
    out += name + "_bucket{le=\"" + bound + "\"} " + std::to_string(total) + "\n";
  }
  out += name + "_sum " + number(sum_) + "\n" + name + "_count " + std::to_string(total) + "\n";
}

void write_metric(const std::string& name, const std::string& type, const std::string& help, double value,
                  std::string& out) {
  comments(name, type, help, out);
  out += name + " " + number(value) + "\n";
}

void Metrics::count_request(const std::string& endpoint, int status) {
  std::lock_guard lock(mutex_);
  ++requests_[{endpoint, status}];
}

void Metrics::first_token(double seconds) {
  std::lock_guard lock(mutex_);
  first_token_.add(seconds);
}

void Metrics::next_token(double seconds) {
  std::lock_guard lock(mutex_);
  next_token_.add(seconds);
}

void Metrics::request_seconds(double seconds) {
  std::lock_guard lock(mutex_);
  request_.add(seconds);
}

void Metrics::write(std::string& out) const {
  std::lock_guard lock(mutex_);
  comments("powerinfer_http_requests_total", "counter",
           "HTTP requests by endpoint and status (499: the client hung up before the answer)", out);
  for (const auto& [key, count] : requests_) {
    out += "powerinfer_http_requests_total{endpoint=\"" + key.first + "\",status=\"" + std::to_string(key.second) + "\"} " +
           std::to_string(count) + "\n";
  }
  first_token_.write("powerinfer_time_to_first_token_seconds", "From a request's arrival to its first token", out);
  next_token_.write("powerinfer_time_per_token_seconds", "Between two tokens of one sequence", out);
  request_.write("powerinfer_request_seconds", "From a request's arrival to the end of its answer", out);
}

}  // namespace powerinfer
