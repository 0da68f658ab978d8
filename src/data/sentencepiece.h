// tokenizer.model of SentencePiece (Llama 2, Mistral, T5 and their kin), read by its own library.
#pragma once
#include <memory>

#include "core/files.h"
#include "data/tokenizer.h"

namespace everlong {

// Reads the file, or tokenizer.model in the folder. Text gives the ids that the sentencepiece
// package gives, without begin or end; control symbols spelled out in a text are plain text. Bytes
// that are not UTF-8 become U+FFFD, as in that package: such text does not come back as it was.
//
// decode() gives bytes, so lists may be cut anywhere, in the middle of a character too, and decoded
// in pieces. The blank which these models put before a text is text, but for a list that says that
// a text begins there: after bod() or eod() it is left out.
//
// libsentencepiece (0.1.97 or a later one of its ABI 0) is looked for when the first file is read;
// kUnsupported where it is not installed.
Result<std::unique_ptr<Tokenizer>> read_sentencepiece(const fs::path& file_or_folder);

}  // namespace everlong
