// Counters of the server in Prometheus' text format.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace powerinfer {

class Histogram {
 public:
  explicit Histogram(std::vector<double> bounds) : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}
  void add(double value);
  // `name`_bucket, _sum and _count lines
  void write(const std::string& name, const std::string& help, std::string& out) const;

 private:
  std::vector<double> bounds_;    // upper, rising
  std::vector<uint64_t> counts_;  // one more than bounds
  double sum_ = 0;
};

// One value with its two comment lines; `type`: "counter" or "gauge".
void write_metric(const std::string& name, const std::string& type, const std::string& help, double value, std::string& out);

// Thread-safe.
class Metrics {
 public:
  void count_request(const std::string& endpoint, int status);
  void first_token(double seconds);
  void next_token(double seconds);
  void request_seconds(double seconds);
  void write(std::string& out) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<std::string, int>, uint64_t> requests_;
  Histogram first_token_{{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120}};
  Histogram next_token_{{.001, .0025, .005, .01, .02, .03, .05, .075, .1, .15, .2, .3, .5, 1, 2.5}};
  Histogram request_{{.05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600}};
};

}  // namespace powerinfer
