// Element types by the names safetensors gives them.
#pragma once
#include <cstddef>
#include <optional>
#include <string_view>

namespace everlong {

enum class DType {
  kBool,
  kUint8,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kFloat16,
  kBFloat16,
  kFloat32,
  kFloat64
};

struct DTypeInfo {
  DType dtype;
  std::string_view safetensors_name;  // "F32"
  std::string_view name;              // "fp32", as users type and read it
  std::size_t bytes;
};

inline constexpr DTypeInfo kDTypes[] = {
    {DType::kBool, "BOOL", "bool", 1},   {DType::kUint8, "U8", "uint8", 1},
    {DType::kInt8, "I8", "int8", 1},     {DType::kInt16, "I16", "int16", 2},
    {DType::kInt32, "I32", "int32", 4},  {DType::kInt64, "I64", "int64", 8},
    {DType::kFloat16, "F16", "fp16", 2}, {DType::kBFloat16, "BF16", "bf16", 2},
    {DType::kFloat32, "F32", "fp32", 4}, {DType::kFloat64, "F64", "fp64", 8},
};

constexpr const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)]; }

constexpr std::optional<DType> dtype_from_safetensors(std::string_view name) {
  for (const auto& entry : kDTypes)
    if (entry.safetensors_name == name) return entry.dtype;
  return std::nullopt;
}
constexpr std::optional<DType> dtype_from_name(std::string_view name) {
  for (const auto& entry : kDTypes)
    if (entry.name == name) return entry.dtype;
  return std::nullopt;
}

}  // namespace everlong
