#include "eval/byte_baselines.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>

#include "core/process.h"
#include "core/progress.h"

namespace everlong {
namespace {

constexpr int kBits = 9;  // of a symbol

constexpr std::uint64_t low_symbols(int count) { return (std::uint64_t{1} << (kBits * count)) - 1; }

std::uint64_t beginning(int order) {
  std::uint64_t context = 0;
  for (int i = 0; i < order; ++i) context = context << kBits | ByteModel::kBeginning;
  return context;
}

// Calls visitor(packed context of `order` symbols, symbol, position) for each symbol of the
// document.
template <class Visitor>
void walk(std::string_view document, bool ends, int order, const Visitor& visitor) {
  std::uint64_t context = beginning(order);
  for (std::size_t i = 0; i < document.size(); ++i) {
    const auto symbol = static_cast<unsigned char>(document[i]);
    visitor(context, symbol, i);
    context = (context << kBits | symbol) & low_symbols(order);
  }
  if (ends) visitor(context, ByteModel::kEnd, document.size());
}

// The text of each document, and whether its end is there too.
Status each_document(const SplitView& split, const Tokenizer& tokenizer, std::int64_t tokens,
                     const std::function<void(std::string_view, bool)>& visitor) {
  std::vector<std::int32_t> ids;
  for (std::int64_t i = 0; i < split.documents() && split.document_start(i) < tokens; ++i) {
    const std::int64_t begin = split.document_start(i), end = split.document_start(i + 1);
    ids.resize(std::min(end, tokens) - begin);
    EVERLONG_RETURN_IF_ERROR(split.read(begin, ids));
    visitor(tokenizer.decode(ids), end <= tokens);
  }
  return {};
}

}  // namespace

std::size_t GramCounts::slot(std::uint64_t gram) const {
  // Multiplicative hashing (Knuth 6.4), the high bits down to where the mask looks.
  std::uint64_t hash = gram * 0x9e3779b97f4a7c15;
  hash ^= hash >> 32;
  std::size_t at = hash & (keys_.size() - 1);
  while (keys_[at] != kEmpty && keys_[at] != gram) at = (at + 1) & (keys_.size() - 1);
  return at;
}

void GramCounts::rehash(std::size_t slots) {
  auto keys = std::exchange(keys_, std::vector<std::uint64_t>(slots, kEmpty));
  auto counts = std::exchange(counts_, std::vector<std::uint32_t>(slots));
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (keys[i] == kEmpty) continue;
    const std::size_t at = slot(keys[i]);
    keys_[at] = keys[i];
    counts_[at] = counts[i];
  }
}

std::uint32_t& GramCounts::operator[](std::uint64_t gram) {
  std::size_t at = slot(gram);
  if (keys_[at] == kEmpty) {
    if (3 * (size_ + 1) > 2 * keys_.size()) {
      rehash(2 * keys_.size());
      at = slot(gram);
    }
    keys_[at] = gram;
    ++size_;
  }
  return counts_[at];
}

std::uint32_t GramCounts::find(std::uint64_t gram) const { return counts_[slot(gram)]; }

ByteModelTrainer::ByteModelTrainer(int order)
    : order_(std::clamp(order, 0, ByteModel::kMostOrder)) {}

void ByteModelTrainer::add(std::string_view document) {
  walk(document, true, order_, [&](std::uint64_t context, int symbol, std::size_t) {
    ++grams_[context << kBits | symbol];
  });
}

ByteModel ByteModelTrainer::finish() && {
  ByteModel model;
  model.levels_.resize(order_ + 1);
  model.levels_[order_].grams = std::move(grams_);
  // Below the highest order a gram counts once for each different symbol that came before it.
  for (int order = order_; order > 0; --order) {
    auto& lower = model.levels_[order - 1].grams;
    model.levels_[order].grams.visit(
        [&](std::uint64_t gram, std::uint32_t) { ++lower[gram & low_symbols(order)]; });
  }
  for (auto& level : model.levels_) {
    double with_count[5] = {0, 0, 0, 0, 0};  // grams that count exactly 1, 2, 3, 4
    level.grams.visit([&](std::uint64_t gram, std::uint32_t count) {
      if (count <= 4) ++with_count[count];
      std::uint32_t& place = level.contexts[gram >> kBits];
      if (place == 0) {
        level.stats.emplace_back();
        place = static_cast<std::uint32_t>(level.stats.size());
      }
      ByteModel::Context& context = level.stats[place - 1];
      context.total += count;
      ++(count == 1 ? context.ones : count == 2 ? context.twos : context.more);
    });
    // Chen and Goodman eq. 26. A text too small for the estimate gets half of each count.
    const double y = with_count[1] / (with_count[1] + 2 * with_count[2]);
    for (int i = 1; i <= 3; ++i) {
      const double estimate = i - (i + 1) * y * with_count[i + 1] / with_count[i];
      level.discount[i] = estimate > 0 && estimate < i ? estimate : 0.5 * i;
    }
  }
  return model;
}

double ByteModel::probability(std::uint64_t packed_context, int symbol) const {
  double p = 1.0 / kSymbols;
  for (int order = 0; order <= this->order(); ++order) {
    const Level& level = levels_[order];
    const std::uint64_t context = packed_context & low_symbols(order);
    const std::uint32_t place = level.contexts.find(context);
    if (place == 0) break;  // never seen: nor was any longer one
    const Context& stats = level.stats[place - 1];
    const std::uint32_t count = level.grams.find(context << kBits | symbol);
    const double kept = count - level.discount[std::min<std::uint32_t>(count, 3)];
    const double freed = level.discount[1] * stats.ones + level.discount[2] * stats.twos +
                         level.discount[3] * stats.more;
    p = (kept + freed * p) / stats.total;
  }
  return p;
}

double ByteModel::probability(std::string_view context, int symbol) const {
  const auto used = context.substr(context.size() - std::min<std::size_t>(context.size(), order()));
  std::uint64_t packed = beginning(order());
  for (const char byte : used)
    packed = (packed << kBits | static_cast<unsigned char>(byte)) & low_symbols(order());
  return probability(packed, symbol);
}

double ByteModel::bits(std::string_view document, bool ends) const {
  double bits = 0;
  walk(document, ends, order(), [&](std::uint64_t context, int symbol, std::size_t position) {
    if (position > 0) bits -= std::log2(probability(context, symbol));
  });
  return bits;
}

Result<std::int64_t> xz_bytes(std::string_view text) {
  std::int64_t bytes = 0;
  Process xz{{"xz", "-9", "-c"}};
  xz.input = text;
  xz.output = [&](std::string_view piece) {
    bytes += static_cast<std::int64_t>(piece.size());
    return Status();
  };
  EVERLONG_ASSIGN(const auto result, run_process(xz));
  if (result.exit_code != 0)
    return io_error("xz failed with exit code ", result.exit_code, ": ", result.errors);
  return bytes;
}

Result<ByteBaselineReport> byte_baselines(const SplitView& train, const SplitView& held_out,
                                          const Tokenizer& tokenizer,
                                          const ByteBaselineOptions& options) {
  for (const int order : options.orders)
    if (order < 0 || order > ByteModel::kMostOrder)
      return invalid_argument("byte model of order ", order, "; allowed: 0 to ",
                              ByteModel::kMostOrder);
  const std::int64_t tokens = options.held_out_tokens > 0
                                  ? std::min(options.held_out_tokens, held_out.tokens())
                                  : held_out.tokens();
  if (train.tokens() == 0 || tokens == 0)
    return invalid_argument("byte models need text to learn from and held-out text; there are ",
                            train.tokens(), " and ", tokens, " tokens");

  ByteBaselineReport report;
  std::vector<ByteModelTrainer> trainers(options.orders.begin(), options.orders.end());
  Progress progress("byte models", train.bytes(), "B");
  EVERLONG_RETURN_IF_ERROR(
      each_document(train, tokenizer, train.tokens(), [&](std::string_view text, bool) {
        for (auto& trainer : trainers) trainer.add(text);
        report.train_bytes += static_cast<std::int64_t>(text.size());
        progress.update(report.train_bytes);
      }));
  progress.finish();
  std::vector<ByteModel> models;
  for (auto& trainer : trainers) models.push_back(std::move(trainer).finish());

  std::vector<double> bits(models.size());
  std::string whole;
  EVERLONG_RETURN_IF_ERROR(
      each_document(held_out, tokenizer, tokens, [&](std::string_view text, bool ends) {
        for (std::size_t i = 0; i < models.size(); ++i) bits[i] += models[i].bits(text, ends);
        ++report.held_out_documents;
        whole += text;
      }));
  if (whole.empty()) return invalid_argument("the held-out documents hold no text");
  report.held_out_bytes = static_cast<std::int64_t>(whole.size());
  const auto bytes = static_cast<double>(whole.size());
  for (std::size_t i = 0; i < models.size(); ++i)
    report.baselines.push_back({cat("order-", options.orders[i], " bytes"), bits[i] / bytes});
  if (!options.xz) return report;
  const auto compressed = xz_bytes(whole);
  if (compressed.ok()) {
    report.baselines.push_back({"xz -9", 8 * static_cast<double>(*compressed) / bytes});
  } else if (compressed.status().code() == StatusCode::kInterrupted) {
    return compressed.status();
  } else {
    report.missing = compressed.status().message();
  }
  return report;
}

nlohmann::json to_json(const ByteBaselineReport& report) {
  nlohmann::json baselines = nlohmann::json::array();
  for (const auto& baseline : report.baselines)
    baselines.push_back({{"name", baseline.name}, {"bits_per_byte", baseline.bits_per_byte}});
  return {{"train_bytes", report.train_bytes},
          {"held_out_bytes", report.held_out_bytes},
          {"held_out_documents", report.held_out_documents},
          {"baselines", baselines},
          {"missing", report.missing}};
}

}  // namespace everlong
