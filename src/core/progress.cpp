#include "core/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "core/text.h"

namespace everlong {
namespace {

bool quiet = false;

double seconds_between(std::chrono::steady_clock::time_point a,
                       std::chrono::steady_clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

}  // namespace

void Progress::set_quiet(bool value) { quiet = value; }

Progress::Progress(std::string label, std::int64_t total, std::string unit, double plain_interval)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(std::max<std::int64_t>(total, 1)),
      plain_interval_(plain_interval),
      terminal_(::isatty(STDERR_FILENO) == 1),
      start_(std::chrono::steady_clock::now()),
      last_draw_(start_) {}

Progress::~Progress() { finish(); }

void Progress::update(std::int64_t done, std::string_view note) {
  done_ = done;
  if (!note.empty()) note_ = note;
  const double since = seconds_between(last_draw_, std::chrono::steady_clock::now());
  if (since >= (terminal_ ? 0.1 : plain_interval_)) draw(false);
}

void Progress::finish(std::string_view note) {
  if (finished_) return;
  finished_ = true;
  if (!note.empty()) note_ = note;
  draw(true);
}

void Progress::draw(bool last) {
  if (quiet) return;
  const auto now = std::chrono::steady_clock::now();
  // Quick work leaves no trace: a bar that was never needed is noise.
  const double elapsed = seconds_between(start_, now);
  if (last && !drawn_ && elapsed < 2) return;
  last_draw_ = now;
  drawn_ = true;
  const double fraction =
      std::clamp(static_cast<double>(done_) / static_cast<double>(total_), 0.0, 1.0);
  const double rate = elapsed > 0 ? static_cast<double>(done_) / elapsed : 0;
  const double left = rate > 0 ? static_cast<double>(total_ - done_) / rate : 0;
  constexpr int kWidth = 24;
  const int filled = static_cast<int>(fraction * kWidth);
  const std::string bar = std::string(filled, '#') + std::string(kWidth - filled, ' ');
  const std::string line =
      cat(label_, " ", fixed(100 * fraction, 0), "%|", bar, "| ", with_commas(done_), "/",
          with_commas(total_), " [", human_duration(elapsed), "<", human_duration(left), ", ",
          rate < 100 ? fixed(rate, 1) : with_commas(static_cast<std::int64_t>(rate)), " ", unit_,
          "/s] ", note_);
  if (terminal_) {
    std::fprintf(stderr, "\r\033[K%s%s", line.c_str(), last ? "\n" : "");
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  std::fflush(stderr);
}

}  // namespace everlong
