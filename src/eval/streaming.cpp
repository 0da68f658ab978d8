#include "eval/streaming.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "ops/runtime.h"

namespace everlong {
namespace {

constexpr int kWarmUpFeeds = 32;
constexpr std::size_t kRecentFeeds = 16;  // what a mark tells of: those before it
constexpr double kWindowGrowth = 1.1;     // 24 windows a decade

// Feeds the tokens one way or the other and waits for the device.
Result<std::vector<float>> advance(Stream& stream, std::span<const std::int32_t> ids, bool score,
                                   at::Device device) {
  std::vector<float> log_probabilities;
  if (score) {
    EVERLONG_ASSIGN(log_probabilities, stream.score(ids));
  } else {
    EVERLONG_RETURN_IF_ERROR(stream.feed(ids));
  }
  synchronize(device);
  return log_probabilities;
}

// The same feed from a copy of every stream in turn, each round beginning with another one.
Result<std::vector<Spread>> time_in_turns(const std::vector<Stream>& streams,
                                          std::span<const std::int32_t> ids,
                                          const StreamingOptions& options, at::Device device) {
  std::vector<std::vector<double>> speeds(streams.size());
  for (std::int64_t round = 0; round <= options.rounds; ++round)
    for (std::size_t i = 0; i < streams.size(); ++i) {
      const std::size_t turn = (i + static_cast<std::size_t>(round)) % streams.size();
      Stream copy = streams[turn].clone();
      synchronize(device);
      const Stopwatch watch;
      EVERLONG_ASSIGN(const auto ignored, advance(copy, ids, options.score, device));
      if (round > 0)
        speeds[turn].push_back(static_cast<double>(ids.size()) / watch.seconds());  // 0 warms up
    }
  std::vector<Spread> out;
  for (auto& values : speeds) out.push_back(spread(std::move(values)));
  return out;
}

// The most resident memory since the last call.
std::int64_t take_resident_peak() {
  const std::int64_t peak = peak_resident_bytes();
  return reset_resident_peak() ? peak : resident_bytes();
}

// The last feeds, the same number at every mark: the highest of more would be higher by itself.
class Recent {
 public:
  void add(double value) {
    values_.push_back(value);
    if (values_.size() > kRecentFeeds) values_.erase(values_.begin());
  }
  bool empty() const { return values_.empty(); }
  double median() const { return spread(values_).median; }
  double most() const { return *std::ranges::max_element(values_); }

 private:
  std::vector<double> values_;
};

StreamingMark mark_here(const Stream& stream, std::int64_t tokens, const Recent& speeds,
                        const Recent& resident, at::Device device) {
  StreamingMark mark;
  mark.tokens = tokens;
  mark.observed = speeds.median();
  mark.resident_bytes = static_cast<std::int64_t>(resident.most());
  mark.state_bytes = stream.state_bytes();
  mark.state_bytes_bound = stream.state_bytes_bound();
  mark.file_bytes = stream.file_bytes();
  mark.file_bytes_bound = stream.file_bytes_bound();
  if (const auto memory = device_memory(device)) mark.device_bytes = memory->allocated;
  return mark;
}

}  // namespace

Result<StreamingReport> measure_streaming(Stream& stream, const TokenSource& source,
                                          const Tokenizer& tokenizer,
                                          const StreamingOptions& options,
                                          const ProgressFunction& progress) {
  if (options.feed < 1)
    return invalid_argument("feed = ", options.feed, "; at least 1 token is fed at a time");
  if (options.tokens < 2 || options.tokens > source.tokens())
    return invalid_argument("tokens = ", options.tokens, ", but the text has ", source.tokens(),
                            "; ask for 2 to that many");
  auto marks = options.marks;
  std::ranges::sort(marks);
  std::erase_if(marks, [&](std::int64_t mark) { return mark < 1 || mark > options.tokens; });

  const at::Device device = stream.model().head_weight().device();
  StreamingReport report;
  report.tokens = options.tokens;
  report.feed = options.feed;
  std::vector<std::int32_t> ids(static_cast<std::size_t>(std::min(options.feed, options.tokens)));
  EVERLONG_RETURN_IF_ERROR(source.read(0, ids));
  const std::vector<std::int32_t> first_feed = ids;
  stream.reset();
  Recent speeds, resident;
  reset_resident_peak();
  {
    // Several feeds: the allocator grows to its working size over the first ones, and that would
    // look like memory that grows with the text. They count at the marks that come sooner than
    // kRecentFeeds: the first feeds are cut short there and would need less.
    Stream warm_up = stream.clone();
    for (int i = 0; i < kWarmUpFeeds; ++i) {
      EVERLONG_ASSIGN(const auto ignored, advance(warm_up, first_feed, options.score, device));
      resident.add(static_cast<double>(take_resident_peak()));
    }
  }

  PositionBuckets buckets;
  std::vector<Stream> copies;
  StreamingWindow window;
  std::size_t next_mark = 0;
  const Stopwatch all;
  for (std::int64_t done = 0; done < options.tokens;) {
    std::int64_t end = std::min(done + options.feed, options.tokens);
    if (next_mark < marks.size()) end = std::min(end, marks[next_mark]);
    ids.resize(static_cast<std::size_t>(end - done));
    EVERLONG_RETURN_IF_ERROR(source.read(done, ids));

    const Stopwatch watch;
    EVERLONG_ASSIGN(const auto log_probabilities, advance(stream, ids, options.score, device));
    const double seconds = watch.seconds();
    if (options.score) buckets.add(done, ids, log_probabilities, tokenizer);
    // Feeds cut short by a mark pay their fixed cost over few tokens: they say little about speed.
    if (end - done == options.feed || speeds.empty())
      speeds.add(static_cast<double>(end - done) / seconds);
    const std::int64_t peak = take_resident_peak();
    resident.add(static_cast<double>(peak));
    done = end;

    window.end = done;
    window.seconds += seconds;
    window.resident_bytes = std::max(window.resident_bytes, peak);
    const bool at_mark = next_mark < marks.size() && done == marks[next_mark];
    if (at_mark || done == options.tokens ||
        static_cast<double>(done) >= kWindowGrowth * static_cast<double>(window.begin)) {
      window.state_bytes = stream.state_bytes();
      report.windows.push_back(window);
      window = StreamingWindow{.begin = done};
    }
    if (at_mark) {
      report.marks.push_back(mark_here(stream, done, speeds, resident, device));
      if (options.rounds > 0) copies.push_back(stream.clone());
      ++next_mark;
    }
    if (progress) progress(done);
  }
  report.seconds = all.seconds();
  report.buckets = buckets.buckets();
  report.total = buckets.total();
  report.counts = stream.state_counts();
  if (!copies.empty()) {
    EVERLONG_ASSIGN(const auto in_turns, time_in_turns(copies, first_feed, options, device));
    for (std::size_t i = 0; i < in_turns.size(); ++i) report.marks[i].speed = in_turns[i];
  }
  return report;
}

nlohmann::ordered_json to_json(const StreamingReport& report) {
  nlohmann::ordered_json out = {
      {"tokens", report.tokens}, {"feed", report.feed}, {"seconds", report.seconds}};
  if (report.total.tokens > 0) out["bits_per_byte"] = report.total.bits_per_byte();
  out["marks"] = nlohmann::ordered_json::array();
  for (const auto& mark : report.marks) {
    nlohmann::ordered_json entry = {{"tokens", mark.tokens}};
    if (mark.speed.repeats > 0) {
      entry["tokens_per_second"] = mark.speed.median;
      entry["tokens_per_second_min"] = mark.speed.min;
      entry["tokens_per_second_max"] = mark.speed.max;
    }
    entry["observed"] = mark.observed;
    entry["state_bytes"] = mark.state_bytes;
    entry["state_bytes_bound"] = mark.state_bytes_bound;
    if (mark.file_bytes_bound > 0) {
      entry["file_bytes"] = mark.file_bytes;
      entry["file_bytes_bound"] = mark.file_bytes_bound;
    }
    entry["resident_bytes"] = mark.resident_bytes;
    if (mark.device_bytes) entry["device_bytes"] = *mark.device_bytes;
    out["marks"].push_back(entry);
  }
  out["windows"] = nlohmann::ordered_json::array();
  for (const auto& window : report.windows)
    out["windows"].push_back(
        {{"begin", window.begin},
         {"end", window.end},
         {"tokens_per_second", static_cast<double>(window.end - window.begin) / window.seconds},
         {"state_bytes", window.state_bytes},
         {"resident_bytes", window.resident_bytes}});
  out["buckets"] = to_json(report.buckets);
  if (!report.counts.empty()) out["counts"] = report.counts;
  return out;
}

}  // namespace everlong
