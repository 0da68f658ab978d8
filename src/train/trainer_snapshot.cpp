// What a trainer carries from step to step, out of it and back into it. docs/formats.md, "Training
// checkpoint".
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <mutex>
#include <nlohmann/json.hpp>

#include "train/checkpoint_file.h"
#include "train/trainer.h"

namespace everlong {
namespace {

constexpr const char* kWeights = "weights.";
constexpr const char* kOptimizer = "optimizer.";
constexpr const char* kCarried = "carried.";
constexpr const char* kCarriedPositions = "carried.positions";

at::Tensor generator_state(at::Device device) {
  at::Generator generator = at::globalContext().defaultGenerator(device);
  const std::scoped_lock lock(generator.mutex());
  return generator.get_state();
}

Status restore_generator(at::Device device, const TensorMap& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) return {};  // of another kind of device: it starts from the seed
  at::Generator generator = at::globalContext().defaultGenerator(device);
  const std::scoped_lock lock(generator.mutex());
  try {
    generator.set_state(found->second);
  } catch (const c10::Error& error) {
    return corrupt("tensor ", name, ": ", error.what_without_backtrace());
  }
  return {};
}

// Those whose name begins so, by the rest of it.
TensorMap with_prefix(const TensorMap& tensors, const std::string& prefix) {
  TensorMap chosen;
  for (const auto& [name, tensor] : tensors)
    if (name.starts_with(prefix)) chosen[name.substr(prefix.size())] = tensor;
  return chosen;
}

Status restore_weights(Decoder& model, TensorMap weights) {
  for (const auto& entry : model.named_parameters()) {
    const auto found = weights.find(entry.key());
    if (found == weights.end()) return invalid_argument("weights of ", entry.key(), " are missing");
    const at::Tensor& own = entry.value();
    if (found->second.sizes() != own.sizes() || found->second.scalar_type() != own.scalar_type())
      return invalid_argument("weights of ", entry.key(), " are ", found->second.scalar_type(), " ",
                              found->second.sizes(), "; this run needs ", own.scalar_type(), " ",
                              own.sizes());
    at::Tensor(own).copy_(found->second);
    weights.erase(found);
  }
  if (!weights.empty())
    return invalid_argument("weights of ", weights.begin()->first, " belong to no parameter");
  return {};
}

}  // namespace

Result<TensorFile> Trainer::snapshot() const {
  const c10::NoGradGuard no_grad;
  TensorFile file;
  file.metadata = {{"step", std::to_string(steps_done_)},
                   {"tokens", std::to_string(tokens_done_)},
                   {"config", model_->config().to_json().dump()},
                   {"run", run_.to_toml()},
                   {"data", data_hash_},
                   {"cursor", to_json(reader_->cursor()).dump()}};
  for (const auto& entry : model_->named_parameters())
    file.tensors[kWeights + entry.key()] = entry.value();
  for (const auto& [name, tensor] : optimizer_->tensors()) file.tensors[kOptimizer + name] = tensor;
  if (const auto& carried = backprop_->carried()) {
    for (const auto& [name, tensor] : carried->tensors()) file.tensors[kCarried + name] = tensor;
    file.tensors[kCarriedPositions] = at::tensor(carried->positions(), at::kLong);
  }
  file.tensors["generator.cpu"] = generator_state(at::kCPU);
  if (device_.is_cuda()) file.tensors["generator.cuda"] = generator_state(device_);
  return file;
}

Status Trainer::restore(const TensorFile& snapshot) {
  const c10::NoGradGuard no_grad;
  EVERLONG_ASSIGN(const auto data, metadata_entry(snapshot, "data"));
  if (data != data_hash_)
    return invalid_argument(run_.data.path,
                            ": these are not the data of the run, which had a dataset.json of "
                            "another content; prepare them as they were, or begin anew");
  EVERLONG_ASSIGN(const auto cursor_text, metadata_entry(snapshot, "cursor"));
  EVERLONG_ASSIGN(const auto cursor,
                  cursor_from_json(nlohmann::json::parse(cursor_text, nullptr, false), "cursor"));
  EVERLONG_RETURN_IF_ERROR(reader_->seek(cursor));
  EVERLONG_ASSIGN(steps_done_, metadata_count(snapshot, "step"));
  EVERLONG_ASSIGN(tokens_done_, metadata_count(snapshot, "tokens"));
  EVERLONG_RETURN_IF_ERROR(restore_weights(*model_, with_prefix(snapshot.tensors, kWeights)));
  EVERLONG_RETURN_IF_ERROR(optimizer_->restore(with_prefix(snapshot.tensors, kOptimizer)));
  if (const auto found = snapshot.tensors.find(kCarriedPositions);
      found != snapshot.tensors.end() && run_.train.carry != "none") {
    TensorMap carried = with_prefix(snapshot.tensors, kCarried);
    carried.erase("positions");
    const at::Tensor positions = found->second;
    if (positions.scalar_type() != at::kLong || positions.dim() != 1)
      return corrupt("tensor ", kCarriedPositions, " is not I64 [rows]");
    const auto* const first = positions.const_data_ptr<std::int64_t>();
    EVERLONG_RETURN_IF_ERROR(
        backprop_->restore_carried(carried, {first, first + positions.numel()}));
  }
  EVERLONG_RETURN_IF_ERROR(restore_generator(at::kCPU, snapshot.tensors, "generator.cpu"));
  if (device_.is_cuda())
    EVERLONG_RETURN_IF_ERROR(restore_generator(device_, snapshot.tensors, "generator.cuda"));
  return {};
}

}  // namespace everlong
