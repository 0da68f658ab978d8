#include "models/checkpoint.h"

#include <gtest/gtest.h>

#include "support/small_models.h"

namespace everlong {
namespace {

using test::same_bits;
using test::small_config;
using test::small_configs;
using test::small_model;
using test::TemporaryFolder;

TensorMap parameters_of(const Decoder& model) {
  TensorMap parameters;
  for (const auto& item : model.named_parameters()) parameters[item.key()] = item.value().detach();
  return parameters;
}

ModelConfig some_config() { return small_config("llama", {mechanisms().front()->name}); }

// Saves a model, lets `change` edit the tensors of its file, and expects load_model to refuse with
// `part`.
template <class Change>
void expect_refused(const ModelConfig& config, const Change& change, std::string_view part) {
  const TemporaryFolder folder("checkpoint_refused");
  ASSERT_TRUE(save_model(folder.path(), *small_model(config), {}).ok());
  auto file = load_tensors(folder / "model.safetensors");
  ASSERT_TRUE(file.ok());
  change(file->tensors);
  ASSERT_TRUE(save_tensors(folder / "model.safetensors", file->tensors, {}).ok());
  const auto model = load_model(folder.path(), at::kCPU, at::kFloat);
  ASSERT_FALSE(model.ok()) << part;
  EXPECT_NE(model.status().message().find(part), std::string::npos) << model.status().message();
  EXPECT_NE(model.status().message().find("model.safetensors"), std::string::npos)
      << model.status().message();
}

TEST(Checkpoint, SavedModelsLoadBitForBit) {
  for (const auto& config : small_configs()) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      const TemporaryFolder folder("checkpoint_round");
      const auto model = small_model(config, dtype);
      ASSERT_TRUE(save_model(folder.path(), *model, {{"steps", "12"}}).ok());
      const auto loaded = load_model(folder.path(), at::kCPU, dtype);
      ASSERT_TRUE(loaded.ok()) << loaded.status().message();
      EXPECT_EQ((*loaded)->config().to_json(), config.to_json());
      const TensorMap expected = parameters_of(*model), actual = parameters_of(**loaded);
      ASSERT_EQ(actual.size(), expected.size());
      for (const auto& [name, tensor] : expected) {
        EXPECT_EQ(actual.at(name).scalar_type(), dtype) << name;
        EXPECT_TRUE(same_bits(actual.at(name), tensor)) << name;
      }
      EXPECT_EQ(load_tensors(folder / "model.safetensors")->metadata.at("steps"), "12");
      EXPECT_EQ(fingerprint(**loaded), fingerprint(*model));
    }
  }
}

TEST(Checkpoint, LargeModelsAreSavedInShardsThatLoadBitForBit) {
  const auto config = some_config();
  const TemporaryFolder folder("checkpoint_shards");
  ASSERT_TRUE(save_model(folder.path(), *small_model(config, at::kFloat, /*seed=*/2), {}).ok());
  const auto model = small_model(config, at::kFloat);
  ASSERT_TRUE(save_model(folder.path(), *model, {{"steps", "12"}}, /*max_shard_bytes=*/3000).ok());
  EXPECT_FALSE(fs::exists(folder / "model.safetensors"));
  const auto opened = SafetensorsFolder::open(folder.path());
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  EXPECT_GT(opened->files().size(), 2U);
  EXPECT_EQ(opened->metadata().at("steps"), "12");
  const auto loaded = load_model(folder.path(), at::kCPU, at::kFloat);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(fingerprint(**loaded), fingerprint(*model));
  fs::remove(opened->files()[1].path());
  EXPECT_NE(load_model(folder.path(), at::kCPU, at::kFloat).status().message().find("is missing"),
            std::string::npos);
  ASSERT_TRUE(save_model(folder.path(), *model, {}).ok());
  EXPECT_FALSE(fs::exists(folder / "model.safetensors.index.json"));
  EXPECT_EQ(fingerprint(**load_model(folder.path(), at::kCPU, at::kFloat)), fingerprint(*model));
}

TEST(Checkpoint, LoadedWeightsAreTheOnesThatCompute) {
  const TemporaryFolder folder("checkpoint_used");
  const auto config = small_configs().back();
  const auto model = small_model(config, at::kFloat);
  ASSERT_TRUE(save_model(folder.path(), *model, {}).ok());
  at::manual_seed(99);
  const auto loaded = *load_model(folder.path(), at::kCPU, at::kFloat);
  const at::NoGradGuard off;
  const at::Tensor tokens = at::randint(0, config.vocab_size, {1, 9}, at::kLong);
  EXPECT_TRUE(same_bits(loaded->logits(loaded->hidden(tokens, {}, nullptr)),
                        model->logits(model->hidden(tokens, {}, nullptr))));
}

TEST(Checkpoint, WeightsAreConvertedToTheDtypeAskedFor) {
  const TemporaryFolder folder("checkpoint_converted");
  const auto model = small_model(some_config(), at::kFloat);
  ASSERT_TRUE(save_model(folder.path(), *model, {}).ok());
  const auto loaded = *load_model(folder.path(), at::kCPU, at::kBFloat16);
  for (const auto& [name, tensor] : parameters_of(*model))
    EXPECT_TRUE(same_bits(parameters_of(*loaded).at(name), tensor.to(at::kBFloat16))) << name;
  EXPECT_FALSE(load_model(folder.path(), at::kCPU, at::kLong).ok());
}

TEST(Checkpoint, TensorsThatDoNotFitAreNamed) {
  const std::string weight = "model.layers.0.mlp.up_proj.weight";
  expect_refused(
      some_config(), [&](TensorMap& t) { t.erase(weight); }, cat("\"", weight, "\" is missing"));
  expect_refused(
      some_config(), [&](TensorMap& t) { t["stranger"] = at::zeros({1}); },
      "\"stranger\" is no parameter");
  expect_refused(
      some_config(), [&](TensorMap& t) { t[weight] = t[weight].t(); },
      cat("\"", weight, "\" has shape [16,24]"));
  expect_refused(
      some_config(), [&](TensorMap& t) { t[weight] = t[weight].to(at::kInt); }, "int32");
}

TEST(Checkpoint, ATiedHeadMayBeInTheFileAsACopy) {
  auto config = some_config();
  config.tie_word_embeddings = true;
  const TemporaryFolder folder("checkpoint_tied");
  ASSERT_TRUE(save_model(folder.path(), *small_model(config), {}).ok());
  auto file = *load_tensors(folder / "model.safetensors");
  EXPECT_FALSE(file.tensors.contains("lm_head.weight"));
  file.tensors["lm_head.weight"] = file.tensors.at("model.embed_tokens.weight").clone();
  ASSERT_TRUE(save_tensors(folder / "model.safetensors", file.tensors, {}).ok());
  EXPECT_TRUE(load_model(folder.path(), at::kCPU, at::kFloat).ok());
  expect_refused(
      config, [](TensorMap& t) { t["lm_head.weight"] = t.at("model.embed_tokens.weight") + 1; },
      "set tie_word_embeddings to false");
}

TEST(Checkpoint, FoldersThatLackAFileAreRefusedByItsName) {
  const TemporaryFolder folder("checkpoint_lacking");
  EXPECT_NE(load_model(folder.path(), at::kCPU, at::kFloat).status().message().find("config.json"),
            std::string::npos);
  ASSERT_TRUE(save_model(folder.path(), *small_model(some_config()), {}).ok());
  fs::remove(folder / "model.safetensors");
  const auto model = load_model(folder.path(), at::kCPU, at::kFloat);
  ASSERT_FALSE(model.ok());
  EXPECT_NE(model.status().message().find("model.safetensors"), std::string::npos);
}

TEST(Checkpoint, FingerprintSeesWeightsDtypeAndConfig) {
  auto config = some_config();
  const auto model = small_model(config, at::kFloat);
  const std::string original = fingerprint(*model);
  EXPECT_EQ(original.size(), 16U);
  EXPECT_EQ(fingerprint(*small_model(config, at::kFloat)), original);
  EXPECT_NE(fingerprint(*small_model(config, at::kFloat, /*seed=*/2)), original);
  EXPECT_NE(fingerprint(*small_model(config, at::kBFloat16)), original);
  config.norm_eps *= 2;
  EXPECT_NE(fingerprint(*small_model(config, at::kFloat)), original);
  const at::NoGradGuard off;
  model->named_parameters()["lm_head.weight"].view(-1)[3].add_(1e-3);
  EXPECT_NE(fingerprint(*model), original);
}

TEST(Checkpoint, FingerprintDoesNotSeeHowAModelRuns) {
  auto config = small_config("llama", {"lightning"});
  const auto with = [&](const char* key, const nlohmann::json& value) {
    auto changed = config;
    changed.mechanisms["lightning"][key] = value;
    return fingerprint(*small_model(changed, at::kFloat));
  };
  EXPECT_EQ(with("write_behind", "off"), fingerprint(*small_model(config, at::kFloat)));
  EXPECT_EQ(with("write_behind", "on"), with("write_behind", "off"));
  EXPECT_NE(with("norm_eps", 1e-3), with("write_behind", "off"));
  config.mechanisms.erase("lightning");  // nothing set, or only that
  EXPECT_EQ(with("write_behind", "off"), fingerprint(*small_model(config, at::kFloat)));
}

TEST(Checkpoint, GenerationConfigHoldsTheSamplingDefaultsAndStaysTheUsers) {
  const TemporaryFolder folder("checkpoint_generation");
  EXPECT_EQ(read_generation_config(folder.path())->temperature, SamplingParams{}.temperature);
  ASSERT_TRUE(save_model(folder.path(), *small_model(some_config()), {}).ok());
  EXPECT_TRUE(fs::exists(folder / "generation_config.json"));
  EXPECT_EQ(read_generation_config(folder.path())->penalty_window, SamplingParams{}.penalty_window);

  const auto write = [&](const std::string& text) {
    ASSERT_TRUE(write_file(folder / "generation_config.json", text).ok());
  };
  write(R"({"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1,
            "penalty_window": 8, "do_sample": true, "eos_token_id": 2, "transformers_version": "4.57"})");
  ASSERT_TRUE(save_model(folder.path(), *small_model(some_config()), {}).ok());
  const auto params = read_generation_config(folder.path());
  ASSERT_TRUE(params.ok()) << params.status().message();
  EXPECT_EQ(params->temperature, 0.7);
  EXPECT_EQ(params->top_k, 40);
  EXPECT_EQ(params->top_p, 0.9);
  EXPECT_EQ(params->min_p, 0.05);
  EXPECT_EQ(params->repetition_penalty, 1.1);
  EXPECT_EQ(params->penalty_window, 8);
  write(R"({"do_sample": false, "temperature": 0.7})");
  EXPECT_EQ(read_generation_config(folder.path())->temperature, 0);
  write(R"({"temprature": 0.7})");
  EXPECT_NE(
      read_generation_config(folder.path()).status().message().find("Did you mean \"temperature\""),
      std::string::npos);
  write(R"({"top_p": 0})");
  EXPECT_FALSE(read_generation_config(folder.path()).ok());
}

TEST(TensorFile, EveryDtypeAndStrideRoundTrips) {
  const TemporaryFolder folder("tensor_file");
  TensorMap tensors = {{"scalar", at::tensor(1.5)}, {"empty", at::zeros({0, 3})}};
  const at::Tensor values = at::arange(24).view({2, 3, 4});
  for (const at::ScalarType dtype : {at::kBool, at::kByte, at::kChar, at::kShort, at::kInt,
                                     at::kLong, at::kHalf, at::kBFloat16, at::kFloat, at::kDouble})
    tensors[at::toString(dtype)] = values.to(dtype).transpose(0, 2);
  ASSERT_TRUE(save_tensors(folder / "t.safetensors", tensors, {{"k", "v"}}).ok());
  const auto loaded = load_tensors(folder / "t.safetensors");
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->metadata, (std::map<std::string, std::string>{{"k", "v"}}));
  ASSERT_EQ(loaded->tensors.size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(loaded->tensors.at(name).sizes(), tensor.sizes()) << name;
    EXPECT_TRUE(same_bits(loaded->tensors.at(name).contiguous(), tensor.contiguous())) << name;
  }
  const Status complex =
      save_tensors(folder / "c.safetensors", {{"z", at::zeros({1}, at::kComplexFloat)}}, {});
  EXPECT_NE(complex.message().find("\"z\""), std::string::npos) << complex.message();
}

}  // namespace
}  // namespace everlong
