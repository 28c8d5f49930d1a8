// HTTP/1.1 over httplib, with its connections handled here: limits on time and size, hang-ups seen while a request waits,
// and no more threads than asked for.
#pragma once

#include <httplib.h>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace powerinfer {

struct HttpOptions {
  size_t connections = 256;            // at once; further ones get 503
  size_t max_header_bytes = 64 << 10;  // request line and headers together
  std::chrono::seconds idle{5};        // between requests
  std::chrono::seconds receive{30};    // for a whole request, from its first byte
  std::chrono::seconds send{10};       // without any progress
};

// One connection, as httplib reads and writes it.
class Connection final : public httplib::Stream {
 public:
  Connection(int socket, const HttpOptions& options) : socket_(socket), options_(options) {}

  bool wait_for_request();  // false: closed, or idle for too long
  void headers_read() { header_room_ = SIZE_MAX; }
  // Waits until `event` (an eventfd) can be read; false: the client hung up first.
  bool wait(int event) const;
  bool hung_up() const;
  bool timed_out() const { return timed_out_; }  // the last read did not come in time

  // The response leaves the request's body unread: what follows on this connection is no request.
  void close_after() { close_after_ = true; }
  bool closes() const { return close_after_; }

  bool is_readable() const override;
  bool is_writable() const override;
  ssize_t read(char* data, size_t size) override;
  ssize_t write(const char* data, size_t size) override;
  void get_remote_ip_and_port(std::string& ip, int& port) const override;
  void get_local_ip_and_port(std::string& ip, int& port) const override;
  int socket() const override { return socket_; }

 private:
  int poll_for(short events, std::chrono::steady_clock::time_point until) const;  // revents; 0: too late
  bool fill();

  const int socket_;
  const HttpOptions& options_;
  char buffer_[8192];
  size_t begin_ = 0, end_ = 0;  // of what was received and not read
  size_t header_room_ = 0;      // bytes that may still be read
  std::chrono::steady_clock::time_point deadline_;
  bool timed_out_ = false;
  bool close_after_ = false;
};

class HttpServer final : public httplib::Server {
 public:
  explicit HttpServer(const HttpOptions& options);

  // Port 0 takes a free one. Returns the port; throws Error(kListen).
  int bind(const std::string& host, int port);
  void run() { listen_after_bind(); }  // until stop(), and all connections are closed
  // Closes idle connections, and the others after their response.
  void finish_connections();
  // Returns once no answer is being written, or after `limit`.
  void wait_for_answers(std::chrono::seconds limit);
  // Cuts off the connections that are left, then ends run().
  void shut_down();

  static Connection& connection();  // whose request the calling thread handles

 private:
  class Pool;
  friend class Pool;
  enum class Phase { kIdle, kReading, kAnswering };
  struct State {
    Phase phase = Phase::kIdle;
    bool fresh = true;  // nothing received yet
    std::chrono::steady_clock::time_point since = std::chrono::steady_clock::now();
  };

  bool process_and_close_socket(int socket) override;
  void refuse(int socket);
  void add(int socket);
  void set_phase(int socket, Phase phase);
  bool close_one_idle();

  const HttpOptions options_;
  int listening_ = -1;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<int, State> connections_;
  bool finishing_ = false, cut_off_ = false;
};

}  // namespace powerinfer
