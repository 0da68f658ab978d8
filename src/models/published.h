// Folders that other programs wrote: their config.json, and where their files keep our parameters.
// Pure functions of JSON and names; reading and writing files is checkpoint.h's work.
//
// Our parameter names are the published ones (decoder.h), so writing a published folder is: the
// JSON of published_config() as config.json, and every parameter under its own name. Reading asks
// published_places() for older and newer layouts of the same numbers.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "models/config.h"

namespace everlong {

// The families, by the model_type of their config.json.
//   "llama"            transformers LlamaForCausalLM, either place of rope_theta
//   "transnormer"      TransNormerLLM as on its hub: TransnormerForCausalLM
//   "minimax"          transformers MiniMaxForCausalLM: layer_types, *_attn_alpha_factor, ...
//   "landmark_llama"   LLaMA with Landmark Attention, "landmark_gpt" lm_benchmark's GPTBase
//   "megalodon"        the ModelConf of Megalodon's published code
//   "minimax_text_01"  MiniMax-Text-01 and M1 as on their hub: attn_type_list, layernorm_*_alpha
const std::vector<std::string>& published_families();

// True for a config.json of somebody else: false for our own (model_type "everlong", or no
// model_type, no architectures and none of the families' telling keys).
bool is_published(const nlohmann::json& config);

// The model that a published config.json describes. The family is recognised by model_type, else by
// architectures, else by telling keys. Everything that would change the numbers is checked: a key
// that is not known, a bias, a scaled rotary embedding, another activation or quantised weights are
// refused with the key in the message. Token ids of special tokens and settings of training and of
// other programs' run time are known and not kept. The tokenizer of the result is "published": the
// tokenizer.json that came with it (data/tokenizer_json.h).
// Messages open with `place`.
Result<ModelConfig> config_from_published(const nlohmann::json& config, const std::string& place);

// The config.json that the family's own program reads as this model, without the dtype of the
// weights: add "torch_dtype" ("float32", "bfloat16", "float16"). Refused, with what stands in the
// way, when the family cannot say it: config_from_published() of the result is `config` again but
// for tokenizer and initializer_range.
Result<nlohmann::json> published_config(const ModelConfig& config, std::string_view family);

// The family to write when the user names none: the first of published_families() that can say it.
Result<std::string> family_of(const ModelConfig& config);

// Where a published file may hold one of our parameters.
struct PublishedPlace {
  std::string tensor;  // name in the file
  // Empty: the parameter is the whole tensor, with its shape. Else the shape [E, R, C] of a tensor
  // that packs many; the parameter [r, C] is rows [row, row + r) of matrix `expert`, which are
  // contiguous bytes from element (expert * R + row) * C on.
  std::vector<std::int64_t> packed_shape;
  std::int64_t expert = 0, row = 0;
};

// The places of a parameter (a name of Decoder::named_parameters()), in the order in which a reader
// tries them; a file has one of them. The first is the parameter's own name, whole: what we write
// and what transformers' save_pretrained writes. Others: experts packed as mlp.experts.gate_up_proj
// and mlp.experts.down_proj, their router mlp.gate.weight; a TransNormerLLM head that the file does
// not hold because it is the embedding.
std::vector<PublishedPlace> published_places(const ModelConfig& config,
                                             const std::string& parameter);

// Tensors of published files that no parameter holds and that a reader skips: what follows from the
// configuration (slope_rate, query_decay, key_decay, diagonal_decay, slopes, rotary inv_freq).
bool is_derived_tensor(std::string_view tensor);

}  // namespace everlong
