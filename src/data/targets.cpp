#include "data/targets.h"

#include <cmath>
#include <cstring>

namespace everlong {
namespace {

constexpr const char* kTargets = "targets";
constexpr const char* kWeights = "weights";
constexpr const char* kFormat = "everlong-targets-1";

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

}  // namespace

Status write_targets(const fs::path& path, std::span<const std::int32_t> targets,
                     std::span<const float> weights) {
  if (targets.size() != weights.size())
    return invalid_argument(path.string(), ": ", targets.size(), " targets and ", weights.size(),
                            " weights; one of each for every token is needed");
  if (const Status wrong = check(targets, weights, INT32_MAX); !wrong.ok())
    return invalid_argument(wrong.message()).at(path.string());
  const std::vector<std::int64_t> shape = {std::ssize(targets)};
  return write_safetensors(path,
                           {{kTargets, {DType::kInt32, shape, std::as_bytes(targets)}},
                            {kWeights, {DType::kFloat32, shape, std::as_bytes(weights)}}},
                           {{"format", kFormat}});
}

Result<TargetsFile> TargetsFile::open(const fs::path& path, std::int64_t tokens) {
  EVERLONG_ASSIGN(auto file, SafetensorsFile::open(path));
  const auto format = file.metadata().find("format");
  if (format == file.metadata().end() || format->second != kFormat)
    return unsupported(path.string(), ": is not a file of targets (metadata format ", kFormat, ")");
  for (const auto& [name, dtype] :
       {std::pair(kTargets, DType::kInt32), std::pair(kWeights, DType::kFloat32)}) {
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
  const auto copy = [&](const char* name, auto out) {
    const auto bytes = file_.tensors().at(name).bytes;
    std::memcpy(out.data(), bytes.data() + static_cast<std::size_t>(position) * 4,
                out.size_bytes());
  };
  copy(kTargets, targets);
  copy(kWeights, weights);
  return check(targets, weights, vocab_size).at(file_.path().string());
}

}  // namespace everlong
