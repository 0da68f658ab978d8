#include "eval/retrieval.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "eval/timing.h"

namespace everlong {
namespace {

constexpr std::uint64_t kLengthDraw = 0x6c656e677468;  // "length": a seed of its own

Status check(const RetrievalOptions& options, const RetrievalPrompts& prompts) {
  if (options.lengths.empty() || options.depths.empty() || options.prompts < 1)
    return invalid_argument("nothing to measure: ", options.lengths.size(), " lengths, ",
                            options.depths.size(), " depths, ", options.prompts,
                            " prompts a cell; at least one of each is needed");
  if (options.feed < 1)
    return invalid_argument("feed = ", options.feed, "; at least 1 token is fed at a time");
  if (options.jitter < 0 || options.length_jitter < 0 || options.local < 0)
    return invalid_argument("jitter = ", options.jitter,
                            ", length_jitter = ", options.length_jitter,
                            ", local = ", options.local, "; token counts must not be negative");
  for (const std::int64_t length : options.lengths)
    if (length - options.length_jitter < prompts.least_tokens())
      return invalid_argument("a prompt of ", length - options.length_jitter,
                              " tokens has no room for the task ", name(prompts.task().kind),
                              ", which needs at least ", prompts.least_tokens(),
                              " tokens; ask for longer prompts");
  for (const double depth : options.depths)
    if (!(depth >= 0 && depth <= 1))
      return invalid_argument("depth ", depth, " is out of range; allowed: 0 (begin) to 1 (end)");
  return {};
}

// Predicts the answer token by token.
Result<RetrievalScore> answer(TextReader& reader, const RetrievalPrompt& prompt) {
  RetrievalScore score;
  bool all = true;
  for (std::size_t i = 0; i < prompt.answer.size(); ++i) {
    EVERLONG_ASSIGN(const std::int32_t said, reader.predict());
    if (prompt.scored[i] != 0) {
      score.tokens.add(said == prompt.answer[i]);
      all = all && said == prompt.answer[i];
    }
    if (i + 1 < prompt.answer.size())
      EVERLONG_RETURN_IF_ERROR(reader.feed(std::span(prompt.answer).subspan(i, 1)));
  }
  score.exact.add(all);
  return score;
}

class Measurement {
 public:
  Measurement(TextReader& reader, const RetrievalPrompts& prompts, const RetrievalOptions& options,
              const RetrievalProgress& progress)
      : reader_(reader),
        prompts_(prompts),
        options_(options),
        progress_(progress),
        buffer_(static_cast<std::size_t>(options.feed)) {}

  Result<RetrievalReport> run() {
    const Stopwatch watch;
    RetrievalReport report;
    report.task = prompts_.task();
    report.filler = prompts_.filler().kind();
    report.options = options_;
    for (const std::int64_t length : options_.lengths)
      for (const double depth : options_.depths) {
        EVERLONG_ASSIGN(auto cell, measure(length, depth));
        report.cells.push_back(std::move(cell));
      }
    report.tokens = tokens_;
    report.seconds = watch.seconds();
    return report;
  }

 private:
  Result<RetrievalCell> measure(std::int64_t length, double depth) {
    const Stopwatch watch;
    RetrievalCell cell{.length = length, .depth = depth, .nearest = length};
    for (std::int64_t number = 0; number < options_.prompts; ++number) {
      const auto seed = mixed_seed({options_.seed, static_cast<std::uint64_t>(length),
                                    static_cast<std::uint64_t>(std::llround(depth * 1e6)),
                                    static_cast<std::uint64_t>(number)});
      Random random{mixed_seed({seed, kLengthDraw})};
      const std::int64_t tokens = length - random.between(0, options_.length_jitter);
      EVERLONG_ASSIGN(const auto prompt, prompts_.prompt({tokens, depth, options_.jitter}, seed));
      EVERLONG_RETURN_IF_ERROR(read(prompt, 0));
      cell.state_bytes = std::max(cell.state_bytes, reader_.state_bytes());
      EVERLONG_ASSIGN(const auto score, answer(reader_, prompt));
      cell.score.add(score);
      score_.add(score);
      cell.prompts.push_back({prompt.fact_begin, score.tokens.successes, score.tokens.trials});
      const std::int64_t after = tokens - prompt.fact_end;
      cell.nearest = std::min(cell.nearest, after);
      cell.farthest = std::max(cell.farthest, after);
      cell.within_local += tokens - prompt.fact_begin <= options_.local ? 1 : 0;
      if (options_.control) {
        const std::int64_t seen = std::max(prompt.question_tokens(), options_.local);
        EVERLONG_RETURN_IF_ERROR(read(prompt, std::max<std::int64_t>(tokens - seen, 0)));
        EVERLONG_ASSIGN(const auto without, answer(reader_, prompt));
        cell.control.add(without);
      }
    }
    cell.seconds = watch.seconds();
    return cell;
  }

  // The prompt into a fresh state, but for its first `skipped` tokens.
  Status read(const RetrievalPrompt& prompt, std::int64_t skipped) {
    reader_.reset();
    PromptReader source(prompt, prompts_.filler());
    for (;;) {
      EVERLONG_ASSIGN(const std::int64_t count, source.next(buffer_));
      if (count == 0) return {};
      const std::int64_t gone = std::min(skipped, count);
      skipped -= gone;
      const auto piece = std::span(buffer_)
                             .first(static_cast<std::size_t>(count))
                             .subspan(static_cast<std::size_t>(gone));
      if (piece.empty()) continue;
      EVERLONG_RETURN_IF_ERROR(reader_.feed(piece));
      tokens_ += std::ssize(piece);
      if (progress_) EVERLONG_RETURN_IF_ERROR(progress_(tokens_, score_));
    }
  }

  TextReader& reader_;
  const RetrievalPrompts& prompts_;
  const RetrievalOptions& options_;
  const RetrievalProgress& progress_;
  std::vector<std::int32_t> buffer_;
  RetrievalScore score_;
  std::int64_t tokens_ = 0;
};

nlohmann::ordered_json to_json(const RetrievalScore& score) {
  return {{"exact", to_json(score.exact)}, {"tokens", to_json(score.tokens)}};
}

}  // namespace

RetrievalScore RetrievalReport::total() const {
  RetrievalScore sum;
  for (const auto& cell : cells) sum.add(cell.score);
  return sum;
}

RetrievalScore RetrievalReport::total_control() const {
  RetrievalScore sum;
  for (const auto& cell : cells) sum.add(cell.control);
  return sum;
}

std::int64_t tokens_to_read(const RetrievalOptions& options) {
  std::int64_t tokens = 0;
  for (const std::int64_t length : options.lengths)
    tokens += length + (options.control ? std::min(length, options.local) : 0);
  return tokens * options.prompts * std::ssize(options.depths);
}

Result<RetrievalReport> retrieval(TextReader& reader, const RetrievalPrompts& prompts,
                                  const RetrievalOptions& options,
                                  const RetrievalProgress& progress) {
  EVERLONG_RETURN_IF_ERROR(check(options, prompts));
  return Measurement(reader, prompts, options, progress).run();
}

nlohmann::ordered_json to_json(const RetrievalReport& report) {
  const auto& options = report.options;
  nlohmann::ordered_json task = {{"kind", name(report.task.kind)}, {"digits", report.task.digits}};
  if (report.task.kind == RetrievalKind::kMultiKey ||
      report.task.kind == RetrievalKind::kMultiValue)
    task["needles"] = report.task.needles;
  if (report.task.kind == RetrievalKind::kTracking) {
    task["hops"] = report.task.hops;
    task["chains"] = report.task.chains;
  }
  auto cells = nlohmann::ordered_json::array();
  for (const auto& cell : report.cells) {
    auto object = to_json(cell.score);
    object["length"] = cell.length;
    object["depth"] = cell.depth;
    if (options.control) object["control"] = to_json(cell.control);
    object["nearest"] = cell.nearest;
    object["farthest"] = cell.farthest;
    object["within_local"] = cell.within_local;
    object["state_bytes"] = cell.state_bytes;
    object["seconds"] = cell.seconds;
    auto& prompts = object["prompts"] = nlohmann::ordered_json::array();
    for (const auto& prompt : cell.prompts)
      prompts.push_back({prompt.fact_begin, prompt.right, prompt.scored});
    cells.push_back(std::move(object));
  }
  auto lengths = nlohmann::ordered_json::array();  // all depths of each
  for (const std::int64_t length : options.lengths) {
    RetrievalScore sum;
    for (const auto& cell : report.cells)
      if (cell.length == length) sum.add(cell.score);
    auto object = to_json(sum);
    object["length"] = length;
    lengths.push_back(std::move(object));
  }
  nlohmann::ordered_json object = {{"task", task},
                                   {"filler", name(report.filler)},
                                   {"lengths", options.lengths},
                                   {"depths", options.depths},
                                   {"prompts", options.prompts},
                                   {"jitter", options.jitter},
                                   {"length_jitter", options.length_jitter},
                                   {"local", options.local},
                                   {"seed", options.seed},
                                   {"total", to_json(report.total())},
                                   {"tokens", report.tokens},
                                   {"seconds", report.seconds},
                                   {"by_length", std::move(lengths)},
                                   {"cells", std::move(cells)}};
  if (options.control) object["total_control"] = to_json(report.total_control());
  return object;
}

}  // namespace everlong
