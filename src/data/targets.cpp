#include "data/targets.h"

#include <cmath>
#include <cstring>

namespace everlong {
namespace {

constexpr const char* kTargets = "targets";
constexpr const char* kWeights = "weights";
constexpr const char* kWrites = "writes";
constexpr const char* kFormat = "everlong-targets-1";
constexpr const char* kFormatWithWrites = "everlong-targets-2";

Status check_writes(std::span<const float> writes) {
  for (const float weight : writes)
    if (!(weight >= 0 && std::isfinite(weight)))
      return corrupt("write weight ", weight,
                     " of a token is not a number >= 0; make the dataset again");
  return {};
}

// `what` of token `at` of a file, or the failure of the first one that is not allowed.
Status check(std::span<const std::int32_t> targets, std::span<const float> weights,
             std::int64_t vocab_size) {
  for (std::size_t i = 0; i < targets.size(); ++i) {
    if (targets[i] != kNoTarget && (targets[i] < 0 || targets[i] >= vocab_size))
      return corrupt("target ", targets[i], " is outside the vocabulary of ", vocab_size,
                     "; make the dataset again");
    if (!(weights[i] >= 0 && std::isfinite(weights[i])))
      return corrupt("weight ", weights[i], " of a target is not a number >= 0; make the dataset ",
                     "again");
  }
  return {};
}

// Elements of tensor `name` from `position` on; the file was checked when it was opened.
template <class T>
void copy_elements(const SafetensorsFile& file, const char* name, std::int64_t position,
                   std::span<T> out) {
  const auto bytes = file.tensors().at(name).bytes;
  std::memcpy(out.data(), bytes.data() + static_cast<std::size_t>(position) * sizeof(T),
              out.size_bytes());
}

}  // namespace

Status write_targets(const fs::path& path, std::span<const std::int32_t> targets,
                     std::span<const float> weights, std::span<const float> writes) {
  if (targets.size() != weights.size())
    return invalid_argument(path.string(), ": ", targets.size(), " targets and ", weights.size(),
                            " weights; one of each for every token is needed");
  if (!writes.empty() && writes.size() != targets.size())
    return invalid_argument(path.string(), ": ", writes.size(), " write weights for ",
                            targets.size(), " tokens; one for every token is needed, or none");
  if (const Status wrong = check(targets, weights, INT32_MAX); !wrong.ok())
    return invalid_argument(wrong.message()).at(path.string());
  if (const Status wrong = check_writes(writes); !wrong.ok())
    return invalid_argument(wrong.message()).at(path.string());
  const std::vector<std::int64_t> shape = {std::ssize(targets)};
  std::map<std::string, TensorEntry> tensors = {
      {kTargets, {DType::kInt32, shape, std::as_bytes(targets)}},
      {kWeights, {DType::kFloat32, shape, std::as_bytes(weights)}}};
  if (!writes.empty()) tensors[kWrites] = {DType::kFloat32, shape, std::as_bytes(writes)};
  return write_safetensors(path, tensors,
                           {{"format", writes.empty() ? kFormat : kFormatWithWrites}});
}

Result<TargetsFile> TargetsFile::open(const fs::path& path, std::int64_t tokens) {
  EVERLONG_ASSIGN(auto file, SafetensorsFile::open(path));
  const auto format = file.metadata().find("format");
  const bool known = format != file.metadata().end();
  const bool writes = known && format->second == kFormatWithWrites;
  if (!known || (format->second != kFormat && !writes))
    return unsupported(path.string(), ": is not a file of targets (metadata format ", kFormat,
                       " or ", kFormatWithWrites, ")");
  std::vector<std::pair<const char*, DType>> needed = {{kTargets, DType::kInt32},
                                                       {kWeights, DType::kFloat32}};
  if (writes) needed.emplace_back(kWrites, DType::kFloat32);
  for (const auto& [name, dtype] : needed) {
    const auto found = file.tensors().find(name);
    if (found == file.tensors().end() || found->second.dtype != dtype ||
        found->second.shape != std::vector<std::int64_t>{tokens})
      return corrupt(path.string(), ": needs ", name, " as ", info(dtype).safetensors_name, " [",
                     tokens, "], one for each token of its shard; make the dataset again");
  }
  return TargetsFile(std::move(file));
}

Status TargetsFile::read(std::int64_t position, std::int64_t vocab_size,
                         std::span<std::int32_t> targets, std::span<float> weights) const {
  copy_elements(file_, kTargets, position, targets);
  copy_elements(file_, kWeights, position, weights);
  return check(targets, weights, vocab_size).at(file_.path().string());
}

Status TargetsFile::verify() const {
  for (const auto& [name, entry] : file_.tensors()) EVERLONG_RETURN_IF_ERROR(file_.verify(name));
  return {};
}

bool TargetsFile::has_writes() const { return file_.metadata().at("format") == kFormatWithWrites; }

Status TargetsFile::read_writes(std::int64_t position, std::span<float> writes) const {
  copy_elements(file_, kWrites, position, writes);
  return check_writes(writes).at(file_.path().string());
}

}  // namespace everlong
