#include "cli/terminal.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "core/progress.h"

namespace everlong::cli {
namespace {

std::string color_mode = "auto";
bool quiet_mode = false;
volatile sig_atomic_t signal_number = 0;

bool colored(int descriptor) {
  if (color_mode == "always") return true;
  if (color_mode == "never") return false;
  const char* const no_color = std::getenv("NO_COLOR");
  const char* const terminal = std::getenv("TERM");
  return (no_color == nullptr || *no_color == '\0') && ::isatty(descriptor) == 1 &&
         (terminal == nullptr || std::string_view(terminal) != "dumb");
}

void remember_signal(int number) {
  if (signal_number != 0) ::_exit(128 + number);
  signal_number = number;
}

}  // namespace

void set_color(std::string_view mode) { color_mode = mode; }

void set_quiet(bool quiet) {
  quiet_mode = quiet;
  Progress::set_quiet(quiet);
}

std::string bold(std::string_view text) {
  return colored(STDOUT_FILENO) ? cat("\033[1m", text, "\033[0m") : std::string(text);
}

void note(std::string_view line) {
  if (!quiet_mode) std::fprintf(stderr, "%.*s\n", static_cast<int>(line.size()), line.data());
}

void print_error(std::string_view command, std::string_view message) {
  const bool red = colored(STDERR_FILENO);
  std::fprintf(stderr, "%s%.*s:%s %.*s\n", red ? "\033[31m" : "", static_cast<int>(command.size()),
               command.data(), red ? "\033[0m" : "", static_cast<int>(message.size()),
               message.data());
}

void print(std::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); }

void print_json(const nlohmann::ordered_json& value) {
  print(value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
  std::fflush(stdout);
}

Status flush_output() {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return {};
  return io_error("standard output cannot be written");
}

Table::Table(std::vector<std::string> head, std::vector<std::size_t> left)
    : left_(std::move(left)) {
  rows_.push_back(std::move(head));
}

void Table::add(std::vector<std::string> row) {
  row.resize(rows_.front().size());
  rows_.push_back(std::move(row));
}

std::string Table::text() const {
  std::vector<std::size_t> widths(rows_.front().size(), 0);
  for (const auto& row : rows_)
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  std::string out;
  for (const auto& row : rows_) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string space(widths[i] - row[i].size(), ' ');
      const bool left = std::ranges::find(left_, i) != left_.end();
      line += cat(i == 0 ? "" : "  ", left ? "" : space, row[i], left ? space : "");
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += cat(&row == &rows_.front() ? bold(line) : line, "\n");
  }
  return out;
}

void catch_signals() {
  struct sigaction action {};
  action.sa_handler = remember_signal;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
}

int caught_signal() { return signal_number; }

}  // namespace everlong::cli
