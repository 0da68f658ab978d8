// A stream: one endless text through one model. Where the model's mechanisms carry a state of fixed
// size, memory and the cost of a token are the same after a thousand tokens and after a billion.
#pragma once
#include <everlong/model.h>

#include <map>

EVERLONG_NAMESPACE_BEGIN

// How the next token is drawn from the logits. The penalty first, then temperature, top_k, top_p,
// min_p, then one draw.
struct SamplingOptions {
  double temperature = 1;  // >= 0; 0: the largest logit, the lowest id among equals
  std::int64_t top_k = 0;  // only the likeliest so many; 0: all
  double top_p = 1;        // only the likeliest that sum to this probability, 0 < p <= 1
  double min_p = 0;        // none below this part of the likeliest one's probability, 0 <= p <= 1
  double repetition_penalty = 1;     // > 0; above 1 discourages the last `penalty_window` ids
  std::int64_t penalty_window = 64;  // 0 to 2^20
  std::uint64_t seed = 0;            // same seed, same logits: same tokens, on every machine
};

// Draws tokens. Remembers where its random sequence stands and what was said last. Not thread safe;
// one sampler may serve several streams.
class Sampler {
 public:
  // Refuses options that no draw can follow.
  static Result<Sampler> create(const SamplingOptions& options);
  Sampler(Sampler&&) noexcept;
  Sampler& operator=(Sampler&&) noexcept;
  ~Sampler();

  // Tells the penalty of a token that was not drawn here: the prompt's.
  void saw(std::int32_t token);
  // What it remembers, as text; restore() goes on from there. Text that save() did not write is
  // refused, and nothing changes.
  std::string save() const;
  Status restore(const std::string& text);

 private:
  friend class Stream;
  struct Impl;
  explicit Sampler(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Not thread safe; streams over one model are independent of each other. After a failure the stream
// is as it was, but for kOutOfMemory and kInternal: then reset() it, or load() a saved state.
class Stream {
 public:
  // A fresh stream at position 0. Tokens run through the model in pieces of at most `chunk` (1 to
  // 2^24): how much is fed at once costs time, not memory. Feeding in any pieces gives the same
  // predictions within rounding, and bit for bit where the cuts fall on multiples of `chunk`.
  static Result<Stream> create(const Model& model, std::int64_t chunk = 2048);
  Stream(Stream&&) noexcept;
  Stream& operator=(Stream&&) noexcept;
  ~Stream();

  // Feeds any number of tokens. An id outside the vocabulary is refused before any is fed.
  Status feed(std::span<const std::int32_t> tokens);
  // Feeds, and returns the natural logarithm of each token's probability given all before it. The
  // first token of a fresh stream is predicted by nothing: NaN. So is a landmark (Landmark
  // Attention), which the stream places itself.
  Result<std::vector<float>> score(std::span<const std::int32_t> tokens);
  // What comes next, [vocab_size]: valid until the next call that is not const; empty at position
  // 0.
  std::span<const float> logits() const;
  // Draws the next token and feeds it. A fresh stream predicts nothing: refused.
  Result<std::int32_t> generate(Sampler& sampler);

  std::int64_t position() const;     // tokens that the model has read, its landmarks counted
  std::int64_t state_bytes() const;  // what is carried now
  // The most it can be at this position; the same at every later one where the state is bounded.
  std::int64_t state_bytes_bound() const;
  const Model& model() const;

  // Position 0 again.
  Status reset();
  // An independent stream that stands where this one does: a copy of the state, no text is read
  // again.
  Result<Stream> fork() const;

  // One file with everything carried (docs/formats.md, "Stream file"), written beside its target,
  // synced and renamed: never half there. Notes travel in it unread: UTF-8 texts by name.
  Status save(const std::string& file, const std::map<std::string, std::string>& notes = {}) const;
  // Goes on from such a file, bit for bit on the same kind of machine. A file of another model,
  // dtype or format, or one that is damaged, is refused, and nothing changes. Fills `notes` where
  // it is not null.
  Status load(const std::string& file, std::map<std::string, std::string>* notes = nullptr);

 private:
  struct Impl;
  explicit Stream(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

EVERLONG_NAMESPACE_END
