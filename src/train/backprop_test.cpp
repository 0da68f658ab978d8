#include "train/backprop.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <random>

#include "layers/write_weighted.h"

namespace everlong {
namespace {

// fp64 sums of some hundred terms in another order; gradients here are about 1.
constexpr double kFp64 = 1e-10;
constexpr std::int64_t kVocabulary = 11;

std::shared_ptr<Decoder> make_model(const std::vector<std::string>& layers) {
  at::set_num_threads(1);  // tiny tensors: a second thread only waits
  at::manual_seed(5);
  ModelConfig config;
  config.vocab_size = kVocabulary;
  config.hidden_size = 16;
  config.intermediate_size = 24;
  config.layer_types = layers;
  config.initializer_range = 0.5;
  const nlohmann::json heads = {{"num_heads", 2}, {"head_dim", 8}};
  for (const auto& name : layers) config.mechanisms[name] = heads;
  if (config.mechanisms.contains("infini")) config.mechanisms["infini"]["segment"] = 3;
  auto model = Decoder::make(config);
  EXPECT_TRUE(model.ok()) << model.status().message();
  (*model)->to(at::kDouble);
  return *model;
}

const std::vector<std::vector<std::string>> kModels = {
    {"lightning", "lightning"}, {"softmax", "softmax"}, {"lightning", "softmax"}};

// Random tokens. `documents`: columns in which a document starts, for each row; the target before a
// start is ignored.
Batch make_batch(std::int64_t rows, std::int64_t tokens, unsigned seed,
                 const std::vector<std::vector<std::int64_t>>& documents = {}) {
  Batch batch{.rows = rows, .tokens = tokens};
  std::mt19937 random(seed);
  for (std::int64_t row = 0; row < rows; ++row) {
    std::vector<std::int64_t> starts = {0};
    if (!documents.empty()) {
      const auto& inside = documents[static_cast<std::size_t>(row)];
      starts.insert(starts.end(), inside.begin(), inside.end());
    }
    for (const auto start : starts) batch.document_starts.push_back(row * tokens + start);
    for (std::int64_t t = 0; t < tokens; ++t) {
      batch.inputs.push_back(static_cast<std::int32_t>(random() % kVocabulary));
      const bool ends = std::ranges::find(starts, t + 1) != starts.end();
      batch.targets.push_back(ends ? kNoTarget : static_cast<std::int32_t>(random() % kVocabulary));
    }
    batch.row_continues.push_back(0);
  }
  return batch;
}

// The columns [first, first + tokens) of some rows as a batch of its own.
Batch cut(const Batch& whole, std::int64_t row, std::int64_t rows, std::int64_t first,
          std::int64_t tokens, bool continues) {
  Batch part{.rows = rows, .tokens = tokens};
  for (std::int64_t b = 0; b < rows; ++b) {
    const std::int64_t from = (row + b) * whole.tokens + first;
    part.document_starts.push_back(b * tokens);
    for (const auto start : whole.document_starts)
      if (start > from && start < from + tokens)
        part.document_starts.push_back(b * tokens + start - from);
    part.inputs.insert(part.inputs.end(), whole.inputs.begin() + from,
                       whole.inputs.begin() + from + tokens);
    part.targets.insert(part.targets.end(), whole.targets.begin() + from,
                        whole.targets.begin() + from + tokens);
    if (!whole.weights.empty())
      part.weights.insert(part.weights.end(), whole.weights.begin() + from,
                          whole.weights.begin() + from + tokens);
    if (!whole.writes.empty())
      part.writes.insert(part.writes.end(), whole.writes.begin() + from,
                         whole.writes.begin() + from + tokens);
    const bool starts_here =
        std::ranges::find(whole.document_starts, from) != whole.document_starts.end();
    part.row_continues.push_back(continues && !starts_here ? 1 : 0);
  }
  return part;
}

struct Outcome {
  double loss = 0;
  TensorMap gradients;
};

// The gradients that were gathered in the model since the last call.
Outcome outcome(Decoder& model, double loss) {
  Outcome out{loss, {}};
  for (auto& entry : model.named_parameters()) {
    at::Tensor parameter = entry.value();
    out.gradients[entry.key()] =
        parameter.grad().defined() ? parameter.grad() : at::zeros_like(parameter).detach();
    parameter.mutable_grad().reset();
  }
  return out;
}

Outcome run(Decoder& model, const std::vector<Batch>& batches, Carry carry,
            std::int64_t segment_tokens) {
  Backprop backprop(model, at::kCPU, carry, segment_tokens);
  double loss = 0;
  for (const auto& batch : batches) loss += backprop.run(batch, 0.1).item<double>();
  return outcome(model, loss);
}

double difference(const Outcome& a, const Outcome& b) {
  double most = 0;
  for (const auto& [name, gradient] : a.gradients)
    most = std::max(most, (gradient - b.gradients.at(name)).abs().max().item<double>());
  return most;
}

void expect_same(const Outcome& a, const Outcome& b) {
  EXPECT_NEAR(a.loss, b.loss, kFp64);
  EXPECT_LE(difference(a, b), kFp64);
  double largest = 0;
  for (const auto& [name, gradient] : b.gradients)
    largest = std::max(largest, gradient.abs().max().item<double>());
  EXPECT_GT(largest, 1e-3);  // or the comparison says nothing
}

TEST(Backprop, PackedRowsEqualSeparateDocuments) {
  for (const auto& layers : kModels) {
    const auto model = make_model(layers);
    const Batch packed = make_batch(2, 12, 1, {{5, 6}, {}});
    const auto whole = run(*model, {packed}, Carry::kNone, 0);
    const auto separate = run(*model,
                              {cut(packed, 0, 1, 0, 5, false), cut(packed, 0, 1, 5, 1, false),
                               cut(packed, 0, 1, 6, 6, false), cut(packed, 1, 1, 0, 12, false)},
                              Carry::kNone, 0);
    expect_same(whole, separate);
  }
}

TEST(Backprop, TwoHalfBatchesEqualOneFullBatch) {
  const auto model = make_model({"lightning", "softmax"});
  const Batch full = make_batch(4, 9, 2);
  expect_same(
      run(*model, {cut(full, 0, 2, 0, 9, false), cut(full, 2, 2, 0, 9, false)}, Carry::kNone, 0),
      run(*model, {full}, Carry::kNone, 0));
}

TEST(Backprop, ExactSegmentsGiveTheGradientsOfTheWholeRow) {
  for (const auto& layers : kModels) {
    const auto model = make_model(layers);
    for (const auto& documents : std::vector<std::vector<std::vector<std::int64_t>>>{
             {}, {{4, 10, 17}, {15}}, {{10}, {10}}}) {
      const Batch row = make_batch(2, 23, 3, documents);
      expect_same(run(*model, {row}, Carry::kExact, 5), run(*model, {row}, Carry::kNone, 0));
      model->set_checkpointing(true);
      expect_same(run(*model, {row}, Carry::kExact, 5), run(*model, {row}, Carry::kExact, 0));
      model->set_checkpointing(false);
    }
  }
}

// A target of weight 3 counts as three of weight 1, and one of weight 0 as none, in every way of
// feeding a row.
TEST(Backprop, WeightsCountTargetsSoManyTimes) {
  const auto model = make_model({"lightning", "softmax"});
  Batch once = make_batch(2, 23, 3, {{4, 10, 17}, {15}});
  Batch weighed = once;
  for (std::size_t i = 0; i < once.targets.size(); ++i) {
    weighed.weights.push_back(i % 3 == 0 ? 3.0f : i % 3 == 1 ? 1.0f : 0.0f);
    if (i % 3 == 2) once.targets[i] = kNoTarget;
  }
  Batch thrice = once;
  for (std::size_t i = 0; i < once.targets.size(); ++i)
    if (i % 3 != 0) thrice.targets[i] = kNoTarget;
  const auto counted = run(*model, {once, thrice, thrice}, Carry::kNone, 0);
  expect_same(run(*model, {weighed}, Carry::kNone, 0), counted);
  expect_same(run(*model, {weighed}, Carry::kExact, 5), counted);
  expect_same(run(*model, {cut(weighed, 0, 1, 0, 23, false), cut(weighed, 1, 1, 0, 23, false)},
                  Carry::kNone, 0),
              counted);
}

// Each token is stored as often as the data say in every way of feeding a row, and the next batch
// without writes is read as if there had been none.
TEST(Backprop, WritesReachTheMemoryInEveryWayOfFeeding) {
  const auto model = make_model({"infini", "infini"});
  const Batch plain = make_batch(2, 23, 3, {{4, 15}, {16}});
  Batch written = plain;
  for (std::size_t i = 0; i < plain.inputs.size(); ++i)
    written.writes.push_back(static_cast<float>(i % 7) * 5);
  const auto before = run(*model, {plain}, Carry::kNone, 0);
  const auto whole = run(*model, {written}, Carry::kNone, 0);
  EXPECT_GT(difference(before, whole), 1e-3);
  // What the batch says is what the layers get, all of them.
  const Batch row = cut(written, 1, 1, 0, 16, false);
  const at::Tensor targets = at::tensor(row.targets, at::kLong).unsqueeze(1);
  for (const std::int64_t i : {0, 1})
    dynamic_cast<WriteWeighted&>(model->mixer(i))
        .set_write_weight(at::tensor(row.writes, at::kFloat).view({1, 16}));
  const at::Tensor ids = at::tensor(row.inputs, at::kLong).view({1, 16});
  const at::Tensor nats = model->logits(model->hidden(ids, {}, nullptr))[0].log_softmax(1).gather(
      1, targets.clamp_min(0));
  EXPECT_NEAR(run(*model, {row}, Carry::kNone, 0).loss,
              -(nats * targets.ne(kNoTarget)).sum().item<double>(), kFp64);
  const auto separate = run(*model,
                            {cut(written, 0, 1, 0, 4, false), cut(written, 0, 1, 4, 11, false),
                             cut(written, 0, 1, 15, 8, false), cut(written, 1, 1, 0, 16, false),
                             cut(written, 1, 1, 16, 7, false)},
                            Carry::kNone, 0);
  expect_same(whole, separate);
  expect_same(run(*model, {written}, Carry::kExact, 5), whole);
  model->set_checkpointing(true);
  expect_same(run(*model, {written}, Carry::kExact, 5), whole);
  expect_same(run(*model, {written}, Carry::kNone, 0), whole);
  model->set_checkpointing(false);
  Backprop scorer(*model, at::kCPU, Carry::kDetached, 0);
  EXPECT_NEAR(scorer.score(written).item<double>(), whole.loss, kFp64);
  expect_same(run(*model, {plain}, Carry::kNone, 0), before);
}

TEST(Backprop, ExactSegmentsContinueTheRowBefore) {
  const auto model = make_model({"lightning", "softmax"});
  const Batch row = make_batch(2, 30, 4, {{21}, {}});
  const std::vector<Batch> halves = {cut(row, 0, 2, 0, 15, false), cut(row, 0, 2, 15, 15, true)};
  expect_same(run(*model, halves, Carry::kExact, 4), run(*model, halves, Carry::kDetached, 0));
}

TEST(Backprop, DetachedSegmentsKeepTheLossAndCutTheGradient) {
  for (const auto& layers : kModels) {
    const auto model = make_model(layers);
    const Batch row = make_batch(2, 20, 6, {{}, {7}});
    const auto whole = run(*model, {row}, Carry::kNone, 0);
    const auto segments = run(*model, {row}, Carry::kDetached, 5);
    EXPECT_NEAR(whole.loss, segments.loss, kFp64);
    EXPECT_GT(difference(whole, segments), 1e-6);
    // Rows that go on in the next batch are the same thing.
    const auto batches = run(*model, {cut(row, 0, 2, 0, 10, false), cut(row, 0, 2, 10, 10, true)},
                             Carry::kDetached, 5);
    expect_same(batches, segments);
  }
}

TEST(Backprop, RowsThatDoNotContinueStartFresh) {
  const auto model = make_model({"lightning", "softmax"});
  const Batch first = make_batch(2, 8, 7), second = make_batch(2, 8, 8);
  expect_same(run(*model, {first, second}, Carry::kDetached, 0),
              run(*model, {first, second}, Carry::kNone, 0));
}

TEST(Backprop, ScoreIsTheLossOfOneStream) {
  const auto model = make_model({"lightning", "softmax"});
  const Batch row = make_batch(1, 20, 9, {{13}});
  const auto whole = run(*model, {row}, Carry::kNone, 0);
  Backprop scorer(*model, at::kCPU, Carry::kDetached, 0);
  const double loss = scorer.score(cut(row, 0, 1, 0, 6, false)).item<double>() +
                      scorer.score(cut(row, 0, 1, 6, 7, true)).item<double>() +
                      scorer.score(cut(row, 0, 1, 13, 7, true)).item<double>();
  EXPECT_NEAR(loss, whole.loss, kFp64);
  EXPECT_EQ(difference(outcome(*model, 0), Outcome{0, whole.gradients}) > 0,
            true);  // no gradients were left
}

TEST(Backprop, SegmentsWithoutInnerDocumentsStayUnpacked) {
  const auto plans = plan_segments(make_batch(2, 10, 1, {{5}, {7}}), 5);
  ASSERT_EQ(plans.size(), 2U);
  EXPECT_TRUE(plans[0].sequences.offsets.empty());
  EXPECT_EQ(plans[0].enter, (std::vector<std::int64_t>{-1, -1}));
  EXPECT_EQ(plans[1].sequences.offsets, (std::vector<std::int64_t>{0, 5, 7, 10}));
  EXPECT_EQ(plans[1].enter, (std::vector<std::int64_t>{-1, 1, -1}));
  EXPECT_EQ(plans[1].leave, (std::vector<std::int64_t>{0, 2}));
}

}  // namespace
}  // namespace everlong
