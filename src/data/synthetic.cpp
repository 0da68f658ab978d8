#include "data/synthetic.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>
#include <system_error>

#include "core/progress.h"
#include "data/install.h"
#include "data/staging.h"
#include "data/word_tokenizer.h"

namespace everlong {
namespace {

constexpr std::uint64_t kHeldOut = std::uint64_t{1} << 62;  // numbers of the held-out documents

constexpr std::uint64_t kWriteDraw = 0x77726974;  // the draw of a document's write weight
constexpr double kMostWrites = 1e9;  // beyond it fp32 sums of a memory lose what is written once

// Text tokens that leave room for their landmarks in `tokens`. Where a landmark would come last it
// is left out, and the document is one token shorter.
std::int64_t text_tokens(std::int64_t tokens, std::int64_t block) {
  return block == 0 ? tokens : tokens - tokens / block;
}

// The one token of a word.
Result<std::int32_t> single_token(const Tokenizer& tokenizer, std::string_view word) {
  const auto ids = tokenizer.encode(word);
  if (ids.size() == 1) return ids[0];
  return invalid_argument("tokenizer \"", tokenizer.name(), "\" makes ", ids.size(),
                          " tokens of \"", word, "\"; recall needs one a symbol");
}

}  // namespace

Result<std::vector<LengthRange>> length_ranges(std::string_view text) {
  std::vector<LengthRange> ranges;
  std::istringstream parts{std::string(text)};
  for (std::string part; std::getline(parts, part, ',');) {
    const auto colon = part.find(':'), dash = part.find('-');
    const std::string lengths = part.substr(0, colon);
    const auto low = parse_count(lengths.substr(0, dash));
    const auto high = dash < lengths.size() ? parse_count(lengths.substr(dash + 1)) : low;
    const auto share =
        colon == std::string::npos ? std::optional(1.0) : parse_number(part.substr(colon + 1));
    if (!low || !high || !share || *low < 1 || *high < *low || *high > kMaxShardTokens ||
        !(*share > 0))
      return invalid_argument("lengths \"", text, "\": \"", part, "\" is no range of tokens; ",
                              "allowed: 256, 52-121, or several with their shares of the tokens ",
                              "as in 52-121:85,52-481:15");
    ranges.push_back({*low, *high, *share});
  }
  if (ranges.empty()) return invalid_argument("no lengths given; 52-121 is a range of tokens");
  return ranges;
}

Result<SyntheticDocuments> SyntheticDocuments::make(const SyntheticSettings& settings,
                                                    const Tokenizer& tokenizer,
                                                    const Filler& filler) {
  if (settings.lengths.empty()) return invalid_argument("no lengths given");
  if (!(settings.text_weight >= 0 && settings.text_weight <= 1e6))
    return invalid_argument("text_weight = ", settings.text_weight,
                            " is out of range; allowed: 0 (the answer alone) to 1e6");
  if (settings.landmark_block != 0 && settings.landmark_block < 2)
    return invalid_argument("landmark_block = ", settings.landmark_block,
                            "; a block has 2 tokens or more (0: no landmarks)");
  if (!(settings.write_multiplicity >= 1 && settings.write_multiplicity <= kMostWrites))
    return invalid_argument("write_multiplicity = ", settings.write_multiplicity,
                            " is out of range; allowed: 1 (no weights) to ", kMostWrites);
  if (settings.write_multiplicity > 1 && !retrieval_kind(settings.task).ok())
    return invalid_argument("write_multiplicity = ", settings.write_multiplicity, " with task \"",
                            settings.task,
                            "\", which has no filler to weigh; retrieval tasks have: ",
                            "passkey, single, multikey, multivalue, tracking");
  SyntheticDocuments documents(settings, tokenizer);
  if (settings.task == "counts") {
    const auto& counts = settings.counts;
    const auto most = std::ssize(letter_words());
    if (counts.symbols < 2 || counts.symbols > most || !(counts.concentration > 0) ||
        !(counts.concentration <= 1e6))
      return invalid_argument("counts with ", counts.symbols, " symbols of concentration ",
                              counts.concentration, "; allowed: 2 to ", most,
                              " symbols, 0 < concentration <= 1e6");
    EVERLONG_RETURN_IF_ERROR(documents.find_symbols(counts.symbols));
    return documents;
  }
  if (settings.task == "recall") {
    const auto& recall = settings.recall;
    const auto most = std::ssize(letter_words());
    if (recall.symbols < 1 || recall.symbols > most || recall.first < 0 ||
        (recall.last != 0 && recall.last < recall.first) ||
        !(recall.questions > 0 && recall.questions <= 1))
      return invalid_argument("recall with ", recall.symbols, " symbols at ", recall.first, " to ",
                              recall.last, ", questions = ", recall.questions, "; allowed: 1 to ",
                              most, " symbols, a range, 0 < questions <= 1");
    EVERLONG_RETURN_IF_ERROR(documents.find_symbols(recall.symbols));
    EVERLONG_ASSIGN(documents.blank_, single_token(tokenizer, "_"));
    EVERLONG_ASSIGN(documents.question_, single_token(tokenizer, "?"));
    return documents;
  }
  RetrievalTask task = settings.retrieval;
  EVERLONG_ASSIGN(task.kind, retrieval_kind(settings.task));
  EVERLONG_ASSIGN(const auto prompts, RetrievalPrompts::make(task, tokenizer, filler));
  documents.prompts_.push_back(prompts);
  return documents;
}

Status SyntheticDocuments::find_symbols(std::int64_t count) {
  for (const auto letter : letter_words().first(static_cast<std::size_t>(count))) {
    EVERLONG_ASSIGN(const auto id, single_token(*tokenizer_, letter));
    symbols_.push_back(id);
  }
  return {};
}

std::int64_t SyntheticDocuments::vocab_size() const {
  return tokenizer_->vocab_size() + (settings_.landmark_block > 0 ? 1 : 0);
}

std::int64_t SyntheticDocuments::draw_length(Random& random) const {
  // Shares are of tokens: a range of long documents is drawn less often.
  const auto often = [](const LengthRange& range) {
    return range.share / (static_cast<double>(range.low) + static_cast<double>(range.high));
  };
  double sum = 0;
  for (const auto& range : settings_.lengths) sum += often(range);
  double at = sum * random.share();
  std::size_t chosen = 0;
  while (chosen + 1 < settings_.lengths.size() && at >= often(settings_.lengths[chosen]))
    at -= often(settings_.lengths[chosen++]);
  return random.between(settings_.lengths[chosen].low, settings_.lengths[chosen].high);
}

Result<SyntheticDocument> SyntheticDocuments::document(std::uint64_t number) const {
  Random random{mixed_seed({settings_.seed, number})};
  const std::int64_t block = settings_.landmark_block;
  const std::int64_t tokens = text_tokens(draw_length(random), block);
  const auto make = [&]() -> Result<SyntheticDocument> {
    if (settings_.task == "recall") return recall(tokens, random);
    if (settings_.task == "counts") return counts(tokens, random);
    return retrieval(tokens, random);
  };
  EVERLONG_ASSIGN(auto made, make());
  if (block == 0) return made;
  const auto landmark = static_cast<std::int32_t>(tokenizer_->vocab_size());
  return SyntheticDocument{with_landmarks(made, block, landmark), made.best_nats};
}

Result<SyntheticDocument> SyntheticDocuments::recall(std::int64_t tokens, Random& random) const {
  const auto& task = settings_.recall;
  const std::int64_t last = task.last == 0 ? tokens - 2 : std::min(task.last, tokens - 2);
  if (last < task.first)
    return invalid_argument("a recall document of ", tokens,
                            " tokens has no place for a symbol at ", task.first,
                            " or later; ask for longer documents");
  SyntheticDocument out;
  const auto size = static_cast<std::size_t>(tokens);
  out.ids.assign(size, blank_);
  out.targets.assign(size, kNoTarget);
  out.weights.assign(size, 0);
  out.ids.back() = tokenizer_->eod();
  const std::int64_t place = random.between(task.first, last);
  const std::int32_t symbol =
      symbols_[static_cast<std::size_t>(random.below(std::ssize(symbols_)))];
  for (std::int64_t i = 0; i + 1 < tokens; ++i) {
    const bool asks = random.share() < task.questions;
    const auto at = static_cast<std::size_t>(i);
    if (i == place) out.ids[at] = symbol;
    if (i == place || !asks) continue;
    out.ids[at] = question_;
    if (i < place) continue;
    out.targets[at] = symbol;
    out.weights[at] = 1;
  }
  return out;
}

// Drawn as from Polya's urn, symbol k next with (a + n_k) / (K a + n): the same law as drawing the
// shares from the Dirichlet law first, and each draw's probability is the best prediction of it.
SyntheticDocument SyntheticDocuments::counts(std::int64_t tokens, Random& random) const {
  SyntheticDocument out;
  const double a = settings_.counts.concentration;
  std::vector<double> urn(symbols_.size(), a);
  double sum = a * static_cast<double>(symbols_.size());
  for (std::int64_t i = 0; i + 1 < tokens; ++i) {
    double at = sum * random.share();
    std::size_t drawn = 0;
    while (drawn + 1 < urn.size() && at >= urn[drawn]) at -= urn[drawn++];
    if (i > 0) {  // nothing predicts the first
      out.targets.push_back(symbols_[drawn]);
      out.best_nats -= std::log(urn[drawn] / sum);
    }
    out.ids.push_back(symbols_[drawn]);
    urn[drawn] += 1;
    sum += 1;
  }
  out.weights.assign(out.targets.size(), 1);
  out.ids.push_back(tokenizer_->eod());
  out.targets.resize(out.ids.size(), kNoTarget);
  out.weights.resize(out.ids.size(), 0);
  return out;
}

// A draw of its own: documents with and without weights are the same otherwise.
std::vector<float> SyntheticDocuments::drawn_writes(const RetrievalPrompt& prompt,
                                                    std::int64_t tokens, std::uint64_t seed) const {
  if (settings_.write_multiplicity <= 1) return {};
  Random random{mixed_seed({seed, kWriteDraw})};
  const double written = std::exp(random.share() * std::log(settings_.write_multiplicity));
  std::vector<float> writes;
  for (const auto& piece : prompt.pieces) {
    writes.resize(writes.size() + static_cast<std::size_t>(piece.filler),
                  static_cast<float>(written));
    writes.resize(writes.size() + piece.tokens.size(), 1);
  }
  writes.resize(static_cast<std::size_t>(tokens), 1);  // the answer and the end of the document
  return writes;
}

Result<SyntheticDocument> SyntheticDocuments::retrieval(std::int64_t tokens, Random& random) const {
  const RetrievalPrompts& prompts = prompts_.front();
  const double depth = random.share();
  const std::uint64_t seed = random();
  const std::int64_t asked = tokens - prompts.answer_tokens() - 1;
  EVERLONG_ASSIGN(const auto prompt,
                  prompts.prompt({std::max<std::int64_t>(asked, 0), depth, 0}, seed));
  SyntheticDocument out;
  const auto size = static_cast<std::size_t>(tokens);
  out.ids.resize(size);
  PromptReader reader(prompt, prompts.filler());
  EVERLONG_ASSIGN(const std::int64_t read, reader.next(out.ids));
  std::copy(prompt.answer.begin(), prompt.answer.end(), out.ids.begin() + read);
  out.ids.back() = tokenizer_->eod();

  out.targets.assign(out.ids.begin() + 1, out.ids.end());
  out.targets.push_back(kNoTarget);
  // Means over the answer and over the rest, which a batch then sums up document by document.
  const auto scored = std::ranges::count(prompt.scored, 1);
  const float rest =
      static_cast<float>(settings_.text_weight / static_cast<double>(tokens - 1 - scored));
  out.writes = drawn_writes(prompt, tokens, seed);
  out.weights.assign(size, rest);
  out.weights.back() = 0;
  for (std::size_t i = 0; i < prompt.answer.size(); ++i)
    if (prompt.scored[i] != 0)
      out.weights[static_cast<std::size_t>(read) - 1 + i] = 1.0f / static_cast<float>(scored);
  return out;
}

Result<SyntheticReport> write_synthetic(const SyntheticDocuments& documents,
                                        const Tokenizer& tokenizer, const SyntheticAmount& amount,
                                        const fs::path& out) {
  if (amount.train_tokens < 1 || amount.valid_documents < 0 || amount.shard_tokens < 1 ||
      amount.shard_tokens > kMaxShardTokens)
    return invalid_argument("train_tokens = ", amount.train_tokens,
                            ", valid_documents = ", amount.valid_documents,
                            ", shard_tokens = ", amount.shard_tokens,
                            "; allowed: at least 1, at least 0, 1 to ", kMaxShardTokens);
  if (out.empty()) return invalid_argument("no output folder given");
  EVERLONG_RETURN_IF_ERROR(check_dataset_target(out, amount.force));
  const bool made_here = !fs::exists(out);
  SyntheticReport report;
  const auto written = [&]() -> Status {
    EVERLONG_ASSIGN(const auto staging, StagingFolder::create(out, "synthetic"));
    report.dataset = {
        std::string(tokenizer.name()), documents.vocab_size(), tokenizer.eod(), 0, {}};
    Progress progress("writing", amount.train_tokens, "tokens");
    const auto write = [&](const char* split, std::uint64_t first, const auto& enough) -> Status {
      SplitWriter writer(staging.path(), split, amount.shard_tokens);
      std::int64_t tokens = 0;
      double best = 0, targets = 0;
      for (std::int64_t i = 0; !enough(i, tokens); ++i) {
        EVERLONG_ASSIGN(const auto made, documents.document(first + static_cast<std::uint64_t>(i)));
        EVERLONG_RETURN_IF_ERROR(writer.add(made.ids, std::ssize(tokenizer.decode(made.ids)),
                                            made.targets, made.weights, made.writes));
        best += made.best_nats;
        for (const float weight : made.weights) targets += static_cast<double>(weight);
        tokens += std::ssize(made.ids);
        progress.update(std::min(tokens, amount.train_tokens));
      }
      if (first == kHeldOut && best > 0) report.best_valid_loss = best / targets;
      EVERLONG_ASSIGN(report.dataset.splits[split], writer.finish());
      report.tokens += report.dataset.splits[split].tokens;
      report.documents += report.dataset.splits[split].documents;
      return {};
    };
    EVERLONG_RETURN_IF_ERROR(write("train", 0, [&](std::int64_t, std::int64_t tokens) {
      return tokens >= amount.train_tokens;
    }));
    EVERLONG_RETURN_IF_ERROR(write("valid", kHeldOut, [&](std::int64_t count, std::int64_t) {
      return count == amount.valid_documents;
    }));
    progress.finish();
    return install_dataset(staging.path(), out, report.dataset);
  }();
  if (!written.ok()) {
    std::error_code ignored;
    if (made_here) fs::remove(out, ignored);  // only when nothing is in it
    return written;
  }
  return report;
}

nlohmann::json to_json(const SyntheticReport& report) {
  nlohmann::json splits = nlohmann::json::object();
  for (const auto& [name, info] : report.dataset.splits)
    splits[name] = {{"tokens", info.tokens}, {"documents", info.documents}};
  nlohmann::json object = {{"documents", report.documents},
                           {"tokens", report.tokens},
                           {"tokenizer", report.dataset.tokenizer},
                           {"vocab_size", report.dataset.vocab_size},
                           {"splits", splits}};
  if (report.best_valid_loss) object["best_valid_loss"] = *report.best_valid_loss;
  return object;
}

}  // namespace everlong
