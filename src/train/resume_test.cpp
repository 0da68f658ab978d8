// A run that goes on is the run that never stopped.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <cmath>

#include "support/small_run.h"
#include "train/checkpoint_store.h"
#include "train/loop.h"

namespace everlong {
namespace {

using nlohmann::json;

class ResumeTest : public test::TrainingTest {
 protected:
  RunFile run_file(std::vector<std::string> overrides = {}) {
    overrides.insert(overrides.begin(), "train.warmup_steps=1");
    return TrainingTest::run_file(overrides);
  }
  // The same run in a folder of its own.
  RunFile in_folder(RunFile run, const std::string& name) {
    run.out.folder = (folder_.path() / name).string();
    return run;
  }

  static std::string bytes(const fs::path& path) {
    const auto text = read_file(path);
    EXPECT_TRUE(text.ok()) << text.status().message();
    return text.ok() ? *text : "";
  }

  // What the log says of the mathematics, exactly as it is written; speed and memory left out.
  static std::vector<std::string> figures(const fs::path& folder) {
    std::vector<std::string> lines;
    for (auto& line : parse_json_lines(bytes(folder / "log.jsonl")).lines) {
      for (const char* key : {"tok_s", "mem_bytes", "wall_s"}) line.erase(key);
      lines.push_back(line.dump());
    }
    return lines;
  }

  // Trains and stops when `steps` are done; false: ended by itself.
  bool train_until(const RunFile& run, std::int64_t steps, RunStart start) {
    std::int64_t done = 0;
    first_step_ = 0;
    const auto report = train(run,
                              {.interrupted = [&] { return done >= steps; },
                               .after_step =
                                   [&](const StepReport& step) {
                                     done = step.step;
                                     if (first_step_ == 0) first_step_ = done;
                                   },
                               .note = [&](const std::string& line) { notes_ += line + "\n"; }},
                              start);
    EXPECT_TRUE(report.ok() || report.status().code() == StatusCode::kInterrupted)
        << report.status().message();
    return !report.ok();
  }

  void expect_same_run(const fs::path& whole, const fs::path& resumed) {
    EXPECT_EQ(figures(whole), figures(resumed));
    for (const char* model : {"model", "best"}) {
      ASSERT_EQ(fs::exists(whole / model), fs::exists(resumed / model)) << model;
      if (!fs::exists(whole / model)) continue;
      EXPECT_EQ(bytes(whole / model / "model.safetensors"),
                bytes(resumed / model / "model.safetensors"))
          << model;
    }
  }

  // Stops after `first` steps and after each further one.
  void expect_resume_is_exact(const RunFile& run, std::int64_t first) {
    const RunFile whole = in_folder(run, "whole"), parts = in_folder(run, "parts");
    const auto report = train(whole);
    ASSERT_TRUE(report.ok()) << report.status().message();
    ASSERT_TRUE(train_until(parts, first, RunStart::kNew));
    for (std::int64_t step = first + 1; step < run.train.steps; ++step) {
      ASSERT_TRUE(train_until(parts, step, RunStart::kResume));
      ASSERT_EQ(first_step_, step);  // it did go on, and did not begin anew
    }
    const auto resumed = train(parts, {}, RunStart::kResume);
    ASSERT_TRUE(resumed.ok()) << resumed.status().message();
    EXPECT_EQ(report->loss, resumed->loss);
    EXPECT_EQ(report->tokens, resumed->tokens);
    EXPECT_EQ(report->epochs, resumed->epochs);
    ASSERT_EQ(report->valid.has_value(), resumed->valid.has_value());
    EXPECT_EQ(report->valid.value_or(Evaluation{}).loss,
              resumed->valid.value_or(Evaluation{}).loss);
    expect_same_run(whole.out.folder, parts.out.folder);
    fs::remove_all(whole.out.folder);
    fs::remove_all(parts.out.folder);
  }

  std::vector<fs::path> checkpoints(const std::string& run = "run") {
    return CheckpointStore(folder_.path() / run / "checkpoints", 1).files();
  }

  void flip_byte(const fs::path& path, std::size_t at) {
    std::string text = bytes(path);
    text.at(at) = static_cast<char>(text.at(at) ^ 4);
    ASSERT_TRUE(write_file(path, text).ok());
  }

  std::string notes_;
  std::int64_t first_step_ = 0;  // of the last train_until
};

TEST_F(ResumeTest, IsExactForEveryMechanismAndWhateverIsCarried) {
  for (const Mechanism* mechanism : mechanisms()) {
    for (const std::string carry : {"none", "detached", "exact"}) {
      SCOPED_TRACE(cat(mechanism->name, ", carry ", carry));
      RunFile run = run_file({"train.steps=5", "train.carry=" + carry, "train.eval_every=2",
                              "train.eval_tokens=300", "data.rows=2", "data.row_tokens=32",
                              cat("train.segment_tokens=", carry == "none" ? 0 : 16)});
      const std::string name(mechanism->name);
      run.model = test::small_config(name == "megalodon" ? "megalodon" : "llama", {name, name});
      run.model.vocab_size = 259;
      expect_resume_is_exact(run, 2);
    }
  }
}

TEST_F(ResumeTest, IsExactForEveryPackingAndWithSumsThatSpanTheStop) {
  for (const std::string packing : {"packed", "shuffled", "documents"}) {
    SCOPED_TRACE(packing);
    expect_resume_is_exact(
        run_file({"train.steps=9", "data.packing=" + packing, "data.row_tokens=128", "data.rows=3",
                  "train.accumulation=2", "train.log_every=4", "train.schedule=wsd",
                  "train.eval_tokens=300"}),
        1);
  }
}

TEST_F(ResumeTest, IsExactInBf16WithItsMasters) {
  expect_resume_is_exact(run_file({"train.steps=6", "train.dtype=bf16", "train.carry=detached",
                                   "train.eval_every=3", "train.eval_tokens=300"}),
                         2);
}

TEST_F(ResumeTest, LinesAfterTheCheckpointAreWrittenAgainAndNotDoubled) {
  const auto run = run_file({"train.steps=8", "train.save_every=3", "train.eval_tokens=0"});
  ASSERT_TRUE(train(in_folder(run, "whole")).ok());
  ASSERT_TRUE(train_until(run, 5, RunStart::kNew));
  // As if it had been killed after step 5: the checkpoint of the stop was never written.
  ASSERT_EQ(checkpoints().size(), 2U);
  fs::remove(checkpoints().front());
  EXPECT_EQ(log().size(), 5U);
  const auto report = train(run, {}, RunStart::kResume);
  ASSERT_TRUE(report.ok()) << report.status().message();
  expect_same_run(folder_.path() / "whole", out());
  EXPECT_EQ(log().size(), 8U);
}

TEST_F(ResumeTest, LinesThatTheLogLostAreANoteAndNoFailure) {
  const auto run = run_file({"train.steps=8", "train.eval_tokens=0"});
  ASSERT_TRUE(train_until(run, 5, RunStart::kNew));
  fs::remove(out() / "log.jsonl");
  EXPECT_FALSE(train_until(run, 100, RunStart::kResume));
  EXPECT_NE(notes_.find("lacks 4 of 5 lines"), std::string::npos) << notes_;
  EXPECT_EQ(log().size(), 4U);  // the checkpoint itself holds the fifth
}

TEST_F(ResumeTest, DamagedNewestFallsBackToTheOneBefore) {
  const auto run = run_file({"train.steps=8", "train.save_every=2", "train.eval_tokens=0"});
  ASSERT_TRUE(train(in_folder(run, "whole")).ok());
  ASSERT_TRUE(train_until(run, 5, RunStart::kNew));
  const auto newest = checkpoints().front();
  flip_byte(newest, fs::file_size(newest) / 2);
  EXPECT_FALSE(train_until(run, 100, RunStart::kResume));
  EXPECT_NE(notes_.find("step-000000005.safetensors: is damaged"), std::string::npos) << notes_;
  EXPECT_NE(notes_.find("goes on after step 4"), std::string::npos) << notes_;
  EXPECT_TRUE(fs::exists(newest.string() + ".damaged"));
  expect_same_run(folder_.path() / "whole", out());
}

TEST_F(ResumeTest, RunWithoutAReadableCheckpointIsNotBegunAnewByAccident) {
  const auto run = run_file({"train.steps=8", "train.save_every=2"});
  ASSERT_TRUE(train_until(run, 5, RunStart::kNew));
  for (const auto& path : checkpoints()) flip_byte(path, 9);
  for (int i = 0; i < 2; ++i) {  // and not the second time either
    const auto refused = train(run, {}, RunStart::kResume);
    ASSERT_FALSE(refused.ok());
    EXPECT_NE(refused.status().message().find("none of the 2 checkpoints can be read"),
              std::string::npos)
        << refused.status().message();
  }
  EXPECT_EQ(log().size(), 5U);
}

TEST_F(ResumeTest, NewRunInTheFolderOfAnUnfinishedOneIsRefused) {
  const auto run = run_file({"train.steps=4", "train.eval_tokens=0"});
  ASSERT_TRUE(train_until(run, 2, RunStart::kNew));
  const auto refused = train(run);
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("--resume"), std::string::npos)
      << refused.status().message();
  EXPECT_EQ(log().size(), 2U);
  ASSERT_TRUE(train(run, {}, RunStart::kRestart).ok());
  EXPECT_EQ(log().size(), 4U);
  EXPECT_TRUE(train(run).ok());  // a finished one gives way, as ever
}

TEST_F(ResumeTest, FinishedRunSaysSoAndGoesOnWithMoreSteps) {
  auto run = run_file({"train.steps=3", "train.eval_tokens=300", "train.schedule=constant"});
  const auto first = train(run);
  ASSERT_TRUE(first.ok());
  ASSERT_EQ(checkpoints().size(), 1U);
  const std::string before = bytes(out() / "log.jsonl");
  const auto again = train(
      run, {.interrupted = {}, .after_step = {}, .note = [&](const auto& line) { notes_ += line; }},
      RunStart::kResume);
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_NE(notes_.find("the run is finished, at step 3"), std::string::npos) << notes_;
  EXPECT_EQ(again->loss, first->loss);
  EXPECT_EQ(again->valid->loss, first->valid->loss);
  EXPECT_EQ(again->seconds, first->seconds);
  EXPECT_EQ(bytes(out() / "log.jsonl"), before);
  run.train.steps = 6;
  const auto longer = train(run, {}, RunStart::kResume);
  ASSERT_TRUE(longer.ok()) << longer.status().message();
  auto whole = in_folder(run, "whole");
  ASSERT_TRUE(train(whole).ok());
  EXPECT_EQ(bytes(out() / "model" / "model.safetensors"),
            bytes(folder_.path() / "whole" / "model" / "model.safetensors"));
}

TEST_F(ResumeTest, ChangedSettingsAreSaidAndThoseThatShapeTheRunRefused) {
  auto run = run_file({"train.steps=4", "train.eval_tokens=0"});
  ASSERT_TRUE(train_until(run, 2, RunStart::kNew));
  auto other = run;
  other.train.learning_rate = 5e-3;
  other.train.steps = 5;
  EXPECT_FALSE(train_until(other, 100, RunStart::kResume));
  EXPECT_NE(notes_.find("train.learning_rate was 0.01 and is 0.005 from here on"),
            std::string::npos)
      << notes_;
  EXPECT_NE(notes_.find("train.steps was 4 and is 5"), std::string::npos) << notes_;
  const std::vector<std::pair<std::string, std::function<void(RunFile&)>>> refused = {
      {"model.hidden_size was 32 and is 48", [](RunFile& r) { r.model.hidden_size = 48; }},
      {"data.rows was 8 and is 4", [](RunFile& r) { r.data.rows = 4; }},
      {"train.seed was 1 and is 2", [](RunFile& r) { r.train.seed = 2; }},
      {"train.dtype was \"auto\" and is \"bf16\"", [](RunFile& r) { r.train.dtype = "bf16"; }}};
  for (const auto& [message, change] : refused) {
    auto changed = other;
    change(changed);
    const auto result = train(changed, {}, RunStart::kResume);
    ASSERT_FALSE(result.ok()) << message;
    EXPECT_NE(result.status().message().find(message), std::string::npos)
        << result.status().message();
  }
}

TEST_F(ResumeTest, OtherDataAreRefused) {
  const auto run = run_file({"train.steps=4"});
  ASSERT_TRUE(train_until(run, 2, RunStart::kNew));
  auto info = *read_dataset_info(folder_.path());
  info.valid_fraction = 0.5;  // any other content
  ASSERT_TRUE(write_dataset_info(folder_.path(), info).ok());
  const auto refused = train(run, {}, RunStart::kResume);
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("these are not the data of the run"), std::string::npos)
      << refused.status().message();
}

TEST_F(ResumeTest, KeepsTheNewestFewAndTheBest) {
  const auto run = run_file({"train.steps=9", "train.save_every=1", "train.keep_checkpoints=3",
                             "train.eval_every=2", "train.eval_tokens=300"});
  std::size_t most = 0;
  double best = INFINITY;
  const auto report = train(run, {.interrupted = {}, .after_step = [&](const StepReport&) {
                                    most = std::max(most, checkpoints().size());
                                  }});
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(most, 3U);
  std::string best_step;
  for (const auto& line : log())
    if (line.contains("valid_loss") && line.at("valid_loss") < best) {
      best = line.at("valid_loss");
      best_step = line.at("step").dump();
    }
  const auto file = load_tensors(out() / "best" / "model.safetensors");
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->metadata.at("step"), best_step);

  ASSERT_TRUE(train(run_file({"train.steps=3", "train.keep_checkpoints=0"})).ok());
  EXPECT_TRUE(checkpoints().empty());
  EXPECT_FALSE(fs::exists(out() / "best"));
}

TEST_F(ResumeTest, SecondTrainingInTheFolderIsRefused) {
  const auto run = run_file({"train.steps=3", "train.eval_tokens=0"});
  Status second;
  ASSERT_TRUE(train(run, {.interrupted = {},
                          .after_step =
                              [&](const StepReport&) {
                                second = train(run, {}, RunStart::kRestart).status();
                              }})
                  .ok());
  EXPECT_NE(second.message().find("another training is at work"), std::string::npos)
      << second.message();
  EXPECT_EQ(log().size(), 3U);
}

// A limit on the size of files stands in for a full disk: writes beyond it fail.
TEST_F(ResumeTest, FullDiskStopsTheRunAndCostsNothingThatWasSaved) {
  const auto run = run_file({"train.steps=8", "train.save_every=2", "train.eval_tokens=0"});
  ASSERT_TRUE(train(in_folder(run, "whole")).ok());
  ::signal(SIGXFSZ, SIG_IGN);
  ::rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto failed = train(run, {.interrupted = {}, .after_step = [&](const StepReport& step) {
                                    ::rlimit full = before;
                                    full.rlim_cur = 16 << 10;
                                    if (step.step == 5) ::setrlimit(RLIMIT_FSIZE, &full);
                                  }});
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  ASSERT_FALSE(failed.ok());
  EXPECT_EQ(failed.status().code(), StatusCode::kIo);
  EXPECT_NE(failed.status().message().find("cannot write"), std::string::npos)
      << failed.status().message();
  const auto left = checkpoints();
  ASSERT_EQ(left.size(), 2U);  // those of steps 2 and 4
  for (const auto& path : left) EXPECT_TRUE(read_checkpoint(path).ok()) << path;
  const auto report = train(run, {}, RunStart::kResume);
  ASSERT_TRUE(report.ok()) << report.status().message();
  expect_same_run(folder_.path() / "whole", out());
}

TEST_F(ResumeTest, DivergenceNamesTheLayerWhereItBeganAndTheLastCheckpoint) {
  const auto run = run_file({"train.steps=8", "train.eval_tokens=0"});
  ASSERT_TRUE(train_until(run, 2, RunStart::kNew));
  const auto path = checkpoints().front();
  const auto good = read_checkpoint(path);
  ASSERT_TRUE(good.ok());
  const auto message_with = [&](const std::string& weight, double value) {
    TensorFile changed = *good;
    at::Tensor& tensor = changed.tensors.at(weight);
    tensor = at::full_like(tensor, value);
    EXPECT_TRUE(write_checkpoint(path, changed).ok());
    const auto failed = train(run, {}, RunStart::kResume);
    return failed.ok() ? std::string("no failure") : failed.status().message();
  };
  const std::string overflow = message_with("weights.model.layers.1.channel_mixer.l3.weight", 1e38);
  for (const char* part : {"step 3: loss = ", "It began in layer 1 (lightning)", "Likely causes",
                           "The last good checkpoint is", "step-000000002.safetensors"})
    EXPECT_NE(overflow.find(part), std::string::npos) << part << " in: " << overflow;
  const std::string nan = message_with("weights.model.layers.0.channel_mixer.l1.weight", NAN);
  EXPECT_NE(nan.find("The weights model.layers.0.channel_mixer.l1.weight of layer 0 (lightning) "
                     "are not finite"),
            std::string::npos)
      << nan;
}

// Where a document begins the carried state ends: then its layer cannot be told any more.
TEST_F(ResumeTest, DivergenceInACarriedStateNamesItsLayerWhereItIsStillThere) {
  const std::vector<std::pair<int, std::string>> cases = {
      {64, "a state that was carried here is not"},  // documents begin in the third step's rows
      {16, "It began in layer 1 (lightning): from a fresh state all is finite"}};
  for (const auto& [row_tokens, message] : cases) {
    const auto run = run_file({"train.steps=8", "train.eval_tokens=0", "train.carry=detached",
                               cat("data.row_tokens=", row_tokens)});
    ASSERT_TRUE(train_until(run, 2, RunStart::kRestart));
    const auto path = checkpoints().front();
    auto content = read_checkpoint(path);
    ASSERT_TRUE(content.ok());
    content->tensors.at("carried.layers.1.S").fill_(INFINITY);
    ASSERT_TRUE(write_checkpoint(path, *content).ok());
    const auto failed = train(run, {}, RunStart::kResume);
    ASSERT_FALSE(failed.ok());
    EXPECT_NE(failed.status().message().find(message), std::string::npos)
        << failed.status().message();
  }
}

}  // namespace
}  // namespace everlong
