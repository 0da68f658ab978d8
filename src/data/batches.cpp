#include "data/batches.h"

#include <algorithm>
#include <numeric>

#include "core/random.h"
#include "core/settings.h"

namespace everlong {
namespace {

constexpr std::int64_t kMostRows = 1 << 16;
constexpr std::int64_t kMostRowTokens = kMaxShardTokens;
constexpr std::int64_t kMostBatches = std::int64_t{1}
                                      << 46;  // times kMostRows stays within 63 bits

Status check(const BatchOptions& options) {
  if (options.rows < 1 || options.rows > kMostRows)
    return invalid_argument("rows = ", options.rows, " is out of range; allowed: 1 to ", kMostRows);
  if (options.row_tokens < 1 || options.row_tokens > kMostRowTokens)
    return invalid_argument("row_tokens = ", options.row_tokens, " is out of range; allowed: 1 to ",
                            kMostRowTokens);
  return {};
}

void resize(Batch& batch, std::int64_t rows, std::int64_t tokens) {
  batch.rows = rows;
  batch.tokens = tokens;
  batch.inputs.resize(rows * tokens);
  batch.targets.resize(rows * tokens);
  batch.weights.clear();
  batch.writes.clear();
  batch.document_starts.clear();
  batch.row_continues.assign(rows, 0);
}

// Row `row` of the batch = the T <= split.tokens() tokens from `position` on, around the ring.
Status fill_row(const SplitView& split, std::int64_t position, std::int64_t row, Batch& batch) {
  const std::int64_t line = split.tokens(), tokens = batch.tokens, base = row * tokens;
  const auto inputs = std::span(batch.inputs).subspan(base, tokens);
  const auto targets = std::span(batch.targets).subspan(base, tokens);
  const std::int64_t before_end = std::min(tokens, line - position);
  EVERLONG_RETURN_IF_ERROR(split.read(position, inputs.first(before_end)));
  EVERLONG_RETURN_IF_ERROR(split.read(0, inputs.subspan(before_end)));
  if (split.has_targets()) {
    batch.weights.resize(batch.targets.size());
    const auto weights = std::span(batch.weights).subspan(base, tokens);
    EVERLONG_RETURN_IF_ERROR(
        split.read_targets(position, targets.first(before_end), weights.first(before_end)));
    EVERLONG_RETURN_IF_ERROR(
        split.read_targets(0, targets.subspan(before_end), weights.subspan(before_end)));
    if (split.has_writes()) {
      batch.writes.resize(batch.targets.size());
      const auto writes = std::span(batch.writes).subspan(base, tokens);
      EVERLONG_RETURN_IF_ERROR(split.read_writes(position, writes.first(before_end)));
      EVERLONG_RETURN_IF_ERROR(split.read_writes(0, writes.subspan(before_end)));
    }
  } else {
    std::copy(inputs.begin() + 1, inputs.end(), targets.begin());
    EVERLONG_RETURN_IF_ERROR(split.read((position + tokens) % line, targets.last(1)));
  }

  batch.document_starts.push_back(base);
  std::int64_t document = split.document_at(position);
  std::int64_t lap = -position;  // turns a position of the line into an offset of the row
  for (;;) {
    if (++document == split.documents()) {
      document = 0;
      lap += line;
    }
    const std::int64_t start = lap + split.document_start(document);
    if (start > tokens) return {};
    targets[start - 1] = kNoTarget;
    if (start == tokens) return {};
    batch.document_starts.push_back(base + start);
  }
}

// Row `row` of the batch = these documents, then padding.
Status fill_documents(const SplitView& split, std::span<const std::uint32_t> documents,
                      std::int64_t row, Batch& batch) {
  const bool weighed = split.has_targets(), written = split.has_writes();
  if (weighed) batch.weights.resize(batch.targets.size());
  if (written) batch.writes.resize(batch.targets.size(), 1);
  std::int64_t at = row * batch.tokens;
  const std::int64_t end = at + batch.tokens;
  for (const std::uint32_t document : documents) {
    const std::int64_t begin = split.document_start(document);
    const std::int64_t count = split.document_start(document + 1) - begin;
    const auto inputs = std::span(batch.inputs).subspan(at, count);
    const auto targets = std::span(batch.targets).subspan(at, count);
    batch.document_starts.push_back(at);
    EVERLONG_RETURN_IF_ERROR(split.read(begin, inputs));
    if (weighed) {
      EVERLONG_RETURN_IF_ERROR(
          split.read_targets(begin, targets, std::span(batch.weights).subspan(at, count)));
      if (written)
        EVERLONG_RETURN_IF_ERROR(
            split.read_writes(begin, std::span(batch.writes).subspan(at, count)));
    } else {
      std::copy(inputs.begin() + 1, inputs.end(), targets.begin());
    }
    targets.back() = kNoTarget;
    at += count;
  }
  if (at == end) return {};
  batch.document_starts.push_back(at);
  std::fill(batch.inputs.begin() + at, batch.inputs.begin() + end, split.eod());
  std::fill(batch.targets.begin() + at, batch.targets.begin() + end, kNoTarget);
  if (weighed) std::fill(batch.weights.begin() + at, batch.weights.begin() + end, 0.0f);
  return {};
}

}  // namespace

std::vector<std::int64_t> Batch::cu_seqlens() const {
  auto offsets = document_starts;
  offsets.push_back(rows * tokens);
  return offsets;
}

std::int64_t Batch::predictions() const {
  return static_cast<std::int64_t>(targets.size()) -
         std::count(targets.begin(), targets.end(), kNoTarget);
}

double Batch::weight() const {
  if (weights.empty()) return static_cast<double>(predictions());
  double sum = 0;
  for (std::size_t i = 0; i < targets.size(); ++i)
    if (targets[i] != kNoTarget) sum += static_cast<double>(weights[i]);
  return sum;
}

Result<Packing> packing_from_name(std::string_view given) {
  for (const Packing packing : {Packing::kPacked, Packing::kShuffled, Packing::kDocuments})
    if (name(packing) == given) return packing;
  return invalid_argument("packing = \"", given,
                          "\" is not known; allowed: packed, shuffled, documents");
}

std::string_view name(Packing packing) {
  if (packing == Packing::kDocuments) return "documents";
  return packing == Packing::kPacked ? "packed" : "shuffled";
}

nlohmann::json to_json(const BatchCursor& cursor) {
  return {{"batches", cursor.batches},
          {"rows", cursor.options.rows},
          {"row_tokens", cursor.options.row_tokens},
          {"packing", name(cursor.options.packing)},
          {"seed", cursor.options.seed},
          {"line_tokens", cursor.line_tokens}};
}

Result<BatchCursor> cursor_from_json(const nlohmann::json& object, const std::string& place) {
  BatchCursor cursor;
  Settings settings(object, place);
  cursor.batches = settings.integer("batches", -1, 0, kMostBatches);
  cursor.options.rows = settings.integer("rows", -1, 1, kMostRows);
  cursor.options.row_tokens = settings.integer("row_tokens", -1, 1, kMostRowTokens);
  cursor.line_tokens = settings.integer("line_tokens", -1, 1, INT64_MAX);
  const std::string packing = settings.text("packing", "");
  const nlohmann::json seed = settings.raw("seed");
  EVERLONG_RETURN_IF_ERROR(settings.finish());
  if (cursor.batches < 0 || cursor.options.rows < 0 || cursor.options.row_tokens < 0 ||
      cursor.line_tokens < 0 || !seed.is_number_unsigned())
    return corrupt(
        place, ": a data cursor needs batches, rows, row_tokens, packing, seed and line_tokens");
  cursor.options.seed = seed.get<std::uint64_t>();
  const auto known = packing_from_name(packing);
  if (!known.ok()) return known.status().at(place);
  cursor.options.packing = *known;
  return cursor;
}

Result<BatchReader> BatchReader::create(SplitView split, const BatchOptions& options) {
  EVERLONG_RETURN_IF_ERROR(check(options));
  if (options.packing == Packing::kDocuments) {
    for (std::int64_t i = 0; i < split.documents(); ++i)
      if (const auto tokens = split.document_start(i + 1) - split.document_start(i);
          tokens > options.row_tokens)
        return invalid_argument("document ", i, " of split \"", split.name(), "\" has ", tokens,
                                " tokens: a row of whole documents needs row_tokens of at least ",
                                "that, not ", options.row_tokens);
    if (split.documents() == 0)
      return invalid_argument("split \"", split.name(), "\" has no documents; make a larger one");
    return BatchReader(std::move(split), options);
  }
  if (split.tokens() < options.row_tokens)
    return invalid_argument("split \"", split.name(), "\" has ", split.tokens(),
                            " tokens: not one row of ", options.row_tokens,
                            "; prepare more text or set a smaller row_tokens");
  return BatchReader(std::move(split), options);
}

void BatchReader::shuffle(std::int64_t epoch) {
  Random random{options_.seed};
  random.state = random() + static_cast<std::uint64_t>(epoch);
  // Cuts fall elsewhere in every epoch; the ring makes every offset legal.
  window_offset_ = random.below(split_.tokens());
  windows_.resize(split_.tokens() / options_.row_tokens);
  std::iota(windows_.begin(), windows_.end(), 0u);
  for (std::size_t i = windows_.size(); i > 1; --i)
    std::swap(windows_[i - 1], windows_[random.below(static_cast<std::int64_t>(i))]);
  shuffled_epoch_ = epoch;
}

std::int64_t BatchReader::shuffled_position(std::int64_t row) {
  const std::int64_t an_epoch = split_.tokens() / options_.row_tokens;
  const std::int64_t number = batches_ * options_.rows + row;
  if (number / an_epoch != shuffled_epoch_) shuffle(number / an_epoch);
  return (window_offset_ + windows_[number % an_epoch] * options_.row_tokens) % split_.tokens();
}

void BatchReader::shuffle_documents(std::int64_t epoch) {
  Random random{options_.seed};
  random.state = random() + static_cast<std::uint64_t>(epoch);
  documents_.resize(static_cast<std::size_t>(split_.documents()));
  std::iota(documents_.begin(), documents_.end(), 0u);
  for (std::size_t i = documents_.size(); i > 1; --i)
    std::swap(documents_[i - 1], documents_[random.below(static_cast<std::int64_t>(i))]);
  row_begins_ = {0};
  std::int64_t used = 0;
  for (std::size_t i = 0; i < documents_.size(); ++i) {
    const std::int64_t tokens =
        split_.document_start(documents_[i] + 1) - split_.document_start(documents_[i]);
    if (used + tokens > options_.row_tokens) {
      row_begins_.push_back(i);
      used = 0;
    }
    used += tokens;
  }
  row_begins_.push_back(documents_.size());
  document_epoch_ = epoch;
}

std::span<const std::uint32_t> BatchReader::documents_of(std::int64_t row) {
  if (document_epoch_ < 0 || row < first_row_) {
    first_row_ = 0;
    shuffle_documents(0);
  }
  // How many rows an epoch has depends on its order: they can only be walked through.
  while (row >= first_row_ + std::ssize(row_begins_) - 1) {
    first_row_ += std::ssize(row_begins_) - 1;
    shuffle_documents(document_epoch_ + 1);
  }
  const std::size_t begin = row_begins_[row - first_row_], end = row_begins_[row - first_row_ + 1];
  return std::span<const std::uint32_t>(documents_).subspan(begin, end - begin);
}

Status BatchReader::next(Batch& batch) {
  const std::int64_t line = split_.tokens(), rows = options_.rows, tokens = options_.row_tokens;
  resize(batch, rows, tokens);
  const std::int64_t turn = Random{options_.seed}.below(line);
  const auto walked = static_cast<std::int64_t>(static_cast<__int128>(batches_) * tokens % line);
  for (std::int64_t row = 0; row < rows; ++row) {
    if (options_.packing == Packing::kDocuments) {
      EVERLONG_RETURN_IF_ERROR(
          fill_documents(split_, documents_of(batches_ * rows + row), row, batch));
      continue;
    }
    std::int64_t position = 0;
    if (options_.packing == Packing::kShuffled) {
      position = shuffled_position(row);
    } else {
      // Rows start evenly spread and each goes on into the next one's stretch: an epoch reads every
      // token once.
      const auto stretch = static_cast<std::int64_t>(static_cast<__int128>(row) * line / rows);
      position = ((turn + stretch) % line + walked) % line;
      const bool starts_document = split_.document_start(split_.document_at(position)) == position;
      batch.row_continues[row] = batches_ > 0 && !starts_document;
    }
    EVERLONG_RETURN_IF_ERROR(fill_row(split_, position, row, batch));
  }
  ++batches_;
  return {};
}

Status BatchReader::seek(const BatchCursor& cursor) {
  const auto must_equal = [](std::string_view what, const auto& theirs,
                             const auto& ours) -> Status {
    if (theirs == ours) return {};
    return invalid_argument("data cursor: it was saved with ", what, " = ", theirs,
                            ", this run has ", ours, "; to go on exactly these must be equal");
  };
  EVERLONG_RETURN_IF_ERROR(
      must_equal("packing", name(cursor.options.packing), name(options_.packing)));
  EVERLONG_RETURN_IF_ERROR(must_equal("rows", cursor.options.rows, options_.rows));
  EVERLONG_RETURN_IF_ERROR(
      must_equal("row_tokens", cursor.options.row_tokens, options_.row_tokens));
  EVERLONG_RETURN_IF_ERROR(must_equal("seed", cursor.options.seed, options_.seed));
  EVERLONG_RETURN_IF_ERROR(must_equal("tokens in the data", cursor.line_tokens, split_.tokens()));
  if (cursor.batches < 0 || cursor.batches > kMostBatches)
    return invalid_argument("data cursor: batches = ", cursor.batches, " is out of range");
  batches_ = cursor.batches;
  return {};
}

double BatchReader::epochs() const {
  if (options_.packing == Packing::kDocuments) {
    if (document_epoch_ < 0) return 0;
    const std::int64_t row = batches_ * options_.rows - first_row_;
    return static_cast<double>(document_epoch_) +
           static_cast<double>(row) / static_cast<double>(row_begins_.size() - 1);
  }
  return static_cast<double>(batches_) * static_cast<double>(options_.rows * options_.row_tokens) /
         static_cast<double>(split_.tokens());
}

SequentialReader::SequentialReader(SplitView split, std::int64_t row_tokens, std::int64_t limit)
    : split_(std::move(split)),
      row_tokens_(std::max<std::int64_t>(row_tokens, 1)),
      end_(limit > 0 ? std::min(limit, split_.tokens()) : split_.tokens()) {}

Result<bool> SequentialReader::next(Batch& batch) {
  if (position_ >= end_) return false;
  resize(batch, 1, std::min(row_tokens_, end_ - position_));
  batch.row_continues[0] = split_.document_start(split_.document_at(position_)) != position_;
  EVERLONG_RETURN_IF_ERROR(fill_row(split_, position_, 0, batch));
  position_ += batch.tokens;
  return true;
}

}  // namespace everlong
