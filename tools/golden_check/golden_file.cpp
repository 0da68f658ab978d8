#include "golden_file.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace everlong::golden {
namespace {

std::optional<at::ScalarType> scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return at::kBool;
    case DType::kUint8:
      return at::kByte;
    case DType::kInt8:
      return at::kChar;
    case DType::kInt16:
      return at::kShort;
    case DType::kInt32:
      return at::kInt;
    case DType::kInt64:
      return at::kLong;
    case DType::kFloat16:
      return at::kHalf;
    case DType::kBFloat16:
      return at::kBFloat16;
    case DType::kFloat32:
      return at::kFloat;
    case DType::kFloat64:
      return at::kDouble;
  }
  return std::nullopt;
}

// A copy (the map may lie at odd addresses), floating point as float64.
at::Tensor to_tensor(const TensorEntry& entry) {
  const auto type = *scalar_type(entry.dtype);
  at::Tensor tensor = at::empty(entry.shape, at::TensorOptions().dtype(type));
  if (!entry.bytes.empty()) std::memcpy(tensor.data_ptr(), entry.bytes.data(), entry.bytes.size());
  return tensor.is_floating_point() ? tensor.to(at::kDouble) : tensor;
}

}  // namespace

Result<Case> read_case(const SafetensorsFile& file) {
  const auto& metadata = file.metadata();
  Case out;
  const auto params = metadata.find("params");
  if (params != metadata.end())
    out.call.params = nlohmann::json::parse(params->second, nullptr, /*allow_exceptions=*/false);
  if (out.call.params.is_discarded() || !out.call.params.is_object())
    return corrupt("metadata params is not a JSON object");
  for (const auto& [key, target] : {std::pair{"rtol", &out.rtol}, std::pair{"atol", &out.atol}}) {
    const auto found = metadata.find(key);
    const auto value = found == metadata.end() ? std::nullopt : parse_number(found->second);
    if (!value || !(*value >= 0) || !std::isfinite(*value))
      return corrupt("metadata ", key,
                     found == metadata.end() ? " is missing" : cat(" = \"", found->second, "\""),
                     "; a number >= 0 is needed");
    *target = *value;
  }
  std::vector<std::pair<std::string, at::Tensor>> state_gradients;
  TensorMap grad_out, grad;
  for (const auto& [name, entry] : file.tensors()) {
    const at::Tensor tensor = to_tensor(entry);
    const auto dot = name.find('.');
    const std::string group = name.substr(0, dot),
                      rest = dot == std::string::npos ? "" : name.substr(dot + 1);
    if (rest.empty())
      return corrupt("tensor ", name, " has no known prefix (in., out., state_in., ...)");
    if (group == "in" && rest == "cu_seqlens") {
      if (tensor.dim() != 1 || at::isFloatingType(tensor.scalar_type()))
        return corrupt("in.cu_seqlens must be whole numbers in one dimension");
      const at::Tensor offsets = tensor.to(at::kLong).contiguous();
      out.call.cu_seqlens.assign(offsets.data_ptr<std::int64_t>(),
                                 offsets.data_ptr<std::int64_t>() + offsets.numel());
    } else if (group == "in") {
      out.call.inputs[rest] = tensor;
    } else if (group == "state_in") {
      out.call.state[rest] = tensor;
    } else if (group == "out") {
      out.out[rest] = tensor;
    } else if (group == "state_out") {
      out.state[rest] = tensor;
    } else if (group == "grad_out") {
      grad_out[rest] = tensor;
    } else if (group == "grad") {
      grad[rest] = tensor;
    } else if (group == "w") {
      out.call.inputs[name] = tensor;
    } else {
      return corrupt(
          "tensor ", name,
          " has no known prefix (in., out., state_in., state_out., grad_out., grad., w.)");
    }
  }
  if (out.out.empty() && out.state.empty())
    return corrupt("the case has no out.* and no state_out.* tensor");
  // A name that is an output stays; else a state's name stands for the state.
  for (const auto& [name, tensor] : grad_out)
    out.call
        .grad_out[!out.out.contains(name) && out.state.contains(name) ? "state." + name : name] =
        tensor;
  for (const auto& [name, tensor] : grad) {
    const bool of_input = out.call.inputs.contains(name),
               of_weight = !of_input && out.call.inputs.contains("w." + name),
               of_state = !of_input && !of_weight && out.call.state.contains(name);
    out.grad[of_weight ? "w." + name : of_state ? "state." + name : name] = tensor;
  }
  return out;
}

namespace {

struct Compared {
  bool good = false;
  double error = 0;  // largest |a - b|, over the largest |b| unless b is 0 within atol
  std::string why;
};

std::string shape_text(const at::Tensor& tensor) {
  std::vector<std::string> sizes;
  for (const auto size : tensor.sizes()) sizes.push_back(std::to_string(size));
  return cat("[", join(sizes, ", "), "]");
}

Compared compare(const at::Tensor& given, const at::Tensor& wanted, double rtol, double atol) {
  if (given.sizes() != wanted.sizes())
    return {false, 0, cat("has shape ", shape_text(given), ", the case has ", shape_text(wanted))};
  if (wanted.numel() == 0) return {true, 0, ""};
  if (!at::isFloatingType(wanted.scalar_type())) {
    const bool same = at::equal(given.to(at::kCPU), wanted);
    return {same, same ? 0.0 : 1.0, same ? "" : "has other whole numbers"};
  }
  const at::Tensor a = given.to(at::kCPU, at::kDouble), b = wanted.to(at::kDouble);
  if (!at::isfinite(a).all().item<bool>()) return {false, 0, "is not finite"};
  if (!at::isfinite(b).all().item<bool>()) return {false, 0, "is not finite in the file"};
  const double worst = (a - b).abs().max().item<double>(), scale = b.abs().max().item<double>();
  const double allowed = atol + rtol * scale;
  const double relative = scale > atol ? worst / scale : worst;
  if (worst <= allowed) return {true, relative, ""};
  return {false, relative,
          cat("differs by ", worst, "; allowed ", allowed, " (largest value ", scale, ")")};
}

bool is_zero(const at::Tensor& tensor) {
  return tensor.is_floating_point() && tensor.numel() > 0 && tensor.eq(0).all().item<bool>();
}

struct Group {
  std::string_view prefix;
  const TensorMap &expected, &actual;
};

std::array<Group, 3> groups(const Case& wanted, const OpResult& given) {
  return {Group{"out.", wanted.out, given.out}, Group{"state_out.", wanted.state, given.state},
          Group{"grad.", wanted.grad, given.grad}};
}

}  // namespace

std::optional<std::string> difference(const Case& wanted, const OpResult& given, double& worst,
                                      const Shares& more) {
  for (const Group& group : groups(wanted, given))
    for (const auto& [name, tensor] : group.expected) {
      const std::string full = cat(group.prefix, name);
      const auto found = group.actual.find(name);
      if (found == group.actual.end()) return cat(full, " was not computed");
      const auto share = more.find(full);
      const double rounding = share == more.end() ? 0.0 : share->second;
      // A result that cancels to nothing is still made of terms of size 1.
      const double least = rounding > 0 && is_zero(tensor) ? rounding : 0.0;
      const Compared compared =
          compare(found->second, tensor, wanted.rtol + rounding, wanted.atol + least);
      worst = std::max(worst, compared.error);
      if (!compared.good) return cat(full, " ", compared.why);
    }
  return std::nullopt;
}

Shares everywhere(const Case& wanted, double share) {
  Shares shares;
  const OpResult none;
  for (const Group& group : groups(wanted, none))
    for (const auto& [name, tensor] : group.expected) shares[cat(group.prefix, name)] = share;
  return shares;
}

OpCall in_float32(const OpCall& call) {
  OpCall out = call;
  for (TensorMap* tensors : {&out.inputs, &out.state, &out.grad_out})
    for (auto& [name, tensor] : *tensors)
      if (tensor.is_floating_point()) tensor = tensor.to(at::kFloat);
  return out;
}

Shares relative_errors(const Case& wanted, const OpResult& given) {
  Shares errors;
  for (const Group& group : groups(wanted, given))
    for (const auto& [name, tensor] : group.expected)
      if (const auto found = group.actual.find(name); found != group.actual.end())
        errors[cat(group.prefix, name)] = compare(found->second, tensor, 0, 0).error;
  return errors;
}

}  // namespace everlong::golden
