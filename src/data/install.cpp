#include "data/install.h"

#include <set>
#include <system_error>

#include "data/staging.h"

namespace everlong {
namespace {

std::vector<std::string> files_of(const SplitInfo& info) {
  std::vector<std::string> files;
  for (const auto& shard : info.shards) {
    files.push_back(shard.file);
    if (!shard.targets.empty()) files.push_back(shard.targets);
  }
  return files;
}

}  // namespace

Status check_dataset_target(const fs::path& out, bool force) {
  std::error_code error;
  if (!fs::exists(out, error)) return {};
  if (!fs::is_directory(out, error)) return invalid_argument(out.string(), ": is not a folder");
  if (force || read_dataset_info(out).ok()) return {};
  for (fs::directory_iterator entry(out, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (name.starts_with('.')) continue;
    return invalid_argument(
        out.string(), ": the folder holds other things (", name,
        ") and no dataset; give an empty or new folder, or --force to write there all the same");
  }
  return error ? io_error(out.string(), ": cannot be read: ", error.message()) : Status();
}

Status install_dataset(const fs::path& staging, const fs::path& out, const DatasetInfo& info) {
  const auto old = read_dataset_info(out);
  std::error_code error;
  fs::remove(out / kDatasetFile, error);
  if (error)
    return io_error((out / kDatasetFile).string(), ": cannot be removed: ", error.message());
  std::set<std::string> fresh;
  for (const auto& [name, split_info] : info.splits) {
    for (const std::string& file : files_of(split_info)) {
      EVERLONG_RETURN_IF_ERROR(move_into_place(staging / file, out / file));
      fresh.insert(file);
    }
  }
  if (old.ok()) {
    for (const auto& [name, split_info] : old->splits)
      for (const std::string& file : files_of(split_info))
        if (!fresh.contains(file)) fs::remove(out / file, error);
  }
  return write_dataset_info(out, info);
}

}  // namespace everlong
