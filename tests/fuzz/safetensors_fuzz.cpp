// Any bytes as a safetensors file; what is accepted keeps every rule of docs/formats.md.
#include "core/safetensors.h"
#include "fuzz.h"

using namespace everlong;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  const auto content = parse_safetensors(bytes);
  if (!fuzz::accepted(content)) return 0;
  std::size_t sum = 0;
  unsigned touched = 0;
  for (const auto& [name, entry] : content->tensors) {
    const auto wanted = tensor_bytes(entry.dtype, entry.shape);
    fuzz::require(wanted.ok() && *wanted == entry.bytes.size(), "bytes fit the shape");
    for (const std::byte byte : entry.bytes) touched += static_cast<unsigned>(byte);
    sum += entry.bytes.size();
  }
  std::uint64_t header = 0;
  for (int i = 7; i >= 0; --i) header = header << 8 | data[i];
  fuzz::require(8 + header + sum == size, "tensors fill the file");
  return touched == 0xffffffff ? 1 : 0;
}
