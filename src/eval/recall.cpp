#include "eval/recall.h"

#include <algorithm>
#include <bit>
#include <nlohmann/json.hpp>

#include "eval/timing.h"

namespace everlong {
namespace {

constexpr std::uint64_t kFirstDocument = std::uint64_t{1} << 63;  // none of a dataset's

// The group with this begin, made where it is not there yet; groups stay in order.
void add(std::vector<RecallGroup>& groups, std::int64_t begin, std::int64_t end, bool right,
         bool connected) {
  auto at = std::ranges::lower_bound(groups, begin, {}, &RecallGroup::begin);
  if (at == groups.end() || at->begin != begin) at = groups.insert(at, {begin, end, {}, 0});
  at->right.add(right);
  at->connected += connected ? 1 : 0;
}

Status check(const RecallOptions& options) {
  if (options.lengths.empty() || options.documents < 1)
    return invalid_argument("nothing to measure: ", options.lengths.size(), " lengths, ",
                            options.documents, " documents; at least one of each is needed");
  if (options.chunk < 0 || options.modulus < 0)
    return invalid_argument("chunk = ", options.chunk, ", modulus = ", options.modulus,
                            "; token counts must not be negative (0: no such groups)");
  return {};
}

Status read(TextReader& reader, const SyntheticDocument& document, const RecallOptions& options,
            RecallRow& row) {
  // Blanks and questions have no target before the symbol: it is the first token of its kind.
  const auto asked = std::ranges::find_if(document.targets,
                                          [](std::int32_t target) { return target != kNoTarget; });
  if (asked == document.targets.end()) return {};
  const std::int64_t place = std::ranges::find(document.ids, *asked) - document.ids.begin();
  std::vector<std::int64_t> layers;
  if (options.layers_from) layers = options.layers_from(place, std::ssize(document.ids));
  reader.reset();
  std::size_t fed = 0;
  for (std::size_t i = 0; i < document.ids.size(); ++i) {
    if (document.targets[i] == kNoTarget) continue;
    EVERLONG_RETURN_IF_ERROR(reader.feed(std::span(document.ids).subspan(fed, i + 1 - fed)));
    fed = i + 1;
    EVERLONG_ASSIGN(const std::int32_t said, reader.predict());
    const bool right = said == document.targets[i];
    const auto at = static_cast<std::int64_t>(i), distance = at - place;
    const auto power =
        static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(distance)));
    const bool connected = !layers.empty() && layers[i] >= 0;
    row.right.add(right);
    row.connected += connected ? 1 : 0;
    add(row.distances, power, 2 * power, right, connected);
    if (!layers.empty()) add(row.layers, layers[i], layers[i] + 1, right, connected);
    if (options.chunk > 0) {
      const std::int64_t apart = at / options.chunk - place / options.chunk;
      add(row.chunks, apart, apart + 1, right, connected);
    }
    if (options.modulus > 0) {
      const std::int64_t residue = distance % options.modulus;
      add(row.residues, residue, residue + 1, right, connected);
    }
  }
  return {};
}

void predict(nlohmann::ordered_json& object, const RecallOptions& options, std::int64_t connected,
             const Proportion& right) {
  if (!options.layers_from) return;
  object["connected"] = connected;
  object["predicted"] = predicted_share(connected, right.trials, options.task.symbols);
}

nlohmann::ordered_json to_json(const std::vector<RecallGroup>& groups,
                               const RecallOptions& options) {
  auto out = nlohmann::ordered_json::array();
  for (const auto& group : groups) {
    nlohmann::ordered_json object = {
        {"begin", group.begin}, {"end", group.end}, {"right", to_json(group.right)}};
    predict(object, options, group.connected, group.right);
    out.push_back(std::move(object));
  }
  return out;
}

}  // namespace

double predicted_share(std::int64_t connected, std::int64_t questions, std::int64_t symbols) {
  if (questions == 0) return 0;
  const auto reached = static_cast<double>(connected) / static_cast<double>(questions);
  return reached + (1 - reached) / static_cast<double>(symbols);
}

Result<RecallReport> recall(TextReader& reader, const Tokenizer& tokenizer,
                            const RecallOptions& options, const RecallProgress& progress) {
  EVERLONG_RETURN_IF_ERROR(check(options));
  EVERLONG_ASSIGN(const auto filler, Filler::make(FillerKind::kSentences, tokenizer));
  const Stopwatch watch;
  RecallReport report;
  report.options = options;
  std::int64_t done = 0;
  for (const std::int64_t length : options.lengths) {
    SyntheticSettings settings;
    settings.task = "recall";
    settings.recall = options.task;
    settings.lengths = {{length, length}};
    settings.seed = mixed_seed({options.seed, static_cast<std::uint64_t>(length)});
    EVERLONG_ASSIGN(const auto documents, SyntheticDocuments::make(settings, tokenizer, filler));
    RecallRow& row = report.rows.emplace_back();
    row.length = length;
    for (std::int64_t i = 0; i < options.documents; ++i) {
      EVERLONG_ASSIGN(const auto document,
                      documents.document(kFirstDocument + static_cast<std::uint64_t>(i)));
      EVERLONG_RETURN_IF_ERROR(read(reader, document, options, row));
      if (progress) EVERLONG_RETURN_IF_ERROR(progress(++done));
    }
  }
  report.seconds = watch.seconds();
  return report;
}

nlohmann::ordered_json to_json(const RecallReport& report) {
  const auto& options = report.options;
  auto rows = nlohmann::ordered_json::array();
  for (const auto& row : report.rows) {
    nlohmann::ordered_json object = {{"length", row.length},
                                     {"right", to_json(row.right)},
                                     {"distances", to_json(row.distances, options)}};
    predict(object, options, row.connected, row.right);
    if (options.chunk > 0) object["chunks"] = to_json(row.chunks, options);
    if (options.modulus > 0) object["residues"] = to_json(row.residues, options);
    if (options.layers_from) object["layers"] = to_json(row.layers, options);
    rows.push_back(std::move(object));
  }
  return {{"task", "recall"},
          {"symbols", options.task.symbols},
          {"first", options.task.first},
          {"last", options.task.last},
          {"questions", options.task.questions},
          {"documents", options.documents},
          {"chunk", options.chunk},
          {"modulus", options.modulus},
          {"seed", options.seed},
          {"seconds", report.seconds},
          {"rows", std::move(rows)}};
}

}  // namespace everlong
