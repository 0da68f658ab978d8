#include "data/package.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <system_error>

#include "core/process.h"

namespace everlong {
namespace {

std::string as_root(std::string_view command) {
  return cat(::geteuid() == 0 ? "" : "sudo ", command);
}

// The line that says most: apt's first "E:", else the last line of all.
std::string reason(std::string_view errors) {
  std::string_view last;
  while (!errors.empty()) {
    const std::string_view line = errors.substr(0, errors.find('\n'));
    errors.remove_prefix(std::min(errors.size(), line.size() + 1));
    if (line.starts_with("E:")) return std::string(line);
    if (!line.empty()) last = line;
  }
  return std::string(last);
}

Status explain_download(const std::string& package, const std::string& errors) {
  static constexpr std::array<std::string_view, 4> kUnknown = {
      "Unable to locate package", "No packages found", "Can't select candidate version",
      "Can't find a source"};
  const auto says = [&](std::string_view text) { return errors.find(text) != std::string::npos; };
  if (std::any_of(kUnknown.begin(), kUnknown.end(), says))
    return not_found("apt knows no package ", package,
                     ": its list is missing or old. Run: ", as_root("apt-get update"));
  return io_error("package ", package, " cannot be downloaded (", reason(errors),
                  "). Check the network, then run this again; when the list is old, first: ",
                  as_root("apt-get update"));
}

// python3.11-doc_2%3a3.11.2-6_all.deb -> 2:3.11.2-6
std::string version_of(const fs::path& deb) {
  const std::string name = deb.filename().string();
  const auto begin = name.find('_');
  if (begin == std::string::npos) return "unknown";
  std::string version = name.substr(begin + 1, name.find('_', begin + 1) - begin - 1);
  if (const auto colon = version.find("%3a"); colon != std::string::npos)
    version.replace(colon, 3, ":");
  return version;
}

}  // namespace

Status program_missing(const Status& status, const std::string& why, const std::string& package) {
  if (status.code() != StatusCode::kNotFound) return status;
  return not_found(why, " needs a program that is not installed (", status.message(),
                   "). Run: ", as_root(cat("apt-get install ", package)));
}

Status run_step(const std::vector<std::string>& command, const std::string& why,
                const std::string& package) {
  const auto result = run_process({.command = command, .environment = {{"LC_ALL", "C"}}});
  if (!result.ok()) return program_missing(result.status(), why, package);
  if (result->exit_code == 0) return {};
  return io_error(why, ": ", command[0], " failed with exit code ", result->exit_code, " (",
                  reason(result->errors), ")");
}

Result<UnpackedPackage> download_package(const std::string& package, const fs::path& work) {
  const fs::path download = work / "download", unpacked = work / "unpacked";
  EVERLONG_RETURN_IF_ERROR(make_directories(download));
  const auto apt = run_process({.command = {"apt-get", "download", package},
                                .folder = download,
                                .environment = {{"LC_ALL", "C"}}});
  if (!apt.ok()) {
    if (apt.status().code() != StatusCode::kNotFound) return apt.status();
    return not_found(
        "apt-get is not there: fetch takes its texts from Debian packages. With texts of your own: "
        "everlong data prepare PATH... --out DIR");
  }
  if (apt->exit_code != 0) return explain_download(package, apt->errors);

  std::error_code error;
  fs::path deb;
  for (fs::directory_iterator entry(download, error), end; !error && entry != end;
       entry.increment(error))
    if (entry->path().extension() == ".deb") deb = entry->path();
  if (deb.empty())
    return io_error("apt-get download ", package, " left no .deb in ", download.string());
  const std::string why = cat("unpacking ", package);
  EVERLONG_RETURN_IF_ERROR(run_step({"dpkg", "-x", deb.string(), unpacked.string()}, why, "dpkg"));
  fs::remove_all(download, error);
  return UnpackedPackage{version_of(deb), unpacked};
}

}  // namespace everlong
