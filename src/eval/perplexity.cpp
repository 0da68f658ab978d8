#include "eval/perplexity.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

namespace everlong {
namespace {

constexpr std::int64_t kFirstBucket = 1024, kGrowth = 4;

std::string short_count(std::int64_t value) {
  if (value >= (1 << 20) && value % (1 << 20) == 0) return cat(value >> 20, "M");
  return value >= 1024 ? cat(value >> 10, "K") : cat(value);
}

}  // namespace

double PositionBucket::bits_per_byte() const {
  return bytes > 0 ? nats / std::numbers::ln2 / static_cast<double>(bytes) : 0;
}

void PositionBuckets::add(std::int64_t position, std::span<const std::int32_t> ids,
                          std::span<const float> log_probabilities, const Tokenizer& tokenizer) {
  std::int64_t begin = 0, end = kFirstBucket;
  while (!ids.empty()) {
    while (position >= end) {
      begin = end;
      end *= kGrowth;
    }
    const auto count =
        static_cast<std::size_t>(std::min<std::int64_t>(end - position, std::ssize(ids)));
    auto found = std::ranges::find(buckets_, begin, &PositionBucket::begin);
    if (found == buckets_.end()) {
      found = std::ranges::find_if(
          buckets_, [&](const PositionBucket& bucket) { return bucket.begin > begin; });
      found = buckets_.insert(found, PositionBucket{.begin = begin, .end = end});
    }
    for (std::size_t i = 0; i < count; ++i) {
      if (std::isnan(log_probabilities[i])) continue;
      ++found->tokens;
      found->nats -= log_probabilities[i];
    }
    // What was not predicted (a first token) does not count as text either.
    const std::size_t skipped = std::isnan(log_probabilities[0]) ? 1 : 0;
    found->bytes += std::ssize(tokenizer.decode(ids.subspan(skipped, count - skipped)));
    position += static_cast<std::int64_t>(count);
    ids = ids.subspan(count);
    log_probabilities = log_probabilities.subspan(count);
  }
}

PositionBucket PositionBuckets::total() const {
  PositionBucket sum;
  for (const auto& bucket : buckets_) {
    sum.end = std::max(sum.end, bucket.end);
    sum.tokens += bucket.tokens;
    sum.bytes += bucket.bytes;
    sum.nats += bucket.nats;
  }
  return sum;
}

Result<PerplexityReport> perplexity(Stream& stream, const TokenSource& source,
                                    const Tokenizer& tokenizer, const PerplexityOptions& options,
                                    const ProgressFunction& progress) {
  if (options.feed < 1)
    return invalid_argument("feed = ", options.feed, "; at least 1 token is fed at a time");
  if (options.max_tokens < 0 || options.reset_every < 0)
    return invalid_argument("token counts must not be negative; 0 means all, or never");
  const std::int64_t tokens =
      options.max_tokens > 0 ? std::min(options.max_tokens, source.tokens()) : source.tokens();
  if (tokens < 2)
    return invalid_argument("the text has ", tokens, " tokens; at least 2 are needed");

  const auto start = std::chrono::steady_clock::now();
  PerplexityReport report;
  PositionBuckets buckets;
  std::vector<std::int32_t> ids;
  stream.reset();
  for (std::int64_t done = 0; done < tokens;) {
    std::int64_t end = std::min(done + options.feed, tokens);
    if (options.reset_at_documents) end = std::min(end, source.document_end(done));
    if (options.reset_every > 0)
      end = std::min(end, (done / options.reset_every + 1) * options.reset_every);
    ids.resize(static_cast<std::size_t>(end - done));
    EVERLONG_RETURN_IF_ERROR(source.read(done, ids));
    const std::int64_t position = stream.text_position();
    EVERLONG_ASSIGN(const auto log_probabilities, stream.score(ids));
    buckets.add(position, ids, log_probabilities, tokenizer);
    const bool document_ended = options.reset_at_documents && end == source.document_end(done);
    done = end;
    if (done < tokens &&
        (document_ended || (options.reset_every > 0 && done % options.reset_every == 0))) {
      stream.reset();
      ++report.resets;
    }
    if (progress) progress(done);
  }
  report.total = buckets.total();
  report.buckets = buckets.buckets();
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

std::string bucket_name(const PositionBucket& bucket) {
  return cat(short_count(bucket.begin), "-", short_count(bucket.end));
}

nlohmann::ordered_json to_json(const std::vector<PositionBucket>& buckets) {
  auto out = nlohmann::ordered_json::array();
  for (const auto& bucket : buckets)
    out.push_back({{"begin", bucket.begin},
                   {"end", bucket.end},
                   {"tokens", bucket.tokens},
                   {"bytes", bucket.bytes},
                   {"nats_per_token", bucket.nats_per_token()},
                   {"bits_per_byte", bucket.bits_per_byte()}});
  return out;
}

nlohmann::ordered_json to_json(const PerplexityReport& report) {
  return {{"tokens", report.total.tokens},
          {"bytes", report.total.bytes},
          {"nats_per_token", report.total.nats_per_token()},
          {"perplexity", std::exp(report.total.nats_per_token())},
          {"bits_per_byte", report.total.bits_per_byte()},
          {"resets", report.resets},
          {"seconds", report.seconds},
          {"buckets", to_json(report.buckets)}};
}

}  // namespace everlong
