// Megalodon's model: published counts and names, the two-hop residual, the last norm's state.
#include "models/megalodon_block.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "models/presets.h"
#include "models/published.h"
#include "support/compare.h"
#include "support/small_models.h"

namespace everlong {
namespace {

using test::small_megalodon;

TEST(MegalodonBlock, PresetsHaveThePublishedCountsWithoutMemory) {
  const std::pair<const char*, std::int64_t> published[] = {{"mega-200m", 220627968},
                                                            {"mega-1.3b", 1342832640},
                                                            {"mega-1.3b-pg19", 1327628288},
                                                            {"mega-7.1b", 7117381632},
                                                            {"mega-7.3b", 7385817088}};
  for (const auto& [name, count] : published) {
    const auto config = preset(name);
    ASSERT_TRUE(config.ok()) << config.status().message();
    const auto model = Decoder::make(*config, WeightInit::kMeta);
    ASSERT_TRUE(model.ok()) << model.status().message();
    EXPECT_EQ((*model)->parameter_count(), count) << name;
    for (const auto& weight : (*model)->parameters()) ASSERT_TRUE(weight.is_meta());
  }
}

TEST(MegalodonBlock, ParametersHaveThePublishedNames) {
  const auto model = test::small_model(small_megalodon());
  ASSERT_NE(model, nullptr);
  std::vector<std::string> names;
  for (const auto& item : model->named_parameters()) names.push_back(item.key());
  for (const char* name :
       {"embed.weight", "layers.0.mega.timenorm.weight", "layers.1.mega.timenorm.bias",
        "layers.0.mega.cema.alpha", "layers.0.mega.cema.omega", "layers.0.mega.rmsnorm.weight",
        "layers.1.mega.wv.bias", "layers.1.mega.wh2.weight", "layers.0.mega.gamma",
        "layers.0.mega.beta", "layers.1.nffn.norm.bias", "layers.1.nffn.fc3.weight",
        "output.final_norm.weight", "output.final_norm.bias", "output.output.weight"})
    EXPECT_NE(std::ranges::find(names, name), names.end()) << name;
  EXPECT_EQ(std::ranges::find(names, "layers.0.mega.wh2.bias"), names.end());
}

TEST(MegalodonBlock, PublishedConfigsComeBackAsTheyWere) {
  ModelConfig config = small_megalodon();
  config.scale_embedding = true;
  config.gated_mlp = false;
  config.output_size = 11;
  const auto written = published_config(config, "megalodon");
  ASSERT_TRUE(written.ok()) << written.status().message();
  EXPECT_EQ(family_of(config).value(), "megalodon");
  const auto back = config_from_published(*written, "test");
  ASSERT_TRUE(back.ok()) << back.status().message();
  EXPECT_EQ(published_config(*back, "megalodon").value(), *written);
  EXPECT_EQ(back->output_size, 11);
  EXPECT_FALSE(back->gated_mlp);
  // And our own file says as much.
  const auto own = ModelConfig::from_json(config.to_json(), "test");
  ASSERT_TRUE(own.ok()) << own.status().message();
  EXPECT_EQ(own->to_json(), config.to_json());
  EXPECT_TRUE(own->rescale_mlp);
}

TEST(MegalodonBlock, AnotherProgramsConfigIsRecognisedAndChecked) {
  nlohmann::json config = published_config(small_megalodon(), "megalodon").value();
  config.erase("model_type");
  config["efficient_attn"] = nullptr;
  config["dropout"] = 0.1;
  EXPECT_TRUE(is_published(config));
  EXPECT_TRUE(config_from_published(config, "test").ok());
  config["z_dims"] = 3;
  const auto refused = config_from_published(config, "test");
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("z_dims"), std::string::npos);
}

// Attention reaches the stream through the channel mixer alone: with W_2 = 0 a block is the
// identity.
TEST(MegalodonBlock, WithoutTheChannelMixersOutputABlockIsTheIdentity) {
  for (const bool rescale : {false, true}) {
    ModelConfig config = small_megalodon();
    config.rescale_mlp = rescale;
    auto block = make_megalodon_block(config, 1);
    ASSERT_TRUE(block.ok()) << block.status().message();
    const at::NoGradGuard off;
    const at::Tensor x = at::randn({2, 20, 16});
    const at::Tensor before = (*block)->forward(x, {}, nullptr);
    EXPECT_GT((before - x).abs().max().item<double>(), 1e-3);
    if (rescale)  // 0.1 * 0.5^1
      EXPECT_NEAR((*block)->named_parameters()["nffn.alpha"][0].item<double>(), 0.05, 1e-7);
    (*block)->named_parameters()["nffn.fc2.weight"].zero_();
    EXPECT_TRUE(at::equal((*block)->forward(x, {}, nullptr), x));
  }
}

TEST(MegalodonBlock, AnyCutIsOnePassAndTheLastNormIsCarried) {
  for (const bool gated : {false, true}) {
    ModelConfig config = small_megalodon();
    config.gated_mlp = config.rescale_mlp = gated;
    config.scale_embedding = config.tie_word_embeddings = gated;
    config.output_size = gated ? 0 : 7;
    const auto model = test::small_model(config);
    ASSERT_NE(model, nullptr);
    const at::NoGradGuard off;
    const at::Tensor tokens = at::randint(0, config.vocab_size, {2, 40}, at::kLong);
    const at::Tensor whole = model->logits(model->hidden(tokens, {}, nullptr));
    EXPECT_EQ(whole.size(2), gated ? config.vocab_size : 7);
    ModelState state = model->make_state(2);
    EXPECT_EQ(state.num_layers(), 3U);  // two layers and the last norm
    std::vector<at::Tensor> parts;
    std::int64_t begin = 0;
    for (const std::int64_t length : {5, 1, 0, 19, 1, 1, 13}) {
      parts.push_back(model->logits(model->hidden(tokens.narrow(1, begin, length), {}, &state)));
      begin += length;
    }
    EXPECT_LT(test::relative_error(at::cat(parts, 1), whole), 1e-11);
    EXPECT_EQ(state.layer(2).positions(), (std::vector<std::int64_t>{40, 40}));
    EXPECT_LE(state.bytes(), state.bytes_bound(40));
  }
}

TEST(MegalodonBlock, OtherMechanismsAndSettingsAreRefusedWithTheWayOut) {
  const auto message = [](const ModelConfig& config) {
    const auto made = Decoder::make(config, WeightInit::kMeta);
    return made.ok() ? std::string() : made.status().message();
  };
  EXPECT_NE(message(test::small_config("megalodon", {"softmax"})).find("block \"llama\""),
            std::string::npos);
  ModelConfig config = small_megalodon();
  config.tie_word_embeddings = true;
  config.output_size = 5;
  EXPECT_NE(message(config).find("output_size"), std::string::npos);
  config = small_megalodon();
  config.num_experts = 4;
  EXPECT_NE(message(config).find("num_experts"), std::string::npos);
  nlohmann::json other = test::small_config("llama", {"softmax"}).to_json();
  other["gated_mlp"] = false;
  const auto refused = ModelConfig::from_json(other, "test");
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("gated_mlp"), std::string::npos);
}

}  // namespace
}  // namespace everlong
