#include <charconv>
#include <iterator>
#include <string>

#include "cli/commands.h"
#include "cli/terminal.h"
#include "core/text.h"
#include "data/tokenizer.h"

namespace everlong::cli {
namespace {

Result<std::string> read_input(const std::string& file) {
  if (file != "-") return read_file(file, std::size_t{1} << 30);
  std::string text;
  char buffer[1 << 16];
  while (const std::size_t got = std::fread(buffer, 1, sizeof buffer, stdin))
    text.append(buffer, got);
  if (std::ferror(stdin) != 0) return io_error("cannot read the standard input");
  return text;
}

struct TokenizeCommand {
  std::string tokenizer, file = "-";
  bool decode = false;

  Status run() const {
    std::error_code ignored;
    const bool is_name = !fs::exists(tokenizer, ignored);
    EVERLONG_ASSIGN(const auto made,
                    make_tokenizer(is_name ? tokenizer : fs::absolute(tokenizer).string()));
    EVERLONG_ASSIGN(const std::string text, read_input(file));
    if (decode) {
      EVERLONG_ASSIGN(auto ids, parse_ids(text));
      ids.insert(ids.begin(), made->bod());  // they are a whole text: what opens one is no text
      print(made->decode(ids));
      return {};
    }
    std::string lines;
    for (const std::int32_t id : made->encode(text)) lines += cat(id, "\n");
    print(lines);
    return {};
  }

  static Result<std::vector<std::int32_t>> parse_ids(std::string_view text) {
    std::vector<std::int32_t> ids;
    for (std::size_t i = 0; i < text.size();) {
      if (text[i] == ' ' || text[i] == '\n' || text[i] == '\r' || text[i] == '\t') {
        ++i;
        continue;
      }
      std::int32_t id = 0;
      const auto [end, error] = std::from_chars(text.data() + i, text.data() + text.size(), id);
      if (error != std::errc())
        return invalid_argument(
            "byte ", i,
            " of the ids is no number; numbers with blanks or line ends between them are needed");
      i = static_cast<std::size_t>(end - text.data());
      ids.push_back(id);
    }
    return ids;
  }
};

}  // namespace

void add_tokenize(Command& data) {
  static TokenizeCommand command;
  Command tokenize = data.subcommand(
      "tokenize", "Text to token ids, one a line, and back",
      "Reads a file or the standard input and prints what `data prepare` would make of it. Special "
      "tokens spelled out in the text are plain text.");
  tokenize.positional("FILE", command.file, false, "text, or ids with --decode; -: standard input");
  tokenize.required_option(
      "-t,--tokenizer NAME", command.tokenizer,
      "bytes, words, a tokenizer.json or tokenizer.model, or a folder that holds one");
  tokenize.flag("--decode", command.decode, "ids to text");
  tokenize.example("echo 'The list' | everlong data tokenize --tokenizer models/llama");
  tokenize.example(
      "everlong data tokenize -t models/llama text | everlong data tokenize -t models/llama "
      "--decode");
  tokenize.run([] { return command.run(); });
}

}  // namespace everlong::cli
