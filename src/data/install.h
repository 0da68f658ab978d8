// Putting a finished dataset where it belongs.
#pragma once
#include "data/dataset.h"

namespace everlong {

// Refuses a folder with other things in it and no dataset, unless `force`.
Status check_dataset_target(const fs::path& out, bool force);

// Moves the files that `info` names from `staging` (on the same file system) to `out` and writes
// dataset.json: it goes first and comes last, so that at no moment it names shards that are not its
// own. Files of a dataset that was there before and that the new one does not have are removed.
Status install_dataset(const fs::path& staging, const fs::path& out, const DatasetInfo& info);

}  // namespace everlong
