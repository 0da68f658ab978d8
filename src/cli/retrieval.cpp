#include <cmath>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/shared_options.h"
#include "cli/terminal.h"
#include "core/progress.h"
#include "core/text.h"
#include "eval/attention_reach.h"
#include "eval/plot.h"
#include "eval/recall.h"
#include "eval/retrieval_page.h"
#include "eval/stream_reader.h"

namespace everlong::cli {
namespace {

std::string count(const Proportion& proportion) {
  return cat(proportion.successes, "/", proportion.trials);
}

std::string interval(const Proportion& proportion) {
  return cat(percent(proportion.low()), "-", percent(proportion.high()));
}

struct RetrievalCommand {
  ModelOptions model;
  TextOptions text;
  OutputOptions output;
  std::string filler = "sentences", task_name, report;
  RetrievalTask task;
  RetrievalOptions options;
  std::vector<std::int64_t> depths = {0, 50, 100};
  std::int64_t seed = 1;
  bool no_control = false;

  Status run() const {
    RetrievalOptions wanted = options;
    wanted.control = !no_control;
    wanted.seed = static_cast<std::uint64_t>(seed);
    wanted.depths.clear();
    for (const std::int64_t depth : depths) {
      if (depth < 0 || depth > 100)
        return invalid_argument("--depths ", depth, " is out of range; allowed: 0 to 100 percent");
      wanted.depths.push_back(static_cast<double>(depth) / 100);
    }
    RetrievalTask asked = task;
    EVERLONG_ASSIGN(asked.kind, retrieval_kind(task_name));
    EVERLONG_ASSIGN(const auto loaded, model.load());
    EVERLONG_ASSIGN(const auto hiding, make_filler(loaded));
    EVERLONG_ASSIGN(const auto prompts, RetrievalPrompts::make(asked, *loaded.tokenizer, hiding));

    catch_signals();
    Stream stream(loaded.model, wanted.feed);
    StreamReader reader(stream);
    Progress progress("read", tokens_to_read(wanted), "tokens");
    EVERLONG_ASSIGN(
        const auto measured,
        retrieval(reader, prompts, wanted,
                  [&](std::int64_t tokens, const RetrievalScore& score) -> Status {
                    if (caught_signal() != 0)
                      return {StatusCode::kInterrupted, "stopped before every cell was measured"};
                    progress.update(tokens, cat("exact ", count(score.exact)));
                    return {};
                  }));
    progress.finish();
    nlohmann::ordered_json object = {{"model", loaded.folder.string()},
                                     {"settings", model.settings}};
    object.update(to_json(measured));
    object.update(describe(loaded.place));
    if (!report.empty())
      EVERLONG_RETURN_IF_ERROR(write_file(report, report.ends_with(".svg")
                                                      ? svg_file(retrieval_map(object, false))
                                                      : retrieval_page(measured, object)));
    return output.give(object, table(measured));
  }

  Result<Filler> make_filler(const LoadedModel& loaded) const {
    EVERLONG_ASSIGN(const FillerKind kind, filler_kind(filler));
    const bool given = !text.data.empty() || !text.text.empty();
    if (kind != FillerKind::kText) {
      if (given)
        return invalid_argument(
            "--data and --text give the text that facts are hidden in; it is "
            "read with --filler text, but the filler is ",
            filler);
      return Filler::make(kind, *loaded.tokenizer);
    }
    EVERLONG_ASSIGN(const auto opened, text.open(loaded));
    const auto source = std::make_shared<TokenSource>(opened);
    return Filler::from_text({source->tokens(), [source](std::int64_t position, auto out) {
                                return source->read(position, out);
                              }});
  }

  static std::string table(const RetrievalReport& report) {
    const bool control = report.options.control;
    std::vector<std::string> head = {"length", "depth %",  "exact",      "95 % interval",
                                     "tokens", "interval", "fact to end"};
    if (report.options.local > 0) head.emplace_back("local");
    if (control) head.insert(head.end(), {"without memory", "tokens"});
    head.insert(head.end(), {"state", "tokens/s"});
    Table table(std::move(head));
    for (const auto& cell : report.cells) {
      const auto& [exact, tokens] = cell.score;
      std::vector<std::string> row = {
          with_commas(cell.length),
          fixed(100 * cell.depth, 0),
          count(exact),
          interval(exact),
          percent(tokens.share()),
          interval(tokens),
          cell.nearest == cell.farthest
              ? with_commas(cell.nearest)
              : cat(with_commas(cell.nearest), "-", with_commas(cell.farthest))};
      if (report.options.local > 0) row.push_back(cat(cell.within_local, "/", exact.trials));
      if (control)
        row.insert(row.end(), {count(cell.control.exact), percent(cell.control.tokens.share())});
      const double read = static_cast<double>(cell.length * exact.trials);
      row.push_back(human_bytes(static_cast<double>(cell.state_bytes)));
      row.push_back(with_commas(static_cast<std::int64_t>(read / std::max(cell.seconds, 1e-9))));
      table.add(std::move(row));
    }
    const auto total = report.total();
    return cat(table.text(), name(report.task.kind), " in ", name(report.filler), ": exact ",
               count(total.exact), " (", interval(total.exact), " %), tokens ",
               percent(total.tokens.share()), " %",
               control ? cat("; without memory ", count(report.total_control().exact), ", tokens ",
                             percent(report.total_control().tokens.share()), " %")
                       : "",
               "; ", with_commas(report.tokens), " tokens read in ", human_duration(report.seconds),
               "\n");
  }

  void add(Command& command) {
    model.add(command);
    command.option("--lengths N,N,...", options.lengths,
                   "tokens of a prompt, question included: exactly so many (landmarks of the "
                   "model come on top)");
    command.option("--depths P,P,...", depths,
                   "where the fact is hidden, in percent: 0 begin, 100 right before the question");
    command.option("--prompts N", options.prompts, "prompts of each length and depth");
    command.option("--jitter N", options.jitter,
                   "move the fact by up to N tokens either way, so that it meets the borders of "
                   "segments and blocks in all ways");
    command.option(
        "--length-jitter N", options.length_jitter,
        "make each prompt up to N tokens shorter, so that the question meets them in all "
        "ways too");
    command.option("--digits N", task.digits, "digits of a number");
    command.choice("--filler", filler, {"sentences", "shuffled", "words", "digits", "text"},
                   "what hides the fact: the same five sentences over and over, or shuffled; "
                   "random words; words and digits; a text of --data or --text");
    text.add(command);
    command.option("--local N", options.local,
                   "tokens that the model's attention reaches without its memory (segment, window, "
                   "chunk): counted apart, and all that the control reads");
    command.flag("--no-control", no_control, "leave out the control without memory");
    command.option("--feed N", options.feed, "tokens fed at a time; changes speed, not results");
    command.option("--seed N", seed, "same seed, same prompts");
    command.option("--report FILE", report,
                   "write a page with the map of length and depth; FILE.svg: the map alone");
    output.add(command);
    command.run([this] { return run(); });
  }
};

struct RecallCommand {
  ModelOptions model;
  OutputOptions output;
  RecallOptions options;
  std::int64_t seed = 1;

  Status run() const {
    RecallOptions wanted = options;
    wanted.seed = static_cast<std::uint64_t>(seed);
    EVERLONG_ASSIGN(const auto loaded, model.load());
    // Of other models than attention over patterns and windows nothing is predicted.
    if (auto reach = AttentionReach::of(loaded.model->config()); reach.ok())
      wanted.layers_from = [reach = std::move(reach).value()](std::int64_t place,
                                                              std::int64_t tokens) {
        return reach.layers_from(place, tokens);
      };
    catch_signals();
    Stream stream(loaded.model);
    StreamReader reader(stream);
    Progress progress("read", wanted.documents * std::ssize(wanted.lengths), "documents");
    EVERLONG_ASSIGN(
        const auto report,
        recall(reader, *loaded.tokenizer, wanted, [&](std::int64_t documents) -> Status {
          if (caught_signal() != 0)
            return {StatusCode::kInterrupted, "stopped before every document was read"};
          progress.update(documents);
          return {};
        }));
    progress.finish();
    nlohmann::ordered_json object = {{"model", loaded.folder.string()},
                                     {"settings", model.settings}};
    object.update(to_json(report));
    object.update(describe(loaded.place));
    return output.give(object, table(report));
  }

  static std::string table(const RecallReport& report) {
    const bool predicts = bool(report.options.layers_from);
    std::vector<std::string> heads = {"length", "distance", "right", "%", "95 % interval"};
    if (predicts) heads.insert(heads.end(), {"can reach %", "predicted %"});
    Table table(heads, {0, 1});
    const auto add = [&](const RecallRow& row, const std::string& what, const auto& group) {
      const Proportion& right = group.right;
      std::vector<std::string> cells = {with_commas(row.length), what, count(right),
                                        percent(right.share()), interval(right)};
      if (predicts)
        cells.insert(
            cells.end(),
            {percent(Proportion{group.connected, right.trials}.share()),
             percent(predicted_share(group.connected, right.trials, report.options.task.symbols))});
      table.add(cells);
    };
    for (const auto& row : report.rows) {
      add(row, "any", row);
      for (const auto& group : row.distances)
        add(row, cat(group.begin, "-", group.end - 1, " tokens"), group);
      for (const auto& group : row.chunks)
        add(row, group.begin == 0 ? "the same chunk" : cat(group.begin, " chunks back"), group);
      for (const auto& group : row.residues)
        add(row, cat(group.begin, " modulo ", report.options.modulus), group);
      for (const auto& group : row.layers)
        add(row, group.begin < 0 ? "out of reach" : cat("over ", group.begin, " layers"), group);
    }
    return cat(table.text(),
               "right by chance: ", percent(1 / static_cast<double>(report.options.task.symbols)),
               " %; ", human_duration(report.seconds), "\n");
  }
};

constexpr const char* kMeasure =
    "Every prompt has exactly the asked number of tokens and is read as a stream, at constant "
    "memory. `tokens` are answer tokens right when all before them are given, `exact` are prompts "
    "with all of them right (what a greedy answer gets), with Wilson's 95 % intervals. `without "
    "memory` asks the same after a fresh state has read the question alone (or the last --local "
    "tokens); a mechanism's own switch goes by --set. What lies within --local tests attention, "
    "not memory.";

}  // namespace

void add_retrieval(Command& eval) {
  static RetrievalCommand passkey_command;
  passkey_command.task_name = "passkey";
  Command passkey = eval.subcommand(
      "passkey", "Is a number found again, by length of the prompt and depth",
      cat("Hides a number in filler text and asks for it at the end (2305.16300). ", kMeasure));
  passkey_command.add(passkey);
  passkey.example("everlong eval passkey --model runs/demo --lengths 1K,16K,128K --prompts 50");
  passkey.example(
      "everlong eval passkey --model runs/lm --lengths 32K --jitter 64 --set landmark.top_k=0",
      "with a mechanism's own switch");

  static RetrievalCommand needle_command;
  needle_command.task_name = "multikey";
  Command needle = eval.subcommand(
      "needle", "The same with several numbers, or variables to follow",
      cat("Tasks after RULER (2404.06654): single, one number under a name; multikey, several "
          "names and one of them asked; multivalue, several numbers of one name, all asked in "
          "their order; tracking, variables assigned from one another. ",
          kMeasure));
  needle.choice("--task", needle_command.task_name,
                {"single", "multikey", "multivalue", "tracking"}, "what is hidden and asked");
  needle.option("--needles N", needle_command.task.needles,
                "names with a number (multikey) or numbers (multivalue)");
  needle.option("--hops N", needle_command.task.hops, "assignments after the first (tracking)");
  needle.option("--chains N", needle_command.task.chains,
                "chains of variables, one of them asked (tracking)");
  needle_command.add(needle);
  needle.example("everlong eval needle --model runs/demo --task multikey --needles 4");
  needle.example("everlong eval needle --model runs/demo --task tracking --hops 2 --chains 2",
                 "variables assigned from one another, two chains of three");

  static RecallCommand recall_command;
  Command recall = eval.subcommand(
      "recall", "How far back is a symbol still known",
      "Shows one symbol among blanks and asks for it at many distances (the task recall of "
      "`everlong data synthetic`): accuracy by distance, by chunks between and by the distance's "
      "residue, which tells what a chunked, strided or decaying memory can reach; for longnet and "
      "softmax layers also what the arithmetic of their patterns allows. The model's tokenizer "
      "must "
      "know blanks and symbols as single tokens: words or bytes.");
  recall_command.model.add(recall);
  recall.option("--lengths N,N,...", recall_command.options.lengths, "tokens of a document");
  recall.option("--documents N", recall_command.options.documents, "of each length");
  recall.option("--symbols N", recall_command.options.task.symbols, "1 to 16 symbols");
  recall.option("--first N", recall_command.options.task.first, "the symbol's first place");
  recall.option("--last N", recall_command.options.task.last,
                "the symbol's last place; 0: anywhere");
  recall.option("--questions X", recall_command.options.task.questions,
                "share of the other places that ask");
  recall.option("--chunk N", recall_command.options.chunk,
                "also by how many chunks of N tokens lie between; 0: not");
  recall.option("--modulus N", recall_command.options.modulus, "also by distance modulo N; 0: not");
  recall.option("--seed N", recall_command.seed, "same seed, same documents");
  recall_command.output.add(recall);
  recall.example("everlong eval recall --model runs/recall --lengths 256,1K,4K --chunk 32");
  recall.run([] { return recall_command.run(); });
}

}  // namespace everlong::cli
