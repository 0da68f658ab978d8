#include "core/safetensors_folder.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>

#include "core/strict_json.h"

namespace everlong {
namespace {

using nlohmann::json;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr std::string_view kSuffix = ".safetensors";

// A file beside the index: no path leads out of the folder.
bool is_plain_name(std::string_view name) {
  return name.size() > kSuffix.size() && name.ends_with(kSuffix) &&
         name.find('/') == std::string_view::npos && name.front() != '.';
}

// weight_map: shard file by tensor.
Result<std::map<std::string, std::string>> read_index(const fs::path& path) {
  EVERLONG_ASSIGN(const std::string text, read_file(path));
  const auto index = parse_strict_object(text, "index");
  if (!index.ok()) return index.status().at(path.string());
  const auto map = index->find("weight_map");
  if (map == index->end() || !map->is_object() || map->empty())
    return corrupt(path.string(), ": has no \"weight_map\" of tensors and their files");
  std::map<std::string, std::string> files;
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string() || !is_plain_name(file.get_ref<const std::string&>()))
      return corrupt(path.string(), ": weight_map[\"", tensor, "\"] = ", file.dump(),
                     "; the name of a .safetensors file in the same folder is needed");
    files[tensor] = file.get<std::string>();
  }
  return files;
}

std::string numbered(const std::string& stem, std::size_t number, std::size_t count) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "-%05zu-of-%05zu", number, count);
  return cat(stem, digits, kSuffix);
}

// "model-00001-of-00003.safetensors", and with a generation "model-2-00001-of-00003.safetensors".
bool is_shard_name(std::string_view name) {
  if (!name.starts_with("model-") || !name.ends_with(kSuffix)) return false;
  name.remove_prefix(5);
  name.remove_suffix(kSuffix.size());
  std::string form;  // digits as 0, runs of them once
  for (const char c : name)
    if (c < '0' || c > '9' || !form.ends_with('0')) form += c >= '0' && c <= '9' ? '0' : c;
  return form == "-0-of-0" || form == "-0-0-of-0";
}

// The process that wrote "<model...>.safetensors.tmp.<pid>" (AtomicFile), where it no longer runs.
bool is_abandoned(std::string_view name) {
  const auto at = name.find(".safetensors.tmp.");
  if (!name.starts_with("model") || at == std::string_view::npos) return false;
  const auto owner = parse_count(name.substr(at + 17));
  return owner && *owner > 0 && ::kill(static_cast<::pid_t>(*owner), 0) != 0 && errno == ESRCH;
}

// Shards that no index names, and halves of files that a killed program left.
void remove_leftovers(const fs::path& folder, const std::set<std::string>& kept) {
  std::error_code error;
  for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    std::error_code ignored;
    if ((is_shard_name(name) && !kept.contains(name)) || is_abandoned(name))
      fs::remove(entry->path(), ignored);
  }
}

Status remove_file(const fs::path& path) {
  std::error_code error;
  fs::remove(path, error);
  if (error) return io_error(path.string(), ": cannot be removed: ", error.message());
  return {};
}

struct Shards {
  std::vector<std::vector<TensorPlan>> of;
  std::uint64_t total = 0;
};

Result<Shards> divide(const std::vector<TensorPlan>& tensors, std::int64_t max_shard_bytes) {
  Shards shards{{{}}, 0};
  std::uint64_t used = 0;
  for (const auto& tensor : tensors) {
    const auto bytes = tensor_bytes(tensor.dtype, tensor.shape);
    if (!bytes.ok())
      return invalid_argument("tensor \"", tensor.name, "\": ", bytes.status().message());
    if (used > 0 && used + *bytes > static_cast<std::uint64_t>(max_shard_bytes)) {
      shards.of.emplace_back();
      used = 0;
    }
    shards.of.back().push_back(tensor);
    used += *bytes;
    shards.total += *bytes;
  }
  return shards;
}

// Names that the folder does not have yet: what it has must stay until the index names the new
// ones.
std::vector<std::string> free_names(const fs::path& folder, std::size_t count) {
  for (int generation = 1;; ++generation) {
    const std::string stem = generation == 1 ? "model" : cat("model-", generation);
    std::vector<std::string> names;
    for (std::size_t i = 1; i <= count; ++i) names.push_back(numbered(stem, i, count));
    std::error_code ignored;
    if (std::ranges::none_of(names, [&](const auto& n) { return fs::exists(folder / n, ignored); }))
      return names;
  }
}

}  // namespace

Result<SafetensorsFolder> SafetensorsFolder::open(const fs::path& folder) {
  SafetensorsFolder opened;
  std::error_code ignored;
  if (!fs::exists(folder / kIndex, ignored)) {
    opened.place_ = folder / kSingle;
    EVERLONG_ASSIGN(auto file, SafetensorsFile::open(opened.place_));
    opened.tensors_ = file.tensors();
    for (const auto& [name, entry] : opened.tensors_) opened.file_of_[name] = 0;
    opened.files_.push_back(std::move(file));
    return opened;
  }
  opened.place_ = folder / kIndex;
  EVERLONG_ASSIGN(const auto map, read_index(opened.place_));
  std::map<std::string, std::size_t> number;  // of each shard
  for (const auto& [tensor, name] : map) {
    if (number.contains(name)) continue;
    auto file = SafetensorsFile::open(folder / name);
    if (!file.ok() && file.status().code() == StatusCode::kNotFound)
      return not_found((folder / name).string(), ": is missing; ", kIndex, " says that it holds \"",
                       tensor, "\" (and maybe more). Fetch the file again");
    if (!file.ok()) return file.status();
    number[name] = opened.files_.size();
    opened.files_.push_back(*std::move(file));
  }
  for (std::size_t i = 0; i < opened.files_.size(); ++i) {
    const auto& file = opened.files_[i];
    for (const auto& [name, entry] : file.tensors()) {
      if (!opened.tensors_.emplace(name, entry).second)
        return corrupt("tensor \"", name, "\" is in two shards: ",
                       opened.files_[opened.file_of_[name]].path().string(), " and ",
                       file.path().string());
      opened.file_of_[name] = i;
      if (!map.contains(name))
        return corrupt(file.path().string(), ": tensor \"", name, "\" is not named in ", kIndex,
                       ": the two do not belong together");
    }
  }
  for (const auto& [tensor, name] : map) {
    const auto found = opened.file_of_.find(tensor);
    if (found == opened.file_of_.end() || found->second != number[name])
      return corrupt((folder / name).string(), ": does not hold tensor \"", tensor, "\", but ",
                     kIndex, " says so: the two do not belong together");
  }
  return opened;
}

bool SafetensorsFolder::has_checksums() const {
  return std::ranges::all_of(files_, [](const auto& file) { return file.has_checksums(); });
}

Status write_safetensors_folder(const fs::path& folder, const std::vector<TensorPlan>& tensors,
                                const std::map<std::string, std::string>& metadata,
                                std::int64_t max_shard_bytes, const TensorBytes& bytes_of,
                                const std::function<Status()>& before_commit) {
  if (max_shard_bytes <= 0)
    return invalid_argument("a shard of ", max_shard_bytes, " bytes holds nothing; at least 1");
  const auto shards = divide(tensors, max_shard_bytes);
  if (!shards.ok()) return shards.status().at(folder.string());
  const auto names = free_names(folder, shards->of.size());
  json weight_map = json::object();
  Status status;
  for (std::size_t i = 0; status.ok() && i < names.size(); ++i) {
    status = write_safetensors(folder / names[i], shards->of[i], metadata, bytes_of);
    for (const auto& tensor : shards->of[i]) weight_map[tensor.name] = names[i];
  }
  if (status.ok() && before_commit) status = before_commit();
  if (!status.ok()) {
    for (const auto& name : names) static_cast<void>(remove_file(folder / name));
    return status;
  }
  if (names.size() == 1) {
    EVERLONG_RETURN_IF_ERROR(rename_file(folder / names[0], folder / kSingle));
    EVERLONG_RETURN_IF_ERROR(remove_file(folder / kIndex));  // from here on the single file counts
    remove_leftovers(folder, {});
    return {};
  }
  const json index = {{"metadata", {{"total_size", shards->total}}}, {"weight_map", weight_map}};
  EVERLONG_RETURN_IF_ERROR(write_file(folder / kIndex, index.dump(2) + "\n"));
  EVERLONG_RETURN_IF_ERROR(remove_file(folder / kSingle));  // the index counts since its rename
  remove_leftovers(folder, {names.begin(), names.end()});
  return {};
}

}  // namespace everlong
