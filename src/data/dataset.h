// A folder of token shards, split into train and valid. Format: docs/formats.md, "Dataset folder".
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "data/shards.h"
#include "data/targets.h"

namespace everlong {

inline constexpr const char* kDatasetFile = "dataset.json";
inline constexpr const char* kDatasetFormat = "everlong-tokens-1";

// What dataset.json says.
struct SplitInfo {
  struct ShardInfo {
    std::string file;
    std::int64_t tokens = 0, documents = 0;
    std::string targets = {};  // file of targets beside it; none: each token predicts the next
  };
  std::vector<ShardInfo> shards;
  std::int64_t tokens = 0;  // each document's end-of-document token included
  std::int64_t documents = 0;
  std::int64_t bytes = 0;  // of text: the denominator of bits per byte
};
struct DatasetInfo {
  std::string tokenizer;
  std::int64_t vocab_size = 0;
  std::int32_t eod = 0;
  double valid_fraction = 0;
  std::map<std::string, SplitInfo> splits;  // "train", "valid"
};

Result<DatasetInfo> read_dataset_info(const fs::path& folder);
Status write_dataset_info(const fs::path& folder, const DatasetInfo& info);

// Collects documents and writes them as <split>-00000.tokens, <split>-00001.tokens, ... Holds one
// shard in memory.
class SplitWriter {
 public:
  SplitWriter(fs::path folder, std::string split, std::int64_t shard_tokens);
  // `ids` end with the end-of-document token and stand for `text_bytes` bytes of text.
  Status add(std::span<const std::int32_t> ids, std::int64_t text_bytes);
  // With targets of its own, one and a weight for each id, and perhaps how often each is stored. A
  // split has them for all documents or for none.
  Status add(std::span<const std::int32_t> ids, std::int64_t text_bytes,
             std::span<const std::int32_t> targets, std::span<const float> weights,
             std::span<const float> writes = {});
  Result<SplitInfo> finish();

 private:
  Status flush();
  fs::path folder_;
  std::string split_;
  std::int64_t shard_tokens_;
  std::vector<std::uint16_t> tokens_;
  std::vector<std::uint64_t> starts_ = {0};
  std::vector<std::int32_t> targets_;
  std::vector<float> weights_, writes_;
  SplitInfo info_;
};

// The token line of one split: its shards end to end, documents whole and in order, each closed by
// the end-of-document token. Copies share the maps and may outlive the dataset. Thread safe.
// Positions count from 0; the caller keeps them in range.
class SplitView {
 public:
  const std::string& name() const { return data_->name; }
  std::int64_t tokens() const { return data_->info.tokens; }
  std::int64_t documents() const { return data_->info.documents; }
  std::int64_t bytes() const { return data_->info.bytes; }
  std::int64_t vocab_size() const { return data_->vocab_size; }
  std::int32_t eod() const { return data_->eod; }

  // Where document i begins; i = documents() gives tokens().
  std::int64_t document_start(std::int64_t document) const;
  // The document that holds this position.
  std::int64_t document_at(std::int64_t position) const;
  // As much of [position, position + count) as lies in one shard: at least one token.
  std::span<const std::uint16_t> piece(std::int64_t position, std::int64_t count) const;
  // Copies tokens across shards; refuses ids outside the vocabulary, which would index past an
  // embedding.
  Status read(std::int64_t position, std::span<std::int32_t> out) const;
  // Takes these tokens out of the process's memory, for who reads a long text once, in order.
  void release(std::int64_t position, std::int64_t count) const;
  // Whether the split says itself what each token predicts, and then what: copied across shards.
  bool has_targets() const { return !data_->targets.empty(); }
  Status read_targets(std::int64_t position, std::span<std::int32_t> targets,
                      std::span<float> weights) const;
  // Whether it also says how often a memory stores each token, and then how often.
  bool has_writes() const { return has_targets() && data_->targets.front().has_writes(); }
  Status read_writes(std::int64_t position, std::span<float> writes) const;

 private:
  friend class TokenDataset;
  struct Data {
    std::string name;
    SplitInfo info;
    std::int64_t vocab_size = 0;
    std::int32_t eod = 0;
    std::vector<Shard> shards;
    std::vector<std::int64_t> first_token,
        first_document;                     // of each shard, and the totals at the end
    std::vector<TargetsFile> targets = {};  // of each shard, or none at all
  };
  explicit SplitView(std::shared_ptr<const Data> data) : data_(std::move(data)) {}
  std::size_t shard_at(std::int64_t position) const;
  std::shared_ptr<const Data> data_;
};

class TokenDataset {
 public:
  // Reads dataset.json and maps every shard that it names; refuses counts that disagree.
  static Result<TokenDataset> open(const fs::path& folder);

  const DatasetInfo& info() const { return info_; }
  // "train" or "valid"; refused when the dataset has no such split.
  Result<SplitView> split(const std::string& name) const;
  // Reads everything: checksums, ids within the vocabulary, each document closed by the
  // end-of-document token.
  Status verify() const;

 private:
  fs::path folder_;
  DatasetInfo info_;
  std::map<std::string, SplitView> splits_;
};

}  // namespace everlong
