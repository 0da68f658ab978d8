// Bidirectional LongNet encoders of sets too large for dense attention: the Prov-GigaPath slide
// encoder (tiles of a pathology slide with their places) and LongViT (patches of a large image).
// Sources: prov-gigapath/prov-gigapath 09d8e87, gigapath/slide_encoder.py; microsoft/torchscale
// 4d1e0e8, examples/longvit; arXiv 2312.03558.
#pragma once
#include <optional>

#include "models/torchscale_layer.h"

namespace everlong {

struct SlideEncoderSettings {
  std::int64_t features = 1536;  // of a tile; LongViT: pixels of a patch, 3 p p
  std::int64_t hidden_size = 768, num_layers = 12, num_heads = 16, ffn_dim = 3072;
  std::vector<std::int64_t> segment_length, dilated_ratio;
  // Gradient with constant mixing weights, as the published training; else the exact one.
  bool detached = false;
  bool global_pool = false;  // the mean of the tiles instead of the CLS token
  double layer_eps = 1e-5, norm_eps = 1e-6;
  // Tile encoder: a CLS token in front, places as sines and cosines. LongViT: neither; instead a
  // learned vector for each of this many patches, patches as a convolution's weight [D, 3, p, p],
  // no norm behind the encoder, and the mean of all patches.
  std::int64_t image_patches = 0, patch_size = 0;
};

// gigapath_slide_enc12l768d: patterns from the largest slide, in pixels a side (262144), as the
// published code computes them.
SlideEncoderSettings gigapath_slide_encoder(std::int64_t largest_slide = 262144);
// LongViT for images of this many pixels a side: 1024, 4096, 8192, 16384 or 32768.
Result<SlideEncoderSettings> longvit(std::int64_t image_side);

// Places of tiles, int64 [n, 2] as (x, y) in pixels of the slide.
inline constexpr std::int64_t kTilePixels = 256, kTileGrid = 1000;

// [sin(gy w), cos(gy w), sin(gx w), cos(gx w)] of the tile's column and row gx, gy, w_j = 10000^(-j
// / (D / 4)): [n, D] fp32, computed and not looked up in a table of a million rows. Refuses places
// outside of the grid of 1000 x 1000 tiles.
Result<at::Tensor> tile_positions(const at::Tensor& places, std::int64_t hidden_size);
// Row by row, left to right: the order that tiles should be given in. The lattice is over the order
// of the sequence, so another order is another function. Int64 [n], stable.
at::Tensor raster_order(const at::Tensor& places);

// Parameters under the published names: cls_token, patch_embed.proj.*, encoder.layers.<i>..,
// encoder.layer_norm.*, norm.* (LongViT: pos_embed, patch_embed.proj.*, encoder.layers.<i>..,
// fc_norm.*). Weights are initialised from torch's global generator.
class SlideEncoder final : public torch::nn::Module {
 public:
  static Result<std::shared_ptr<SlideEncoder>> make(const SlideEncoderSettings& settings);

  // Several sets behind each other: tiles [n, features], set i owns rows [offsets[i], offsets[i +
  // 1]); places as above (LongViT: undefined, and every set has image_patches rows). Returns [sets,
  // D]: what `global_pool` says, behind the norm. No set sees another.
  at::Tensor forward(const at::Tensor& tiles, const at::Tensor& places,
                     const std::vector<std::int64_t>& offsets);
  // The embeddings and what each layer made of them, num_layers + 1 of [n + sets, D] (CLS in front
  // of each set): without the encoder's last norm, as all_layer_embed of the published code.
  std::vector<at::Tensor> layers(const at::Tensor& tiles, const at::Tensor& places,
                                 const std::vector<std::int64_t>& offsets);
  std::int64_t parameter_count() const;

 private:
  explicit SlideEncoder(const SlideEncoderSettings& settings) : settings_(settings) {}
  Status build();
  bool of_image() const { return settings_.image_patches > 0; }
  at::Tensor embed(const at::Tensor& tiles, const at::Tensor& places,
                   const std::vector<std::int64_t>& offsets) const;

  SlideEncoderSettings settings_;
  at::Tensor cls_, places_, patch_weight_, patch_bias_;
  std::vector<std::shared_ptr<Block>> layers_;
  std::shared_ptr<AffineNorm> encoder_norm_, norm_;
};

}  // namespace everlong
