// Torch tensors in and out of safetensors files.
#include <ATen/ATen.h>

#include <cstring>

#include "models/checkpoint.h"

namespace everlong {
namespace {

struct Pair {
  DType dtype;
  at::ScalarType scalar_type;
};
constexpr Pair kPairs[] = {
    {DType::kBool, at::kBool},     {DType::kUint8, at::kByte},
    {DType::kInt8, at::kChar},     {DType::kInt16, at::kShort},
    {DType::kInt32, at::kInt},     {DType::kInt64, at::kLong},
    {DType::kFloat16, at::kHalf},  {DType::kBFloat16, at::kBFloat16},
    {DType::kFloat32, at::kFloat}, {DType::kFloat64, at::kDouble},
};

}  // namespace

at::ScalarType to_scalar_type(DType dtype) {
  for (const Pair& pair : kPairs)
    if (pair.dtype == dtype) return pair.scalar_type;
  return at::kFloat;  // not reached: every DType has its pair
}

Result<DType> to_dtype(at::ScalarType type) {
  for (const Pair& pair : kPairs)
    if (pair.scalar_type == type) return pair.dtype;
  return unsupported("a tensor of ", at::toString(type), " is nothing a safetensors file can hold");
}

at::Tensor to_tensor(const TensorEntry& entry) {
  at::Tensor tensor = at::empty(entry.shape, to_scalar_type(entry.dtype));
  if (!entry.bytes.empty())
    std::memcpy(tensor.mutable_data_ptr(), entry.bytes.data(), entry.bytes.size());
  return tensor;
}

Status save_tensors(const fs::path& path, const TensorMap& tensors,
                    const std::map<std::string, std::string>& metadata) {
  std::map<std::string, TensorEntry> entries;
  TensorMap kept;  // the contiguous copies that the entries point into
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor plain = tensor.detach().cpu().contiguous();
    const auto dtype = to_dtype(plain.scalar_type());
    if (!dtype.ok()) return dtype.status().at(cat(path.string(), ": tensor \"", name, "\""));
    kept[name] = plain;
    entries[name] = {*dtype,
                     plain.sizes().vec(),
                     {static_cast<const std::byte*>(plain.const_data_ptr()), plain.nbytes()}};
  }
  return write_safetensors(path, entries, metadata);
}

Result<TensorFile> load_tensors(const fs::path& path) {
  EVERLONG_ASSIGN(const auto file, SafetensorsFile::open(path));
  TensorFile loaded;
  for (const auto& [name, entry] : file.tensors()) {
    EVERLONG_RETURN_IF_ERROR(file.verify(name));
    loaded.tensors[name] = to_tensor(entry);
  }
  loaded.metadata = file.metadata();
  return loaded;
}

}  // namespace everlong
