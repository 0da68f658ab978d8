// How well a model predicts a text, and whether it goes on doing so further into a stream.
#pragma once
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "eval/token_source.h"
#include "session/stream.h"

namespace everlong {

// Sums over the tokens whose position in the stream (tokens since it began or was reset) lies in
// [begin, end).
struct PositionBucket {
  std::int64_t begin = 0, end = 0;
  std::int64_t tokens = 0;  // predicted ones: the first token of a fresh stream is not
  std::int64_t bytes = 0;   // of text they stand for
  double nats = 0;          // -sum of ln p(token | all before)

  double nats_per_token() const { return tokens > 0 ? nats / static_cast<double>(tokens) : 0; }
  // All nats, those of end-of-document tokens too, over the bytes of text: comparable between
  // tokenizers and with compressors.
  double bits_per_byte() const;
};

// Buckets 0-1K, 1K-4K, 4K-16K, ...: each four times as far as the one before. Empty ones are left
// out of buckets().
class PositionBuckets {
 public:
  // ln p of each id, whose first one is at `position`. NaN means: not predicted.
  void add(std::int64_t position, std::span<const std::int32_t> ids,
           std::span<const float> log_probabilities, const Tokenizer& tokenizer);
  const std::vector<PositionBucket>& buckets() const { return buckets_; }
  PositionBucket total() const;  // from 0 to the end of the last bucket

 private:
  std::vector<PositionBucket> buckets_;
};

struct PerplexityOptions {
  std::int64_t max_tokens = 0;      // 0: all there are
  std::int64_t feed = 2048;         // tokens scored at a time
  bool reset_at_documents = false;  // else state is carried from document to document
  std::int64_t reset_every = 0;     // tokens; 0: never
};

struct PerplexityReport {
  PositionBucket total;
  std::vector<PositionBucket> buckets;
  std::int64_t resets = 0;
  double seconds = 0;
};

using ProgressFunction = std::function<void(std::int64_t done)>;

// Resets the stream, then scores the source through it. `progress` (may be empty) hears the tokens
// done so far.
Result<PerplexityReport> perplexity(Stream& stream, const TokenSource& source,
                                    const Tokenizer& tokenizer, const PerplexityOptions& options,
                                    const ProgressFunction& progress);

nlohmann::ordered_json to_json(const PerplexityReport& report);
nlohmann::ordered_json to_json(const std::vector<PositionBucket>& buckets);
// "4K-16K"
std::string bucket_name(const PositionBucket& bucket);

}  // namespace everlong
