#include "models/published.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>

#include "models/published_family.h"

namespace everlong {
namespace {

using nlohmann::json;

struct Known {
  std::string_view word;
  Family family;
};
// What config.json files call the families: model_type, and the class in architectures.
constexpr Known kModelTypes[] = {{"llama", Family::kLlama},
                                 {"transnormer", Family::kTransnormer},
                                 {"minimax", Family::kMinimax},
                                 {"minimax_text_01", Family::kMinimaxText01},
                                 {"minimax_m1", Family::kMinimaxText01},
                                 {"llama_with_landmark", Family::kLandmarkLlama},
                                 {"megalodon", Family::kMegalodon}};
constexpr Known kArchitectures[] = {{"LlamaForCausalLM", Family::kLlama},
                                    {"TransnormerForCausalLM", Family::kTransnormer},
                                    {"MiniMaxForCausalLM", Family::kMinimax},
                                    {"MiniMaxText01ForCausalLM", Family::kMinimaxText01},
                                    {"MiniMaxM1ForCausalLM", Family::kMinimaxText01}};
// Keys that one family alone has, for files that name neither.
constexpr Known kTellingKeys[] = {{"decoder_embed_dim", Family::kTransnormer},
                                  {"attn_type_list", Family::kMinimaxText01},
                                  {"linear_attn_alpha_factor", Family::kMinimax},
                                  {"rms_norm_eps", Family::kLlama},
                                  {"n_embd", Family::kLandmarkGpt},
                                  {"cema_ndim", Family::kMegalodon}};
// A LLaMA that has any of these is one with landmarks.
constexpr const char* kTellsLandmarks[] = {"mem_id", "mem_freq", "mem_top_k"};
constexpr std::string_view kOwn = "everlong";

template <std::size_t N>
std::optional<Family> look_up(const Known (&table)[N], const json& word) {
  for (const Known& known : table)
    if (word == known.word) return known.family;
  return std::nullopt;
}

const json* member(const json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

const json* first_architecture(const json& config) {
  const json* list = member(config, "architectures");
  return list != nullptr && list->is_array() && !list->empty() ? &list->front() : nullptr;
}

// What stands before a parameter's own part: "model.layers.3." of
// "model.layers.3.block_sparse_moe.gate.weight".
constexpr std::string_view kExperts = "block_sparse_moe.";

// e of "experts.<e>.<rest>", with the rest.
std::optional<std::pair<std::int64_t, std::string_view>> split_expert(std::string_view name) {
  constexpr std::string_view kPrefix = "experts.";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  name.remove_prefix(kPrefix.size());
  std::int64_t expert = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), expert);
  const auto digits = static_cast<std::size_t>(end - name.data());
  if (error != std::errc() || digits >= name.size() || name[digits] != '.') return std::nullopt;
  return std::pair{expert, name.substr(digits + 1)};
}

// Experts as newer transformers hold them in memory: mlp.experts.gate_up_proj [E, 2 I, D], w1 above
// w3, and mlp.experts.down_proj [E, D, I].
std::optional<PublishedPlace> packed_place(const ModelConfig& config, std::string_view parameter) {
  const auto begin = parameter.find(kExperts);
  if (config.num_experts == 0 || begin == std::string_view::npos) return std::nullopt;
  const std::string block(parameter.substr(0, begin));
  const std::string_view rest = parameter.substr(begin + kExperts.size());
  if (rest == "gate.weight") return PublishedPlace{block + "mlp.gate.weight", {}, 0, 0};
  const auto expert = split_expert(rest);
  if (!expert) return std::nullopt;
  const std::int64_t E = config.num_experts, I = config.intermediate_size, D = config.hidden_size;
  const auto& [e, matrix] = *expert;
  const std::string experts = block + "mlp.experts.";
  if (matrix == "w1.weight") return PublishedPlace{experts + "gate_up_proj", {E, 2 * I, D}, e, 0};
  if (matrix == "w3.weight") return PublishedPlace{experts + "gate_up_proj", {E, 2 * I, D}, e, I};
  if (matrix == "w2.weight") return PublishedPlace{experts + "down_proj", {E, D, I}, e, 0};
  return std::nullopt;
}

}  // namespace

const std::vector<std::string>& published_families() {
  static const std::vector<std::string> kNames = {
      "llama",          "transnormer",  "minimax",  "minimax_text_01",
      "landmark_llama", "landmark_gpt", "megalodon"};
  return kNames;
}

Result<Family> parse_family(std::string_view name) {
  const auto& names = published_families();
  const auto found = std::ranges::find(names, name);
  if (found != names.end()) return static_cast<Family>(found - names.begin());
  const std::string near = nearest(name, names);
  return invalid_argument("\"", name, "\" is not a published family; known: ", join(names, ", "),
                          near.empty() ? "" : cat(". Did you mean \"", near, "\"?"));
}

namespace {

Result<Family> recognise_plainly(const json& config) {
  if (const json* type = member(config, "model_type")) {
    if (const auto family = look_up(kModelTypes, *type)) return *family;
    if (*type == "bailing_moe_linear")
      return unsupported(
          "model_type = \"bailing_moe_linear\" (Ling and Ring linear) is not offered: ",
          "how its experts are routed is in no source that this program was made from");
    return unsupported("model_type = ", type->dump(), " is not known; allowed: ", kOwn, ", ",
                       join(published_families(), ", "), ", minimax_m1");
  }
  if (const json* architecture = first_architecture(config)) {
    if (const auto family = look_up(kArchitectures, *architecture)) return *family;
    return unsupported("architectures = [", architecture->dump(),
                       "] is not known, and model_type is ", "missing; give model_type, one of ",
                       join(published_families(), ", "));
  }
  for (const Known& known : kTellingKeys)
    if (config.contains(known.word)) return known.family;
  return unsupported("is the config.json of no family that this program knows (",
                     join(published_families(), ", "), "); give model_type");
}

}  // namespace

Result<Family> recognise(const json& config) {
  EVERLONG_ASSIGN(const Family family, recognise_plainly(config));
  const auto has = [&](const char* key) { return config.contains(key); };
  return family == Family::kLlama && std::ranges::any_of(kTellsLandmarks, has)
             ? Family::kLandmarkLlama
             : family;
}

bool is_published(const json& config) {
  if (!config.is_object()) return false;
  if (const json* type = member(config, "model_type")) return *type != kOwn;
  if (const json* architecture = first_architecture(config)) return *architecture != kOwn;
  return std::ranges::any_of(kTellingKeys,
                             [&](const Known& known) { return config.contains(known.word); });
}

std::vector<PublishedPlace> published_places(const ModelConfig& config,
                                             const std::string& parameter) {
  std::vector<PublishedPlace> places = {{parameter, {}, 0, 0}};
  if (auto packed = packed_place(config, parameter)) places.push_back(*std::move(packed));
  if (config.block == "transnormer" && parameter == "lm_head.weight")
    places.push_back({"model.embed_tokens.weight", {}, 0, 0});
  return places;
}

bool is_derived_tensor(std::string_view tensor) {
  constexpr std::array<std::string_view, 4> kDerived = {"query_decay", "key_decay",
                                                        "diagonal_decay", "inv_freq"};
  const std::string_view last = tensor.substr(tensor.rfind('.') + 1);  // npos + 1 is 0
  return last.find("slope") != std::string_view::npos ||
         std::ranges::find(kDerived, last) != kDerived.end() || tensor.ends_with(".attn.bias") ||
         tensor.ends_with("wpe.freqs");  // lm_benchmark: the mask and the angles
}

}  // namespace everlong
