// Model folders: config.json, model.safetensors, generation_config.json (docs/formats.md).
#pragma once
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <map>
#include <memory>
#include <string>

#include "core/safetensors.h"
#include "kernels/sampling.h"
#include "models/decoder.h"

namespace everlong {

// Builds the decoder of config.json and fills it. Every parameter must be in the file with its
// shape, and every tensor of the file must be a parameter; the message names the first that is not.
// Weights are converted to `dtype`.
Result<std::shared_ptr<Decoder>> load_model(const fs::path& folder, at::Device device,
                                            at::ScalarType dtype);

// Weights in the dtype they have. Each file is replaced atomically; a generation_config.json that
// is already there belongs to the user and stays.
Status save_model(const fs::path& folder, const Decoder& model,
                  const std::map<std::string, std::string>& metadata);

// The sampling defaults of the folder's generation_config.json; plain defaults where the folder has
// none.
Result<SamplingParams> read_generation_config(const fs::path& folder);

// A fingerprint of config and weights: what a stream file remembers its model by. 16 hex digits
// (XXH3). Reads all weights: about 0.1 s a gigabyte.
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

}  // namespace everlong
