#include "golden_case.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "core/safetensors.h"
#include "mechanisms/mechanism.h"

namespace everlong::golden {
namespace {

constexpr const char* kFormat = "everlong-golden-1";

struct Case {
  OpCall call;
  TensorMap out, state,
      grad;  // what the reference computed; gradients named as OpResult names them
  double rtol = 0, atol = 0;
};

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

Result<Case> read_case(const SafetensorsFile& file,
                       const std::map<std::string, std::string>& metadata) {
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
  for (const auto& [name, tensor] : grad)
    out.grad[!out.call.inputs.contains(name) && out.call.state.contains(name) ? "state." + name
                                                                              : name] = tensor;
  return out;
}

struct Compared {
  bool good = false;
  double error = 0;  // largest |a - b| over the largest |b|
  std::string why;
};

std::string shape_text(const at::Tensor& tensor) {
  std::vector<std::string> sizes;
  for (const auto size : tensor.sizes()) sizes.push_back(std::to_string(size));
  return cat("[", join(sizes, ", "), "]");
}

// |a - b| <= atol + rtol max|b| everywhere. Non-finite values never pass.
Compared compare(const at::Tensor& given, const at::Tensor& wanted, double rtol, double atol) {
  if (given.sizes() != wanted.sizes())
    return {false, 0, cat("has shape ", shape_text(given), ", the case has ", shape_text(wanted))};
  if (wanted.numel() == 0) return {true, 0, ""};
  const at::Tensor a = given.to(at::kCPU, at::kDouble), b = wanted.to(at::kDouble);
  if (!at::isfinite(a).all().item<bool>()) return {false, 0, "is not finite"};
  if (!at::isfinite(b).all().item<bool>()) return {false, 0, "is not finite in the file"};
  const double worst = (a - b).abs().max().item<double>(), scale = b.abs().max().item<double>();
  const double allowed = atol + rtol * scale;
  const double relative = scale > 0 ? worst / scale : worst;
  if (worst <= allowed) return {true, relative, ""};
  return {false, relative,
          cat("differs by ", worst, "; allowed ", allowed, " (largest value ", scale, ")")};
}

// The first difference of one form as a sentence, or nothing; `worst` collects the largest relative
// error.
std::optional<std::string> difference(const Case& wanted, const OpResult& given, double& worst) {
  const auto check_group = [&](std::string_view prefix, const TensorMap& expected,
                               const TensorMap& actual) -> std::optional<std::string> {
    for (const auto& [name, tensor] : expected) {
      const auto found = actual.find(name);
      if (found == actual.end()) return cat(prefix, name, " was not computed");
      const Compared compared = compare(found->second, tensor, wanted.rtol, wanted.atol);
      worst = std::max(worst, compared.error);
      if (!compared.good) return cat(prefix, name, " ", compared.why);
    }
    return std::nullopt;
  };
  if (auto why = check_group("out.", wanted.out, given.out)) return why;
  if (auto why = check_group("state_out.", wanted.state, given.state)) return why;
  return check_group("grad.", wanted.grad, given.grad);
}

const Operator* find_operator(std::string_view mechanism, std::string_view kind,
                              std::string& reason) {
  const auto room = find_mechanism(mechanism);
  if (!room.ok()) {
    reason = cat("no mechanism \"", mechanism, "\" in this build");
    return nullptr;
  }
  std::vector<std::string> kinds;
  for (const Operator* op : (*room)->operators) {
    if (op->kind() == kind) return op;
    kinds.emplace_back(op->kind());
  }
  reason = cat(mechanism, " offers no \"", kind, "\"; it has ",
               kinds.empty() ? "no operators" : join(kinds, ", "));
  return nullptr;
}

Verdict failed(std::string detail) { return {Outcome::kFailed, std::move(detail)}; }

}  // namespace

Result<std::vector<fs::path>> find_files(const fs::path& root) {
  std::error_code error;
  if (!fs::exists(root, error)) return not_found(root.string(), ": there is no such folder");
  std::vector<fs::path> files;
  if (fs::is_directory(root, error)) {
    for (fs::recursive_directory_iterator
             it(root, fs::directory_options::skip_permission_denied, error),
         end;
         !error && it != end; it.increment(error))
      if (it->path().extension() == ".safetensors" && !it->is_directory(error))
        files.push_back(it->path());
    if (error) return io_error(root.string(), ": cannot list the folder: ", error.message());
  } else {
    files.push_back(root);
  }
  std::ranges::sort(files);
  return files;
}

Verdict check(const fs::path& path) {
  const auto file = SafetensorsFile::open(path);
  if (!file.ok()) return failed(file.status().message());
  const auto& metadata = file->metadata();
  const auto value = [&](const std::string& key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? std::string() : found->second;
  };
  if (value("format").empty() || !value("format").starts_with("everlong-golden"))
    return {Outcome::kNotGolden, "no golden metadata"};
  if (value("format") != kFormat)
    return failed(
        cat("format \"", value("format"), "\" is not known; this program reads ", kFormat));
  for (const char* const key : {"mechanism", "level", "kind"})
    if (value(key).empty()) return failed(cat("metadata ", key, " is missing"));

  // A file that nobody can run is still a file that must be whole.
  auto wanted = read_case(*file, metadata);
  if (!wanted.ok()) return failed(wanted.status().message());
  if (value("level") != "op")
    return {Outcome::kNotApplicable,
            cat("level \"", value("level"), "\" is not checked here; operators (op) are")};
  std::string reason;
  const Operator* const op = find_operator(value("mechanism"), value("kind"), reason);
  if (op == nullptr) return {Outcome::kNotApplicable, reason};

  std::string forms;
  double worst = 0;
  for (const OpForm& form : op->forms()) {
    if (!form.cpu) continue;
    const auto result = op->run(form.name, wanted->call);
    if (!result.ok()) return failed(cat(form.name, ": ", result.status().message()));
    if (const auto why = difference(*wanted, *result, worst))
      return failed(cat(form.name, ": ", *why));
    forms += cat(forms.empty() ? "" : ", ", form.name);
  }
  if (forms.empty())
    return {Outcome::kNotApplicable, cat(value("kind"), " has no form that runs on the CPU")};
  return {Outcome::kPassed, cat(forms, "; largest error ", worst)};
}

}  // namespace everlong::golden
