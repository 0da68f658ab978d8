// Any bytes as the TOML of a run file, and as an override of it.
#include <nlohmann/json.hpp>

#include "fuzz.h"
#include "train/toml_document.h"

using namespace everlong;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto document = TomlDocument::parse(text, "run.toml", {});
  if (fuzz::accepted(document)) {
    (void)document->root().dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
    for (const auto& [key, value] : document->root().items()) (void)document->place(key);
  }
  (void)fuzz::accepted(
      TomlDocument::parse("[train]\nsteps = 3\n", "run.toml", {std::string(text)}));
  return 0;
}
