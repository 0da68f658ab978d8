#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <unistd.h>

#include "mechanisms/landmark/layer.h"
#include "mechanisms/landmark/op.h"
#include "support/compare.h"

namespace everlong::landmark {
namespace {

using test::relative_error;

at::Tensor marks_of(std::vector<std::uint8_t> row) {
  return at::tensor(at::ArrayRef<std::uint8_t>(row), at::kByte).unsqueeze(0);
}

// Empty sections, a landmark in front, one long section, one at the end.
at::Tensor uneven_marks() {
  at::manual_seed(8);
  at::Tensor marks = at::rand({2, 90}).lt(0.15).to(at::kByte);
  marks[0][0] = marks[0][1] = marks[1][89] = 1;
  marks[1].narrow(0, 20, 25).zero_();
  return marks;
}

OpCall attention_call(const at::Tensor& marks, std::uint64_t seed) {
  at::manual_seed(seed);
  const std::int64_t B = marks.size(0), T = marks.size(1);
  OpCall call;
  call.inputs = {{"q", at::randn({B, T, 4, 8}, at::kDouble)},
                 {"k", at::randn({B, T, 2, 8}, at::kDouble)},
                 {"v", at::randn({B, T, 2, 6}, at::kDouble)},
                 {"is_landmark", marks}};
  call.grad_out["o"] = at::randn({B, T, 4, 6}, at::kDouble);
  return call;
}

void expect_same(const OpResult& a, const OpResult& b, double allowed) {
  for (const auto& [name, t] : b.out) EXPECT_LT(relative_error(a.out.at(name), t), allowed) << name;
  for (const auto& [name, t] : b.grad)
    EXPECT_LT(relative_error(a.grad.at(name), t), allowed) << name;
}

TEST(LandmarkAttention, UnevenSectionsAgreeInEveryForm) {
  for (const char* empty : {"keep", "drop"}) {
    OpCall call = attention_call(uneven_marks(), 1);
    call.params["empty_block"] = empty;
    const auto truth = *attention_operator().run("reference", call);
    for (const char* form : {"reference_two_level", "naive", "composite"}) {
      SCOPED_TRACE(testing::Message() << form << ", empty_block " << empty);
      expect_same(*attention_operator().run(form, call), truth, tolerance::kFormsFloat64);
    }
  }
}

TEST(LandmarkAttention, AnUnevenTextMayBeCutAnywhere) {
  const OpCall whole = attention_call(uneven_marks(), 2);
  const auto expected = *attention_operator().run("composite", whole);
  for (const std::int64_t cut : {0, 1, 2, 33, 60, 90}) {
    OpCall first = whole, second = whole;
    first.grad_out.clear();
    second.grad_out.clear();
    for (auto& [name, t] : first.inputs) t = t.narrow(1, 0, cut);
    for (auto& [name, t] : second.inputs) t = t.narrow(1, cut, 90 - cut);
    const auto before = *attention_operator().run("composite", first);
    second.state = before.state;
    const auto after = *attention_operator().run("composite", second);
    EXPECT_LT(
        relative_error(at::cat({before.out.at("o"), after.out.at("o")}, 1), expected.out.at("o")),
        tolerance::split_of(at::kDouble))
        << cut;
    EXPECT_TRUE(at::equal(after.state.at("is_landmark"), whole.inputs.at("is_landmark")));
  }
}

TEST(LandmarkAttention, SectionsTooUnevenForATableAgreeToo) {
  at::Tensor marks = at::zeros({1, 300}, at::kByte);
  marks[0].narrow(0, 0, 100).fill_(1);  // 100 empty sections before one of 200 tokens
  const OpCall call = attention_call(marks, 3);
  expect_same(*attention_operator().run("composite", call),
              *attention_operator().run("reference", call), tolerance::kFormsFloat64);
}

TEST(LandmarkAttention, LandmarksHaveNoWeightAndTheirValuesNoGradient) {
  const at::Tensor marks = uneven_marks();
  OpCall call = attention_call(marks, 4);
  for (const char* form : {"naive", "composite"}) {
    const auto result = *attention_operator().run(form, call);
    EXPECT_EQ(result.grad.at("v").index({marks.to(at::kBool)}).abs().max().item<double>(), 0);
  }
  const at::Tensor scores = at::randn({2, 3, 90, 90}, at::kDouble);
  const at::Tensor w = grouped_softmax(scores, marks, 0, true);
  EXPECT_EQ(w.permute({0, 3, 1, 2}).index({marks.to(at::kBool)}).abs().max().item<double>(), 0);
  EXPECT_EQ(w.triu(1).abs().max().item<double>(), 0);
  const at::Tensor sums = w.sum(-1);
  EXPECT_EQ(sums[0].narrow(1, 0, 2).abs().max().item<double>(), 0);  // they see nothing
  EXPECT_LT((sums[1] - 1).abs().max().item<double>(), 1e-13);
}

TEST(LandmarkAttention, TheLogSumAgreesAndDifferentiates) {
  const at::Tensor marks = marks_of(regular_landmarks(0, 60, 7, 3));
  at::manual_seed(5);
  const auto draw = [] { return at::randn({1, 60, 2, 8}, at::kDouble); };
  const at::Tensor k = draw(), v = draw(), direction = draw(),
                   upstream = at::randn({1, 2, 60}, at::kDouble);
  const at::Tensor q = draw().set_requires_grad(true);
  const auto loss = [&](const at::Tensor& x) {
    return (attention(x, k, v, marks, {.scale = std::nullopt, .path = Path::kComposite}).lse *
            upstream)
        .sum();
  };
  const at::Tensor grad = torch::autograd::grad({loss(q)}, {q}, {}, std::nullopt, false)[0];
  const at::NoGradGuard off;
  const double numeric =
      (loss(q + 1e-4 * direction) - loss(q - 1e-4 * direction)).item<double>() / 2e-4;
  EXPECT_NEAR(numeric, (grad * direction).sum().item<double>(), 1e-6);
  const at::Tensor fast = attention(q.to(at::kFloat), k.to(at::kFloat), v.to(at::kFloat), marks,
                                    {.scale = std::nullopt, .path = Path::kCpu})
                              .lse;
  EXPECT_LT(relative_error(fast, attention(q, k, v, marks, {}).lse), 4e-6);
}

OpCall retrieval_call(std::int64_t tokens, std::uint64_t seed, nlohmann::json params) {
  at::manual_seed(seed);
  OpCall call;
  call.inputs = {{"q", at::randn({2, tokens, 4, 8}, at::kDouble)},
                 {"k", at::randn({2, tokens, 2, 8}, at::kDouble)},
                 {"v", at::randn({2, tokens, 2, 8}, at::kDouble)}};
  call.params = std::move(params);
  return call;
}

TEST(LandmarkRetrieval, AgreesWithTheReferenceInWindowsAndChunks) {
  using nlohmann::json;
  const json chunks = {1, 20, 7, 4, 40, 1, 1, 16};
  for (json params : std::vector<json>{
           {{"top_k", 2}},
           {{"top_k", 2}, {"window", 2}},
           {{"top_k", 3}, {"window", 1}, {"max_blocks", 5}},
           {{"top_k", 1}, {"granularity", "token_max_over_heads"}, {"rope", "interleaved"}},
           {{"top_k", 0}, {"max_blocks", 3}},
           {{"top_k", 0}},
           {{"top_k", 2}, {"mode", "chunk"}, {"max_blocks", 4}},
           {{"top_k", 2}, {"mode", "chunk"}, {"granularity", "head_max_over_tokens"}},
           {{"top_k", 40}},
           {{"top_k", -1}},
           {{"top_k", -1}, {"window", 2}, {"score", "mean"}},
           {{"top_k", 2}, {"score", "mean"}, {"window", 1}},
           {{"top_k", 2}, {"score", "max"}, {"rope", "interleaved"}},
           {{"top_k", 3}, {"score", "max"}, {"window", 1}, {"max_blocks", 5}},
           {{"top_k", 2}, {"score", "max"}, {"granularity", "token_max_over_heads"}},
           {{"top_k", 2}, {"score", "mean"}, {"mode", "chunk"}},
           {{"top_k", 0}, {"score", "mean"}}}) {
    params["block"] = 5;
    params["chunks"] = chunks;
    const OpCall call = retrieval_call(90, 11, params);
    const auto truth = retrieval_operator().run("reference", call);
    const auto given = retrieval_operator().run("composite", call);
    ASSERT_TRUE(truth.ok() && given.ok()) << truth.status().message() << given.status().message();
    EXPECT_LT(relative_error(given->out.at("o"), truth->out.at("o")), 1e-12) << params.dump();
    if (truth->out.contains("selected")) {
      EXPECT_TRUE(at::equal(given->out.at("selected"), truth->out.at("selected"))) << params.dump();
    }
    // The kernels, on numbers that fp32 holds.
    OpCall rounded = call, single = call;
    for (auto& [name, t] : single.inputs) t = t.to(at::kFloat);
    for (auto& [name, t] : rounded.inputs) t = single.inputs.at(name).to(at::kDouble);
    const auto exact = *retrieval_operator().run("reference", rounded);
    const auto by_kernel = retrieval_operator().run("cpu", single);
    ASSERT_TRUE(by_kernel.ok()) << by_kernel.status().message();
    EXPECT_LT(relative_error(by_kernel->out.at("o"), exact.out.at("o")),
              tolerance::split_of(DType::kFloat32))
        << params.dump();
    if (exact.out.contains("selected")) {
      EXPECT_TRUE(at::equal(by_kernel->out.at("selected"), exact.out.at("selected")))
          << params.dump();
    }
  }
}

TEST(LandmarkRetrieval, TheGradientAgreesWithDifferencesWherePicksStay) {
  OpCall call = retrieval_call(40, 12, {{"block", 4}, {"top_k", 2}, {"window", 1}});
  const auto plain = *retrieval_operator().run("composite", call);
  call.grad_out["o"] = at::randn_like(plain.out.at("o"));
  const auto result = *retrieval_operator().run("composite", call);
  for (const char* name : {"q", "k", "v"}) {
    const at::Tensor direction = at::randn_like(call.inputs.at(name));
    const auto loss = [&](double step) {
      OpCall moved = call;
      moved.grad_out.clear();
      moved.inputs[name] = call.inputs.at(name) + step * direction;
      const auto out = retrieval_operator().run("composite", moved)->out;
      EXPECT_TRUE(at::equal(out.at("selected"), plain.out.at("selected")));
      return (out.at("o") * call.grad_out.at("o")).sum().item<double>();
    };
    const double exact = (result.grad.at(name) * direction).sum().item<double>();
    EXPECT_NEAR((loss(1e-5) - loss(-1e-5)) / 2e-5, exact, 1e-5 * std::max(1.0, std::abs(exact)))
        << name;
  }
}

TEST(LandmarkRetrieval, EqualScoresGiveTheYoungestBlock) {
  const at::Tensor scores = at::tensor({1.0, 3.0, 3.0, 2.0, 3.0 - 1e-13, 1.0}, at::kDouble);
  EXPECT_TRUE(at::equal(picked_blocks(scores, 2), at::tensor({2, 4}, at::kLong)));
  EXPECT_TRUE(at::equal(picked_blocks(scores, 4), at::tensor({1, 2, 3, 4}, at::kLong)));
  EXPECT_TRUE(at::equal(picked_blocks(at::zeros({3, 5}), 2)[1], at::tensor({3, 4}, at::kLong)));
}

std::shared_ptr<LandmarkAttention> make_layer(const nlohmann::json& settings) {
  nlohmann::json all = {{"num_heads", 4}, {"num_kv_heads", 2}, {"block", 8}};
  if (settings.is_object()) all.update(settings);
  at::manual_seed(3);
  const LayerSpec spec{.hidden_size = 32, .num_layers = 2, .settings = all};
  auto layer = std::make_shared<LandmarkAttention>(*read_settings(spec));
  layer->to(at::kDouble);
  return layer;
}

at::Tensor text(std::int64_t rows, std::int64_t tokens) {
  at::manual_seed(4);
  return at::randn({rows, tokens, 32}, at::kDouble);
}

TEST(LandmarkLayer, AStreamThatReadsEveryBlockIsTheTrainingForward) {
  const at::NoGradGuard off;
  const auto x = text(2, 75);
  for (const char* rope : {"half_split", "interleaved", "none"}) {
    const auto dense = make_layer({{"rope", rope}})->forward(x, {}, nullptr);
    for (const std::int64_t top_k : {0, 9, 30}) {
      const auto layer = make_layer({{"rope", rope}, {"top_k", top_k}, {"window", 1}});
      const auto state = layer->make_state(2);
      std::vector<at::Tensor> parts;
      for (const auto& [begin, count] : {std::pair{0, 13}, {13, 40}, {53, 1}, {54, 21}})
        parts.push_back(layer->forward(x.narrow(1, begin, count), {}, state.get()));
      EXPECT_LT(relative_error(at::cat(parts, 1), dense), tolerance::split_of(at::kDouble))
          << rope << " " << top_k;
    }
  }
}

// Blocks that are scored by their own keys need no landmarks, and a text without them is read by
// plain softmax attention.
TEST(LandmarkLayer, WithoutLandmarksReadingEveryBlockIsSoftmaxAttention) {
  const at::NoGradGuard off;
  const auto x = text(2, 75);
  const auto layer = make_layer({{"rope", "none"}, {"score", "mean"}});
  const auto parameters = layer->named_parameters();
  const auto heads = [&](const char* name, std::int64_t count) {  // [B, 4, T, 8]
    return at::linear(x, parameters[name])
        .unflatten(2, {count, 8})
        .transpose(1, 2)
        .repeat_interleave(4 / count, 1);
  };
  const at::Tensor q = heads("q_proj.weight", 4), k = heads("k_proj.weight", 2),
                   v = heads("v_proj.weight", 2);
  const at::Tensor later = at::ones({75, 75}, at::kBool).triu(1);
  const at::Tensor weights =
      at::softmax((at::matmul(q, k.mT()) / std::sqrt(8.0)).masked_fill(later, -kInfinity), -1);
  const at::Tensor wanted =
      at::linear(at::matmul(weights, v).transpose(1, 2).flatten(2), parameters["o_proj.weight"]);
  EXPECT_LT(relative_error(layer->forward(x, {}, nullptr), wanted), 1e-13);
  for (const char* score : {"mean", "max"})
    for (const std::int64_t top_k : {0, 9}) {
      const auto reader =
          make_layer({{"rope", "none"}, {"score", score}, {"top_k", top_k}, {"window", 1}});
      const auto state = reader->make_state(2);
      EXPECT_LT(relative_error(reader->forward(x, {}, state.get()), wanted),
                tolerance::split_of(at::kDouble));
    }
  const at::Tensor marks = at::zeros({2, 75}, at::kBool);
  EXPECT_NO_THROW(layer->forward(x, {.offsets = {}, .marks = marks}, nullptr));
  marks[1][7] = true;
  EXPECT_THROW(layer->forward(x, {.offsets = {}, .marks = marks}, nullptr), c10::Error);
}

TEST(LandmarkLayer, EverySettingOfAWindowIsIndependentOfTheCut) {
  const at::NoGradGuard off;
  const auto x = text(1, 150);
  for (const nlohmann::json& settings :
       std::vector<nlohmann::json>{{{"top_k", 1}},
                                   {{"top_k", 3}, {"window", 2}, {"max_blocks", 5}},
                                   {{"top_k", 2}, {"granularity", "token_max_over_heads"}},
                                   {{"top_k", 0}, {"window", 1}, {"max_blocks", 2}},
                                   {{"top_k", -1}, {"window", 1}},
                                   {{"top_k", 2}, {"window", 1}, {"score", "mean"}},
                                   {{"top_k", 2}, {"score", "max"}}}) {
    const auto layer = make_layer(settings);
    layer->record_picks(true);
    const auto whole_state = layer->make_state(1);
    const auto whole = layer->forward(x, {}, whole_state.get());
    const auto picks = layer->picks();
    const auto state = layer->make_state(1);
    std::vector<at::Tensor> parts, picked;
    for (std::int64_t t = 0; t < 150;) {
      const std::int64_t count = std::min<std::int64_t>(1 + (t * 7) % 11, 150 - t);
      parts.push_back(layer->forward(x.narrow(1, t, count), {}, state.get()));
      picked.push_back(layer->picks());
      t += count;
      EXPECT_LE(state->bytes(), state->bytes_bound(t));
    }
    EXPECT_LT(relative_error(at::cat(parts, 1), whole), tolerance::split_of(at::kDouble))
        << settings.dump();
    if (picks.defined()) {
      EXPECT_TRUE(at::equal(at::cat(picked, 1), picks)) << settings.dump();
    }
  }
}

TEST(LandmarkLayer, MaxBlocksBoundsTheState) {
  const at::NoGradGuard off;
  const auto layer = make_layer({{"top_k", 2}, {"window", 1}, {"max_blocks", 4}});
  const auto state = layer->make_state(1);
  EXPECT_EQ(state->bytes_bound(1000), state->bytes_bound(std::int64_t{1} << 40));
  for (int i = 0; i < 40; ++i) (void)layer->forward(text(1, 37), {}, state.get());
  EXPECT_EQ(state->positions(), std::vector<std::int64_t>{40 * 37});
  // Twice the blocks that are read from, keys and values of two heads of 8 in fp64.
  EXPECT_LE(state->bytes(), 8 + 2 * (4 + 1 + 1) * 8 * 2 * 16 * 8);
}

TEST(LandmarkLayer, ChunksDependOnTheCutAsPublished) {
  const at::NoGradGuard off;
  const auto layer = make_layer({{"top_k", 1}, {"mode", "chunk"}});
  const auto x = text(1, 96);
  const auto run = [&](std::int64_t piece) {
    const auto state = layer->make_state(1);
    std::vector<at::Tensor> parts;
    for (std::int64_t t = 0; t < 96; t += piece)
      parts.push_back(layer->forward(x.narrow(1, t, piece), {}, state.get()));
    return at::cat(parts, 1);
  };
  EXPECT_GT(relative_error(run(48), run(16)), 1e-4);
  // Cuts inside one block change nothing.
  EXPECT_LT(relative_error(run(4), run(8)), tolerance::split_of(at::kDouble));
}

TEST(LandmarkLayer, MarksSayWhereLandmarksAreInTrainingAndMustBeRegularInStreams) {
  const auto layer = make_layer({});
  const auto x = text(2, 30);
  const at::Tensor regular = marks_of(regular_landmarks(0, 30, 8)).expand({2, 30});
  const auto plain = layer->forward(x, {}, nullptr);
  EXPECT_LT(relative_error(layer->forward(x, {.offsets = {}, .marks = regular}, nullptr), plain),
            1e-15);
  at::Tensor other = regular.clone();
  other[1] = marks_of(regular_landmarks(0, 30, 8, 5))[0];
  const auto moved = layer->forward(x, {.offsets = {}, .marks = other}, nullptr);
  EXPECT_LT(relative_error(moved[0], plain[0]), 1e-14);
  EXPECT_GT(relative_error(moved[1], plain[1]), 1e-4);
  const auto state = layer->make_state(2);
  EXPECT_NO_THROW((void)layer->forward(x, {.offsets = {}, .marks = regular}, state.get()));
  EXPECT_ANY_THROW((void)layer->forward(x, {.offsets = {}, .marks = regular}, state.get()));
  const auto fresh = layer->make_state(2);
  EXPECT_ANY_THROW((void)layer->forward(x, {.offsets = {}, .marks = other}, fresh.get()));
}

TEST(LandmarkLayer, PackedTextsAreReadOneByOne) {
  const at::NoGradGuard off;
  const auto x = text(1, 70);
  for (const char* training : {"dense", "as_streamed"}) {
    const auto layer = make_layer({{"top_k", 1}, {"training", training}});
    const auto packed = layer->forward(x, {{0, 20, 20, 61, 70}}, nullptr);
    for (const auto& [begin, end] : {std::pair{0, 20}, {20, 61}, {61, 70}})
      EXPECT_LT(relative_error(packed.narrow(1, begin, end - begin),
                               layer->forward(x.narrow(1, begin, end - begin), {}, nullptr)),
                tolerance::split_of(at::kDouble));
  }
}

TEST(LandmarkLayer, PagesInAFolderReadTheSame) {
  const at::NoGradGuard off;
  const auto folder = fs::temp_directory_path() / cat("landmark_test_", ::getpid());
  nlohmann::json settings = {{"top_k", 2}, {"window", 1}};
  const auto plain = make_layer(settings);
  settings["pages"] = folder.string();
  settings["page_megabytes"] = 1;
  const auto paged = make_layer(settings);
  const auto x = text(2, 120).to(at::kFloat);
  for (const auto& layer : {plain, paged}) layer->to(at::kFloat);
  const auto memory = plain->make_state(2), pages = paged->make_state(2);
  for (const auto& [begin, count] : {std::pair{0, 50}, {50, 1}, {51, 69}}) {
    const auto piece = x.narrow(1, begin, count);
    EXPECT_LT(relative_error(paged->forward(piece, {}, pages.get()),
                             plain->forward(piece, {}, memory.get())),
              tolerance::split_of(at::kFloat));
  }
  EXPECT_FALSE(
      read_settings({.hidden_size = 32, .settings = {{"num_heads", 4}, {"pages", folder.string()}}})
          .ok());  // top_k = 0 would read every page
  std::error_code ignored;
  fs::remove_all(folder, ignored);
}

TEST(LandmarkLayer, ReadingMayChangeButNotTheBlocks) {
  const auto layer = make_layer({{"top_k", 1}});
  EXPECT_FALSE(layer->set_reading({.block = 9}).ok());
  EXPECT_FALSE(layer->set_reading({.block = 8, .window = 1, .chunked = true}).ok());
  EXPECT_TRUE(layer->set_reading({.block = 8, .top_k = 4}).ok());
}

}  // namespace
}  // namespace everlong::landmark
