// One stream, very long: does it keep its speed and its memory?
#pragma once
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "eval/perplexity.h"
#include "eval/timing.h"

namespace everlong {

struct StreamingOptions {
  std::int64_t tokens = 1'000'000;
  std::int64_t feed = 2048;
  std::vector<std::int64_t> marks = {1'000, 10'000, 100'000, 1'000'000};
  bool score = true;  // predict every token on the way and report bits per byte; else only feed
  std::int64_t rounds = 9;  // of timing at the marks, 0: none
};

struct StreamingMark {
  std::int64_t tokens = 0;
  // One feed timed from a copy of the stream at this mark, the marks taking turns so that a noisy
  // machine treats them alike: tokens a second.
  Spread speed;
  double observed =
      0;  // tokens a second as it streamed: median over the last feeds before the mark
  std::int64_t state_bytes = 0, state_bytes_bound = 0;
  std::int64_t file_bytes = 0, file_bytes_bound = 0;  // of states that lie in files too
  std::int64_t resident_bytes = 0;  // the most during the last 16 feeds: it goes up and down
  std::optional<std::int64_t> device_bytes;
};

// The stream from `begin` to `end`, as it went.
struct StreamingWindow {
  std::int64_t begin = 0, end = 0;
  double seconds = 0;
  std::int64_t state_bytes = 0, resident_bytes = 0;
};

struct StreamingReport {
  std::int64_t tokens = 0, feed = 0;
  double seconds = 0;
  std::vector<StreamingMark> marks;
  std::vector<StreamingWindow> windows;  // about 24 a decade
  std::vector<PositionBucket> buckets;   // when scored
  PositionBucket total;
  std::map<std::string, double> counts;  // Stream::state_counts at the end
};

// Resets the stream and feeds it the first `tokens` tokens of the source. Marks beyond them are
// left out. Feeds of a throw-away copy come first, so that buffers exist before memory is
// compared.
Result<StreamingReport> measure_streaming(Stream& stream, const TokenSource& source,
                                          const Tokenizer& tokenizer,
                                          const StreamingOptions& options,
                                          const ProgressFunction& progress);

nlohmann::ordered_json to_json(const StreamingReport& report);

}  // namespace everlong
