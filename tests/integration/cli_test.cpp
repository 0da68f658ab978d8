// The program as its users meet it: processes, exit codes, standard streams.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>
#include <set>

#include "core/files.h"
#include "core/process.h"
#include "core/text.h"

namespace everlong {
namespace {

using nlohmann::json;

struct Ran {
  int code = -1;
  std::string out, err;
  json object() const { return json::parse(out, nullptr, false); }
};

Ran run(std::vector<std::string> command, std::string_view input = {},
        std::vector<std::pair<std::string, std::string>> environment = {}) {
  environment.emplace_back("OMP_WAIT_POLICY", "passive");
  const auto result = run_process(
      {.command = std::move(command), .environment = std::move(environment), .input = input});
  if (!result.ok()) return {-1, "", result.status().message()};
  return {result->exit_code, result->output, result->errors};
}

Ran everlong(std::vector<std::string> arguments, std::string_view input = {},
             std::vector<std::pair<std::string, std::string>> environment = {}) {
  arguments.insert(arguments.begin(), EVERLONG_BINARY);
  return run(std::move(arguments), input, std::move(environment));
}

// Words in an order that a small generator decides: enough structure to be learnt, never the same
// twice.
std::string words(std::size_t bytes, std::uint32_t seed) {
  static constexpr const char* kWords[] = {"the ", "stream ", "goes ",  "on ",
                                           "and ", "never ",  "ends. ", "state\n"};
  std::string text;
  while (text.size() < bytes) {
    seed = seed * 1664525 + 1013904223;
    text += kWords[seed >> 29];
  }
  text.resize(bytes);
  return text;
}

constexpr const char* kRun = R"(
[model]
block = "transnormer"
vocab_size = 259
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
layer_types = "lightning"
[model.lightning]
num_heads = 2
head_dim = 16
[data]
row_tokens = 64
rows = 2
[train]
steps = 3
warmup_steps = 1
learning_rate = 1e-2
device = "cpu"
threads = 1
eval_tokens = 1000
)";

// One dataset and one trained model for all tests.
class Cli : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder = fs::temp_directory_path() / cat("everlong_cli_", ::getpid());
    ASSERT_TRUE(make_directories(folder / "text").ok());
    for (std::uint32_t i = 0; i < 12; ++i)
      ASSERT_TRUE(write_file(folder / "text" / cat(i, ".txt"), words(3000 + 100 * i, i)).ok());
    ASSERT_TRUE(write_file(folder / "run.toml", kRun).ok());
    const Ran prepared = everlong({"data", "prepare", path("text"), "--out", path("tokens"),
                                   "--valid-fraction", "0.3", "--json"});
    ASSERT_EQ(prepared.code, 0) << prepared.err;
    trained = train({});
    ASSERT_EQ(trained.code, 0) << trained.err;
  }
  static void TearDownTestSuite() {
    std::error_code ignored;
    fs::remove_all(folder, ignored);
  }

  static std::string path(const std::string& name) { return (folder / name).string(); }

  static Ran train(std::vector<std::string> more, const std::string& out = "run") {
    std::vector<std::string> arguments = {
        "train", path("run.toml"), "--set", "data.path=" + path("tokens"),
        "--out", path(out),        "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return everlong(std::move(arguments));
  }

  static Ran generate(std::vector<std::string> more, std::string_view input = {}) {
    std::vector<std::string> arguments = {"generate", "--model",   path("run"), "--device",
                                          "cpu",      "--threads", "1"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return everlong(std::move(arguments), input);
  }

  static inline fs::path folder;
  static inline Ran trained;
};

TEST_F(Cli, HelpGoesToStdoutAndShowsAnExampleForEveryCommand) {
  const std::vector<std::vector<std::string>> commands = {{},
                                                          {"data", "fetch"},
                                                          {"data", "prepare"},
                                                          {"data", "info"},
                                                          {"data", "synthetic"},
                                                          {"eval", "passkey"},
                                                          {"eval", "needle"},
                                                          {"eval", "recall"},
                                                          {"train"},
                                                          {"generate"},
                                                          {"eval", "perplexity"},
                                                          {"eval", "baselines"},
                                                          {"stream"},
                                                          {"bench", "op"},
                                                          {"bench", "model"},
                                                          {"info"},
                                                          {"report"}};
  for (auto command : commands) {
    const std::string name = join(command, " ");
    command.push_back("--help");
    const Ran help = everlong(command);
    EXPECT_EQ(help.code, 0) << name;
    EXPECT_EQ(help.err, "") << name;
    EXPECT_NE(help.out.find("Usage: everlong " + name), std::string::npos) << help.out;
    EXPECT_NE(help.out.find("Examples:\n  "), std::string::npos) << name << " has no example";
  }
}

TEST_F(Cli, VersionNamesCommitTorchAndCuda) {
  const Ran version = everlong({"--version"});
  EXPECT_EQ(version.code, 0) << version.err;
  for (const char* const word : {"everlong ", "commit ", "torch 2.", "CPU kernels ", "CUDA: "})
    EXPECT_NE(version.out.find(word), std::string::npos) << version.out;
}

TEST_F(Cli, WrongUsageExitsWithTwoAndSaysSoOnStderr) {
  const std::vector<std::vector<std::string>> wrong = {{},
                                                       {"nonsense"},
                                                       {"train"},
                                                       {"info", "--nonsense"},
                                                       {"generate", "--model"},
                                                       {"bench", "op", "--lengths", "12x"},
                                                       {"bench", "op", "--pass", "sideways"},
                                                       {"eval"}};
  for (const auto& command : wrong) {
    const Ran ran = everlong(command);
    EXPECT_EQ(ran.code, 2) << join(command, " ") << ": " << ran.err;
    EXPECT_EQ(ran.out, "") << join(command, " ");
    EXPECT_NE(ran.err.find("--help"), std::string::npos) << ran.err;
  }
  EXPECT_NE(everlong({"info", "--jsn"}).err.find("Did you mean --json?"), std::string::npos);
}

TEST_F(Cli, FailureExitsWithOne) {
  const Ran missing = everlong({"generate", "--model", path("nowhere"), "--prompt", "a"});
  EXPECT_EQ(missing.code, 1);
  EXPECT_EQ(missing.out, "");
  EXPECT_NE(missing.err.find("nowhere"), std::string::npos) << missing.err;
  EXPECT_EQ(everlong({"bench", "op", "--device", "cuda:7x"}).code, 1);
}

TEST_F(Cli, OptionsComeFromTheEnvironmentAndTheCommandLineWins) {
  const std::vector<std::string> arguments = {"generate", "--model",    path("run"), "--prompt",
                                              "the",      "--past-end", "--json"};
  const std::vector<std::pair<std::string, std::string>> environment = {
      {"EVERLONG_MAX_TOKENS", "3"}, {"EVERLONG_DEVICE", "cpu"}};
  EXPECT_EQ(everlong(arguments, {}, environment).object().value("tokens", -1), 3);
  auto more = arguments;
  more.insert(more.end(), {"--max-tokens", "5"});
  EXPECT_EQ(everlong(more, {}, environment).object().value("tokens", -1), 5);
}

TEST_F(Cli, TrainingLogsEveryStepAndSavesTheModel) {
  const json report = trained.object();
  ASSERT_TRUE(report.is_object()) << trained.out;
  EXPECT_EQ(report.at("steps"), 3);
  EXPECT_EQ(report.at("tokens"), 3 * 2 * 64);
  EXPECT_TRUE(fs::exists(folder / "run" / "model" / "model.safetensors"));
  const auto log = read_file(folder / "run" / "log.jsonl");
  ASSERT_TRUE(log.ok());
  std::istringstream lines(*log);
  int steps = 0;
  for (std::string line; std::getline(lines, line); ++steps) {
    const json entry = json::parse(line, nullptr, false);
    for (const char* const key :
         {"step", "loss", "lr", "grad_norm", "tokens", "tok_s", "mem_bytes", "wall_s"})
      EXPECT_TRUE(entry.contains(key)) << key << " is missing in " << line;
  }
  EXPECT_EQ(steps, 3);
}

TEST_F(Cli, TrainingStoppedBySigtermSavesTheModelAndExitsWith143) {
  // Once a step is logged, however long a busy machine takes for it.
  const char* const stop_after_a_step =
      "\"$@\" & for i in $(seq 600); do [ -s \"$0\" ] && break; sleep 0.1; done; kill -TERM $!; "
      "wait $!";
  const Ran ran = run({"timeout", "--kill-after=5", "120", "bash", "-c", stop_after_a_step,
                       path("stopped") + "/log.jsonl", EVERLONG_BINARY, "train", path("run.toml"),
                       "--set", "data.path=" + path("tokens"), "--set", "train.steps=100000000",
                       "--out", path("stopped")});
  EXPECT_EQ(ran.code, 143) << ran.err;
  EXPECT_NE(ran.err.find("stopped after step"), std::string::npos) << ran.err;
  EXPECT_EQ(everlong({"info", "--model", path("stopped"), "--device", "cpu"}).code, 0);
}

TEST_F(Cli, UnknownSettingIsRefusedByName) {
  const Ran ran = train({"--set", "train.stepz=4"}, "never");
  EXPECT_EQ(ran.code, 1);
  EXPECT_NE(ran.err.find("stepz"), std::string::npos) << ran.err;
}

TEST_F(Cli, SameSeedSameText) {
  const std::vector<std::string> base = {
      "--prompt", "the stream", "--temperature", "1", "--past-end", "-n", "40"};
  const auto text = [&](const std::string& seed) {
    auto arguments = base;
    arguments.insert(arguments.end(), {"--seed", seed});
    const Ran ran = generate(arguments);
    EXPECT_EQ(ran.code, 0) << ran.err;
    return ran.out;
  };
  const std::string first = text("7");
  EXPECT_GT(first.size(), 20u);
  EXPECT_EQ(first, text("7"));
  EXPECT_NE(first, text("8"));
}

// Temperature and penalty both remember: the random sequence and the last tokens must travel with
// the state.
TEST_F(Cli, SavedStateGoesOnInAnotherProcessAsIfNeverStopped) {
  const std::vector<std::string> sampling = {"--temperature", "1", "--repetition-penalty", "1.3",
                                             "--past-end"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.end(), sampling.begin(), sampling.end());
    const Ran ran = generate(more);
    EXPECT_EQ(ran.code, 0) << ran.err;
    return ran.out;
  };
  const std::string whole = with({"--prompt", "never ends", "--seed", "11", "-n", "60"});
  const std::string first =
      with({"--prompt", "never ends", "--seed", "11", "-n", "25", "--save-state", path("a.state")});
  const std::string second = with({"--load-state", path("a.state"), "-n", "35"});
  EXPECT_EQ(first + second, whole);
  EXPECT_NE(with({"--load-state", path("a.state"), "-n", "35", "--seed", "12"}), second)
      << "--seed begins anew";
}

TEST_F(Cli, StateOfAnotherModelIsRefused) {
  ASSERT_EQ(train({"--set", "train.seed=2"}, "other").code, 0);
  ASSERT_EQ(generate({"--prompt", "a", "-n", "1", "--save-state", path("b.state")}).code, 0);
  const Ran ran = everlong(
      {"generate", "--model", path("other"), "--device", "cpu", "--load-state", path("b.state")});
  EXPECT_EQ(ran.code, 1);
  EXPECT_EQ(ran.out, "");
  EXPECT_NE(ran.err.find("Nothing was loaded"), std::string::npos) << ran.err;
}

// Longer than one piece of reading (64 KiB), and not a multiple of it.
TEST_F(Cli, PromptFromStdinEqualsPromptFromFile) {
  const std::string prompt = words(150'001, 99);
  ASSERT_TRUE(write_file(folder / "prompt.txt", prompt).ok());
  const std::vector<std::string> sampling = {"--seed", "5", "-n", "30", "--past-end", "--json"};
  const auto with = [&](std::vector<std::string> more, std::string_view input) {
    more.insert(more.end(), sampling.begin(), sampling.end());
    const Ran ran = generate(more, input);
    EXPECT_EQ(ran.code, 0) << ran.err;
    json object = ran.object();
    EXPECT_EQ(object.value("prompt_tokens", 0), 150'001);
    EXPECT_EQ(object.value("position", 0), 150'031);
    return object.value("text", "");
  };
  const std::string from_file = with({"--prompt-file", path("prompt.txt")}, {});
  EXPECT_FALSE(from_file.empty());
  EXPECT_EQ(with({"-"}, prompt), from_file);
  EXPECT_EQ(with({"--prompt-file", "-"}, prompt), from_file);
  EXPECT_EQ(with({path("prompt.txt")}, {}), from_file);
}

TEST_F(Cli, PerplexityAddsUpAndDoesNotDependOnHowItIsFed) {
  const auto measure = [&](std::vector<std::string> more) {
    std::vector<std::string> arguments = {
        "eval",     "perplexity", "--model",   path("run"), "--data", path("tokens"),
        "--device", "cpu",        "--threads", "1",         "--json"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Ran ran = everlong(arguments);
    EXPECT_EQ(ran.code, 0) << ran.err;
    return ran.object();
  };
  const json whole = measure({});
  ASSERT_TRUE(whole.is_object());
  double nats = 0;
  std::int64_t tokens = 0, bytes = 0;
  for (const auto& bucket : whole.at("buckets")) {
    tokens += bucket.at("tokens").get<std::int64_t>();
    bytes += bucket.at("bytes").get<std::int64_t>();
    nats += bucket.at("nats_per_token").get<double>() * bucket.at("tokens").get<double>();
  }
  EXPECT_GE(whole.at("buckets").size(), 2u);
  EXPECT_EQ(whole.at("tokens"), tokens);
  EXPECT_NEAR(whole.at("nats_per_token").get<double>(), nats / static_cast<double>(tokens), 1e-9);
  EXPECT_NEAR(whole.at("bits_per_byte").get<double>(),
              nats / std::numbers::ln2 / static_cast<double>(bytes), 1e-9);
  EXPECT_NEAR(measure({"--feed", "97"}).at("nats_per_token").get<double>(),
              whole.at("nats_per_token").get<double>(), 1e-4);
  const json reset = measure({"--reset", "100"});
  EXPECT_EQ(reset.at("resets"), tokens / 100);
  EXPECT_EQ(reset.at("tokens"), tokens - tokens / 100)
      << "the first token after a reset is not predicted";
  EXPECT_GT(measure({"--reset", "document"}).at("resets").get<int>(), 0);
}

TEST_F(Cli, StreamReportsEveryMarkWithConstantState) {
  const Ran ran = everlong({"stream", "--model", path("run"), "--data", path("tokens"), "--device",
                            "cpu", "--threads", "1", "--tokens", "8000", "--marks", "100,1000,8000",
                            "--rounds", "2", "--json"});
  ASSERT_EQ(ran.code, 0) << ran.err;
  const json report = ran.object();
  ASSERT_EQ(report.at("marks").size(), 3u);
  for (const auto& mark : report.at("marks")) {
    EXPECT_GT(mark.at("tokens_per_second").get<double>(), 0);
    EXPECT_GT(mark.at("observed").get<double>(), 0);
    EXPECT_EQ(mark.at("state_bytes"), report.at("marks")[0].at("state_bytes"));
    EXPECT_LE(mark.at("state_bytes").get<double>(), mark.at("state_bytes_bound").get<double>());
    EXPECT_GT(mark.at("resident_bytes").get<double>(), 0);
  }
  EXPECT_EQ(report.at("windows").back().at("end"), 8000);
  const Ran too_far = everlong({"stream", "--model", path("run"), "--data", path("tokens"),
                                "--device", "cpu", "--tokens", "1M"});
  EXPECT_EQ(too_far.code, 1);
}

TEST_F(Cli, BenchOpCutsTheTokensOfALengthIntoShortSequences) {
  const auto bench = [&](const char* lengths) {
    return everlong({"bench", "op", "--lengths", lengths, "--heads", "2", "--head-dim", "16",
                     "--device", "cpu", "--threads", "1", "--baseline", "short", "--json"});
  };
  const Ran ran = bench("64,256");
  ASSERT_EQ(ran.code, 0) << ran.err;
  const json last = json::parse(ran.out.substr(ran.out.find('\n') + 1), nullptr, false);
  ASSERT_TRUE(last.is_object()) << ran.out;
  EXPECT_EQ(last.at("tokens"), 256);
  EXPECT_GT(last.at("ratio"), 0);
  const Ran uneven = bench("64,100");
  EXPECT_EQ(uneven.code, 1);
  EXPECT_NE(uneven.err.find("as multiples of the first one"), std::string::npos) << uneven.err;
}

TEST_F(Cli, BenchOpPrintsOneObjectALineWithEveryField) {
  for (const char* const pass : {"forward", "train", "step"}) {
    const Ran ran = everlong({"bench", "op", "--mechanism", "lightning", "--pass", pass,
                              "--lengths", "64,1500", "--heads", "2", "--head-dim", "16",
                              "--device", "cpu", "--threads", "1", "--baseline", "sdpa", "--json"});
    ASSERT_EQ(ran.code, 0) << pass << ": " << ran.err;
    std::istringstream lines(ran.out);
    std::vector<std::int64_t> lengths;
    for (std::string line; std::getline(lines, line);) {
      const json record = json::parse(line, nullptr, false);
      ASSERT_TRUE(record.is_object()) << line;
      for (const char* const key : {"mechanism",     "pass",
                                    "device",        "dtype",
                                    "tokens",        "heads",
                                    "head_dim",      "threads",
                                    "seconds",       "seconds_min",
                                    "seconds_max",   "tokens_per_second",
                                    "baseline",      "baseline_seconds",
                                    "ratio",         "bytes",
                                    "flops",         "fraction_of_ceiling",
                                    "max_rel_error", "commit",
                                    "machine",       "gate"})
        EXPECT_TRUE(record.contains(key) && !record.at(key).is_null())
            << key << " is missing: " << line;
      EXPECT_LE(record.at("seconds_min").get<double>(), record.at("seconds").get<double>());
      EXPECT_LE(record.at("seconds").get<double>(), record.at("seconds_max").get<double>());
      lengths.push_back(record.at("tokens"));
    }
    EXPECT_EQ(lengths, (std::vector<std::int64_t>{64, 1500})) << pass;
  }
}

TEST_F(Cli, BenchModelMeasuresTrainingAndStreaming) {
  const Ran ran = everlong({"bench", "model", path("run"), "--lengths", "64", "--device", "cpu",
                            "--threads", "1", "--json"});
  ASSERT_EQ(ran.code, 0) << ran.err;
  for (const char* const key :
       {"training_tokens_per_second", "reading_tokens_per_second", "writing_tokens_per_second"})
    EXPECT_GT(ran.object().value(key, 0.0), 0) << key;
}

TEST_F(Cli, PresetsOfAnySizeAreDescribedWithoutWeights) {
  const Ran ran = everlong({"info", "--preset", "minimax-text-01", "--device", "cpu", "--json"});
  ASSERT_EQ(ran.code, 0) << ran.err;
  EXPECT_EQ(ran.object().value("parameters", std::int64_t{0}), 456'089'655'296);
  EXPECT_EQ(ran.object().at("layers").size(), 80U);
  EXPECT_GT(ran.object().value("state_bytes", std::int64_t{0}),
            std::int64_t{70} * 64 * 128 * 128 * 4);
  const Ran unknown = everlong({"info", "--preset", "minimax-text-02"});
  EXPECT_EQ(unknown.code, 1);
  EXPECT_NE(unknown.err.find("minimax-text-01"), std::string::npos) << unknown.err;
  EXPECT_EQ(everlong({"info", "--preset", "llama-7b", "--model", path("run")}).code, 1);
}

TEST_F(Cli, ReportIsOnePageThatNeedsNothingElse) {
  ASSERT_EQ(everlong({"report", path("run"), "--out", path("page.html")}).code, 0);
  const auto page = read_file(folder / "page.html");
  ASSERT_TRUE(page.ok());
  EXPECT_NE(page->find("<svg"), std::string::npos);
  for (const char* const outside : {"http://", "https://", "<script", "<link", "@import", "nan"})
    EXPECT_EQ(page->find(outside), std::string::npos) << outside;
  EXPECT_EQ(everlong({"report", path("tokens")}).code, 1) << "not a run folder";
}

// Data, training and measurement of a synthetic task. The model has seen it for a moment only: what
// is tested is that every figure is there.
TEST_F(Cli, SyntheticTasksAreMadeTrainedOnAndMeasured) {
  const Ran made = everlong({"data", "synthetic", "passkey", "--lengths", "60-90", "--tokens", "4K",
                             "--valid-documents", "5", "--out", path("passkey"), "--json"});
  ASSERT_EQ(made.code, 0) << made.err;
  EXPECT_EQ(made.object().at("vocab_size"), 86);
  ASSERT_EQ(everlong({"data", "info", path("passkey"), "--verify"}).code, 0);
  const Ran learnt = train(
      {"--set", "data.path=" + path("passkey"), "--set", "data.packing=documents", "--set",
       "data.row_tokens=128", "--set", "model.vocab_size=86", "--set", "model.tokenizer=words"},
      "passkey-run");
  ASSERT_EQ(learnt.code, 0) << learnt.err;
  EXPECT_TRUE(learnt.object().contains("valid_loss"));
  EXPECT_FALSE(learnt.object().contains("valid_bits_per_byte"));

  const Ran passkey = everlong({"eval",
                                "passkey",
                                "--model",
                                path("passkey-run"),
                                "--lengths",
                                "60,300",
                                "--depths",
                                "0,100",
                                "--prompts",
                                "3",
                                "--local",
                                "40",
                                "--jitter",
                                "4",
                                "--device",
                                "cpu",
                                "--threads",
                                "1",
                                "--json",
                                "--save",
                                path("passkey.json"),
                                "--report",
                                path("passkey.html")});
  ASSERT_EQ(passkey.code, 0) << passkey.err;
  const json object = passkey.object();
  ASSERT_EQ(object.at("cells").size(), 4u);
  for (const auto& cell : object.at("cells")) {
    EXPECT_EQ(cell.at("exact").at("trials"), 3);
    EXPECT_EQ(cell.at("tokens").at("trials"), 15);
    EXPECT_EQ(cell.at("control").at("exact").at("trials"), 3);
    EXPECT_GT(cell.at("state_bytes"), 0);
  }
  EXPECT_EQ(object.at("tokens"), 2 * 3 * (60 + 300) + 4 * 3 * 40);
  EXPECT_EQ(json::parse(*read_file(folder / "passkey.json")), object);
  EXPECT_NE(read_file(folder / "passkey.html")->find("<svg"), std::string::npos);

  const Ran needle = everlong({"eval",      "needle", "--task",    "tracking",
                               "--hops",    "2",      "--model",   path("passkey-run"),
                               "--lengths", "200",    "--prompts", "2",
                               "--device",  "cpu",    "--threads", "1",
                               "--filler",  "text",   "--text",    path("text/0.txt"),
                               "--digits",  "9"});
  ASSERT_EQ(needle.code, 0) << needle.err;
  EXPECT_NE(needle.out.find("tracking in text: exact "), std::string::npos) << needle.out;
  const Ran recall =
      everlong({"eval", "recall", "--model", path("passkey-run"), "--lengths", "64", "--documents",
                "3", "--chunk", "16", "--device", "cpu", "--threads", "1", "--json"});
  ASSERT_EQ(recall.code, 0) << recall.err;
  EXPECT_GT(recall.object().at("rows").at(0).at("right").at("trials"), 3);
}

TEST_F(Cli, SettingsOfAMechanismCanBeChangedForOneMeasurement) {
  const auto with = [&](const std::string& setting) {
    return everlong({"eval", "perplexity", "--model", path("run"), "--data", path("tokens"),
                     "--tokens", "500", "--device", "cpu", "--threads", "1", "--json", "--set",
                     setting});
  };
  const Ran plain = with("lightning.num_heads=2"), other = with("lightning.slope_rule=paper");
  ASSERT_EQ(plain.code, 0) << plain.err;
  ASSERT_EQ(other.code, 0) << other.err;
  EXPECT_NE(plain.object().at("bits_per_byte"), other.object().at("bits_per_byte"));
  EXPECT_NE(with("softmax.window=4").err.find("its layers are: lightning"), std::string::npos);
  EXPECT_EQ(with("lightning.num_heads=5").code, 1);  // the weights do not fit
  EXPECT_EQ(with("lightning.nonsense=1").code, 1);
  EXPECT_EQ(with("nonsense").code, 1);
}

TEST_F(Cli, QuietSaysNothingOnStderr) {
  const Ran loud = generate({"--prompt", "a", "-n", "2"}),
            quiet = generate({"--prompt", "a", "-n", "2", "--quiet"});
  EXPECT_NE(loud.err, "");
  EXPECT_EQ(quiet.err, "");
  EXPECT_EQ(loud.out, quiet.out);
}

TEST_F(Cli, ColourComesOnlyWhenAskedForOrOnATerminal) {
  EXPECT_EQ(everlong({"info"}).out.find('\033'), std::string::npos);
  EXPECT_NE(everlong({"info", "--color", "always"}).out.find('\033'), std::string::npos);
}

TEST_F(Cli, FullDiskIsAFailure) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  const Ran ran = run({"sh", "-c", cat("'", EVERLONG_BINARY, "' info > /dev/full")});
  EXPECT_EQ(ran.code, 1);
}

}  // namespace
}  // namespace everlong
