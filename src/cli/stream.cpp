#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/shared_options.h"
#include "cli/terminal.h"
#include "core/progress.h"
#include "core/text.h"
#include "eval/streaming.h"

namespace everlong::cli {
namespace {

struct StreamCommand {
  ModelOptions model;
  TextOptions text;
  StreamingOptions options;
  OutputOptions output;
  bool no_score = false;

  Status run() const {
    auto wanted = options;
    wanted.score = !no_score;
    EVERLONG_ASSIGN(const auto loaded, model.load());
    EVERLONG_ASSIGN(const auto source, text.open(loaded));
    Stream stream(loaded.model, wanted.feed);
    Progress progress("stream", wanted.tokens, "tokens");
    EVERLONG_ASSIGN(const auto report, measure_streaming(stream, source, *loaded.tokenizer, wanted,
                                                         [&](std::int64_t done) {
                                                           progress.update(done);
                                                           if (done == wanted.tokens)
                                                             progress.finish();
                                                         }));
    nlohmann::ordered_json object = {{"model", loaded.folder.string()}};
    object.update(to_json(report));
    object.update(describe(loaded.place));
    return output.give(object,
                       cat(table(report), with_commas(report.tokens), " tokens in one stream in ",
                           human_duration(report.seconds),
                           report.total.tokens > 0
                               ? cat("; ", fixed(report.total.bits_per_byte(), 4), " bits per byte")
                               : "",
                           "\n", tiers(report)));
  }

  static std::string table(const StreamingReport& report) {
    const bool timed = !report.marks.empty() && report.marks.front().speed.repeats > 0;
    const bool device = !report.marks.empty() && report.marks.front().device_bytes.has_value();
    const bool files = !report.marks.empty() && report.marks.back().file_bytes_bound > 0;
    std::vector<std::string> head = {"position", "tokens/s"};
    if (timed) head.emplace_back("as it streamed");
    head.insert(head.end(), {"state", "bound", "resident"});
    if (files) head.insert(head.end(), {"file", "file bound"});
    if (device) head.emplace_back("on the GPU");
    Table out(std::move(head));
    const auto whole = [](double value) { return with_commas(static_cast<std::int64_t>(value)); };
    for (const auto& mark : report.marks) {
      std::vector<std::string> row = {with_commas(mark.tokens),
                                      whole(timed ? mark.speed.median : mark.observed)};
      if (timed) row.push_back(whole(mark.observed));
      for (const auto bytes : {mark.state_bytes, mark.state_bytes_bound, mark.resident_bytes})
        row.push_back(human_bytes(static_cast<double>(bytes)));
      if (files)
        for (const auto bytes : {mark.file_bytes, mark.file_bytes_bound})
          row.push_back(human_bytes(static_cast<double>(bytes)));
      if (mark.device_bytes) row.push_back(human_bytes(static_cast<double>(*mark.device_bytes)));
      out.add(std::move(row));
    }
    return out.text();
  }

  // What states in tiers counted: how often memory sufficed, and how sure the answers are.
  static std::string tiers(const StreamingReport& report) {
    const auto count = [&](const char* name) {
      const auto found = report.counts.find(name);
      return found == report.counts.end() ? 0.0 : found->second;
    };
    const auto whole = [](double value) { return with_commas(static_cast<std::int64_t>(value)); };
    std::string text;
    if (const double reads = count("page_hits") + count("page_misses"); reads > 0)
      text += cat(whole(reads), " pages read, ", fixed(100 * count("page_hits") / reads, 2),
                  " % of them in memory; ", whole(count("pages_spilled")), " written to files\n");
    if (const double reads = count("device_hits") + count("device_misses"); reads > 0)
      text += cat(whole(reads), " pages wanted on the GPU, ",
                  fixed(100 * count("device_hits") / reads, 2), " % of them there already\n");
    if (const double queries = count("queries"); queries > 0)
      text +=
          cat(fixed(100 * count("queries_certified") / queries, 2), " % of ", whole(queries),
              " queries certified: what was left unread changes them by at most epsilon; it had ",
              fixed(100 * count("unread_share") / queries, 3), " % of the weight, after ",
              fixed(count("blocks_more") / queries, 2), " blocks more than top_k\n");
    return text;
  }
};

}  // namespace

void add_stream(Command& program) {
  static StreamCommand command;
  Command stream =
      program.subcommand("stream", "Feed one endless stream and watch speed and memory",
                         "Feeds a long text through one stream and reports, at marks, tokens a "
                         "second, bytes of state and resident memory. "
                         "The speed at a mark is timed after the stream: the same feed from copies "
                         "of the stream at every mark in turn, "
                         "median of several rounds, so that a noisy machine treats all marks "
                         "alike; beside it stands the speed as it "
                         "streamed. States that lie in files too (Landmark Attention with "
                         "landmark.pages) have columns for them.");
  command.model.add(stream);
  command.text.add(stream);
  stream.option("-n,--tokens N", command.options.tokens, "how far");
  stream.option("--marks N,N,...", command.options.marks, "where to measure");
  stream.option("--feed N", command.options.feed, "tokens fed at a time");
  stream.option("--rounds N", command.options.rounds, "of timing at the marks; 0: none");
  stream.flag("--no-score", command.no_score, "only feed: faster, but no bits per byte");
  command.output.add(stream);
  stream.example("everlong stream --model runs/demo --data data/python-doc.tokens");
  stream.example(
      "everlong stream --model runs/demo --text book.txt --tokens 50000 --marks 1000,50000");
  stream.example(
      "everlong stream --model runs/lm --data data/book --set landmark.pages=/tmp/pages --set "
      "landmark.epsilon=0.01",
      "blocks of the past in memory and on disk, and how sure the answers are");
  stream.run([] { return command.run(); });
}

}  // namespace everlong::cli
