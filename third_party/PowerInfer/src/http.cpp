#include "http.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <thread>
#include <vector>

#include "errors.h"

namespace powerinfer {
namespace {

using Clock = std::chrono::steady_clock;

// A new connection's time to send its first byte before it counts as idle.
constexpr std::chrono::milliseconds kFirstByte{200};

thread_local Connection* current = nullptr;
thread_local bool refusing = false;  // the accepting thread, while every other one is taken

int milliseconds_until(Clock::time_point until) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 1 << 30));
}

void address_of(const sockaddr_storage& address, std::string& ip, int& port) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET) {
    const auto& v4 = reinterpret_cast<const sockaddr_in&>(address);
    inet_ntop(AF_INET, &v4.sin_addr, text, sizeof text);
    port = ntohs(v4.sin_port);
  } else if (address.ss_family == AF_INET6) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address);
    inet_ntop(AF_INET6, &v6.sin6_addr, text, sizeof text);
    port = ntohs(v6.sin6_port);
  }
  ip = text;
}

// Closing a socket with unread bytes resets the connection, and the client may lose the response: reads on for a moment.
void close_gently(int socket, bool unread) {
  ::shutdown(socket, SHUT_WR);
  if (unread) {
    const auto until = Clock::now() + std::chrono::seconds(1);
    char sink[4096];
    for (size_t total = 0; total < (1u << 20);) {
      pollfd p{socket, POLLIN, 0};
      if (::poll(&p, 1, milliseconds_until(until)) <= 0) break;
      const ssize_t got = ::recv(socket, sink, sizeof sink, MSG_DONTWAIT);
      if (got <= 0) break;
      total += static_cast<size_t>(got);
    }
  }
  ::close(socket);
}

}  // namespace

bool Connection::wait_for_request() {
  close_after_ = timed_out_ = false;
  header_room_ = options_.max_header_bytes;
  if (begin_ == end_) {
    deadline_ = Clock::now() + options_.idle;
    if (!fill()) return false;
  }
  deadline_ = Clock::now() + options_.receive;
  return true;
}

int Connection::poll_for(short events, Clock::time_point until) const {
  for (;;) {
    pollfd p{socket_, events, 0};
    const int ready = ::poll(&p, 1, milliseconds_until(until));
    if (ready > 0) return p.revents;
    if (ready == 0 || errno != EINTR) return 0;
  }
}

bool Connection::wait(int event) const {
  for (;;) {
    pollfd p[2] = {{event, POLLIN, 0}, {socket_, POLLRDHUP, 0}};
    if (::poll(p, 2, -1) < 0) {
      if (errno == EINTR) continue;
      return false;
    }
    if (p[1].revents) return false;
    if (p[0].revents) return true;
  }
}

bool Connection::hung_up() const {
  pollfd p{socket_, POLLRDHUP, 0};
  return ::poll(&p, 1, 0) > 0;
}

bool Connection::fill() {
  for (;;) {
    if (poll_for(POLLIN, deadline_) == 0) {
      timed_out_ = true;
      return false;
    }
    const ssize_t got = ::recv(socket_, buffer_, sizeof buffer_, MSG_DONTWAIT);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got <= 0) return false;
    begin_ = 0;
    end_ = static_cast<size_t>(got);
    return true;
  }
}

bool Connection::is_readable() const { return begin_ < end_ || poll_for(POLLIN, deadline_) != 0; }

bool Connection::is_writable() const {
  return !hung_up() && (poll_for(POLLOUT, Clock::now() + options_.send) & (POLLOUT | POLLERR | POLLHUP)) == POLLOUT;
}

ssize_t Connection::read(char* data, size_t size) {
  size = std::min(size, header_room_);
  if (size == 0) return -1;
  if (begin_ == end_ && !fill()) return timed_out_ ? -1 : 0;
  size = std::min(size, end_ - begin_);
  std::memcpy(data, buffer_ + begin_, size);
  begin_ += size;
  if (header_room_ != SIZE_MAX) header_room_ -= size;
  return static_cast<ssize_t>(size);
}

ssize_t Connection::write(const char* data, size_t size) {
  size_t sent = 0;
  while (sent < size) {
    const ssize_t n = ::send(socket_, data + sent, size - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      sent += static_cast<size_t>(n);
    } else if (n < 0 && errno == EINTR) {
    } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      if (poll_for(POLLOUT, Clock::now() + options_.send) == 0) return -1;
    } else {
      return -1;
    }
  }
  return static_cast<ssize_t>(sent);
}

void Connection::get_remote_ip_and_port(std::string& ip, int& port) const {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (getpeername(socket_, reinterpret_cast<sockaddr*>(&address), &length) == 0) address_of(address, ip, port);
}

void Connection::get_local_ip_and_port(std::string& ip, int& port) const {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &length) == 0) address_of(address, ip, port);
}

// Threads are started as connections come, each one keeps its connection to the end.
class HttpServer::Pool final : public httplib::TaskQueue {
 public:
  Pool(HttpServer& server, size_t most) : server_(server), most_(most) {}

  void enqueue(std::function<void()> task) override {
    {
      std::unique_lock lock(mutex_);
      if (busy_ + tasks_.size() >= most_ / 4 * 3) {  // makes room before there is none
        lock.unlock();
        server_.close_one_idle();
        lock.lock();
      }
      if (busy_ + tasks_.size() < most_ && add_thread()) {
        tasks_.push_back(std::move(task));
        ready_.notify_one();
        return;
      }
    }
    refusing = true;
    task();
    refusing = false;
  }

  void shutdown() override {
    server_.finish_connections();  // also where accepting failed
    {
      std::lock_guard lock(mutex_);
      ending_ = true;
    }
    ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  // true: a thread is free for one more task
  bool add_thread() {
    if (threads_.size() > busy_ + tasks_.size()) return true;
    try {
      threads_.emplace_back([this] { work(); });
    } catch (const std::exception&) {  // no more threads to be had
      return false;
    }
    return true;
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      ready_.wait(lock, [this] { return ending_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      {
        const std::function<void()> task = std::move(tasks_.front());
        tasks_.pop_front();
        ++busy_;
        lock.unlock();
        task();
      }
      lock.lock();
      --busy_;
    }
  }

  HttpServer& server_;
  const size_t most_;
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> threads_;
  size_t busy_ = 0;
  bool ending_ = false;
};

HttpServer::HttpServer(const HttpOptions& options) : options_(options) {
  new_task_queue = [this] { return new Pool(*this, options_.connections); };
  set_socket_options([this](int socket) {
    // not SO_REUSEPORT, httplib's default: two servers would share a port without a word
    const int yes = 1;
    ::setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    listening_ = socket;
  });
}

int HttpServer::bind(const std::string& host, int port) {
  errno = 0;
  int bound = port;
  const bool fine = port == 0 ? (bound = bind_to_any_port(host)) > 0 : bind_to_port(host, port);
  if (!fine) {
    const std::string reason = errno != 0 ? std::strerror(errno) : "no such address";
    throw Error(ErrorKind::kListen, "cannot listen on " + host + ":" + std::to_string(port) + ": " + reason);
  }
  ::listen(listening_, 511);  // httplib's backlog of 5 drops bursts of connections
  return bound;
}

Connection& HttpServer::connection() { return *current; }

bool HttpServer::process_and_close_socket(int socket) {
  if (refusing) {
    refuse(socket);
    return false;
  }
  bool unread = false;
  try {
    add(socket);
    const int yes = 1;
    ::setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    Connection connection(socket, options_);
    current = &connection;
    for (;; set_phase(socket, Phase::kIdle)) {
      if (!connection.wait_for_request()) break;
      set_phase(socket, Phase::kReading);
      bool last;
      {
        std::lock_guard lock(mutex_);
        last = finishing_;
      }
      bool closed = false;
      const bool fine = process_request(connection, last, closed, [&](httplib::Request& request) {
        connection.headers_read();
        request.ranges.clear();  // httplib would cut answers by them, and compress
        request.headers.erase("Accept-Encoding");
        set_phase(socket, Phase::kAnswering);
      });
      unread = !fine || connection.closes();
      if (!fine || closed || last || connection.closes()) break;
    }
  } catch (const std::exception&) {  // out of memory
  }
  current = nullptr;
  {
    std::lock_guard lock(mutex_);
    connections_.erase(socket);
  }
  changed_.notify_all();
  close_gently(socket, unread);
  return true;
}

void HttpServer::refuse(int socket) {
  static const std::string kBody =
      R"({"error":{"message":"too many connections","type":"service_unavailable_error","param":null,"code":null}})";
  const std::string response =
      "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
      "Connection: close\r\nContent-Length: " +
      std::to_string(kBody.size()) + "\r\n\r\n" + kBody;
  ::send(socket, response.data(), response.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  ::shutdown(socket, SHUT_WR);
  char sink[4096];
  while (::recv(socket, sink, sizeof sink, MSG_DONTWAIT) > 0) {
  }
  ::close(socket);
}

// One that comes during a drain is still told so.
void HttpServer::add(int socket) {
  std::lock_guard lock(mutex_);
  connections_[socket] = State{};
  if (cut_off_) ::shutdown(socket, SHUT_RD);
}

void HttpServer::set_phase(int socket, Phase phase) {
  std::lock_guard lock(mutex_);
  connections_[socket] = State{phase, false};
  changed_.notify_all();
  // one that was accepted after shut_down() has nobody else to end it
  if (finishing_ && (phase == Phase::kIdle || cut_off_)) ::shutdown(socket, SHUT_RD);
}

bool HttpServer::close_one_idle() {
  std::lock_guard lock(mutex_);
  const auto now = Clock::now();
  auto longest = connections_.end();
  for (auto c = connections_.begin(); c != connections_.end(); ++c) {
    if (c->second.phase != Phase::kIdle) continue;
    if (c->second.fresh && now - c->second.since < kFirstByte) continue;
    if (longest == connections_.end() || c->second.since < longest->second.since) longest = c;
  }
  if (longest == connections_.end()) return false;
  longest->second.phase = Phase::kReading;  // not chosen again
  ::shutdown(longest->first, SHUT_RD);
  return true;
}

void HttpServer::finish_connections() {
  std::lock_guard lock(mutex_);
  finishing_ = true;
  for (const auto& [socket, state] : connections_) {
    if (state.phase == Phase::kIdle) ::shutdown(socket, SHUT_RD);
  }
}

void HttpServer::wait_for_answers(std::chrono::seconds limit) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, limit, [this] {
    return std::none_of(connections_.begin(), connections_.end(),
                        [](const auto& c) { return c.second.phase == Phase::kAnswering; });
  });
}

void HttpServer::shut_down() {
  finish_connections();
  {
    std::lock_guard lock(mutex_);
    cut_off_ = true;
    for (const auto& [socket, state] : connections_) {
      ::shutdown(socket, state.phase == Phase::kAnswering ? SHUT_RDWR : SHUT_RD);
    }
  }
  stop();
}

}  // namespace powerinfer
