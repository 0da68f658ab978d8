// tokenizer.json of Hugging Face's tokenizers: byte-level BPE (GPT-2, Llama 3, cl100k and their
// kin).
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "core/files.h"
#include "data/tokenizer.h"

namespace everlong {

// Reads the file, or tokenizer.json in the folder. Text gives the ids that the tokenizers package
// gives with add_special_tokens=False, but special tokens spelled out in a text are plain text:
// documents must not be able to end themselves.
//
// Taken: model BPE over bytes (with ignore_merges); pre-tokenizers ByteLevel, Split (regular
// expression or string; isolated, removed or merged with a neighbour, inverted or not), Digits and
// sequences of them; added tokens; no normalizer. Everything else that would change ids is refused
// by name. Special ids come from tokenizer_config.json and generation_config.json beside the file,
// where they are there; a role that no token has is -1.
Result<std::unique_ptr<Tokenizer>> read_tokenizer_json(const fs::path& file_or_folder);

// A letter stands for each byte in the vocabulary of such files ("Ġ" is a space). The bytes of a
// spelled token, or nothing where a letter stands for no byte. GPT-2, encoder.py.
std::optional<std::string> bytes_of_spelling(std::string_view spelling);

}  // namespace everlong
