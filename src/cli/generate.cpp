#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/shared_options.h"
#include "cli/terminal.h"
#include "core/text.h"
#include "eval/timing.h"
#include "session/stream.h"

namespace everlong::cli {
namespace {

// Prompts are read in pieces of this many bytes. Where tokens are bytes each piece is fed at once,
// so a prompt's length costs no memory; a multiple of the stream's chunk: the pieces then cut the
// text where one feed of it all would. Other tokenizers see the whole text: cut anywhere, a word
// would become two.
constexpr std::size_t kPieceBytes = std::size_t{1} << 16;
constexpr const char* kSamplerNote = "sampler";

struct GenerateCommand {
  ModelOptions model;
  OutputOptions output;
  std::string prompt, prompt_file, source, save_state, load_state;
  std::int64_t max_tokens = 256;
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  std::optional<std::int64_t> top_k, seed;
  bool past_end = false;

  Status run() const;

 private:
  struct Session {
    const LoadedModel& loaded;
    Stream stream;
    Sampler sampler;
    std::int64_t prompt_tokens = 0;
    std::string prompt_end;  // the last of it, to be shown with the continuation
  };
  Result<SamplingParams> sampling(const fs::path& folder) const;
  Status feed_text(Session& session, std::string_view text) const;
  Status feed_file(Session& session, const std::string& path) const;
  Status feed_prompt(Session& session) const;
  Result<std::string> write_text(Session& session, std::int64_t& count) const;
};

Status interrupted_in_prompt() {
  return {StatusCode::kInterrupted, "interrupted while reading the prompt"};
}

Result<SamplingParams> GenerateCommand::sampling(const fs::path& folder) const {
  EVERLONG_ASSIGN(auto params, read_generation_config(folder));
  if (temperature) params.temperature = *temperature;
  if (top_k) params.top_k = *top_k;
  if (top_p) params.top_p = *top_p;
  if (min_p) params.min_p = *min_p;
  if (repetition_penalty) params.repetition_penalty = *repetition_penalty;
  if (seed) params.seed = static_cast<std::uint64_t>(*seed);
  EVERLONG_RETURN_IF_ERROR(validate(params));
  return params;
}

Status GenerateCommand::feed_text(Session& session, std::string_view text) const {
  const auto ids = session.loaded.tokenizer->encode(text);
  for (std::span<const std::int32_t> left = ids; !left.empty();) {
    if (caught_signal() != 0) return interrupted_in_prompt();
    const auto piece = left.first(std::min(left.size(), kPieceBytes));
    EVERLONG_RETURN_IF_ERROR(session.stream.feed(piece));
    left = left.subspan(piece.size());
  }
  for (const auto id : ids) session.sampler.saw(id);
  session.prompt_tokens += std::ssize(ids);
  session.prompt_end = text.size() > 2000 ? text.substr(text.size() - 2000) : text;
  return {};
}

Status GenerateCommand::feed_file(Session& session, const std::string& path) const {
  const bool standard_input = path == "-";
  std::FILE* const file = standard_input ? stdin : std::fopen(path.c_str(), "rb");
  if (file == nullptr)
    return not_found(path, ": the prompt file cannot be opened: ", std::strerror(errno));
  const bool at_once = session.loaded.tokenizer->takes_any_piece();
  Status status;
  std::string piece(kPieceBytes, '\0'), text;
  while (status.ok()) {
    const std::size_t got = std::fread(piece.data(), 1, piece.size(), file);
    if (caught_signal() != 0) status = interrupted_in_prompt();
    if (got == 0 || !status.ok()) break;
    const std::string_view read = std::string_view(piece).substr(0, got);
    if (at_once)
      status = feed_text(session, read);
    else
      text += read;
  }
  if (status.ok() && std::ferror(file) != 0) status = io_error(path, ": the prompt cannot be read");
  if (!standard_input) std::fclose(file);
  if (status.ok() && !text.empty()) status = feed_text(session, text);
  return status;
}

Status GenerateCommand::feed_prompt(Session& session) const {
  const int given = static_cast<int>(!prompt.empty()) + static_cast<int>(!prompt_file.empty()) +
                    static_cast<int>(!source.empty());
  if (given > 1)
    return invalid_argument("more than one prompt is given; use --prompt, --prompt-file or a file");
  if (!prompt.empty()) return feed_text(session, prompt);
  if (given == 1)
    EVERLONG_RETURN_IF_ERROR(feed_file(session, prompt_file.empty() ? source : prompt_file));
  // Nothing read, nothing loaded: the model begins a document of its own.
  const std::int32_t begin = session.loaded.tokenizer->bod();
  return session.stream.position() == 0 ? session.stream.feed({&begin, 1}) : Status();
}

// Prints as it samples; returns the text as well.
Result<std::string> GenerateCommand::write_text(Session& session, std::int64_t& count) const {
  std::string text;
  const auto& tokenizer = *session.loaded.tokenizer;
  while (count < max_tokens && caught_signal() == 0) {
    EVERLONG_ASSIGN(const std::int32_t id, session.stream.generate(session.sampler));
    ++count;
    if (id == tokenizer.eod() && !past_end) break;
    const std::string piece = tokenizer.decode({&id, 1});
    text += piece;
    if (output.json) continue;
    print(piece);
    EVERLONG_RETURN_IF_ERROR(flush_output());
  }
  return text;
}

Status GenerateCommand::run() const {
  if (max_tokens < 0)
    return invalid_argument("--max-tokens ", max_tokens, " is negative; 0 only reads the prompt");
  // Said before the prompt is read, which may take hours.
  if (const fs::path folder = fs::path(save_state).parent_path();
      !folder.empty() && !fs::is_directory(folder))
    return not_found("--save-state ", save_state, ": there is no folder ", folder.string(),
                     "; make it first");
  EVERLONG_ASSIGN(const auto loaded, model.load());
  EVERLONG_ASSIGN(const auto params, sampling(loaded.folder));
  Session session{loaded, Stream(loaded.model), Sampler(params), 0, ""};
  catch_signals();
  if (!load_state.empty()) {
    std::map<std::string, std::string> notes;
    EVERLONG_RETURN_IF_ERROR(session.stream.load(load_state, &notes));
    if (!seed && notes.contains(kSamplerNote))
      EVERLONG_RETURN_IF_ERROR(session.sampler.restore(notes.at(kSamplerNote)));
  }
  const Stopwatch reading;
  EVERLONG_RETURN_IF_ERROR(feed_prompt(session));
  const double read_seconds = reading.seconds();

  const Stopwatch writing;
  std::int64_t count = 0;
  EVERLONG_ASSIGN(const auto text, write_text(session, count));
  const double write_seconds = writing.seconds();
  if (!save_state.empty())
    EVERLONG_RETURN_IF_ERROR(
        session.stream.save(save_state, {{kSamplerNote, session.sampler.save()}}));

  EVERLONG_RETURN_IF_ERROR(flush_output());
  const auto rate = [](std::int64_t tokens, double seconds) {
    return static_cast<double>(tokens) / seconds;
  };
  if (!output.json)
    note(cat(
        "\n[read ", with_commas(session.prompt_tokens), " tokens",
        session.prompt_tokens > 0
            ? cat(" at ",
                  with_commas(static_cast<std::int64_t>(rate(session.prompt_tokens, read_seconds))),
                  "/s")
            : "",
        ", wrote ", with_commas(count),
        count > 0
            ? cat(" at ", with_commas(static_cast<std::int64_t>(rate(count, write_seconds))), "/s")
            : "",
        "; position ", with_commas(session.stream.position()), ", state ",
        human_bytes(static_cast<double>(session.stream.state_bytes())), "]"));
  nlohmann::ordered_json object = {
      {"prompt", session.prompt_end},
      {"text", text},
      {"prompt_tokens", session.prompt_tokens},
      {"tokens", count},
      {"position", session.stream.position()},
      {"state_bytes", session.stream.state_bytes()},
      {"temperature", params.temperature},
      {"seed", params.seed},
      {"prompt_tokens_per_second", rate(session.prompt_tokens, read_seconds)},
      {"tokens_per_second", rate(count, write_seconds)}};
  object.update(describe(loaded.place));
  EVERLONG_RETURN_IF_ERROR(output.give(object, ""));
  return caught_signal() == 0
             ? Status()
             : Status(StatusCode::kInterrupted, "interrupted; what was written is complete");
}

}  // namespace

void add_generate(Command& program) {
  static GenerateCommand command;
  Command generate = program.subcommand("generate", "Continue a text",
                                        "Reads a prompt of any length and continues it, printing "
                                        "as it samples. The prompt is read in pieces: its length "
                                        "costs time, not memory. A saved state goes on later, in "
                                        "another process, exactly where it stopped.");
  command.model.add(generate);
  generate.positional("FILE", command.source, false, "prompt file; - reads standard input");
  generate.option("-p,--prompt TEXT", command.prompt, "the text to continue");
  generate.option("--prompt-file FILE", command.prompt_file,
                  "the same from a file; - reads standard input");
  generate.option("-n,--max-tokens N", command.max_tokens, "most tokens to write");
  generate.option("--temperature X", command.temperature,
                  "0: always the likeliest token; 1: as the model sees it. Default of this and of "
                  "the following: the "
                  "model folder's generation_config.json");
  generate.option("--top-k N", command.top_k, "only the N likeliest tokens; 0: all");
  generate.option("--top-p X", command.top_p,
                  "only the likeliest tokens that sum to this probability");
  generate.option("--min-p X", command.min_p, "no token less likely than X times the likeliest");
  generate.option("--repetition-penalty X", command.repetition_penalty,
                  "above 1 discourages what was just said");
  generate.option("--seed N", command.seed, "same seed, same text");
  generate.option("--save-state FILE", command.save_state, "write the stream's state when done");
  generate.option(
      "--load-state FILE", command.load_state,
      "go on from a saved state; its random sequence goes on too, unless --seed begins a new one");
  generate.flag("--past-end", command.past_end, "go on when the model ends the document");
  command.output.add(generate);
  generate.example(
      "everlong generate --model runs/demo --prompt 'The list method' --temperature 0.8");
  generate.example("cat book.txt | everlong generate --model runs/demo - --max-tokens 400",
                   "a prompt of any length from standard input");
  generate.example(
      "everlong generate --model runs/demo --prompt-file book.txt --max-tokens 0 --save-state "
      "book.state",
      "read once, and ...");
  generate.example(
      "everlong generate --model runs/demo --load-state book.state --prompt ' In short,'",
      "... continue as often as you like without reading it again");
  generate.run([] { return command.run(); });
}

}  // namespace everlong::cli
