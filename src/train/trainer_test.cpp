#include "train/trainer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "data/synthetic.h"
#include "models/checkpoint.h"
#include "support/small_run.h"
#include "train/loop.h"

namespace everlong {
namespace {

class TrainerTest : public test::TrainingTest {};

TEST_F(TrainerTest, LearnsToCopyWhatTheLastTokenDoesNotTell) {
  auto run = run_file({"train.steps=200", "train.carry=detached"});
  const auto report = train(run);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_LT(report->loss, 2.0);
  ASSERT_TRUE(report->valid.has_value());
  EXPECT_LT(report->valid->loss, 2.0);
  EXPECT_EQ(report->valid->tokens, 20 * 121);
  // 120 predictions and 120 bytes a document.
  EXPECT_NEAR(report->valid->bits_per_byte, report->valid->loss / std::log(2), 1e-9);
}

// Only questions have targets: whoever looks at the last token alone guesses one symbol of two.
TEST_F(TrainerTest, LearnsTheTargetsThatTheDataGive) {
  const auto words = *make_tokenizer("words");
  const auto filler = *Filler::make(FillerKind::kSentences, *words);
  SyntheticSettings settings;
  settings.task = "recall";
  settings.recall = {.symbols = 2, .first = 0, .last = 5, .questions = 0.5};
  settings.lengths = {{20, 32}};
  const auto documents = *SyntheticDocuments::make(settings, *words, filler);
  const auto data = folder_.path() / "recall";
  const auto written =
      write_synthetic(documents, *words, {.train_tokens = 50'000, .valid_documents = 50}, data);
  ASSERT_TRUE(written.ok()) << written.status().message();
  auto run = run_file({"model.vocab_size=86", "model.tokenizer=words", "data.packing=documents",
                       "data.row_tokens=64", "train.steps=120", "train.eval_every=60"});
  run.data.path = data.string();
  const auto report = train(run);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_LT(report->loss, 0.1);
  ASSERT_TRUE(report->valid.has_value());
  EXPECT_LT(report->valid->loss, 0.1);  // a guess costs ln 2 = 0.69
  EXPECT_FALSE(report->valid->of_text);
  for (const auto& line : log()) EXPECT_FALSE(line.contains("valid_bpb"));
}

// One document of recall cannot have weights, so these are passkeys.
TEST_F(TrainerTest, WriteWeightsOfTheDataNeedLayersThatTakeThem) {
  const auto words = *make_tokenizer("words");
  const auto filler = *Filler::make(FillerKind::kSentences, *words);
  SyntheticSettings settings;
  settings.write_multiplicity = 100;
  const auto documents = *SyntheticDocuments::make(settings, *words, filler);
  const auto data = folder_.path() / "passkey";
  ASSERT_TRUE(
      write_synthetic(documents, *words, {.train_tokens = 5000, .valid_documents = 5}, data).ok());
  auto run = run_file({"model.vocab_size=86", "model.tokenizer=words", "data.packing=documents",
                       "data.row_tokens=121", "train.steps=2", "train.warmup_steps=1"});
  run.data.path = data.string();
  const auto refused = Trainer::make(run);
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("layer 0, mechanism \"lightning\""), std::string::npos)
      << refused.status().message();

  run.model.layer_types = {"infini"};
  run.model.mechanisms = {{"infini", {{"num_heads", 2}, {"head_dim", 8}, {"segment", 16}}}};
  auto trainer = Trainer::make(run);
  ASSERT_TRUE(trainer.ok()) << trainer.status().message();
  EXPECT_TRUE((*trainer)->step(0).ok());
  EXPECT_TRUE((*trainer)->evaluate().ok());
}

TEST_F(TrainerTest, SameRunFileGivesTheSameLossesBitForBit) {
  const auto losses = [&](const std::vector<std::string>& overrides) {
    auto trainer = Trainer::make(run_file(overrides));
    EXPECT_TRUE(trainer.ok()) << trainer.status().message();
    std::vector<double> all;
    for (int i = 0; i < 10; ++i) all.push_back((*trainer)->step(0)->loss);
    return all;
  };
  for (const std::string carry : {"none", "detached"}) {
    const std::vector<std::string> overrides = {"train.threads=2", "train.carry=" + carry};
    const auto first = losses(overrides);
    EXPECT_EQ(first, losses(overrides));
    EXPECT_NE(first, losses({"train.threads=2", "train.seed=2"}));
  }
}

TEST_F(TrainerTest, AccumulatedBatchesAreOneMean) {
  // The step's loss is the mean over the predictions of all its batches.
  auto one = Trainer::make(run_file({"train.learning_rate=0"}));
  auto two = Trainer::make(run_file({"train.learning_rate=0", "train.accumulation=2"}));
  ASSERT_TRUE(one.ok() && two.ok());
  double nll = 0, predictions = 0;
  auto reader =
      BatchReader::create(*TokenDataset::open(folder_.path())->split("train"),
                          {.rows = 8, .row_tokens = 64, .packing = Packing::kPacked, .seed = 1});
  Batch batch;
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(reader->next(batch).ok());
    nll += (*one)->step(0)->loss * static_cast<double>(batch.predictions());
    predictions += static_cast<double>(batch.predictions());
  }
  const auto report = (*two)->step(0);
  EXPECT_NEAR(report->loss, nll / predictions, 1e-5);  // fp32 losses
  EXPECT_EQ(report->tokens, 2 * 8 * 64);
}

TEST_F(TrainerTest, LogHasOneObjectAStepAndTheEvaluations) {
  const auto report =
      train(run_file({"train.steps=7", "train.eval_every=3", "train.eval_tokens=500"}));
  ASSERT_TRUE(report.ok()) << report.status().message();
  const auto lines = log();
  ASSERT_EQ(lines.size(), 7U);
  for (std::size_t i = 0; i < lines.size(); ++i) {
    EXPECT_EQ(lines[i].at("step"), i + 1);
    EXPECT_EQ(lines[i].at("tokens"), (i + 1) * 8 * 64);
    for (const char* key : {"loss", "lr", "grad_norm", "tok_s", "mem_bytes", "wall_s"})
      EXPECT_TRUE(lines[i].at(key).is_number()) << key;
    EXPECT_EQ(lines[i].contains("valid_bpb"), i == 2 || i == 5 || i == 6) << i;
  }
  const auto written = RunFile::read(folder_.path() / "run" / "run.toml", {});
  ASSERT_TRUE(written.ok()) << written.status().message();
  EXPECT_EQ(written->train.eval_every, 3);
}

TEST_F(TrainerTest, LossThatIsNotFiniteStopsTheRunAndKeepsTheLastSave) {
  const auto saved = train(run_file({"train.steps=6"}));
  ASSERT_TRUE(saved.ok()) << saved.status().message();
  const auto before = *read_file(saved->model_folder / "model.safetensors");
  auto trainer = Trainer::make(run_file());
  ASSERT_TRUE(trainer.ok());
  ASSERT_TRUE((*trainer)->step(0).ok());
  {
    at::Tensor weight = (*trainer)->model().parameters().front();
    weight.detach()[0][0] = NAN;
    weight.detach()[1][0] = NAN;
    weight.detach()[5][0] = NAN;
  }
  const auto failed = (*trainer)->step(0);
  ASSERT_FALSE(failed.ok());
  EXPECT_NE(failed.status().message().find("step 2: loss = "), std::string::npos)
      << failed.status().message();
  EXPECT_EQ(*read_file(saved->model_folder / "model.safetensors"), before);
}

TEST_F(TrainerTest, InterruptionSavesTheModelOfTheFinishedStep) {
  std::int64_t steps = 0;
  const auto stopped =
      train(run_file(), {.interrupted = [&] { return steps == 4; },
                         .after_step = [&](const StepReport& report) { steps = report.step; }});
  EXPECT_EQ(stopped.status().code(), StatusCode::kInterrupted);
  EXPECT_NE(stopped.status().message().find("after step 4"), std::string::npos)
      << stopped.status().message();
  EXPECT_EQ(log().size(), 4U);
  const auto file = load_tensors(folder_.path() / "run" / "model" / "model.safetensors");
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->metadata.at("step"), "4");
}

TEST_F(TrainerTest, ContinuesAModelFolder) {
  const auto first = train(run_file({"train.steps=60"}));
  ASSERT_TRUE(first.ok()) << first.status().message();
  auto run = run_file();
  run.train.from_model = first->model_folder.string();
  auto trainer = Trainer::make(run);
  ASSERT_TRUE(trainer.ok()) << trainer.status().message();
  EXPECT_LT((*trainer)->step(0)->loss, first->loss + 0.2);  // a fresh model starts at ln 259 = 5.6
}

TEST_F(TrainerTest, TimeLimitEndsTheRun) {
  const auto report =
      train(run_file({"train.steps=1000000", "train.max_seconds=0.5", "train.eval_tokens=0"}));
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_LT(report->steps, 100000);
  EXPECT_GE(report->seconds, 0.5);
  EXPECT_LT(log().back().at("lr").get<double>(), 0.5 * 1e-2);  // the schedule came to its end
}

TEST_F(TrainerTest, Bf16TrainsThroughFp32Masters) {
  auto trainer = Trainer::make(run_file({"train.dtype=bf16", "train.warmup_steps=1"}));
  ASSERT_TRUE(trainer.ok()) << trainer.status().message();
  const double first = (*trainer)->step(0)->loss;
  double last = 0;
  for (int i = 0; i < 15; ++i) last = (*trainer)->step(0)->loss;
  EXPECT_LT(last, first - 1);
  EXPECT_EQ((*trainer)->model().parameters().front().scalar_type(), at::kBFloat16);
}

TEST_F(TrainerTest, TextOfAnotherTokenizerIsRefused) {
  auto run = run_file();
  run.model.vocab_size = 100;
  const auto trainer = Trainer::make(run);
  ASSERT_FALSE(trainer.ok());
  EXPECT_NE(trainer.status().message().find("vocabulary 259"), std::string::npos)
      << trainer.status().message();
}

}  // namespace
}  // namespace everlong
