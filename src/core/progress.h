// A progress bar where a person looks, plain lines where a log does.
#pragma once
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

namespace everlong {

// Draws on stderr only: "train  45%|####      | 90/200 [12s<15s, 7.4 steps/s] loss 1.93". On a
// terminal one line is redrawn (at most 10 times a second); elsewhere a line is printed every
// `plain_interval` seconds. Silent after set_quiet(true). Not thread safe.
class Progress {
 public:
  Progress(std::string label, std::int64_t total, std::string unit, double plain_interval = 15);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Corrects the total where it is only estimated: work that a time limit may end.
  void set_total(std::int64_t total) { total_ = total > 0 ? total : 1; }
  void update(std::int64_t done, std::string_view note = "");
  // Ends the bar with a last full line. Called by the destructor as well.
  void finish(std::string_view note = "");

  static void set_quiet(bool quiet);

 private:
  void draw(bool last);
  std::string label_, unit_, note_;
  std::int64_t total_, done_ = 0;
  double plain_interval_;
  bool terminal_, finished_ = false, drawn_ = false;
  std::chrono::steady_clock::time_point start_, last_draw_;
};

}  // namespace everlong
