#include "models/tensor_source.h"

#include <mutex>
#include <nlohmann/json.hpp>
#include <set>

#include "core/process.h"
#include "core/safetensors_folder.h"
#include "core/strict_json.h"
#include "embedded/pickle_index.py.h"

namespace everlong {
namespace {

using nlohmann::json;

class SafetensorsSource final : public TensorSource {
 public:
  explicit SafetensorsSource(SafetensorsFolder folder) : folder_(std::move(folder)) {
    for (const auto& [name, entry] : folder_.tensors())
      tensors_[name] = {entry.dtype, entry.shape, {}, entry.bytes};
    metadata_ = folder_.metadata();
    place_ = folder_.place();
  }
  Status verify(const std::string& name) const override {
    {
      const std::lock_guard lock(mutex_);
      if (verified_.contains(name)) return {};
    }
    EVERLONG_RETURN_IF_ERROR(folder_.verify(name));
    const std::lock_guard lock(mutex_);
    verified_.insert(name);
    return {};
  }
  void release(const std::string& name, std::span<const std::byte> bytes) const override {
    folder_.release(name, bytes);
  }

 private:
  SafetensorsFolder folder_;
  mutable std::mutex mutex_;
  mutable std::set<std::string> verified_;  // tensors that many parameters are parts of: once
};

class PickledSource final : public TensorSource {
 public:
  // `index` as pickle_index.py prints it.
  static Result<std::unique_ptr<TensorSource>> make(const fs::path& folder, const json& index);
  Status verify(const std::string&) const override { return {}; }
  void release(const std::string& name, std::span<const std::byte> bytes) const override {
    files_[file_of_.at(name)].release(bytes);
  }

 private:
  Status add(const std::string& name, const json& about);
  std::vector<MappedFile> files_;
  std::map<std::string, std::size_t> file_of_;
};

// One past the last element that a tensor reaches, or nothing when that leaves 64 bits.
std::optional<std::int64_t> reach(const StoredTensor& tensor) {
  std::int64_t last = 0;
  for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
    if (tensor.shape[i] == 0) return 0;
    std::int64_t step = 0;
    if (__builtin_mul_overflow(tensor.shape[i] - 1, tensor.strides[i], &step) ||
        __builtin_add_overflow(last, step, &last))
      return std::nullopt;
  }
  return last < INT64_MAX / 8 ? std::optional(last + 1) : std::nullopt;
}

bool is_plain(const StoredTensor& tensor) {
  std::int64_t step = 1;
  for (std::size_t i = tensor.shape.size(); i-- > 0;) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != step) return false;
    step *= tensor.shape[i];
  }
  return true;
}

// The program has checked all this; the file may have changed since, and memory is at stake.
Status PickledSource::add(const std::string& name, const json& about) {
  const json type = about.value("dtype", json());
  const auto known =
      type.is_string() ? dtype_from_safetensors(type.get<std::string>()) : std::nullopt;
  const DType dtype = known.value_or(DType::kFloat32);
  const json shape = about.value("shape", json()), stride = about.value("stride", json());
  const json file = about.value("file", json()), offset = about.value("offset", json());
  if (!known || !is_list_of_counts(shape) || !is_list_of_counts(stride) ||
      shape.size() != stride.size() || !is_list_of_counts(json::array({file, offset})) ||
      file.get<std::size_t>() >= files_.size())
    return corrupt("tensor \"", name, "\" is described as ", about.dump());
  StoredTensor tensor{
      dtype, shape.get<std::vector<std::int64_t>>(), stride.get<std::vector<std::int64_t>>(), {}};
  const MappedFile& held = files_[file.get<std::size_t>()];
  const auto elements = reach(tensor);
  const auto begin = offset.get<std::uint64_t>();
  const std::uint64_t bytes =
      elements ? static_cast<std::uint64_t>(*elements) * info(dtype).bytes : UINT64_MAX;
  if (begin > held.bytes().size() || bytes > held.bytes().size() - begin ||
      !tensor_bytes(dtype, tensor.shape).ok())
    return corrupt(held.path().string(), ": tensor \"", name,
                   "\" reaches past the end of the file");
  tensor.bytes = held.bytes().subspan(begin, bytes);
  if (is_plain(tensor)) tensor.strides.clear();
  tensors_[name] = std::move(tensor);
  file_of_[name] = file.get<std::size_t>();
  return {};
}

Result<std::unique_ptr<TensorSource>> PickledSource::make(const fs::path& folder,
                                                          const json& index) {
  auto source = std::make_unique<PickledSource>();
  const json files = index.value("files", json::array());
  for (const json& name : files) {
    EVERLONG_ASSIGN(auto file, MappedFile::open(folder / name.get<std::string>()));
    source->files_.push_back(std::move(file));
  }
  source->place_ = files.size() == 1 ? folder / files[0].get<std::string>() : folder;
  const json tensors = index.value("tensors", json::object());
  for (const auto& [name, about] : tensors.items())
    EVERLONG_RETURN_IF_ERROR(source->add(name, about));
  return std::unique_ptr<TensorSource>(std::move(source));
}

bool any_exists(const fs::path& folder, std::initializer_list<const char*> names) {
  std::error_code ignored;
  for (const char* name : names)
    if (fs::exists(folder / name, ignored)) return true;
  return false;
}

// The last line of what a program complained.
std::string last_line(std::string text) {
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text.substr(text.rfind('\n') + 1);  // npos + 1 is 0
}

}  // namespace

bool has_safetensors(const fs::path& folder) {
  return any_exists(folder, {"model.safetensors", "model.safetensors.index.json"});
}

bool has_pickles(const fs::path& folder) {
  return any_exists(folder, {"pytorch_model.bin", "pytorch_model.bin.index.json"});
}

Result<std::unique_ptr<TensorSource>> open_safetensors(const fs::path& folder) {
  EVERLONG_ASSIGN(auto opened, SafetensorsFolder::open(folder));
  return std::unique_ptr<TensorSource>(std::make_unique<SafetensorsSource>(std::move(opened)));
}

Result<std::unique_ptr<TensorSource>> open_pickles(const fs::path& folder) {
  const auto ran =
      run_process({.command = {"python3", "-", folder.string()}, .input = kPickleIndex});
  if (!ran.ok() && ran.status().code() == StatusCode::kNotFound)
    return not_found(folder.string(),
                     ": its pickles are read by Python, and there is no \"python3\" "
                     "on the PATH; install it (no package is needed)");
  if (!ran.ok()) return ran.status();
  if (ran->exit_code != 0) return corrupt(last_line(ran->errors));
  const auto index = parse_strict_object(ran->output, "list of tensors");
  if (!index.ok()) return index.status().at(folder.string());
  return PickledSource::make(folder, *index);
}

}  // namespace everlong
