#include "train/checkpoint_store.h"

#include <algorithm>
#include <cstdio>

namespace everlong {
namespace {

constexpr std::string_view kBegin = "step-";
constexpr std::string_view kEnd = ".safetensors";

// The step of a checkpoint's name; nothing for other files.
std::optional<std::int64_t> step_of(const fs::path& path) {
  const std::string file = path.filename();
  std::string_view name = file;
  if (!name.starts_with(kBegin) || !name.ends_with(kEnd)) return std::nullopt;
  name.remove_prefix(kBegin.size());
  name.remove_suffix(std::min(kEnd.size(), name.size()));
  if (name.size() < 9 || name.size() > 18 || name.find_first_not_of("0123456789") != name.npos)
    return std::nullopt;
  return std::stoll(std::string(name));
}

Status remove_checkpoint(const fs::path& path) {
  std::error_code error;
  fs::remove(path, error);
  if (error) return io_error(path.string(), ": cannot be removed: ", error.message());
  return {};
}

}  // namespace

std::vector<fs::path> CheckpointStore::files() const {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator it(folder_, error), end; !error && it != end; it.increment(error))
    if (step_of(it->path())) found.push_back(it->path());
  std::ranges::sort(found, std::greater(), [](const fs::path& path) { return *step_of(path); });
  return found;
}

void CheckpointStore::remove_leftovers() const {
  std::error_code error;
  for (fs::directory_iterator it(folder_, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename();
    std::error_code ignored;
    if (name.starts_with(kBegin) && name.find(cat(kEnd, ".tmp.")) != name.npos)
      fs::remove(it->path(), ignored);
  }
}

Status CheckpointStore::save(std::int64_t step, const TensorFile& content) {
  EVERLONG_RETURN_IF_ERROR(make_directories(folder_));
  remove_leftovers();
  char name[48];
  std::snprintf(name, sizeof name, "step-%09lld.safetensors", static_cast<long long>(step));
  EVERLONG_RETURN_IF_ERROR(write_checkpoint(folder_ / name, content));
  last_saved_ = folder_ / name;
  const auto all = files();
  for (std::size_t i = static_cast<std::size_t>(keep_); i < all.size(); ++i)
    EVERLONG_RETURN_IF_ERROR(remove_checkpoint(all[i]));
  return {};
}

Result<std::optional<CheckpointStore::Found>> CheckpointStore::newest(const Note& note) {
  const auto all = files();
  std::vector<std::pair<fs::path, Status>> damaged;
  for (const auto& path : all) {
    auto content = read_checkpoint(path);
    if (!content.ok()) {
      if (content.status().code() != StatusCode::kCorrupt) return content.status();
      damaged.emplace_back(path, content.status());
      continue;
    }
    // Out of the way: a damaged file must not count among the newest that are kept.
    for (const auto& [bad, status] : damaged) {
      const fs::path aside = bad.string() + ".damaged";
      EVERLONG_RETURN_IF_ERROR(rename_file(bad, aside));
      if (note)
        note(cat(status.message(), ". It is now ", aside.filename().string(), "; ",
                 path.filename().string(), " is taken in its place"));
    }
    last_saved_ = path;
    return std::optional(Found{path, *std::move(content)});
  }
  if (!damaged.empty())
    return corrupt(folder_.string(), ": none of the ", all.size(),
                   " checkpoints can be read; begin the run anew with --restart. The newest: ",
                   damaged.front().second.message());
  return std::optional<Found>();
}

bool CheckpointStore::finished() const {
  const auto all = files();
  if (all.empty()) return false;
  const auto file = SafetensorsFile::open(all.front());
  if (!file.ok()) return false;
  const auto entry = file->metadata().find("finished");
  return entry != file->metadata().end() && entry->second == "true";
}

Status CheckpointStore::clear() {
  auto all = files();
  std::ranges::reverse(all);
  for (const auto& path : all) EVERLONG_RETURN_IF_ERROR(remove_checkpoint(path));
  remove_leftovers();
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder_, ignored))
    if (entry.path().extension() == ".damaged") fs::remove(entry.path(), ignored);
  return {};
}

}  // namespace everlong
