#include "eval/attention_reach.h"

#include <set>

#include "mechanisms/longnet/layer.h"
#include "mechanisms/softmax/layer.h"

namespace everlong {
namespace {

using Reached = std::vector<bool>;

// A query takes what any key of its segment on its own lattice holds, up to itself.
void through_lattice(const longnet::Geometry& geometry, std::size_t pattern, std::int64_t offset,
                     std::int64_t place, const Reached& before, Reached& after) {
  const std::int64_t w = geometry.patterns[pattern].segment, r = geometry.patterns[pattern].ratio;
  bool held = false;
  for (std::int64_t at = place; at < std::ssize(before); ++at) {
    const std::int64_t within = at % w;
    if (within == 0) held = false;
    if (within % r != offset) continue;
    const auto i = static_cast<std::size_t>(at);
    held = held || before[i];
    if (held && at >= geometry.active_from(pattern)) after[i] = true;
  }
}

void through_window(std::int64_t window, std::int64_t place, const Reached& before,
                    Reached& after) {
  std::int64_t newest = -1;
  for (std::int64_t at = place; at < std::ssize(before); ++at) {
    const auto i = static_cast<std::size_t>(at);
    if (before[i]) newest = at;
    if (newest >= 0 && (window == 0 || at - newest < window)) after[i] = true;
  }
}

}  // namespace

Result<AttentionReach> AttentionReach::of(const ModelConfig& config) {
  AttentionReach reach;
  for (std::int64_t i = 0; i < config.num_layers(); ++i) {
    const std::string& name = config.layer_types[static_cast<std::size_t>(i)];
    const bool lattice = name == "longnet";
    if ((!lattice && name != "softmax") || config.block == "torchscale")
      return unsupported("layer ", i, " is ", name, " in a block of kind ", config.block,
                         "; reach is computed for longnet and softmax attention in other blocks "
                         "than torchscale");
    const auto settings = config.mechanisms.find(name);
    LayerSpec spec;
    spec.hidden_size = config.hidden_size;
    spec.layer_index = i;
    spec.num_layers = config.num_layers();
    spec.norm_eps = config.norm_eps;
    spec.settings = nlohmann::json::object();
    if (settings != config.mechanisms.end()) spec.settings = settings->second;
    Layer layer;
    layer.lattice = lattice;
    if (lattice) {
      EVERLONG_ASSIGN(const auto read, longnet::read_settings(spec));
      if (!read.geometry.causal)
        return unsupported("layer ", i, " is bidirectional; reach is of causal attention");
      layer.geometry = read.geometry;
      layer.kv_heads = read.num_kv_heads;
    } else {
      EVERLONG_ASSIGN(const auto read, softmax::read_settings(spec));
      layer.window = read.window;
    }
    reach.layers_.push_back(std::move(layer));
  }
  return reach;
}

std::vector<std::int64_t> AttentionReach::layers_from(std::int64_t place,
                                                      std::int64_t tokens) const {
  const auto size = static_cast<std::size_t>(tokens);
  std::vector<std::int64_t> passed(size, -1);
  Reached reached(size, false);
  passed[static_cast<std::size_t>(place)] = 0;
  reached[static_cast<std::size_t>(place)] = true;
  for (std::size_t n = 0; n < layers_.size(); ++n) {
    const Layer& layer = layers_[n];
    Reached after = reached;  // what a position holds it keeps: the residual stream
    if (!layer.lattice) through_window(layer.window, place, reached, after);
    for (std::size_t i = 0; layer.lattice && i < layer.geometry.patterns.size(); ++i) {
      std::set<std::int64_t> offsets;
      for (std::int64_t head = 0; head < layer.kv_heads; ++head)
        offsets.insert(longnet::offset_of(layer.geometry.offset_rule, head, layer.kv_heads,
                                          layer.geometry.patterns[i].ratio));
      for (const std::int64_t offset : offsets)
        through_lattice(layer.geometry, i, offset, place, reached, after);
    }
    for (std::size_t at = 0; at < size; ++at)
      if (after[at] && !reached[at]) passed[at] = static_cast<std::int64_t>(n) + 1;
    reached = std::move(after);
  }
  return passed;
}

}  // namespace everlong
