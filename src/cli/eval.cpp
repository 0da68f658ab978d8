#include <cmath>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/shared_options.h"
#include "cli/terminal.h"
#include "core/progress.h"
#include "core/text.h"
#include "eval/byte_baselines.h"
#include "eval/perplexity.h"

namespace everlong::cli {
namespace {

struct PerplexityCommand {
  ModelOptions model;
  TextOptions text;
  OutputOptions output;
  std::string reset = "never";
  PerplexityOptions options;

  Status run() const {
    auto wanted = options;
    wanted.reset_at_documents = reset == "document";
    if (reset != "never" && reset != "document") {
      const auto every = parse_count(reset);
      if (!every || *every < 2)
        return invalid_argument("--reset ", reset,
                                " is not known; allowed: never, document, or a number of tokens");
      wanted.reset_every = *every;
    }
    EVERLONG_ASSIGN(const auto loaded, model.load());
    EVERLONG_ASSIGN(const auto source, text.open(loaded));
    Stream stream(loaded.model, wanted.feed);
    const std::int64_t tokens =
        wanted.max_tokens > 0 ? std::min(wanted.max_tokens, source.tokens()) : source.tokens();
    Progress progress("score", tokens, "tokens");
    EVERLONG_ASSIGN(const auto report,
                    perplexity(stream, source, *loaded.tokenizer, wanted,
                               [&](std::int64_t done) { progress.update(done); }));
    progress.finish();
    nlohmann::ordered_json object = {{"model", loaded.folder.string()}, {"reset", reset}};
    object.update(to_json(report));
    object.update(describe(loaded.place));
    return output.give(object, table(report));
  }

  static std::string table(const PerplexityReport& report) {
    Table table({"position", "tokens", "nats/token", "bits/byte"});
    const auto add = [&](const std::string& name, const PositionBucket& bucket) {
      table.add({name, with_commas(bucket.tokens), fixed(bucket.nats_per_token(), 4),
                 fixed(bucket.bits_per_byte(), 4)});
    };
    for (const auto& bucket : report.buckets) add(bucket_name(bucket), bucket);
    add("all", report.total);
    const double rate = static_cast<double>(report.total.tokens) / report.seconds;
    return cat(table.text(), "perplexity ", fixed(std::exp(report.total.nats_per_token()), 3),
               " per token; ",
               report.resets == 0 ? std::string("one stream, never reset")
                                  : cat("reset ", with_commas(report.resets), " times"),
               "; ", with_commas(static_cast<std::int64_t>(rate)), " tokens/s\n");
  }
};

struct BaselinesCommand {
  std::string data, beside;
  ByteBaselineOptions options;
  OutputOptions output;

  Status run() const {
    EVERLONG_ASSIGN(const auto dataset, TokenDataset::open(data));
    EVERLONG_ASSIGN(const auto tokenizer, make_tokenizer(dataset.info().tokenizer, data));
    EVERLONG_ASSIGN(const auto train, dataset.split("train"));
    EVERLONG_ASSIGN(const auto valid, dataset.split("valid"));
    EVERLONG_ASSIGN(const auto report, byte_baselines(train, valid, *tokenizer, options));
    Table table({"held-out text", "bits/byte"});
    for (const auto& baseline : report.baselines)
      table.add({baseline.name, fixed(baseline.bits_per_byte, 4)});
    if (!beside.empty()) {
      EVERLONG_ASSIGN(const auto measured, read_file(beside));
      const auto object = nlohmann::json::parse(measured, nullptr, false);
      if (!object.is_object() || !object.contains("bits_per_byte") ||
          !object.at("bits_per_byte").is_number())
        return corrupt(
            beside,
            ": holds no bits_per_byte; give a file that `everlong stream --save` or `everlong eval "
            "perplexity --save` wrote");
      table.add(
          {object.value("model", "the model"), fixed(object.at("bits_per_byte").get<double>(), 4)});
    }
    if (!report.missing.empty()) note(report.missing);
    return output.give(nlohmann::ordered_json::parse(to_json(report).dump()), table.text());
  }
};

}  // namespace

void add_eval(Command& program) {
  Command eval = program.subcommand(
      "eval", "Measure how well a model predicts text, and what it finds again in it");

  static PerplexityCommand perplexity_command;
  Command perplexity =
      eval.subcommand("perplexity", "Nats per token and bits per byte, by position",
                      "Streams a text through a model and reports how well it was predicted, by "
                      "position in the stream. State is carried "
                      "from document to document unless --reset says otherwise.");
  perplexity_command.model.add(perplexity);
  perplexity_command.text.add(perplexity);
  perplexity.option("-n,--tokens N", perplexity_command.options.max_tokens,
                    "read only so many; 0: all");
  perplexity.option("--reset WHEN", perplexity_command.reset,
                    "never, document (fresh state at each), or every N tokens");
  perplexity.option("--feed N", perplexity_command.options.feed,
                    "tokens fed at a time; changes speed, not results");
  perplexity_command.output.add(perplexity);
  perplexity.example("everlong eval perplexity --model runs/demo --data data/python-doc.tokens");
  perplexity.example("everlong eval perplexity --model runs/demo --text README.md --reset 1K",
                     "what is lost when the model forgets every 1,024 tokens");
  perplexity.run([] { return perplexity_command.run(); });

  static BaselinesCommand baselines_command;
  Command baselines =
      eval.subcommand("baselines", "What simple models and xz make of the same text",
                      "Bits per byte of the held-out split for byte models of several orders "
                      "(smoothed counts of the training split) and "
                      "for xz -9: what a model has to beat.");
  baselines.required_option("--data DIR", baselines_command.data,
                            "dataset folder of `everlong data prepare`");
  baselines.option("-n,--tokens N", baselines_command.options.held_out_tokens,
                   "only the first so many held-out tokens; 0: all");
  baselines.option("--beside FILE", baselines_command.beside,
                   "show this measurement of a model among them");
  baselines_command.output.add(baselines);
  baselines.example("everlong eval baselines --data data/python-doc.tokens");
  baselines.run([] { return baselines_command.run(); });

  add_retrieval(eval);
}

}  // namespace everlong::cli
