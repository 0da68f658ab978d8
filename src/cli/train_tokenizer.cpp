#include "data/train_tokenizer.h"

#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/terminal.h"
#include "core/text.h"

namespace everlong::cli {
namespace {

struct TrainTokenizerCommand {
  std::vector<std::string> paths;
  std::string out;
  TrainTokenizerOptions options;
  bool json = false;

  Status run() const {
    EVERLONG_ASSIGN(const auto report, train_tokenizer({paths.begin(), paths.end()}, out, options));
    if (json) {
      print_json(nlohmann::ordered_json{{"tokenizer", out},
                                        {"vocab_size", report.vocab_size},
                                        {"files", report.files},
                                        {"bytes", report.bytes},
                                        {"left_out", report.left_out}});
      return {};
    }
    const std::string fewer =
        report.vocab_size < options.vocab_size
            ? cat(" (", options.vocab_size,
                  " were asked for: ", "the text has no more pairs that repeat)")
            : "";
    print(cat(out, ": vocabulary ", with_commas(report.vocab_size), fewer, ", from ",
              with_commas(report.files), " files, ", human_bytes(static_cast<double>(report.bytes)),
              "\nNext: everlong data prepare ", paths.front(), " --tokenizer ", out,
              " --out DIR\n"));
    return {};
  }
};

}  // namespace

void add_train_tokenizer(Command& data) {
  static TrainTokenizerCommand command;
  Command train = data.subcommand(
      "train-tokenizer", "Make a vocabulary from text files",
      "Trains a byte-level BPE with GPT-2's pattern: every text can be said, and comes back as it "
      "was. The work is done by the tokenizers package of Python; without it the message says how "
      "to install it.");
  train.positional("PATH", command.paths, true, "text files, or folders of them");
  train.required_option("-o,--out FILE", command.out, "the tokenizer.json to write");
  train.option("--vocab-size N", command.options.vocab_size,
               "ids, with 256 bytes and the end of document among them");
  train.option("--python PROGRAM", command.options.python, "a Python that has the package");
  train.flag("--json", command.json, "print one JSON object");
  train.example(
      "everlong data train-tokenizer data/python-doc --vocab-size 4096 --out tokenizer.json");
  train.run([] { return command.run(); });
}

}  // namespace everlong::cli
