// Any bytes as dataset.json beside a shard and its targets; what is opened can be read to its end.
#include "data/dataset.h"
#include "fuzz.h"

using namespace everlong;

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  const std::uint16_t tokens[] = {1, 2, 256, 3, 256};
  const std::uint64_t starts[] = {0, 3, 5};
  const std::int32_t targets[] = {2, 256, -100, 256, -100};
  const float weights[] = {1, 1, 0, 0.5f, 0};
  if (!write_shard(fuzz::folder() / "train-00000.tokens", tokens, starts).ok() ||
      !write_targets(fuzz::folder() / "train-00000.targets.safetensors", targets, weights).ok())
    std::abort();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::file("dataset.json", data, size);
  const auto dataset = TokenDataset::open(fuzz::folder());
  if (!fuzz::accepted(dataset)) return 0;
  for (const auto& [name, info] : dataset->info().splits) {
    const auto split = dataset->split(name);
    if (!fuzz::accepted(split)) continue;
    std::vector<std::int32_t> out(static_cast<std::size_t>(split->tokens())), ids(out.size());
    std::vector<float> weights(out.size());
    if (out.empty()) continue;
    (void)fuzz::accepted(split->read(0, out));
    if (split->has_targets()) (void)fuzz::accepted(split->read_targets(0, ids, weights));
    for (std::int64_t i = 0; i < split->documents(); ++i)
      fuzz::require(split->document_at(split->document_start(i)) == i, "documents are found");
  }
  (void)fuzz::accepted(dataset->verify());
  return 0;
}
