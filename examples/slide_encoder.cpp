// Encodes sets of tiles, as a pathology slide has them, with the bidirectional LongNet encoder: sets
// of different sizes in one padded batch with a mask. Tiles are synthetic, weights random.
//
//   slide_encoder [TILES...]        sizes of the sets; default 37 5 120
//
// Order: dilation is over the sequence, so another order is another function. Tiles are sorted by
// place, row by row and left to right, whatever order they come in. Padding and the other sets must
// not matter: the program measures both and exits with 1 where they do.
//
// Uses the engine's own libraries, not the installed package: built in the main tree.
#include "models/slide_encoder.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <iomanip>
#include <iostream>
#include <limits>

namespace {

using at::Tensor;

struct Batch {
  Tensor tiles;   // [sets, longest, features]; anything where the mask is false
  Tensor places;  // int64 [sets, longest, 2], x and y in pixels
  Tensor mask;    // bool [sets, longest]: where there is a tile
};

// Places all different, in no order; the padding is NaN, so that whoever reads it is found out.
Batch synthetic(const std::vector<std::int64_t>& sizes, std::int64_t features) {
  const auto sets = static_cast<std::int64_t>(sizes.size());
  const std::int64_t longest = *std::max_element(sizes.begin(), sizes.end());
  Batch batch{at::full({sets, longest, features}, std::numeric_limits<float>::quiet_NaN()),
              at::full({sets, longest, 2}, -1, at::kLong), at::zeros({sets, longest}, at::kBool)};
  for (std::int64_t i = 0; i < sets; ++i) {
    const std::int64_t size = sizes[static_cast<std::size_t>(i)], side = 400;
    const Tensor cells = at::randperm(side * side, at::kLong).narrow(0, 0, size);
    const Tensor places = at::stack({cells % side, cells.floor_divide(side)}, 1);
    batch.places[i].narrow(0, 0, size).copy_(places * everlong::kTilePixels);
    batch.tiles[i].narrow(0, 0, size).copy_(at::randn({size, features}));
    batch.mask[i].narrow(0, 0, size).fill_(true);
  }
  return batch;
}

// [sets, hidden_size]. Takes the tiles that the mask shows, each set in raster order; none is
// computed that is not there.
Tensor encode(everlong::SlideEncoder& encoder, const Batch& batch) {
  std::vector<Tensor> tiles, places;
  std::vector<std::int64_t> offsets = {0};
  for (std::int64_t i = 0; i < batch.mask.size(0); ++i) {
    const Tensor there = batch.mask[i].nonzero().squeeze(1);
    const Tensor place = batch.places[i].index_select(0, there);
    const Tensor order = everlong::raster_order(place);
    tiles.push_back(batch.tiles[i].index_select(0, there).index_select(0, order));
    places.push_back(place.index_select(0, order));
    offsets.push_back(offsets.back() + there.size(0));
  }
  return encoder.forward(at::cat(tiles), at::cat(places), offsets);
}

Batch one_set(const Batch& batch, std::int64_t set, const Tensor& order) {
  return {batch.tiles[set].index_select(0, order).unsqueeze(0),
          batch.places[set].index_select(0, order).unsqueeze(0),
          batch.mask[set].index_select(0, order).unsqueeze(0)};
}

double difference(const Tensor& a, const Tensor& b) {
  return ((a - b).abs().max() / b.abs().max()).item<double>();
}

}  // namespace

int main(int argc, char** argv) try {
  std::vector<std::int64_t> sizes;
  for (int i = 1; i < argc; ++i) sizes.push_back(std::stoll(argv[i]));
  if (sizes.empty()) sizes = {37, 5, 120};
  for (const std::int64_t size : sizes)
    if (size < 1 || size > 160'000) throw std::runtime_error("a set has 1 to 160000 tiles");

  const at::NoGradGuard inference;
  at::manual_seed(1);
  everlong::SlideEncoderSettings settings;
  settings.features = 96, settings.hidden_size = 64, settings.num_layers = 3;
  settings.num_heads = 4, settings.ffn_dim = 192;
  settings.segment_length = {16, 64, 256};
  settings.dilated_ratio = {1, 2, 4};
  const auto made = everlong::SlideEncoder::make(settings);
  if (!made.ok()) throw std::runtime_error(made.status().message());
  everlong::SlideEncoder& encoder = **made;

  const Batch batch = synthetic(sizes, settings.features);
  const Tensor all = encode(encoder, batch);
  const Tensor unit = all / all.norm(2, 1, true);
  std::cout << sizes.size() << " sets padded to " << batch.mask.size(1) << " tiles, "
            << encoder.parameter_count() << " parameters\n"
            << "largest difference from the set's result in the batch, over its largest value:\n"
            << "set  tiles     alone  shuffled  unsorted  | likeness to set 0, 1, ..\n";
  bool passed = all.isfinite().all().item<bool>();
  for (std::int64_t i = 0; i < all.size(0); ++i) {
    const std::int64_t size = sizes[static_cast<std::size_t>(i)];
    const Tensor given = at::arange(size, at::kLong), shuffled = at::randperm(size, at::kLong);
    // Neither neighbours nor padding; then the same tiles in another order.
    const double alone = difference(encode(encoder, one_set(batch, i, given))[0], all[i]);
    const double sorted = difference(encode(encoder, one_set(batch, i, shuffled))[0], all[i]);
    // Not sorted: another function.
    const Batch loose = one_set(batch, i, shuffled);
    const double unsorted =
        difference(encoder.forward(loose.tiles[0], loose.places[0], {0, size})[0], all[i]);
    // fp32 sums in blocks that a batch cuts in other places: 1e-6 is usual.
    passed = passed && alone < 2e-5 && sorted < 2e-5;
    std::cout << std::setw(3) << i << std::setw(7) << size << std::scientific
              << std::setprecision(1) << std::setw(10) << alone << std::setw(10) << sorted
              << std::setw(10) << unsorted << "  |" << std::fixed << std::setprecision(3);
    for (std::int64_t j = 0; j < all.size(0); ++j)
      std::cout << std::setw(7) << (unit[i] * unit[j]).sum().item<double>();
    std::cout << "\n";
  }
  std::cout << (passed ? "each set is read by itself, and padding is not read\n"
                       : "WRONG: a set depends on its neighbours, its padding or its order\n");
  return passed ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "slide_encoder: " << error.what() << "\n";
  return 1;
}
