// Model folders: config.json, model.safetensors or shards of it, generation_config.json
// (docs/formats.md). Ours, and those that other programs published (models/published.h).
#pragma once
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "core/safetensors_folder.h"
#include "kernels/sampling.h"
#include "models/decoder.h"

namespace everlong {

// What config.json says, in either dialect.
struct FolderConfig {
  ModelConfig config;
  bool published = false;
  nlohmann::json object;  // the file as it is
};
Result<FolderConfig> read_config(const fs::path& folder);

// Builds the decoder of config.json and fills it, tensor by tensor: beside the model, memory holds
// one tensor, whatever the size of the folder. Every parameter must be in the files with its shape,
// and every tensor of the files must be a parameter; the message names the first that is not. So
// does that of a tensor which does not fit the checksum in its file (published files have none).
// Weights are converted to `dtype`. `edit`, where given, changes the config before the decoder is
// built: settings that only inference knows. What changes a weight's shape is refused when the
// weights are read.
using ConfigEdit = std::function<Status(ModelConfig& config)>;
Result<std::shared_ptr<Decoder>> load_model(const fs::path& folder, at::Device device,
                                            at::ScalarType dtype, const ConfigEdit& edit = {});

// Weights in the dtype they have; shards of at most `max_shard_bytes` where one file would be
// larger. A program that ends on the way leaves the old model. Where the config changes too there
// is a moment, when all is written, in which the folder has no config.json; weights never lie
// beside a config that is not theirs. A
// generation_config.json that is already there belongs to the user and stays.
Status save_model(const fs::path& folder, const Decoder& model,
                  const std::map<std::string, std::string>& metadata,
                  std::int64_t max_shard_bytes = kDefaultShardBytes);

// The sampling defaults of the folder's generation_config.json; plain defaults where the folder has
// none. Of a published folder the keys that this program has, with the publisher's defaults for
// those that are absent (no do_sample: the largest logit).
Result<SamplingParams> read_generation_config(const fs::path& folder);
nlohmann::json generation_config(const SamplingParams& params);  // the file's content

// A fingerprint of config and weights: what a stream file remembers its model by. Settings of
// running alone (mechanisms/mechanism.h) do not count. 16 hex digits (XXH3). Reads all weights:
// about 0.1 s a gigabyte.
std::string fingerprint(const Decoder& model);

// Tensors by name in one safetensors file, and back onto the CPU (copies). Any device and strides.
Status save_tensors(const fs::path& path, const TensorMap& tensors,
                    const std::map<std::string, std::string>& metadata);
struct TensorFile {
  TensorMap tensors;
  std::map<std::string, std::string> metadata;
};
Result<TensorFile> load_tensors(const fs::path& path);
at::Tensor to_tensor(const TensorEntry& entry);  // one of them: a copy on the CPU
at::ScalarType to_scalar_type(DType dtype);
Result<DType> to_dtype(at::ScalarType type);  // fails for what no safetensors file can hold

}  // namespace everlong
