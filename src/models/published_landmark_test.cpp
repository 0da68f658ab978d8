#include <gtest/gtest.h>

#include "models/decoder.h"
#include "models/published.h"

namespace everlong {
namespace {

TEST(PublishedLandmark, PublishedConfigsAreReadAndWrittenBack) {
  const nlohmann::json released = {{"architectures", {"LlamaForCausalLM"}},
                                   {"model_type", "llama"},
                                   {"vocab_size", 32002},
                                   {"hidden_size", 4096},
                                   {"intermediate_size", 11008},
                                   {"num_hidden_layers", 32},
                                   {"num_attention_heads", 32},
                                   {"rms_norm_eps", 1e-6},
                                   {"mem_freq", 50}};
  const auto llama = config_from_published(released, "config.json");
  ASSERT_TRUE(llama.ok()) << llama.status().message();
  EXPECT_EQ(llama->landmark_id, 32001);
  EXPECT_TRUE(llama->landmark_predicted);
  EXPECT_EQ(llama->mechanisms.at("landmark").at("block"), 51);
  const auto model = Decoder::make(*llama, WeightInit::kMeta);
  ASSERT_TRUE(model.ok());
  // LLaMA 7B with 32,002 ids: 6,738,415,616 + 2 rows of 4096 in embedding and head.
  EXPECT_EQ((*model)->parameter_count(), 6738415616 + 4 * 4096);
  const auto family = family_of(*llama);
  ASSERT_TRUE(family.ok()) << family.status().message();
  EXPECT_EQ(*family, "landmark_llama");
  const auto again = config_from_published(*published_config(*llama, *family), "config.json");
  EXPECT_EQ(again->to_json(), llama->to_json());

  const auto gpt = config_from_published(
      {{"n_embd", 64}, {"n_head", 2}, {"n_layer", 2}, {"vocab_size", 50304}}, "config.json");
  ASSERT_TRUE(gpt.ok()) << gpt.status().message();
  EXPECT_EQ(gpt->landmark_id, 50260);
  EXPECT_EQ(*family_of(*gpt), "landmark_gpt");
  EXPECT_EQ(config_from_published(*published_config(*gpt, "landmark_gpt"), "c")->to_json(),
            gpt->to_json());
  EXPECT_FALSE(config_from_published({{"n_embd", 64}, {"bias", true}}, "c").ok());
}

}  // namespace
}  // namespace everlong
