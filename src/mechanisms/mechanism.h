// The descriptor of a room, and the table of them all. docs/adding_a_mechanism.md walks through it.
#pragma once
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "layers/mixer.h"
#include "ops/operator.h"

namespace everlong {

struct LayerSpec {
  std::int64_t hidden_size = 0;
  std::int64_t layer_index = 0, num_layers = 1;  // absolute: other mechanisms' layers count too
  double norm_eps = 1e-6;
  nlohmann::json settings;  // the room's object in config.json
};

// A law or feature that the room does not offer, and why. What is not declared here must hold.
struct Lack {
  std::string what;  // "bounded_state", "initial_state", "varlen", "cuda", "bf16"
  std::string why;
};

struct Mechanism {
  std::string name;     // the folder, the namespace, the word in layer_types
  std::string title;    // "Lightning Attention-2"
  std::string source;   // "arXiv 2401.04658"
  std::string carries;  // what goes from token to token, in a few words
  std::vector<Lack> lacks;
  std::vector<const Operator*> operators;
  // Settings that say where and when things lie while a model runs, and change neither its weights
  // nor what its streams carry, but for rounding: a stream file of the model is of it without them.
  std::vector<std::string> running_settings = {};
  void (*register_schemas)() = nullptr;  // its operators in torch's dispatcher; none: not there

  // Settings that make a small valid layer of this width: what the laws and the scaffolding use.
  nlohmann::json (*example_settings)(std::int64_t hidden_size) = nullptr;
  // Reads and checks the settings (unknown keys are refused), then builds the layer with
  // initialised weights.
  Result<std::shared_ptr<Mixer>> (*make_layer)(const LayerSpec& spec) = nullptr;

  bool has(std::string_view feature) const;  // not listed under lacks
};

std::span<const Mechanism* const> mechanisms();
// Puts the operators of all rooms into torch's dispatcher, namespace "everlong". Again: no effect.
// Thread safe.
void register_torch_operators();
// The room of that name, or a message that lists the names and guesses.
Result<const Mechanism*> find_mechanism(std::string_view name);

}  // namespace everlong
