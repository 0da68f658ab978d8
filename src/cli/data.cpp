#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/terminal.h"
#include "core/text.h"
#include "data/fetch.h"
#include "data/prepare.h"

namespace everlong::cli {
namespace {

struct FetchCommand {
  std::string name, out = "data";
  bool force = false, json = false, list = false;

  Status run() const {
    if (list || name.empty()) return list_corpora();
    const FetchOptions options{.force = force, .say = [](const std::string& line) { note(line); }};
    EVERLONG_ASSIGN(const auto report, fetch(name, out, options));
    if (json) {
      print_json({{"name", report.name},
                  {"package", report.package},
                  {"version", report.version},
                  {"folder", report.folder.string()},
                  {"files", report.files},
                  {"bytes", report.bytes},
                  {"already_there", report.already_there}});
      return {};
    }
    print(cat(report.folder.string(), ": ", with_commas(report.files), " files, ",
              human_bytes(static_cast<double>(report.bytes)), " of text",
              report.already_there ? " (fetched before)"
                                   : cat(", from ", report.package, " ", report.version),
              "\n"));
    return {};
  }

  Status list_corpora() const {
    Table table({"name", "package", "what it is"}, {0, 1, 2});
    auto all = nlohmann::ordered_json::array();
    for (const auto& corpus : known_corpora()) {
      table.add({corpus.name, corpus.package, corpus.about});
      all.push_back({{"name", corpus.name}, {"package", corpus.package}, {"about", corpus.about}});
    }
    if (json)
      print_json(all);
    else
      print(table.text());
    return {};
  }
};

struct PrepareCommand {
  std::vector<std::string> paths;
  std::string out;
  PrepareOptions options;
  bool json = false;

  Status run() const {
    const std::vector<fs::path> sources(paths.begin(), paths.end());
    EVERLONG_ASSIGN(const auto report, prepare(sources, out, options));
    if (json) {
      print_json(to_json(report));
      return {};
    }
    print(cat(out, ": ", with_commas(report.documents), " documents, ",
              human_bytes(static_cast<double>(report.bytes)), " of text from ",
              with_commas(report.files), " files",
              report.duplicates > 0 ? cat("; ", report.duplicates, " duplicates left out") : "",
              "\n"));
    for (const auto& [name, split] : report.dataset.splits)
      print(cat("  ", name, ": ", with_commas(split.tokens), " tokens in ",
                with_commas(split.documents), " documents\n"));
    return {};
  }
};

struct InfoCommand {
  std::string folder;
  bool verify = false, json = false;

  Status run() const {
    EVERLONG_ASSIGN(const auto dataset, TokenDataset::open(folder));
    if (verify) EVERLONG_RETURN_IF_ERROR(dataset.verify());
    const DatasetInfo& info = dataset.info();
    nlohmann::ordered_json object = {{"folder", folder},
                                     {"tokenizer", info.tokenizer},
                                     {"vocab_size", info.vocab_size},
                                     {"valid_fraction", info.valid_fraction},
                                     {"splits", nlohmann::ordered_json::object()}};
    Table table({"split", "tokens", "documents", "text", "shards"});
    for (const auto& [name, split] : info.splits) {
      table.add({name, with_commas(split.tokens), with_commas(split.documents),
                 human_bytes(static_cast<double>(split.bytes)), cat(split.shards.size())});
      object["splits"][name] = {{"tokens", split.tokens},
                                {"documents", split.documents},
                                {"bytes", split.bytes},
                                {"shards", split.shards.size()}};
    }
    if (verify) object["verified"] = true;
    if (json) {
      print_json(object);
      return {};
    }
    print(cat("tokenizer ", info.tokenizer, ", vocabulary ", info.vocab_size,
              verify ? "; every checksum and every token is right" : "", "\n", table.text()));
    return {};
  }
};

}  // namespace

void add_data(Command& program) {
  Command data = program.subcommand(
      "data", "Fetch or make texts and turn them into token shards",
      "Fetches texts and turns them into datasets: folders of memory-mapped token shards, "
      "split into train and valid by document.");

  static FetchCommand fetch_command;
  Command fetch = data.subcommand(
      "fetch", "Download a documentation package and unpack its text",
      "Downloads a Debian documentation package and unpacks its text; needs no root. "
      "Without a name it lists what there is. What was fetched before is left as it is.");
  fetch.positional("NAME", fetch_command.name, false, "which text; without it: the list");
  fetch.option("-o,--out DIR", fetch_command.out, "the text goes to DIR/NAME");
  fetch.flag("--force", fetch_command.force, "fetch again what is there already");
  fetch.flag("--json", fetch_command.json, "print one JSON object");
  fetch.example("everlong data fetch", "what can be fetched");
  fetch.example("everlong data fetch python-doc", "the manuals of Python into data/python-doc");
  fetch.run([] { return fetch_command.run(); });

  static PrepareCommand prepare_command;
  Command prepare =
      data.subcommand("prepare", "Turn text files into a dataset",
                      "Reads text files and folders of them, drops duplicate documents, holds some "
                      "documents out for validation and "
                      "writes token shards. Binary files and unreadable ones are left out and "
                      "counted. The document's own text decides "
                      "whether it is held out, so it stays on its side when others come or go.");
  prepare.positional("PATH", prepare_command.paths, true, "text files, or folders of them");
  prepare.required_option("-o,--out DIR", prepare_command.out, "dataset folder to write");
  prepare.option("--valid-fraction X", prepare_command.options.valid_fraction,
                 "part of the documents that is held out");
  prepare.option(
      "--tokenizer NAME", prepare_command.options.tokenizer,
      "bytes: 256 bytes and 3 specials; or the path of a tokenizer.json or tokenizer.model");
  prepare.option("--max-document-bytes N", prepare_command.options.max_document_bytes,
                 "longer files are cut");
  prepare.option("--shard-tokens N", prepare_command.options.shard_tokens,
                 "tokens of a shard file");
  prepare.option("--landmark-block N", prepare_command.options.landmark_block,
                 "for Landmark Attention: insert a landmark (id: the tokenizer's vocabulary) after "
                 "every N - 1 tokens of a document; 0: none");
  prepare.flag("--landmark-predicted", prepare_command.options.landmark_predicted,
               "landmarks are predicted like any token and asked for the next one, for models with "
               "landmark_predicted = true; without it they are neither");
  prepare.flag("--all-files", prepare_command.options.all_files,
               "also files whose ending does not say that they are text");
  prepare.flag("--force", prepare_command.options.force,
               "write into a folder that holds other things");
  prepare.flag("--json", prepare_command.json, "print one JSON object");
  prepare.example(
      "everlong data prepare data/python-doc --out data/python-doc.tokens --valid-fraction 0.1");
  prepare.example(
      "everlong data prepare data/python-doc --out data/python-doc.landmarks --landmark-block 64");
  prepare.run([] { return prepare_command.run(); });

  static InfoCommand info_command;
  Command info = data.subcommand("info", "What is in a dataset");
  info.positional("DIR", info_command.folder, true, "dataset folder");
  info.flag("--verify", info_command.verify,
            "read everything and check it: checksums, ids, documents");
  info.flag("--json", info_command.json, "print one JSON object");
  info.example("everlong data info data/python-doc.tokens --verify");
  info.run([] { return info_command.run(); });

  add_synthetic(data);
  add_tokenize(data);
  add_train_tokenizer(data);
}

}  // namespace everlong::cli
