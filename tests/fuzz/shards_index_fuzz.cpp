// Any bytes as model.safetensors.index.json beside two shards.
#include "core/safetensors_folder.h"
#include "fuzz.h"

using namespace everlong;

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  const float numbers[6] = {1, 2, 3, 4, 5, 6};
  const auto bytes = std::as_bytes(std::span(numbers));
  for (const char* const name : {"a", "b"})
    if (!write_safetensors(fuzz::folder() / cat(name, ".safetensors"),
                           {{name, {DType::kFloat32, {2, 3}, bytes}}}, {})
             .ok())
      std::abort();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::file("model.safetensors.index.json", data, size);
  const auto opened = SafetensorsFolder::open(fuzz::folder());
  if (fuzz::accepted(opened))
    for (const auto& [name, entry] : opened->tensors())
      fuzz::require((name == "a" || name == "b") && entry.bytes.size() == 24, "only what is there");
  return 0;
}
