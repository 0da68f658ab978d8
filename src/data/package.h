// Getting a Debian package's files without installing it and without being root.
#pragma once
#include <string>

#include "core/files.h"

namespace everlong {

struct UnpackedPackage {
  std::string version;
  fs::path folder;  // its files, as they would lie below /
};

// `apt-get download` and `dpkg -x` into `work`, a folder that is the caller's. Failures name the
// command that helps (no such program, package list missing or old, no network).
Result<UnpackedPackage> download_package(const std::string& package, const fs::path& work);

// "X is not installed; run: sudo apt-get install Y" where run_process() found no program; other
// failures as they are.
Status program_missing(const Status& status, const std::string& why, const std::string& package);

// Runs a command that is expected to succeed; its last error line becomes the message.
Status run_step(const std::vector<std::string>& command, const std::string& why,
                const std::string& package);

}  // namespace everlong
