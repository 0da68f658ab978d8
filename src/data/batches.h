// Rows of tokens for training and evaluation, cut from the token line of a split.
//
// Documents and predictions: a model starts a document with a fresh state, and nothing predicts a
// document's first token: the target at an end-of-document token is kNoTarget. The end-of-document
// token itself is predicted. A split with targets of its own (data/targets.h) says itself what each
// token predicts, how much that counts, and perhaps how often a memory stores the token.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "data/dataset.h"

namespace everlong {

// B rows of T tokens, row after row.
struct Batch {
  std::int64_t rows = 0, tokens = 0;  // B, T
  std::vector<std::int32_t> inputs;   // [B, T]
  std::vector<std::int32_t>
      targets;                 // [B, T]: the token after each input in the line, or kNoTarget
  std::vector<float> weights;  // [B, T]: how much the loss of each target counts; empty: 1 each
  std::vector<float> writes;   // [B, T]: how often a memory stores each token; empty: once each
  // Where a sequence begins in the flattened line of B*T tokens, rising: every row's first token,
  // and every document's first token inside a row.
  std::vector<std::int64_t> document_starts;
  // [B]: 1 when the row's first token goes on with the document in which this row of the batch
  // before ended, so that its state is to be carried; 0 when the row starts afresh.
  std::vector<std::uint8_t> row_continues;

  // document_starts and the end, as variable-length operators take them.
  std::vector<std::int64_t> cu_seqlens() const;
  std::int64_t predictions() const;  // targets other than kNoTarget
  double weight() const;             // sum of their weights: what a mean loss divides by
};

enum class Packing {
  kPacked,     // each row walks the line without end: batch after batch goes on where it stopped
               // (state can be carried)
  kShuffled,   // each row is a random window of the line; every window comes once an epoch; nothing
               // is carried
  kDocuments,  // each row holds whole documents, as many as fit, and then ends of documents without
               // targets; every document comes once an epoch, in random order; nothing is carried
};
// "packed", "shuffled" or "documents".
Result<Packing> packing_from_name(std::string_view name);
std::string_view name(Packing packing);

struct BatchOptions {
  std::int64_t rows = 8;
  std::int64_t row_tokens = 1024;
  Packing packing = Packing::kPacked;
  std::uint64_t seed = 0;
};

// Where a reader stands: all that is needed to go on exactly. The other fields say which line it
// belongs to.
struct BatchCursor {
  std::int64_t batches = 0;  // handed out so far
  BatchOptions options;
  std::int64_t line_tokens = 0;
};
nlohmann::json to_json(const BatchCursor& cursor);
Result<BatchCursor> cursor_from_json(const nlohmann::json& object, const std::string& place);

// Batches without end, a pure function of (split, options, number of the batch). The line is a
// ring: its last token is an end of document, so going on at its first one splits nothing. Not
// thread safe.
class BatchReader {
 public:
  static Result<BatchReader> create(SplitView split, const BatchOptions& options);

  // Fills `batch`, reusing its memory. Fails when a shard holds ids outside the vocabulary.
  Status next(Batch& batch);
  BatchCursor cursor() const { return {batches_, options_, split_.tokens()}; }
  // Goes to where another reader stood. Refused when that reader had other options or another line.
  Status seek(const BatchCursor& cursor);
  double epochs() const;  // times that the line was read so far

 private:
  BatchReader(SplitView split, const BatchOptions& options)
      : split_(std::move(split)), options_(options) {}
  std::int64_t shuffled_position(std::int64_t row);
  void shuffle(std::int64_t epoch);
  void shuffle_documents(std::int64_t epoch);
  // The documents of a row, counted from the first batch on.
  std::span<const std::uint32_t> documents_of(std::int64_t row);
  SplitView split_;
  BatchOptions options_;
  std::int64_t batches_ = 0;
  // Shuffled: this epoch's windows, each row_tokens long, in the order they come.
  std::int64_t shuffled_epoch_ = -1, window_offset_ = 0;
  std::vector<std::uint32_t> windows_;
  // Documents: this epoch's in the order they come, and where in it each of its rows begins (the
  // last one ends).
  std::int64_t document_epoch_ = -1, first_row_ = 0;
  std::vector<std::uint32_t> documents_;
  std::vector<std::size_t> row_begins_ = {0};
};

// The documents of a split once, in order, as one row: pieces of at most `row_tokens` tokens. Not
// thread safe.
class SequentialReader {
 public:
  // Stops after `limit` tokens; 0: at the end of the split.
  SequentialReader(SplitView split, std::int64_t row_tokens, std::int64_t limit = 0);

  // Fills `batch` (rows = 1) and returns true, or returns false at the end.
  Result<bool> next(Batch& batch);
  std::int64_t position() const { return position_; }  // tokens handed out
  std::int64_t tokens() const { return end_; }         // tokens in all

 private:
  SplitView split_;
  std::int64_t row_tokens_, position_ = 0, end_;
};

}  // namespace everlong
