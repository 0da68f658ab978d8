#include "core/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

extern char** environ;

namespace everlong {
namespace {

constexpr std::size_t kErrorTail = 16 << 10;

class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~Descriptor() { close(); }
  void close() {
    if (number_ >= 0) ::close(std::exchange(number_, -1));
  }
  int get() const { return number_; }

 private:
  int number_;
};

// Ours first, the child's second. A socket and not a pipe: send() can be told to raise no SIGPIPE
// when the child closes its stdin early, which would end this whole program.
Result<std::pair<Descriptor, Descriptor>> channel() {
  int both[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, both) != 0)
    return io_error("cannot make a channel to a child process: ", std::strerror(errno));
  return std::pair(Descriptor(both[0]), Descriptor(both[1]));
}

std::vector<std::string> merged_environment(const Process& process) {
  std::vector<std::string> merged;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    bool replaced = false;
    for (const auto& [name, value] : process.environment)
      replaced = replaced || (text.starts_with(name) && text.substr(name.size()).starts_with('='));
    if (!replaced) merged.emplace_back(text);
  }
  for (const auto& [name, value] : process.environment) merged.push_back(cat(name, "=", value));
  return merged;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (auto& text : texts) result.push_back(text.data());
  result.push_back(nullptr);
  return result;
}

Result<::pid_t> spawn(const Process& process, int input, int output, int errors) {
  ::posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  if (!process.folder.empty())
    ::posix_spawn_file_actions_addchdir_np(&actions, process.folder.c_str());
  if (input >= 0) {
    ::posix_spawn_file_actions_adddup2(&actions, input, STDIN_FILENO);
  } else {
    ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  }
  ::posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, errors, STDERR_FILENO);
  // Signals that this program ignores or blocks (SIGPIPE, SIGINT while finishing a step) are the
  // child's to take.
  ::posix_spawnattr_t attributes;
  ::posix_spawnattr_init(&attributes);
  ::sigset_t taken, none;
  ::sigemptyset(&none);
  ::sigemptyset(&taken);
  for (const int signal : {SIGPIPE, SIGINT, SIGTERM}) ::sigaddset(&taken, signal);
  ::posix_spawnattr_setsigdefault(&attributes, &taken);
  ::posix_spawnattr_setsigmask(&attributes, &none);
  ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK);

  std::vector<std::string> command = process.command;
  std::vector<std::string> environment = merged_environment(process);
  ::pid_t child = -1;
  const int error = ::posix_spawnp(&child, command[0].c_str(), &actions, &attributes,
                                   pointers(command).data(), pointers(environment).data());
  ::posix_spawn_file_actions_destroy(&actions);
  ::posix_spawnattr_destroy(&attributes);
  if (error == 0) return child;
  const auto code = error == ENOENT ? StatusCode::kNotFound : StatusCode::kIo;
  return Status(code, cat(command[0], ": cannot be run: ", std::strerror(error)));
}

// Ends the child on every way out and says how it ended.
class Child {
 public:
  explicit Child(::pid_t id) : id_(id) {}
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child() {
    if (id_ < 0) return;
    ::kill(id_, SIGKILL);
    (void)wait();
  }
  int wait() {
    int how = 0;
    while (::waitpid(id_, &how, 0) < 0 && errno == EINTR) {
    }
    id_ = -1;
    return WIFSIGNALED(how) ? 128 + WTERMSIG(how) : WEXITSTATUS(how);
  }

 private:
  ::pid_t id_;
};

// One read; closes the descriptor at the end of the stream.
std::string_view take(Descriptor& from, std::span<char> buffer) {
  const ::ssize_t got = ::read(from.get(), buffer.data(), buffer.size());
  if (got > 0) return {buffer.data(), static_cast<std::size_t>(got)};
  if (got == 0 || (errno != EINTR && errno != EAGAIN)) from.close();
  return {};
}

}  // namespace

Result<ProcessResult> run_process(const Process& process) {
  if (process.command.empty()) return invalid_argument("run_process: the command is empty");
  EVERLONG_ASSIGN(auto output, channel());
  EVERLONG_ASSIGN(auto errors, channel());
  std::pair<Descriptor, Descriptor> input;
  if (!process.input.empty()) {
    EVERLONG_ASSIGN(input, channel());
  }
  EVERLONG_ASSIGN(const ::pid_t id,
                  spawn(process, input.second.get(), output.second.get(), errors.second.get()));
  Child child(id);
  for (auto* pair : {&input, &output, &errors}) pair->second.close();

  ProcessResult result;
  std::string_view left = process.input;
  std::vector<char> buffer(64 << 10);
  while (output.first.get() >= 0 || errors.first.get() >= 0) {
    // poll() passes over negative descriptors.
    std::array<::pollfd, 3> waiting{{{output.first.get(), POLLIN, 0},
                                     {errors.first.get(), POLLIN, 0},
                                     {input.first.get(), POLLOUT, 0}}};
    if (::poll(waiting.data(), waiting.size(), -1) < 0) {
      if (errno == EINTR) continue;
      return io_error(process.command[0], ": cannot wait for its output: ", std::strerror(errno));
    }
    if (waiting[0].revents != 0) {
      const std::string_view piece = take(output.first, buffer);
      if (process.output && !piece.empty()) {
        EVERLONG_RETURN_IF_ERROR(process.output(piece));
      } else {
        result.output += piece;
      }
    }
    if (waiting[1].revents != 0) {
      result.errors += take(errors.first, buffer);
      if (result.errors.size() > kErrorTail)
        result.errors.erase(0, result.errors.size() - kErrorTail);
    }
    if (waiting[2].revents != 0) {
      const ::ssize_t sent =
          ::send(input.first.get(), left.data(), left.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
      if (sent > 0) left.remove_prefix(static_cast<std::size_t>(sent));
      const bool stopped_reading = sent < 0 && errno != EINTR && errno != EAGAIN;
      if (left.empty() || stopped_reading) input.first.close();
    }
  }
  result.exit_code = child.wait();
  if (result.exit_code == 128 + SIGINT)
    return Status(StatusCode::kInterrupted, cat(process.command[0], ": interrupted"));
  return result;
}

}  // namespace everlong
