// A stream: one endless text through one model, at constant memory where the mechanisms' state is
// bounded.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/files.h"
#include "kernels/sampling.h"
#include "models/decoder.h"
#include "session/landmarks.h"

namespace everlong {

// Runs on the model's device, without gradients. Not thread safe; streams over the same model are
// independent and the model is only read: its weights must not change while streams over it live.
// Where a call returns a failure, the stream is as it was; torch errors (out of memory) pass
// through as exceptions.
//
// Callers speak of text. Where the model has landmarks (Landmark Attention; landmark_id of its
// config) the stream places them: they are never drawn, have no score, and those that a text brings
// itself are passed over.
class Stream {
 public:
  // Tokens run through the model in pieces of at most `chunk`: memory does not depend on how much
  // is fed at once.
  explicit Stream(std::shared_ptr<Decoder> model, std::int64_t chunk = 2048);

  // Feeds any number of tokens. Ids outside the vocabulary are refused before any is fed.
  Status feed(std::span<const std::int32_t> tokens);
  // Feeds and returns the natural-log probability of each token given all before it, carried state
  // included. The first token of a fresh stream has none: its entry is NaN, and so is a landmark's.
  Result<std::vector<float>> score(std::span<const std::int32_t> tokens);
  // fp32 [vocab], the prediction after the last token fed; empty before the first.
  std::span<const float> logits() const { return logits_; }
  // Draws the next token from logits() and feeds it. Refused on a fresh stream.
  Result<std::int32_t> generate(Sampler& sampler);

  std::int64_t position() const;           // tokens that the model has read, landmarks counted
  std::int64_t text_position() const;      // without them: what was fed
  std::int64_t state_bytes() const;        // in memory
  std::int64_t state_bytes_bound() const;  // at the present position
  // Of states that lie in files too (layers/tiered_state.h); 0 and empty for others.
  std::int64_t file_bytes() const;
  std::int64_t file_bytes_bound() const;
  std::map<std::string, double> state_counts() const;  // summed over layers
  const Decoder& model() const { return *model_; }

  void reset();
  Stream clone() const;  // a fork: both go on independently

  // One safetensors file (docs/formats.md): state of every layer, position, last logits, model
  // fingerprint, format version. load() refuses a file of another model or version, and then leaves
  // the stream as it was. Notes are texts that travel in the file unread: a sampler's, a caller's.
  Status save(const fs::path& path, const std::map<std::string, std::string>& notes = {}) const;
  Status load(const fs::path& path, std::map<std::string, std::string>* notes = nullptr);

 private:
  Status check_tokens(std::span<const std::int32_t> tokens) const;
  LandmarkRule::Marked marked(std::span<const std::int32_t> text) const;
  at::Tensor run(std::span<const std::int32_t> piece);  // -> hidden [1, T, D]; the state moves on
  void predict(const at::Tensor& hidden_1TD, std::int64_t row);  // logits_ from one of them
  const std::string& model_fingerprint() const;

  std::shared_ptr<Decoder> model_;
  std::optional<LandmarkRule> landmarks_;
  ModelState state_;
  std::vector<float> logits_;
  std::int64_t chunk_;
  mutable std::string fingerprint_;  // of the model, computed when first needed
};

}  // namespace everlong
