// Any bytes as targets of a shard of five tokens.
#include <cmath>

#include "data/targets.h"
#include "fuzz.h"

using namespace everlong;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto targets = TargetsFile::open(fuzz::file("t.targets.safetensors", data, size), 5);
  if (!fuzz::accepted(targets)) return 0;
  std::vector<std::int32_t> ids(5);
  std::vector<float> weights(5);
  if (!fuzz::accepted(targets->read(0, 300, ids, weights))) return 0;
  for (std::size_t i = 0; i < 5; ++i)
    fuzz::require((ids[i] == kNoTarget || (ids[i] >= 0 && ids[i] < 300)) &&
                      std::isfinite(weights[i]) && weights[i] >= 0,
                  "targets lie in the vocabulary, weights count");
  return 0;
}
