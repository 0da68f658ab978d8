#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/terminal.h"
#include "core/text.h"
#include "data/synthetic.h"

namespace everlong::cli {
namespace {

struct SyntheticCommand {
  SyntheticSettings settings;
  SyntheticAmount amount;
  std::string task, out, tokenizer = "words", filler = "sentences", lengths = "52-121";
  std::int64_t seed = 1, show = 0;
  std::optional<std::int64_t> symbols;
  bool json = false;

  Status run() const {
    SyntheticSettings wanted = settings;
    wanted.task = task;
    if (symbols) wanted.recall.symbols = wanted.counts.symbols = *symbols;
    wanted.seed = static_cast<std::uint64_t>(seed);
    EVERLONG_ASSIGN(wanted.lengths, length_ranges(lengths));
    EVERLONG_ASSIGN(wanted.filler, filler_kind(filler));
    EVERLONG_ASSIGN(const auto words, make_tokenizer(tokenizer));
    EVERLONG_ASSIGN(const auto hiding, Filler::make(wanted.filler, *words));
    EVERLONG_ASSIGN(const auto documents, SyntheticDocuments::make(wanted, *words, hiding));
    if (show > 0) return print_some(documents, *words);
    if (out.empty())
      return invalid_argument("no folder to write to; give --out DIR, or --show N to only look");
    EVERLONG_ASSIGN(const auto report, write_synthetic(documents, *words, amount, out));
    if (json) {
      print_json(nlohmann::ordered_json::parse(to_json(report).dump()));
      return {};
    }
    print(cat(out, ": ", with_commas(report.documents), " documents of ", task, ", ",
              with_commas(report.tokens), " tokens (", tokenizer, ", vocabulary ",
              report.dataset.vocab_size, ")\n",
              report.best_valid_loss
                  ? cat("the best predictor loses ", fixed(*report.best_valid_loss, 4),
                        " nats per target on the held-out documents\n")
                  : ""));
    return {};
  }

  // The documents as text, and what counts in them.
  Status print_some(const SyntheticDocuments& documents, const Tokenizer& words) const {
    for (std::int64_t i = 0; i < show; ++i) {
      EVERLONG_ASSIGN(const auto made, documents.document(static_cast<std::uint64_t>(i)));
      const float most = *std::ranges::max_element(made.weights);
      std::vector<std::int32_t> asked;
      for (std::size_t t = 0; t < made.ids.size(); ++t)
        if (made.targets[t] != kNoTarget && made.weights[t] == most && most > 0)
          asked.push_back(made.targets[t]);
      const std::string writes =
          made.writes.empty()
              ? ""
              : cat("; a memory stores its filler ",
                    fixed(static_cast<double>(*std::ranges::max_element(made.writes)), 1),
                    " times");
      print(cat(words.decode(made.ids), "\n  ", made.ids.size(),
                " tokens; counts most: ", words.decode(asked), writes, "\n"));
    }
    return {};
  }
};

}  // namespace

void add_synthetic(Command& data) {
  static SyntheticCommand command;
  Command synthetic = data.subcommand(
      "synthetic", "Make a dataset of a task that small models can learn",
      "Writes documents of a task with the targets that count, the same for the same settings and "
      "seed. passkey, single, multikey, multivalue and tracking hide facts in filler and end with "
      "question and answer, as `everlong eval passkey` and `needle` ask; the loss is the mean over "
      "the answer plus --text-weight times the mean over the rest. recall shows one symbol among "
      "blanks and asks for it again and again; only its questions have targets. counts draws "
      "symbols "
      "with shares of each document's own and says what the best predictor loses.\n\nTrain with "
      "data.packing = \"documents\": a row then holds whole documents.");
  synthetic.positional("TASK", command.task, true,
                       "passkey, single, multikey, multivalue, tracking, recall or counts");
  synthetic.option("-o,--out DIR", command.out, "dataset folder to write");
  synthetic.option("--lengths RANGES", command.lengths,
                   "tokens of a document, specials counted: 256, 52-121, or ranges with their "
                   "shares of the tokens as in 52-121:85,52-481:15");
  synthetic.option("-n,--tokens N", command.amount.train_tokens, "of the training split");
  synthetic.option("--valid-documents N", command.amount.valid_documents, "held out");
  synthetic.choice("--tokenizer", command.tokenizer, {"words", "bytes"},
                   "words: a word or digit is a token; bytes");
  synthetic.choice("--filler", command.filler, {"sentences", "shuffled", "words", "digits"},
                   "what facts are hidden in");
  synthetic.option("--text-weight X", command.settings.text_weight,
                   "how much everything but the answer counts; 0: the answer alone");
  synthetic.option("--write-multiplicity X", command.settings.write_multiplicity,
                   "retrieval tasks: memories store a document's filler w times, w drawn up to X "
                   "(log-uniform, one draw a document), as if it were so much longer; 1: once. "
                   "For models whose layers take write weights (infini)");
  synthetic.option("--digits N", command.settings.retrieval.digits, "digits of a number");
  synthetic.option("--needles N", command.settings.retrieval.needles,
                   "names with a number (multikey) or numbers (multivalue)");
  synthetic.option("--hops N", command.settings.retrieval.hops, "assignments after the first");
  synthetic.option("--chains N", command.settings.retrieval.chains, "chains of variables");
  synthetic.option("--symbols N", command.symbols,
                   "recall, counts: how many, at most 16; default: 8 and 16");
  synthetic.option("--first N", command.settings.recall.first, "recall: the symbol's first place");
  synthetic.option("--last N", command.settings.recall.last,
                   "recall: the symbol's last place; 0: anywhere");
  synthetic.option("--questions X", command.settings.recall.questions,
                   "recall: share of the other places that ask");
  synthetic.option("--concentration X", command.settings.counts.concentration,
                   "counts: of the Dirichlet law; small: few symbols prevail");
  synthetic.option("--landmark-block N", command.settings.landmark_block,
                   "insert a landmark (id: the tokenizer's vocabulary) after every N - 1 tokens; "
                   "0: none");
  synthetic.option("--shard-tokens N", command.amount.shard_tokens, "tokens of a shard file");
  synthetic.option("--seed N", command.seed, "same seed, same documents");
  synthetic.option("--show N", command.show, "print the first N documents instead");
  synthetic.flag("--force", command.amount.force, "write into a folder that holds other things");
  synthetic.flag("--json", command.json, "print one JSON object");
  synthetic.example("everlong data synthetic passkey --show 1");
  synthetic.example(
      "everlong data synthetic passkey --lengths 52-121:85,52-481:15 --tokens 4M --out "
      "data/passkey");
  synthetic.example(
      "everlong data synthetic recall --lengths 256 --last 192 --tokens 2M --out data/recall",
      "one symbol, asked for at every distance");
  synthetic.run([] { return command.run(); });
}

}  // namespace everlong::cli
