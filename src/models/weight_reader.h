// The parameters of a model, read one by one out of a folder.
#pragma once
#include "models/decoder.h"
#include "models/published.h"
#include "models/tensor_source.h"

namespace everlong {

// Opened: every parameter has its tensor, with the shape the model asks for, and every tensor is
// needed. Nothing but headers was read. Thread safe to read.
class WeightReader {
 public:
  // `model` only says names and shapes: it may lie on the meta device. In a published folder
  // tensors may have the names and the packing of published_places().
  static Result<WeightReader> open(std::unique_ptr<TensorSource> source, const Decoder& model,
                                   bool published);

  // A copy, contiguous, of a tensor that fits its checksum, where its file states one. It is made
  // straight from the map and the pages of the file are freed: a loop over all parameters needs
  // memory for one besides what it keeps.
  Result<at::Tensor> read(const std::string& parameter, at::Device device,
                          at::ScalarType dtype) const;
  DType dtype(const std::string& parameter) const;
  const TensorSource& source() const { return *source_; }

 private:
  struct Slice {  // what a parameter is of its tensor
    const StoredTensor* tensor = nullptr;
    std::string name;  // of the tensor
    std::vector<std::int64_t> shape;
    std::size_t begin = 0;  // bytes, where it is not the whole tensor
    bool whole = true;
  };
  Result<Slice> find(const std::string& parameter, at::IntArrayRef shape,
                     const std::vector<PublishedPlace>& places) const;
  Status refuse_strangers(const ModelConfig& config, bool published) const;

  std::unique_ptr<TensorSource> source_;
  std::map<std::string, Slice> slices_;  // by parameter
};

TensorMap parameters_of(const Decoder& model);

}  // namespace everlong
