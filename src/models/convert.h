// A model folder in one dialect, written anew in another.
#pragma once
#include <functional>
#include <optional>

#include "models/checkpoint.h"

namespace everlong {

struct ConvertOptions {
  // "everlong"; "hf": the published family that can say it (family_of()); or one of
  // published_families().
  std::string to = "everlong";
  std::optional<at::ScalarType> dtype = {};  // of all weights; absent: each as it is
  // Softmax layers become Infini-attention layers with these settings of that room
  // (with_infini_layers()); goes with to = "everlong".
  std::optional<nlohmann::json> infini = {};
  std::int64_t max_shard_bytes = kDefaultShardBytes;
  // Called after each tensor, with the bytes of weights written and in all; a failure stops the
  // work.
  std::function<Status(std::int64_t done, std::int64_t total)> progress = {};
};

struct ConvertReport {
  std::string dialect;  // what was written: "everlong", or the family
  std::int64_t parameters = 0, tensors = 0, files = 0;
  std::int64_t bytes = 0;           // of weights, as written
  std::vector<std::string> copied;  // tokenizer and licence files that came along
};

// Reads `from`: our own folders or those of published_families(), with safetensors or pickles.
// Writes `to`, an existing folder: weights, config.json, generation_config.json, and the files of
// the tokenizer as they are. Numbers change only where `dtype` says so. Tensor by tensor: memory
// holds one at a time, whatever the size of the model. Token ids of begin, end and padding travel
// in generation_config.json, and in a published config.json as well.
Result<ConvertReport> convert_model(const fs::path& from, const fs::path& to,
                                    const ConvertOptions& options);

}  // namespace everlong
