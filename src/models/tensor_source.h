// The tensors of a model folder, whatever kind of files hold them, read one by one.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/safetensors.h"

namespace everlong {

struct StoredTensor {
  DType dtype = DType::kFloat32;
  std::vector<std::int64_t> shape;
  // In elements; empty: C order, without gaps.
  std::vector<std::int64_t> strides;
  std::span<const std::byte> bytes;  // into a mapped file, perhaps not aligned to elements
};

// Opened and checked without reading tensors.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const fs::path& place() const { return place_; }  // for messages
  // kCorrupt where the whole tensor is not what was written, as far as its file can say it: ours
  // state checksums, others do not. Reads the tensor the first time. Thread safe.
  virtual Status verify(const std::string& name) const = 0;
  // Frees the memory that reading `bytes` of one of the tensors took.
  virtual void release(const std::string& name, std::span<const std::byte> bytes) const = 0;

 protected:
  std::map<std::string, StoredTensor> tensors_;
  std::map<std::string, std::string> metadata_;
  fs::path place_;
};

// model.safetensors, or shards with their index.
Result<std::unique_ptr<TensorSource>> open_safetensors(const fs::path& folder);

// pytorch_model.bin, or shards with their index: zip archives with a pickle, as torch.save writes.
// A Python program (any python3, no torch needed) reads the pickle and refuses one that names more
// than weights need; the tensors are then read from the archive where they lie.
Result<std::unique_ptr<TensorSource>> open_pickles(const fs::path& folder);

bool has_safetensors(const fs::path& folder);
bool has_pickles(const fs::path& folder);

}  // namespace everlong
