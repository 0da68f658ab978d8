// Model folders: config.json, model.safetensors, generation_config.json.
#pragma once
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <memory>

#include "core/safetensors.h"
#include "models/decoder.h"

namespace everlong {

// Builds the decoder of config.json and fills it. Every parameter must be in the file with its
// shape, and every tensor of the file must be a parameter; the message names the first that is not.
// Weights are converted to `dtype`.
Result<std::shared_ptr<Decoder>> load_model(const fs::path& folder, at::Device device,
                                            at::ScalarType dtype);

// fp32 weights in fp32, bf16 in bf16. Each file is replaced atomically.
Status save_model(const fs::path& folder, const Decoder& model,
                  const std::map<std::string, std::string>& metadata);

// A fingerprint of config and weights: what a stream file remembers its model by. 16 hex digits
// (XXH3).
std::string fingerprint(const Decoder& model);

// Tensors by name in one safetensors file, and back onto the CPU (copies).
Status save_tensors(const fs::path& path, const TensorMap& tensors,
                    const std::map<std::string, std::string>& metadata);
struct TensorFile {
  TensorMap tensors;
  std::map<std::string, std::string> metadata;
};
Result<TensorFile> load_tensors(const fs::path& path);

}  // namespace everlong
