#include "models/slide_encoder.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <set>

#include "support/compare.h"

namespace everlong {
namespace {

using at::Tensor;

SlideEncoderSettings small() {
  SlideEncoderSettings s;
  s.features = 20, s.hidden_size = 32, s.num_layers = 3, s.num_heads = 4, s.ffn_dim = 48;
  s.segment_length = {8, 16, 32};
  s.dilated_ratio = {1, 2, 4};
  return s;
}

struct Slides {
  Tensor tiles, places;
  std::vector<std::int64_t> offsets;
};

Slides random_slides(const std::vector<std::int64_t>& offsets) {
  at::manual_seed(3);
  const std::int64_t n = offsets.back();
  return {at::randn({n, 20}), at::randint(0, 200'000, {n, 2}, at::kLong), offsets};
}

TEST(SlideEncoder, GigapathHasThePublishedPatternsNamesAndCount) {
  using List = std::vector<std::int64_t>;
  EXPECT_EQ(gigapath_slide_encoder().segment_length, (List{1024, 5792, 32768, 185363, 1048576}));
  EXPECT_EQ(gigapath_slide_encoder(250000).segment_length,
            (List{1024, 4870, 23170, 110217, 524288}));
  const WeightInitScope meta(WeightInit::kMeta);
  const auto encoder = SlideEncoder::make(gigapath_slide_encoder());
  ASSERT_TRUE(encoder.ok()) << encoder.status().message();
  EXPECT_EQ((*encoder)->parameter_count(), 86'330'880);
  std::set<std::string> want = {"cls_token",
                                "patch_embed.proj.weight",
                                "patch_embed.proj.bias",
                                "encoder.layer_norm.weight",
                                "encoder.layer_norm.bias",
                                "norm.weight",
                                "norm.bias"};
  for (int i = 0; i < 12; ++i)
    for (const char* part :
         {"self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj",
          "self_attn.inner_attn_ln", "self_attn_layer_norm", "ffn.fc1", "ffn.fc2",
          "ffn.ffn_layernorm", "final_layer_norm"})
      for (const char* kind : {"weight", "bias"})
        want.insert(cat("encoder.layers.", i, ".", part, ".", kind));
  std::set<std::string> names;
  for (const auto& item : (*encoder)->named_parameters()) names.insert(item.key());
  EXPECT_EQ(names, want);
}

TEST(SlideEncoder, LongvitConstructsForEveryPublishedSide) {
  const WeightInitScope meta(WeightInit::kMeta);
  for (const std::int64_t side : {1024, 4096, 8192, 16384, 32768}) {
    const auto settings = longvit(side);
    ASSERT_TRUE(settings.ok());
    const auto encoder = SlideEncoder::make(*settings);
    ASSERT_TRUE(encoder.ok()) << encoder.status().message();
    // 12 layers of width 384, the patches' projection, a vector a patch, and the last norm.
    const std::int64_t layer =
        4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384 + 2 * 1536 + 3 * 2 * 384;
    EXPECT_EQ((*encoder)->parameter_count(),
              12 * layer + 384 * 3072 + 384 + side / 32 * (side / 32) * 384 + 2 * 384);
  }
  EXPECT_NE(longvit(512).status().message().find("1024"), std::string::npos);
}

// Property: sets of several sizes beside each other, and each alone.
TEST(SlideEncoder, SetsBesideEachOtherAreEachAlone) {
  const at::NoGradGuard off;
  for (const bool pool : {false, true}) {
    auto settings = small();
    settings.global_pool = pool;
    at::manual_seed(5);
    const auto encoder = *SlideEncoder::make(settings);
    const Slides all = random_slides({0, 37, 38, 101});
    const Tensor together = encoder->forward(all.tiles, all.places, all.offsets);
    for (std::size_t i = 0; i < 3; ++i) {
      const std::int64_t begin = all.offsets[i], count = all.offsets[i + 1] - begin;
      const Tensor alone = encoder->forward(all.tiles.narrow(0, begin, count),
                                            all.places.narrow(0, begin, count), {0, count});
      EXPECT_LT(test::relative_error(together[static_cast<std::int64_t>(i)], alone[0]), 2e-5);
    }
  }
}

TEST(SlideEncoder, PlacesCountAndOrderDoesToo) {
  const at::NoGradGuard off;
  at::manual_seed(5);
  const auto encoder = *SlideEncoder::make(small());
  const Slides s = random_slides({0, 60});
  const Tensor out = encoder->forward(s.tiles, s.places, s.offsets);
  EXPECT_GT(test::relative_error(encoder->forward(s.tiles, s.places.flip(0), s.offsets), out),
            1e-3);
  // Another order is another function; the raster order makes any order one.
  const Tensor order = at::randperm(60, at::kLong);
  const auto ordered = [&](const Tensor& tiles, const Tensor& places) {
    const Tensor raster = raster_order(places);
    return encoder->forward(tiles.index_select(0, raster), places.index_select(0, raster),
                            s.offsets);
  };
  const Tensor tiles = s.tiles.index_select(0, order), places = s.places.index_select(0, order);
  EXPECT_GT(test::relative_error(encoder->forward(tiles, places, s.offsets), out), 1e-4);
  EXPECT_TRUE(test::same_bits(ordered(tiles, places), ordered(s.tiles, s.places)));
}

TEST(SlideEncoder, TilePositionsAreTheSinesOfColumnAndRow) {
  const Tensor places = at::tensor({3 * 256 + 5, 2 * 256 + 255, 0, 0}, at::kLong).view({2, 2});
  const auto got = tile_positions(places, 8);
  ASSERT_TRUE(got.ok());
  // D = 8: w = 1, 1/100; the row's part first.
  const Tensor want = at::tensor({std::sin(2.0), std::sin(0.02), std::cos(2.0), std::cos(0.02),
                                  std::sin(3.0), std::sin(0.03), std::cos(3.0), std::cos(0.03), 0.0,
                                  0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0},
                                 at::kDouble)
                          .view({2, 8});
  EXPECT_LT(test::relative_error(*got, want), 1e-7);
  // Row 1000 would be read as column 1 of the next row by a table.
  const Tensor far = at::tensor({0, 256 * 1000}, at::kLong).view({1, 2});
  EXPECT_NE(tile_positions(far, 8).status().message().find("1000"), std::string::npos);
  EXPECT_FALSE(tile_positions(places.to(at::kFloat), 8).ok());
}

TEST(SlideEncoder, EveryLayersStatesComeWithoutTheLastNorm) {
  const at::NoGradGuard off;
  at::manual_seed(5);
  const auto encoder = *SlideEncoder::make(small());
  const Slides s = random_slides({0, 12, 30});
  const auto states = encoder->layers(s.tiles, s.places, s.offsets);
  ASSERT_EQ(states.size(), 4u);
  for (const Tensor& x : states) EXPECT_EQ(x.sizes(), at::IntArrayRef({32, 32}));
  EXPECT_LT(test::relative_error(states[0][13], states[0][0]), 1e-7);  // both CLS
}

}  // namespace
}  // namespace everlong
