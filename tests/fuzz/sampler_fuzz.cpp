// Any text as a sampler's state; what is accepted draws on, and is written as it was read.
#include "fuzz.h"
#include "kernels/sampling.h"

using namespace everlong;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  Sampler sampler({.repetition_penalty = 1.3, .penalty_window = 4});
  const std::string before = sampler.save();
  if (!fuzz::accepted(sampler.restore(text))) {
    fuzz::require(sampler.save() == before, "a refusal changes nothing");
    return 0;
  }
  Sampler again({.repetition_penalty = 1.3, .penalty_window = 4});
  fuzz::require(fuzz::accepted(again.restore(sampler.save())), "what is saved is restored");
  const float logits[] = {0.5f, 1, -1, 0};
  const auto one = sampler.draw(logits), two = again.draw(logits);
  fuzz::require(one.ok() && two.ok() && *one == *two, "both go on alike");
  return 0;
}
