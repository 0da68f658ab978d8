// Trainings that are killed (kill -9) at random moments of training and saving, again and again:
// each goes on from a readable checkpoint, and in the end the losses are those of the run that
// nobody touched, bit for bit. EVERLONG_KILLS says how often (default 5; docs/results.md has 200).
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>
#include <thread>

#include "core/json_lines.h"
#include "core/process.h"
#include "core/random.h"
#include "train/checkpoint_store.h"

namespace everlong {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSteps = 400;

constexpr const char* kRun = R"(
[model]
block = "llama"
vocab_size = 259
hidden_size = 32
intermediate_size = 48
layer_types = ["lightning", "softmax"]
[model.lightning]
num_heads = 2
head_dim = 16
[model.softmax]
num_heads = 2
window = 32
[data]
row_tokens = 64
rows = 2
[train]
steps = 400
warmup_steps = 1
learning_rate = 5e-3
device = "cpu"
threads = 1
carry = "detached"
eval_every = 7
eval_tokens = 500
save_every = 3
keep_checkpoints = 2
)";

std::string text_of_words(std::size_t bytes, std::uint64_t seed) {
  static constexpr const char* kWords[] = {"the ", "stream ", "goes ",  "on ",
                                           "and ", "never ",  "ends. ", "state\n"};
  Random random{seed};
  std::string text;
  while (text.size() < bytes) text += kWords[random.below(8)];
  return text;
}

// The child's stderr goes to a file: a kill must not leave a reader behind.
::pid_t start(const std::vector<std::string>& command, const fs::path& errors) {
  const ::pid_t child = ::fork();
  if (child != 0) return child;
  ::setenv("OMP_WAIT_POLICY", "passive", 1);
  std::FILE* const file = std::freopen(errors.c_str(), "w", stderr);
  if (file == nullptr || std::freopen("/dev/null", "w", stdout) == nullptr) ::_exit(127);
  std::vector<char*> arguments;
  for (const auto& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  ::execv(arguments[0], arguments.data());
  ::_exit(127);
}

class KillResume : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / cat("everlong_kill_", ::getpid());
    ASSERT_TRUE(make_directories(folder_ / "text").ok());
    for (std::uint64_t i = 0; i < 8; ++i)
      ASSERT_TRUE(write_file(folder_ / "text" / cat(i, ".txt"), text_of_words(4000, i)).ok());
    ASSERT_TRUE(write_file(folder_ / "run.toml", kRun).ok());
    run({"data", "prepare", (folder_ / "text").string(), "--out", (folder_ / "tokens").string(),
         "--valid-fraction", "0.3"});
  }
  void TearDown() override {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }

  void run(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), EVERLONG_BINARY);
    const auto result = run_process({.command = std::move(arguments)});
    ASSERT_TRUE(result.ok()) << result.status().message();
    ASSERT_EQ(result->exit_code, 0) << result->errors;
  }

  std::vector<std::string> command(const std::string& out) const {
    return {EVERLONG_BINARY,
            "train",
            (folder_ / "run.toml").string(),
            "--resume",
            "--out",
            (folder_ / out).string(),
            "--set",
            "data.path=" + (folder_ / "tokens").string()};
  }

  std::vector<std::string> figures(const std::string& out) const {
    const auto text = read_file(folder_ / out / "log.jsonl");
    if (!text.ok()) return {};
    std::vector<std::string> lines;
    for (auto& line : parse_json_lines(*text).lines) {
      for (const char* key : {"tok_s", "mem_bytes", "wall_s"}) line.erase(key);
      lines.push_back(line.dump());
    }
    return lines;
  }

  std::string errors() const {
    const auto text = read_file(folder_ / "errors");
    return text.ok() ? *text : "";
  }

  static bool writes_checkpoint(const fs::path& checkpoints) {
    std::error_code none;
    for (const auto& entry : fs::directory_iterator(checkpoints, none))
      if (entry.path().string().find(".tmp.") != std::string::npos) return true;
    return false;
  }

  static std::string model_bytes(const fs::path& folder) {
    const auto text = read_file(folder / "model.safetensors");
    EXPECT_TRUE(text.ok()) << text.status().message();
    return text.ok() ? *text : "";
  }

  fs::path folder_;
};

TEST_F(KillResume, EveryResumeReproducesTheUninterruptedLosses) {
  const char* const wanted = std::getenv("EVERLONG_KILLS");
  const int kills = wanted == nullptr ? 5 : std::atoi(wanted);
  ASSERT_GE(kills, 1) << "EVERLONG_KILLS = " << wanted << " is no number of kills";
  auto whole = command("whole");
  std::erase(whole, "--resume");
  run({whole.begin() + 1, whole.end()});
  const auto truth = figures("whole");
  ASSERT_EQ(truth.size(), static_cast<std::size_t>(kSteps));

  Random random{static_cast<std::uint64_t>(kills)};
  int killed = 0, while_saving = 0, finished = 0, rounds = 0;
  const auto compare_finished = [&](const std::string& out) {
    ++finished;
    ASSERT_EQ(figures(out), truth);
    for (const char* model : {"model", "best"})
      ASSERT_EQ(model_bytes(folder_ / out / model), model_bytes(folder_ / "whole" / model));
    fs::remove_all(folder_ / out);
    ++rounds;
  };
  while (killed < kills) {
    const std::string out = cat("run", rounds);
    const fs::path checkpoints = folder_ / out / "checkpoints";
    const std::size_t before = figures(out).size();
    const ::pid_t child = start(command(out), folder_ / "errors");
    ASSERT_GT(child, 0);
    // While it loads; at any moment of the training; while it writes a checkpoint.
    const std::int64_t when = random.below(8);
    int how = 0;
    bool ended = false;
    const auto deadline = Clock::now() + std::chrono::seconds(120);
    const auto wait_until = [&](const std::function<bool()>& there) {
      while (!ended && Clock::now() < deadline && !there()) {
        ended = ::waitpid(child, &how, WNOHANG) == child;
        std::this_thread::sleep_for(std::chrono::microseconds(when < 4 ? 20 : 1000));
      }
    };
    if (when > 0) wait_until([&] { return figures(out).size() != before; });
    if (when > 0 && when < 4) {
      wait_until([&] { return writes_checkpoint(checkpoints); });
      std::this_thread::sleep_for(std::chrono::microseconds(random.below(1500)));
    } else {
      const auto at = Clock::now() + std::chrono::microseconds(random.below(400'000));
      wait_until([&] { return Clock::now() >= at; });
    }
    if (!ended) {
      ::kill(child, SIGKILL);
      ASSERT_EQ(::waitpid(child, &how, 0), child);
    }
    if (WIFEXITED(how)) {  // it was faster than the kill
      ASSERT_EQ(WEXITSTATUS(how), 0) << errors();
      compare_finished(out);
      continue;
    }
    ++killed;
    for (const auto& path : CheckpointStore(checkpoints, 2).files())
      ASSERT_TRUE(read_checkpoint(path).ok()) << read_checkpoint(path).status().message();
    while_saving += writes_checkpoint(checkpoints) ? 1 : 0;  // it left its temporary
    // What the log says so far is the truth already, up to a line that was cut.
    const auto so_far = figures(out);
    for (std::size_t i = 0; i < so_far.size(); ++i) {
      if (so_far[i] == truth[i]) continue;
      // The last line of the run gets its evaluation once the run is over.
      ASSERT_EQ(i + 1, truth.size()) << so_far[i] << "\n" << truth[i];
    }
  }
  const std::string last = cat("run", rounds);
  const auto rest = command(last);
  run({rest.begin() + 1, rest.end()});
  compare_finished(last);
  std::printf("%d kills, %d of them in the writing of a checkpoint, %d runs to their end\n", killed,
              while_saving, finished);
}

// SIGINT and SIGTERM save what is done and say by their exit code which of them it was.
TEST_F(KillResume, SignalsSaveAndExitWithTheirOwnCode) {
  for (const int signal : {SIGINT, SIGTERM}) {
    const std::string out = cat("signal", signal);
    const ::pid_t child = start(command(out), folder_ / "errors");
    ASSERT_GT(child, 0);
    const auto deadline = Clock::now() + std::chrono::seconds(120);
    while (figures(out).empty() && Clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    ::kill(child, signal);
    int how = 0;
    ASSERT_EQ(::waitpid(child, &how, 0), child);
    ASSERT_TRUE(WIFEXITED(how));
    EXPECT_EQ(WEXITSTATUS(how), 128 + signal) << errors();
    EXPECT_NE(errors().find("--resume goes on from here"), std::string::npos) << errors();
    const auto saved = CheckpointStore(folder_ / out / "checkpoints", 2).newest({});
    ASSERT_TRUE(saved.ok() && *saved) << saved.status().message();
    EXPECT_EQ(*metadata_count((*saved)->content, "step"),
              static_cast<std::int64_t>(figures(out).size()));
  }
}

TEST_F(KillResume, QuietTrainingSaysNothingOnStderr) {
  auto quiet = command("quiet");
  for (const char* word : {"--set", "train.steps=20", "--quiet"}) quiet.emplace_back(word);
  const auto result = run_process({.command = quiet});
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_EQ(result->exit_code, 0);
  EXPECT_EQ(result->errors, "");
  EXPECT_NE(result->output.find("20 steps"), std::string::npos) << result->output;
}

}  // namespace
}  // namespace everlong
