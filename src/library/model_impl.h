// What is behind a public Model.
#pragma once
#include "data/tokenizer.h"
#include "library/public_api.h"
#include "models/decoder.h"

namespace everlong::v1 {

struct [[gnu::visibility("hidden")]] Model::Impl {
  std::shared_ptr<Decoder> decoder;
  std::unique_ptr<Tokenizer> tokenizer;
  std::string device, dtype;
};

}  // namespace everlong::v1
