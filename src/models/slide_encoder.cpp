#include "models/slide_encoder.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "core/offsets.h"
#include "layers/weights.h"

namespace everlong {
namespace {

using at::Tensor;

struct SlideGroup : torch::nn::Module {  // gives its children a name
  template <class Child>
  std::shared_ptr<Child> add(const std::string& name, std::shared_ptr<Child> child) {
    return register_module(name, std::move(child));
  }
  Tensor add_weight(const char* name, const Tensor& weight) {
    return register_parameter(name, weight);
  }
};

struct LongVit {
  std::int64_t side;
  std::vector<std::int64_t> segments;
};
const LongVit kLongVit[] = {{1024, {64, 128, 256, 512, 1024}},
                            {4096, {1024, 2048, 4096, 8192, 16384}},
                            {8192, {1024, 4096, 8192, 16384, 65536}},
                            {16384, {1024, 4096, 16384, 65536, 262144}},
                            {32768, {1024, 4096, 32768, 262144, 1048576}}};

}  // namespace

SlideEncoderSettings gigapath_slide_encoder(std::int64_t largest_slide) {
  SlideEncoderSettings s;
  s.dilated_ratio = {1, 2, 4, 8, 16};
  // Five points from 2^10 to the tiles of the largest slide, evenly in their logarithm.
  const double tiles = static_cast<double>(largest_slide / kTilePixels);
  const double last = std::floor(2 * std::log2(tiles));
  for (int i = 0; i < 5; ++i)
    s.segment_length.push_back(static_cast<std::int64_t>(std::exp2(10 + (last - 10) * i / 4)));
  return s;
}

Result<SlideEncoderSettings> longvit(std::int64_t image_side) {
  std::vector<std::string> sides;
  for (const LongVit& known : kLongVit) {
    sides.push_back(cat(known.side));
    if (known.side != image_side) continue;
    SlideEncoderSettings s;
    s.hidden_size = 384, s.ffn_dim = 1536;
    s.patch_size = 32;
    s.features = 3 * 32 * 32;
    s.image_patches = (image_side / 32) * (image_side / 32);
    s.segment_length = known.segments;
    s.dilated_ratio = {1, 2, 4, 8, 16};
    s.global_pool = true;
    return s;
  }
  return invalid_argument("LongViT for images of ", image_side,
                          " pixels a side; known: ", join(sides, ", "));
}

Result<Tensor> tile_positions(const Tensor& places, std::int64_t hidden_size) {
  if (places.dim() != 2 || places.size(1) != 2 || places.scalar_type() != at::kLong)
    return invalid_argument("tile places are ", places.scalar_type(), " ", places.sizes(),
                            "; int64 [n, 2], x and y in pixels, is needed");
  if (hidden_size % 4 != 0)
    return invalid_argument("hidden_size = ", hidden_size,
                            "; tile positions have four parts: a multiple of 4");
  const Tensor grid = places.floor_divide(kTilePixels);
  if (grid.numel() > 0 &&
      (grid.min().item<std::int64_t>() < 0 || grid.max().item<std::int64_t>() >= kTileGrid))
    return invalid_argument("a tile lies at column or row ", grid.max().item<std::int64_t>(),
                            " (least: ", grid.min().item<std::int64_t>(), ") of a grid of ",
                            kTileGrid, "; places are pixels, ", kTilePixels, " a tile");
  const std::int64_t quarter = hidden_size / 4;
  const Tensor w =
      at::pow(10000.0, at::arange(quarter, at::kDouble).div(-static_cast<double>(quarter)));
  const auto turns = [&](int column) {
    return grid.select(1, column).to(at::kDouble).unsqueeze(1).mul(w);
  };
  const Tensor x = turns(0), y = turns(1);
  return at::cat({y.sin(), y.cos(), x.sin(), x.cos()}, 1).to(at::kFloat);
}

Tensor raster_order(const Tensor& places) {
  const Tensor grid = places.floor_divide(kTilePixels);
  return (grid.select(1, 1) * (std::int64_t{1} << 31) + grid.select(1, 0))
      .argsort(/*stable=*/true, 0, false);
}

Result<std::shared_ptr<SlideEncoder>> SlideEncoder::make(const SlideEncoderSettings& settings) {
  std::shared_ptr<SlideEncoder> encoder(new SlideEncoder(settings));
  EVERLONG_RETURN_IF_ERROR(encoder->build());
  return encoder;
}

Status SlideEncoder::build() {
  const std::int64_t D = settings_.hidden_size;
  EVERLONG_ASSIGN(auto attention,
                  longnet::read_settings(
                      {.hidden_size = D,
                       .num_layers = settings_.num_layers,
                       .settings = {{"form", "torchscale"},
                                    {"num_heads", settings_.num_heads},
                                    {"segment_length", settings_.segment_length},
                                    {"dilated_ratio", settings_.dilated_ratio},
                                    {"norm_eps", settings_.layer_eps},
                                    {"mixing_grad", settings_.detached ? "detached" : "joint"},
                                    {"causal", false},
                                    {"pad", "phantom"}}}));
  constexpr double kDeviation = 0.02;
  if (of_image())
    places_ =
        register_parameter("pos_embed", normal_weight({1, settings_.image_patches, D}, kDeviation));
  else
    cls_ = register_parameter("cls_token", normal_weight({1, 1, D}, kDeviation));
  auto proj = register_module("patch_embed", std::make_shared<SlideGroup>())
                  ->add("proj", std::make_shared<SlideGroup>());
  const double deviation = 1 / std::sqrt(static_cast<double>(settings_.features));
  const std::int64_t p = settings_.patch_size;
  patch_weight_ =
      proj->add_weight("weight", of_image() ? normal_weight({D, 3, p, p}, deviation)
                                            : normal_weight({D, settings_.features}, deviation));
  patch_bias_ = proj->add_weight("bias", constant_weight({D}, 0));
  auto encoder = register_module("encoder", std::make_shared<SlideGroup>());
  auto layers = encoder->add("layers", std::make_shared<SlideGroup>());
  for (std::int64_t i = 0; i < settings_.num_layers; ++i)
    layers_.push_back(
        layers->add(std::to_string(i), std::make_shared<TorchscaleLayer>(TorchscaleSettings{
                                           .attention = attention, .ffn_dim = settings_.ffn_dim})));
  if (!of_image())
    encoder_norm_ =
        encoder->add("layer_norm", std::make_shared<AffineNorm>(D, settings_.layer_eps));
  norm_ = register_module(of_image() ? "fc_norm" : "norm",
                          std::make_shared<AffineNorm>(D, settings_.norm_eps));
  return {};
}

std::int64_t SlideEncoder::parameter_count() const {
  std::int64_t total = 0;
  for (const auto& parameter : parameters()) total += parameter.numel();
  return total;
}

Tensor SlideEncoder::embed(const Tensor& tiles, const Tensor& places,
                           const std::vector<std::int64_t>& offsets) const {
  TORCH_CHECK_VALUE(tiles.dim() == 2 && tiles.size(1) == settings_.features,
                    "slide encoder: tiles have shape ", tiles.sizes(), "; [n, ", settings_.features,
                    "] is needed");
  throw_if_error(check_offsets(offsets, 1, tiles.size(0)).at("slide encoder"));
  TORCH_CHECK_VALUE(!offsets.empty(), "slide encoder: offsets are needed: [0, n] for one set");
  const Tensor x = at::linear(tiles, patch_weight_.flatten(1), patch_bias_);
  std::vector<Tensor> rows;
  if (of_image()) {
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
      TORCH_CHECK_VALUE(offsets[i + 1] - offsets[i] == settings_.image_patches,
                        "slide encoder: image ", i, " has ", offsets[i + 1] - offsets[i],
                        " patches; ", settings_.image_patches, " are needed");
      rows.push_back(x.narrow(0, offsets[i], settings_.image_patches) + places_[0]);
    }
    return at::cat(rows, 0);
  }
  TORCH_CHECK_VALUE(places.defined() && places.size(0) == tiles.size(0),
                    "slide encoder: every tile needs a place");
  auto positions = tile_positions(places.cpu(), settings_.hidden_size);
  throw_if_error(positions.status());
  const Tensor placed = x + positions->to(x.options());
  for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
    rows.push_back(cls_[0]);  // its position is zero
    rows.push_back(placed.narrow(0, offsets[i], offsets[i + 1] - offsets[i]));
  }
  return at::cat(rows, 0);
}

std::vector<Tensor> SlideEncoder::layers(const Tensor& tiles, const Tensor& places,
                                         const std::vector<std::int64_t>& offsets) {
  std::vector<Tensor> all = {embed(tiles, places, offsets)};
  Sequences sequences{.offsets = offsets};
  if (!of_image())
    for (std::size_t i = 0; i < offsets.size(); ++i)
      sequences.offsets[i] += static_cast<std::int64_t>(i);
  for (const auto& layer : layers_)
    all.push_back(layer->forward(all.back().unsqueeze(0), sequences, nullptr).squeeze(0));
  return all;
}

Tensor SlideEncoder::forward(const Tensor& tiles, const Tensor& places,
                             const std::vector<std::int64_t>& offsets) {
  Tensor x = layers(tiles, places, offsets).back();
  if (encoder_norm_ != nullptr) x = encoder_norm_->forward(x);
  std::vector<Tensor> pooled;
  const std::int64_t front = of_image() ? 0 : 1;  // the CLS token
  for (std::size_t i = 0; i + 1 < offsets.size(); ++i) {
    const std::int64_t begin = offsets[i] + static_cast<std::int64_t>(i) * front;
    const std::int64_t count = offsets[i + 1] - offsets[i];
    TORCH_CHECK_VALUE(count > 0 || !settings_.global_pool, "slide encoder: set ", i,
                      " is empty and has no mean; leave it out");
    pooled.push_back(settings_.global_pool ? x.narrow(0, begin + front, count).mean(0) : x[begin]);
  }
  return norm_->forward(at::stack(pooled));
}

}  // namespace everlong
