// The library as another program sees it: public headers and libeverlong.so, nothing else.
#include <everlong/stream.h>
#include <everlong/train.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>

namespace {

using everlong::StatusCode;

class Library : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder =
        std::filesystem::temp_directory_path() / ("everlong_library_" + std::to_string(::getpid()));
    std::filesystem::create_directories(folder / "text");
    for (int file = 0; file < 8; ++file) {
      std::ofstream text(folder / "text" / (std::to_string(file) + ".txt"));
      for (int line = 1; line < 60; ++line)
        text << "the stream " << (file + 3) * line * 7919 % 1000 << " goes on and never ends\n";
    }
    const auto made =
        everlong::prepare({.texts = {path("text")}, .out = path("tokens"), .valid_fraction = 0.3});
    ASSERT_TRUE(made.ok()) << made.status().message();
    EXPECT_EQ(made.value().vocab_size, 259);
    EXPECT_EQ(made.value().documents, 8);
    EXPECT_EQ(made.value().train_tokens + made.value().valid_tokens, made.value().bytes + 8);
    const auto report = everlong::train(run(path("run")));
    ASSERT_TRUE(report.ok()) << report.status().message();
    EXPECT_EQ(report.value().steps, 4);
    EXPECT_TRUE(report.value().valid_bits_per_byte.has_value());
    model_folder = report.value().model_folder;
  }
  static void TearDownTestSuite() {
    std::error_code ignored;
    std::filesystem::remove_all(folder, ignored);
  }
  static std::string path(const std::string& name) { return (folder / name).string(); }
  static everlong::TrainOptions run(const std::string& out) {
    everlong::TrainOptions options;
    options.run_text = R"(
[model]
layer_types = "lightning,softmax"
num_hidden_layers = 2
hidden_size = 32
intermediate_size = 48
lightning = { num_heads = 2, head_dim = 16 }
softmax = { num_heads = 2, head_dim = 16, window = 64 }
[data]
row_tokens = 64
rows = 2
[train]
steps = 4
warmup_steps = 1
device = "cpu"
threads = 1
eval_tokens = 500
)";
    options.settings = {"data.path='" + path("tokens") + "'"};
    options.out = out;
    return options;
  }
  static everlong::Model open() {
    return everlong::Model::open(model_folder, {.device = "cpu", .threads = 1}).value();
  }
  static everlong::Stream read(const everlong::Model& model, std::string_view text) {
    auto stream = everlong::Stream::create(model, 16).value();
    stream.feed(model.encode(text)).check();
    return stream;
  }
  static std::string continuation(everlong::Stream stream, everlong::Sampler& sampler, int count) {
    std::string text;
    for (int i = 0; i < count; ++i) {
      const std::int32_t token = stream.generate(sampler).value();
      text += std::to_string(token) + " ";
    }
    return text;
  }

  static inline std::filesystem::path folder;
  static inline std::string model_folder;
};

TEST_F(Library, SaysWhichVersionRuns) {
  EXPECT_EQ(everlong::version(), std::to_string(EVERLONG_VERSION_MAJOR) + "." +
                                     std::to_string(EVERLONG_VERSION_MINOR) + "." +
                                     std::to_string(EVERLONG_VERSION_PATCH));
  EXPECT_NE(std::string(everlong::build()).find("torch"), std::string::npos);
}

TEST_F(Library, DescribesTheModel) {
  const auto model = open();
  EXPECT_EQ(model.vocab_size(), 259);
  EXPECT_EQ(model.layers(), (std::vector<std::string>{"lightning", "softmax"}));
  EXPECT_GT(model.parameters(), 259 * 32);
  EXPECT_EQ(model.device(), "cpu");
  EXPECT_EQ(model.dtype(), "fp32");
  EXPECT_EQ(model.decode(model.encode("a stream\xff")), "a stream\xff");
  EXPECT_EQ(model.begin_of_document(), 257);
  EXPECT_EQ(model.end_of_document(), 256);
}

TEST_F(Library, ForksGoOnIndependentlyOfWhatTheyCameFrom) {
  const auto model = open();
  auto stream = read(model, "the stream goes on");
  EXPECT_EQ(stream.position(), 18);
  EXPECT_LE(stream.state_bytes(), stream.state_bytes_bound());
  auto fork = stream.fork().value();
  const std::vector<float> before(stream.logits().begin(), stream.logits().end());
  ASSERT_EQ(before.size(), 259U);
  fork.feed(model.encode(" and never ends")).check();
  EXPECT_TRUE(std::ranges::equal(before, stream.logits()));
  EXPECT_FALSE(std::ranges::equal(before, fork.logits()));
  stream.feed(model.encode(" and never ends")).check();
  EXPECT_TRUE(std::ranges::equal(fork.logits(), stream.logits()));
  stream.reset().check();
  EXPECT_EQ(stream.position(), 0);
  EXPECT_TRUE(stream.logits().empty());
}

TEST_F(Library, ASavedStreamGoesOnWithItsSampler) {
  const auto model = open();
  auto stream = read(model, "the stream ");
  auto sampler = everlong::Sampler::create({.repetition_penalty = 1.2, .seed = 5}).value();
  sampler.saw(stream.generate(sampler).value());
  stream.save(path("a.state"), {{"sampler", sampler.save()}, {"who", "me"}}).check();
  const std::string expected = continuation(stream.fork().value(), sampler, 30);

  auto later = everlong::Stream::create(model, 16).value();
  std::map<std::string, std::string> notes;
  later.load(path("a.state"), &notes).check();
  EXPECT_EQ(notes.at("who"), "me");
  auto restored = everlong::Sampler::create({.repetition_penalty = 1.2, .seed = 99}).value();
  restored.restore(notes.at("sampler")).check();
  EXPECT_EQ(continuation(std::move(later), restored, 30), expected);
  EXPECT_FALSE(restored.restore("nonsense").ok());
}

// Fed in pieces or scored at once: the same predictions, to rounding of fp32.
TEST_F(Library, ScoresAreTheLogarithmsOfWhatWasPredicted) {
  const auto model = open();
  const auto tokens = model.encode("goes on and never ends");
  auto scored = everlong::Stream::create(model).value();
  const auto scores = scored.score(tokens).value();
  ASSERT_EQ(scores.size(), tokens.size());
  EXPECT_TRUE(std::isnan(scores[0]));
  auto fed = everlong::Stream::create(model).value();
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) {
      double sum = 0;
      for (const float logit : fed.logits()) sum += std::exp(static_cast<double>(logit));
      EXPECT_NEAR(scores[i], static_cast<double>(fed.logits()[tokens[i]]) - std::log(sum), 1e-4);
    }
    fed.feed({&tokens[i], 1}).check();
  }
}

TEST_F(Library, RefusesWithAReasonAndWithoutExceptions) {
  const auto model = open();
  const auto refused = [](const everlong::Status& status, StatusCode code, const char* part) {
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
  };
  refused(everlong::Model::open(path("text")).status(), StatusCode::kNotFound, "no model here");
  refused(everlong::Model::open(model_folder, {.device = "tpu"}).status(),
          StatusCode::kInvalidArgument, "tpu");
  refused(everlong::Model::open(model_folder, {.device = "cpu", .threads = 5000}).status(),
          StatusCode::kInvalidArgument, "5000");
  refused(everlong::Stream::create(model, 0).status(), StatusCode::kInvalidArgument, "chunk of 0");
  refused(everlong::Sampler::create({.temperature = -1}).status(), StatusCode::kInvalidArgument,
          "temperature");
  auto stream = read(model, "abc");
  const std::vector<std::int32_t> outside = {1, 259};
  refused(stream.feed(outside), StatusCode::kInvalidArgument, "259");
  EXPECT_EQ(stream.position(), 3);
  refused(stream.load(path("text/0.txt")), StatusCode::kCorrupt, "0.txt");
  refused(stream.save(path("none/a.state")), StatusCode::kNotFound, "no folder");
  refused(everlong::prepare({.texts = {path("none")}, .out = path("x")}).status(),
          StatusCode::kNotFound, "none");
  refused(everlong::train({}).status(), StatusCode::kInvalidArgument, "run_file or run_text");
  auto wrong = run(path("wrong"));
  wrong.settings.emplace_back("train.stepz=3");
  refused(everlong::train(wrong).status(), StatusCode::kInvalidArgument, "stepz");
  EXPECT_THROW(everlong::Model::open(path("text")).value(), std::runtime_error);
  auto fresh = everlong::Stream::create(model).value();
  auto sampler = everlong::Sampler::create({}).value();
  refused(fresh.generate(sampler).status(), StatusCode::kInvalidArgument, "fresh stream");
}

TEST_F(Library, ATrainingThatIsStoppedIsSavedAndGoesOn) {
  auto options = run(path("stopped"));
  std::vector<double> losses;
  options.after_step = [&](const everlong::TrainStep& step) {
    losses.push_back(step.loss);
    return step.step != 2;
  };
  const auto stopped = everlong::train(options);
  EXPECT_EQ(stopped.status().code(), StatusCode::kInterrupted) << stopped.status().message();
  EXPECT_EQ(losses.size(), 2U);
  EXPECT_TRUE(everlong::Model::open(path("stopped/model"), {.device = "cpu"}).ok());

  options.start = everlong::TrainStart::kResume;
  const auto finished = everlong::train(options);
  ASSERT_TRUE(finished.ok()) << finished.status().message();
  std::vector<double> whole;
  auto uninterrupted = run(path("uninterrupted"));
  uninterrupted.after_step = [&](const everlong::TrainStep& step) {
    whole.push_back(step.loss);
    return true;
  };
  ASSERT_TRUE(everlong::train(uninterrupted).ok());
  EXPECT_EQ(losses, whole);
}

}  // namespace
