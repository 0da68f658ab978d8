// Any bytes as a token shard; what is opened can be read to its end.
#include "data/shards.h"
#include "fuzz.h"

using namespace everlong;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto shard = Shard::open(fuzz::file("train-00000.tokens", data, size));
  if (!fuzz::accepted(shard)) return 0;
  unsigned touched = 0;
  for (const auto token : shard->tokens()) touched += token;
  const auto starts = shard->document_starts();
  fuzz::require(starts.front() == 0 && starts.back() == shard->tokens().size(), "documents cover");
  for (std::size_t i = 1; i < starts.size(); ++i)
    fuzz::require(starts[i - 1] < starts[i], "documents rise");
  (void)fuzz::accepted(shard->verify());
  return touched == 0xffffffff ? 1 : 0;
}
