// Streams in files: docs/formats.md, "Stream file".
#include <ATen/ATen.h>

#include "models/checked_file.h"
#include "session/stream.h"

namespace everlong {
namespace {

constexpr const char* kFormat = "everlong-stream-2";
constexpr const char* kLogits = "logits";
constexpr std::string_view kNote = "note.";  // opens the metadata key of a note

std::string value_or(const std::map<std::string, std::string>& metadata, const std::string& key) {
  const auto found = metadata.find(key);
  return found == metadata.end() ? "" : found->second;
}

// The position is written as plain decimal digits and must read back as them.
Result<std::int64_t> read_position(const std::string& text) {
  const auto position = parse_count(text);
  if (!position || *position < 0 || std::to_string(*position) != text)
    return corrupt("metadata position = \"", text, "\" is not a number of tokens");
  return *position;
}

Result<std::vector<float>> take_logits(TensorMap& tensors, std::int64_t vocabulary) {
  const auto found = tensors.find(kLogits);
  if (found == tensors.end()) return std::vector<float>();
  const at::Tensor logits = found->second;
  if (logits.scalar_type() != at::kFloat || logits.sizes() != at::IntArrayRef({vocabulary}))
    return corrupt("tensor \"", kLogits, "\" is not fp32 [", vocabulary, "]");
  tensors.erase(found);
  return std::vector<float>(logits.const_data_ptr<float>(),
                            logits.const_data_ptr<float>() + vocabulary);
}

}  // namespace

const std::string& Stream::model_fingerprint() const {
  if (fingerprint_.empty()) fingerprint_ = fingerprint(*model_);
  return fingerprint_;
}

Status Stream::save(const fs::path& path, const std::map<std::string, std::string>& notes) const {
  const at::NoGradGuard off;
  TensorFile file;
  file.tensors = state_.tensors();
  if (!logits_.empty()) file.tensors[kLogits] = at::tensor(at::ArrayRef(logits_), at::kFloat);
  file.metadata = {{"model", model_fingerprint()},
                   {"num_layers", std::to_string(state_.num_layers())},
                   {"position", std::to_string(position())}};
  for (const auto& [name, text] : notes) file.metadata[cat(kNote, name)] = text;
  return write_checked(path, file, kFormat);
}

Status Stream::load(const fs::path& path, std::map<std::string, std::string>* notes) {
  const at::NoGradGuard off;
  auto read = read_checked(path, kFormat, "a stream file");
  if (!read.ok())
    return {read.status().code(), cat(read.status().message(), ". Nothing was loaded.")};
  TensorFile file = *std::move(read);
  const auto refused = [&](const Status& status) {
    return Status(status.code(),
                  cat(path.string(), ": ", status.message(), ". Nothing was loaded."));
  };
  if (const std::string model = value_or(file.metadata, "model"); model != model_fingerprint())
    return refused(invalid_argument(
        "was written by model ", model, " (", value_or(file.metadata, "num_layers"),
        " layers); this model is ", model_fingerprint(), " (", state_.num_layers(), " layers)"));
  const auto position = read_position(value_or(file.metadata, "position"));
  if (!position.ok()) return refused(position.status());
  auto logits = take_logits(file.tensors, model_->config().vocab_size);
  if (!logits.ok()) return refused(logits.status());
  if (logits->empty() != (*position == 0))
    return refused(corrupt("position ", *position, logits->empty() ? " needs" : " cannot have",
                           " the tensor \"", kLogits, "\""));

  for (auto& [name, tensor] : file.tensors) tensor = tensor.to(model_->device());
  if (const Status status = state_.restore(file.tensors, {*position}); !status.ok())
    return refused(status);
  logits_ = *std::move(logits);
  if (notes == nullptr) return {};
  notes->clear();
  for (const auto& [key, text] : file.metadata)
    if (key.starts_with(kNote)) (*notes)[key.substr(kNote.size())] = text;
  return {};
}

}  // namespace everlong
