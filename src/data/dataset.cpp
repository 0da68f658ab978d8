#include "data/dataset.h"

#include <algorithm>
#include <cstdio>

#include "core/settings.h"

namespace everlong {
namespace {

using nlohmann::json;

constexpr std::int64_t kMost = std::int64_t{1} << 60;  // sums of counts stay far from overflow

// A name out of a file may only name a file beside it.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
         name.find('\0') == std::string::npos;
}

Result<SplitInfo> read_split(const json& object, const std::string& place) {
  SplitInfo info;
  Settings settings(object, place);
  info.tokens = settings.integer("tokens", -1, 0, kMost);
  info.documents = settings.integer("documents", -1, 0, kMost);
  info.bytes = settings.integer("bytes", -1, 0, kMost);
  const json shards = settings.raw("shards");
  EVERLONG_RETURN_IF_ERROR(settings.finish());
  if (!shards.is_array()) return corrupt(place, ": \"shards\" is not a list");
  std::int64_t tokens = 0, documents = 0;
  for (const json& entry : shards) {
    Settings shard(entry, cat(place, ": shards[", info.shards.size(), "]"));
    SplitInfo::ShardInfo one;
    one.file = shard.text("file", "");
    one.tokens = shard.integer("tokens", -1, 1, kMaxShardTokens);
    one.documents = shard.integer("documents", -1, 1, kMaxShardTokens);
    one.targets = shard.text("targets", "");
    EVERLONG_RETURN_IF_ERROR(shard.finish());
    if (!is_plain_name(one.file) || one.tokens < 0 || one.documents < 0 ||
        (!one.targets.empty() && !is_plain_name(one.targets)))
      return corrupt(
          place, ": shards[", info.shards.size(),
          "] needs file (a plain file name, as is that of targets), tokens and documents");
    if (!info.shards.empty() && info.shards[0].targets.empty() != one.targets.empty())
      return corrupt(place, ": some shards have targets and others have none; make the dataset ",
                     "again");
    tokens += one.tokens;
    documents += one.documents;
    info.shards.push_back(std::move(one));
  }
  if (tokens != info.tokens || documents != info.documents || info.bytes < 0)
    return corrupt(place, ": the shards add up to ", tokens, " tokens in ", documents,
                   " documents, but it says ", info.tokens, " in ", info.documents);
  return info;
}

json to_json(const SplitInfo& info) {
  json shards = json::array();
  for (const auto& shard : info.shards) {
    shards.push_back(
        {{"file", shard.file}, {"tokens", shard.tokens}, {"documents", shard.documents}});
    if (!shard.targets.empty()) shards.back()["targets"] = shard.targets;
  }
  return {{"tokens", info.tokens},
          {"documents", info.documents},
          {"bytes", info.bytes},
          {"shards", shards}};
}

}  // namespace

Result<DatasetInfo> read_dataset_info(const fs::path& folder) {
  const fs::path path = folder / kDatasetFile;
  auto text = read_file(path);
  if (!text.ok()) {
    if (text.status().code() != StatusCode::kNotFound) return text.status();
    return not_found(folder.string(), ": no dataset here (no ", kDatasetFile,
                     "); make one with: everlong data prepare TEXT... --out ", folder.string());
  }
  const json object = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return corrupt(path.string(), ": is not a JSON object");
  const std::string place = path.string();
  DatasetInfo info;
  Settings settings(object, place);
  const std::string format = settings.text("format", "");
  if (format != kDatasetFormat)
    return unsupported(place, ": format \"", format, "\"; this program reads \"", kDatasetFormat,
                       "\"");
  info.tokenizer = settings.text("tokenizer", "");
  info.vocab_size = settings.integer("vocab_size", 0, 1, 65536);
  info.eod = static_cast<std::int32_t>(settings.integer("eod", -1, 0, 65535));
  info.valid_fraction = settings.number("valid_fraction", 0, 0, 1);
  const json splits = settings.raw("splits");
  EVERLONG_RETURN_IF_ERROR(settings.finish());
  if (info.tokenizer.empty() || info.vocab_size == 0 || info.eod < 0 || info.eod >= info.vocab_size)
    return corrupt(place, ": needs tokenizer, vocab_size and an eod below vocab_size");
  Settings by_name(splits, cat(place, ": splits"));
  for (const char* name : {"train", "valid"}) {
    if (!by_name.has(name)) continue;
    EVERLONG_ASSIGN(info.splits[name],
                    read_split(by_name.raw(name), cat(place, ": splits.", name)));
  }
  EVERLONG_RETURN_IF_ERROR(by_name.finish());
  return info;
}

Status write_dataset_info(const fs::path& folder, const DatasetInfo& info) {
  json splits = json::object();
  for (const auto& [name, split] : info.splits) splits[name] = to_json(split);
  const json object = {{"format", kDatasetFormat},
                       {"tokenizer", info.tokenizer},
                       {"vocab_size", info.vocab_size},
                       {"eod", info.eod},
                       {"valid_fraction", info.valid_fraction},
                       {"splits", splits}};
  return write_file(folder / kDatasetFile, object.dump(2) + "\n");
}

SplitWriter::SplitWriter(fs::path folder, std::string split, std::int64_t shard_tokens)
    : folder_(std::move(folder)),
      split_(std::move(split)),
      shard_tokens_(std::min(shard_tokens, kMaxShardTokens)) {}

Status SplitWriter::add(std::span<const std::int32_t> ids, std::int64_t text_bytes) {
  const auto count = static_cast<std::int64_t>(ids.size());
  if (count == 0 || count > kMaxShardTokens)
    return invalid_argument("a document of ", count, " tokens; 1 to ", kMaxShardTokens,
                            " fit a shard");
  // Documents stay whole: one that is longer than a shard should be gets a shard of its own.
  if (!tokens_.empty() && static_cast<std::int64_t>(tokens_.size()) + count > shard_tokens_)
    EVERLONG_RETURN_IF_ERROR(flush());
  for (const std::int32_t id : ids) tokens_.push_back(static_cast<std::uint16_t>(id));
  starts_.push_back(tokens_.size());
  info_.bytes += text_bytes;
  return {};
}

Status SplitWriter::add(std::span<const std::int32_t> ids, std::int64_t text_bytes,
                        std::span<const std::int32_t> targets, std::span<const float> weights,
                        std::span<const float> writes) {
  if (targets.size() != ids.size() || weights.size() != ids.size())
    return invalid_argument("a document of ", ids.size(), " tokens with ", targets.size(),
                            " targets and ", weights.size(), " weights; one of each is needed");
  if (!writes.empty() && writes.size() != ids.size())
    return invalid_argument("a document of ", ids.size(), " tokens with ", writes.size(),
                            " write weights; one each is needed, or none");
  EVERLONG_RETURN_IF_ERROR(add(ids, text_bytes));
  targets_.insert(targets_.end(), targets.begin(), targets.end());
  weights_.insert(weights_.end(), weights.begin(), weights.end());
  writes_.insert(writes_.end(), writes.begin(), writes.end());
  return {};
}

Status SplitWriter::flush() {
  char number[16];
  std::snprintf(number, sizeof number, "-%05zu", info_.shards.size());
  SplitInfo::ShardInfo shard;
  shard.file = cat(split_, number, ".tokens");
  shard.tokens = static_cast<std::int64_t>(tokens_.size());
  shard.documents = static_cast<std::int64_t>(starts_.size()) - 1;
  EVERLONG_RETURN_IF_ERROR(write_shard(folder_ / shard.file, tokens_, starts_));
  const bool has_targets = !targets_.empty();
  if ((has_targets && targets_.size() != tokens_.size()) ||
      (!info_.shards.empty() && has_targets == info_.shards[0].targets.empty()))
    return invalid_argument("some documents of the split have targets and others have none");
  if (has_targets) {
    if (!writes_.empty() && writes_.size() != tokens_.size())
      return invalid_argument(
          "some documents of the split have write weights and others have none");
    shard.targets = cat(split_, number, ".targets.safetensors");
    EVERLONG_RETURN_IF_ERROR(write_targets(folder_ / shard.targets, targets_, weights_, writes_));
  }
  info_.tokens += shard.tokens;
  info_.documents += shard.documents;
  info_.shards.push_back(std::move(shard));
  tokens_.clear();
  targets_.clear();
  weights_.clear();
  writes_.clear();
  starts_.assign(1, 0);
  return {};
}

Result<SplitInfo> SplitWriter::finish() {
  if (!tokens_.empty()) EVERLONG_RETURN_IF_ERROR(flush());
  return std::exchange(info_, {});
}

std::size_t SplitView::shard_at(std::int64_t position) const {
  const auto& first = data_->first_token;
  assert(position >= 0 && position < tokens());
  return static_cast<std::size_t>(std::upper_bound(first.begin(), first.end(), position) -
                                  first.begin()) -
         1;
}

std::int64_t SplitView::document_start(std::int64_t document) const {
  assert(document >= 0 && document <= documents());
  if (document == documents()) return tokens();
  const auto& first = data_->first_document;
  const auto shard = static_cast<std::size_t>(
                         std::upper_bound(first.begin(), first.end(), document) - first.begin()) -
                     1;
  const auto within = data_->shards[shard].document_starts()[document - first[shard]];
  return data_->first_token[shard] + static_cast<std::int64_t>(within);
}

std::int64_t SplitView::document_at(std::int64_t position) const {
  const std::size_t shard = shard_at(position);
  const auto starts = data_->shards[shard].document_starts();
  const auto within = static_cast<std::uint64_t>(position - data_->first_token[shard]);
  return data_->first_document[shard] +
         (std::upper_bound(starts.begin(), starts.end(), within) - starts.begin()) - 1;
}

std::span<const std::uint16_t> SplitView::piece(std::int64_t position, std::int64_t count) const {
  const std::size_t shard = shard_at(position);
  const auto rest = data_->shards[shard].tokens().subspan(position - data_->first_token[shard]);
  return rest.first(std::min<std::size_t>(rest.size(), count));
}

Status SplitView::read(std::int64_t position, std::span<std::int32_t> out) const {
  assert(position >= 0 && position + static_cast<std::int64_t>(out.size()) <= tokens());
  while (!out.empty()) {
    const auto from = piece(position, static_cast<std::int64_t>(out.size()));
    std::int32_t largest = 0;
    for (std::size_t i = 0; i < from.size(); ++i) {
      out[i] = from[i];
      largest = std::max(largest, out[i]);
    }
    if (largest >= vocab_size())
      return corrupt(data_->shards[shard_at(position)].path().string(), ": token ", largest,
                     " is outside the vocabulary of ", vocab_size(), "; prepare the dataset again");
    position += static_cast<std::int64_t>(from.size());
    out = out.subspan(from.size());
  }
  return {};
}

void SplitView::release(std::int64_t position, std::int64_t count) const {
  while (count > 0) {
    const auto part = piece(position, count);
    data_->shards[shard_at(position)].release(part);
    position += std::ssize(part);
    count -= std::ssize(part);
  }
}

Status SplitView::read_targets(std::int64_t position, std::span<std::int32_t> targets,
                               std::span<float> weights) const {
  assert(has_targets() && targets.size() == weights.size());
  while (!targets.empty()) {
    const std::size_t shard = shard_at(position),
                      count = piece(position, std::ssize(targets)).size();
    EVERLONG_RETURN_IF_ERROR(data_->targets[shard].read(position - data_->first_token[shard],
                                                        vocab_size(), targets.first(count),
                                                        weights.first(count)));
    position += static_cast<std::int64_t>(count);
    targets = targets.subspan(count);
    weights = weights.subspan(count);
  }
  return {};
}

Status SplitView::read_writes(std::int64_t position, std::span<float> writes) const {
  assert(has_writes());
  while (!writes.empty()) {
    const std::size_t shard = shard_at(position),
                      count = piece(position, std::ssize(writes)).size();
    EVERLONG_RETURN_IF_ERROR(data_->targets[shard].read_writes(position - data_->first_token[shard],
                                                               writes.first(count)));
    position += static_cast<std::int64_t>(count);
    writes = writes.subspan(count);
  }
  return {};
}

Result<TokenDataset> TokenDataset::open(const fs::path& folder) {
  TokenDataset dataset;
  dataset.folder_ = folder;
  EVERLONG_ASSIGN(dataset.info_, read_dataset_info(folder));
  for (const auto& [name, info] : dataset.info_.splits) {
    SplitView::Data data{name, info, dataset.info_.vocab_size, dataset.info_.eod, {}, {0}, {0}, {}};
    for (const auto& entry : info.shards) {
      EVERLONG_ASSIGN(auto shard, Shard::open(folder / entry.file));
      const auto tokens = static_cast<std::int64_t>(shard.tokens().size());
      if (tokens != entry.tokens || shard.documents() != entry.documents)
        return corrupt(shard.path().string(), ": holds ", tokens, " tokens in ", shard.documents(),
                       " documents, but ", kDatasetFile, " says ", entry.tokens, " in ",
                       entry.documents, "; prepare the dataset again");
      data.first_token.push_back(data.first_token.back() + tokens);
      data.first_document.push_back(data.first_document.back() + shard.documents());
      data.shards.push_back(std::move(shard));
      if (entry.targets.empty()) continue;
      EVERLONG_ASSIGN(auto targets, TargetsFile::open(folder / entry.targets, tokens));
      if (!data.targets.empty() && data.targets[0].has_writes() != targets.has_writes())
        return corrupt((folder / entry.targets).string(),
                       ": some shards have write weights and others have none; make the dataset "
                       "again");
      data.targets.push_back(std::move(targets));
    }
    dataset.splits_.emplace(name,
                            SplitView(std::make_shared<const SplitView::Data>(std::move(data))));
  }
  return dataset;
}

Result<SplitView> TokenDataset::split(const std::string& name) const {
  if (const auto found = splits_.find(name); found != splits_.end()) return found->second;
  std::vector<std::string> known;
  for (const auto& [split, view] : splits_) known.push_back(split);
  return not_found(folder_.string(), ": has no split \"", name, "\"; it has: ", join(known, ", "));
}

Status TokenDataset::verify() const {
  for (const auto& [name, split] : splits_) {
    for (std::size_t s = 0; s < split.data_->targets.size(); ++s) {
      const auto tokens = split.data_->shards[s].tokens().size();
      std::vector<std::int32_t> targets(tokens);
      std::vector<float> weights(tokens);
      const TargetsFile& file = split.data_->targets[s];
      EVERLONG_RETURN_IF_ERROR(file.verify());
      EVERLONG_RETURN_IF_ERROR(file.read(0, info_.vocab_size, targets, weights));
      if (file.has_writes()) EVERLONG_RETURN_IF_ERROR(file.read_writes(0, weights));
    }
    for (const auto& shard : split.data_->shards) {
      EVERLONG_RETURN_IF_ERROR(shard.verify());
      const auto tokens = shard.tokens();
      const auto largest = std::max_element(tokens.begin(), tokens.end());
      if (largest != tokens.end() && *largest >= info_.vocab_size)
        return corrupt(shard.path().string(), ": token ", *largest, " at ",
                       largest - tokens.begin(), " is outside the vocabulary of ",
                       info_.vocab_size);
      for (std::int64_t i = 0; i < shard.documents(); ++i) {
        if (tokens[shard.document_starts()[i + 1] - 1] != info_.eod)
          return corrupt(shard.path().string(), ": document ", i, " does not end with token ",
                         info_.eod);
      }
    }
  }
  return {};
}

}  // namespace everlong
