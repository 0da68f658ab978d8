#include "models/weight_reader.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "models/checkpoint.h"

namespace everlong {
namespace {

constexpr const char* kHead = "lm_head.weight";
// The embedding, which a tied head is.
std::string embedding_of(const ModelConfig& config) {
  return config.block == "gpt" ? "transformer.wte.weight" : "model.embed_tokens.weight";
}

std::string shape_text(at::IntArrayRef shape) { return nlohmann::json(shape.vec()).dump(); }

// Published folders of models with one shared matrix hold it once or, as a copy, twice.
bool is_copy(const StoredTensor& one, const StoredTensor& other) {
  return one.dtype == other.dtype && one.shape == other.shape && one.strides == other.strides &&
         std::ranges::equal(one.bytes, other.bytes);
}

}  // namespace

TensorMap parameters_of(const Decoder& model) {
  TensorMap parameters;
  for (const auto& item : model.named_parameters()) parameters[item.key()] = item.value();
  return parameters;
}

Result<WeightReader::Slice> WeightReader::find(const std::string& parameter, at::IntArrayRef shape,
                                               const std::vector<PublishedPlace>& places) const {
  const auto& tensors = source_->tensors();
  const auto place = std::ranges::find_if(
      places, [&](const PublishedPlace& p) { return tensors.contains(p.tensor); });
  if (place == places.end())
    return corrupt("tensor \"", parameter, "\" is missing; config.json asks for it");
  const StoredTensor& tensor = tensors.at(place->tensor);
  const bool whole = place->packed_shape.empty();
  const at::IntArrayRef expected = whole ? shape : at::IntArrayRef(place->packed_shape);
  if (at::IntArrayRef(tensor.shape) != expected)
    return corrupt("tensor \"", place->tensor, "\" has shape ", shape_text(tensor.shape),
                   "; config.json asks for ", shape_text(expected));
  if (!at::isFloatingType(to_scalar_type(tensor.dtype)))
    return corrupt("tensor \"", place->tensor, "\" is ", info(tensor.dtype).name,
                   "; weights are floating-point numbers");
  Slice slice{&tensor, place->tensor, shape.vec(), 0, whole};
  if (whole) return slice;
  const std::int64_t rows = expected[1], columns = expected[2];
  const std::int64_t first = place->expert * rows + place->row;
  if (!tensor.strides.empty() || shape.size() != 2 || shape[1] != columns ||
      place->row + shape[0] > rows || first + shape[0] > expected[0] * rows)
    return corrupt("tensor \"", place->tensor, "\" ", shape_text(tensor.shape), " does not hold \"",
                   parameter, "\" ", shape_text(shape), " as whole rows");
  slice.begin = static_cast<std::size_t>(first * columns) * info(tensor.dtype).bytes;
  return slice;
}

Status WeightReader::refuse_strangers(const ModelConfig& config, bool published) const {
  std::set<std::string> needed;
  for (const auto& [parameter, slice] : slices_) needed.insert(slice.name);
  const auto& tensors = source_->tensors();
  for (const auto& [name, tensor] : tensors) {
    if (needed.contains(name) || (published && is_derived_tensor(name))) continue;
    if (config.tie_word_embeddings && name == kHead) {
      const std::string embedding = embedding_of(config);
      if (tensors.contains(embedding) && is_copy(tensor, tensors.at(embedding))) {
        source_->release(name, tensor.bytes);
        source_->release(embedding, tensors.at(embedding).bytes);
        continue;
      }
      return corrupt("tensor \"", name, "\" differs from ", embedding,
                     ", but config.json says that they are one: set tie_word_embeddings to false");
    }
    return corrupt("tensor \"", name, "\" is no parameter of the model that config.json describes");
  }
  return {};
}

Result<WeightReader> WeightReader::open(std::unique_ptr<TensorSource> source, const Decoder& model,
                                        bool published) {
  WeightReader reader;
  reader.source_ = std::move(source);
  const std::string place = reader.source_->place().string();
  for (const auto& [name, parameter] : parameters_of(model)) {
    const auto places = published ? published_places(model.config(), name)
                                  : std::vector<PublishedPlace>{{name, {}, 0, 0}};
    auto slice = reader.find(name, parameter.sizes(), places);
    if (!slice.ok()) return slice.status().at(place);
    reader.slices_[name] = *std::move(slice);
  }
  EVERLONG_RETURN_IF_ERROR(reader.refuse_strangers(model.config(), published).at(place));
  return reader;
}

DType WeightReader::dtype(const std::string& parameter) const {
  return slices_.at(parameter).tensor->dtype;
}

Result<at::Tensor> WeightReader::read(const std::string& parameter, at::Device device,
                                      at::ScalarType dtype) const {
  const Slice& slice = slices_.at(parameter);
  EVERLONG_RETURN_IF_ERROR(source_->verify(slice.name));
  const StoredTensor& stored = *slice.tensor;
  const at::ScalarType type = to_scalar_type(stored.dtype);
  const std::size_t width = info(stored.dtype).bytes;
  auto bytes = stored.bytes;
  if (!slice.whole) {
    std::size_t size = width;
    for (const std::int64_t extent : slice.shape) size *= static_cast<std::size_t>(extent);
    bytes = bytes.subspan(slice.begin, size);
  }
  if (bytes.empty()) return at::empty(slice.shape, at::TensorOptions(device).dtype(dtype));
  // The view only reads, as the map does not let it do more.
  auto* data = const_cast<std::byte*>(bytes.data());
  at::Tensor aligned;
  if (reinterpret_cast<std::uintptr_t>(data) % width != 0) {
    aligned = at::empty({static_cast<std::int64_t>(bytes.size() / width)}, type);
    std::memcpy(aligned.mutable_data_ptr(), data, bytes.size());
    data = static_cast<std::byte*>(aligned.mutable_data_ptr());
  }
  const at::Tensor view = stored.strides.empty()
                              ? at::from_blob(data, slice.shape, type)
                              : at::from_blob(data, slice.shape, stored.strides, type);
  at::Tensor tensor =
      view.to(device, dtype, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  source_->release(slice.name, bytes);
  return tensor;
}

}  // namespace everlong
