// A trained model with its tokenizer: what streams read.
#pragma once
#include <everlong/status.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

EVERLONG_NAMESPACE_BEGIN

struct ModelOptions {
  // "cpu", "cuda", "cuda:1", or "auto": the first GPU that works, else the CPU.
  std::string device = "auto";
  // Of weights and activations: "fp32", "bf16", "fp64", or "auto": bf16 on CUDA, else fp32. What
  // streams carry is fp32 in the mechanisms that accumulate.
  std::string dtype = "auto";
  // Of the one pool that all models and streams of the process compute with: 1 to 1024; 0: as it
  // is, at first all cores.
  int threads = 0;
};

// A handle: copies share the weights, which live as long as any handle or stream. Immutable; every
// member may be called from several threads at once.
class Model {
 public:
  // Reads a model folder: config.json, model.safetensors or its shards, and what the tokenizer
  // needs. Folders of Everlong, and published ones that it knows (docs/formats.md). Everything is
  // checked; the message of a failure names the file and what is wrong in it. Beside the weights,
  // memory holds one tensor at a time.
  static Result<Model> open(const std::string& folder, const ModelOptions& options = {});

  std::int64_t parameters() const;
  std::int64_t vocab_size() const;
  // The mechanism of each layer, first layer first: "lightning", "softmax", ...
  const std::vector<std::string>& layers() const;
  const std::string& device() const;  // "cpu", "cuda:0"
  const std::string& dtype() const;   // "fp32"

  // The ids of a text, 0 <= id < vocab_size(). Any bytes are legal. Special tokens spelled out in a
  // text are plain text.
  std::vector<std::int32_t> encode(std::string_view text) const;
  // The bytes of ids. Specials and ids outside the vocabulary have none. One id may be part of a
  // character: join the bytes before you read them as UTF-8.
  std::string decode(std::span<const std::int32_t> ids) const;
  // Special ids, or -1 where the tokenizer has none. The first opens a text that has no beginning
  // of its own, the second closes a document.
  std::int32_t begin_of_document() const;
  std::int32_t end_of_document() const;

 private:
  friend class Stream;
  struct Impl;
  explicit Model(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

EVERLONG_NAMESPACE_END
