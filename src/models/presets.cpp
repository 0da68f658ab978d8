#include "models/presets.h"

#include "models/published.h"

namespace everlong {
namespace {

// The sizes that the authors count (0.39, 1.0 and 6.8 billion) hold the embedding once, so the
// heads are tied.
constexpr std::string_view kTransnormer385M = R"({
  "model_type": "transnormer", "vocab_size": 50272, "decoder_embed_dim": 1024, "decoder_layers": 24,
  "decoder_attention_heads": 8, "hidden_dim": 1024, "glu_dim": 2816, "linear_act_fun": "silu",
  "linear_use_lrpe_list": [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
  "norm_type": "simplermsnorm", "no_scale_embedding": false, "bias": false,
  "tie_word_embeddings": true})";
constexpr std::string_view kTransnormer1B = R"({
  "model_type": "transnormer", "vocab_size": 64000, "decoder_embed_dim": 2048, "decoder_layers": 16,
  "decoder_attention_heads": 16, "hidden_dim": 2048, "glu_dim": 5632, "linear_act_fun": "silu",
  "linear_use_lrpe_list": [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
  "norm_type": "simplermsnorm", "no_scale_embedding": false, "bias": false,
  "tie_word_embeddings": true})";
constexpr std::string_view kTransnormer7B = R"({
  "model_type": "transnormer", "vocab_size": 64000, "decoder_embed_dim": 4096, "decoder_layers": 30,
  "decoder_attention_heads": 32, "hidden_dim": 4096, "glu_dim": 11008, "linear_act_fun": "silu",
  "linear_use_lrpe_list": [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                           0, 0, 0, 0, 0, 0],
  "norm_type": "simplermsnorm", "no_scale_embedding": true, "bias": false,
  "tie_word_embeddings": true})";
constexpr std::string_view kLlama7B = R"({
  "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
  "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0})";
constexpr std::string_view kLlama3_8B = R"({
  "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
  "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
  "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0})";
constexpr std::string_view kLlama2_70B = R"({
  "model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672,
  "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
  "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0})";
// Every eighth layer is softmax; alpha is (2 * 80)^(1/4).
constexpr std::string_view kMinimaxText01 = R"({
  "model_type": "minimax_text_01", "vocab_size": 200064, "hidden_size": 6144,
  "intermediate_size": 9216, "num_hidden_layers": 80, "num_attention_heads": 64,
  "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64, "rope_theta": 10000000,
  "num_local_experts": 32, "num_experts_per_tok": 2, "shared_intermediate_size": 0,
  "rms_norm_eps": 1e-5, "hidden_act": "silu", "postnorm": true,
  "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1,
                     0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1,
                     0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1,
                     0, 0, 0, 0, 0, 0, 0, 1],
  "layernorm_full_attention_alpha": 3.5565588200778455, "layernorm_full_attention_beta": 1.0,
  "layernorm_linear_attention_alpha": 3.5565588200778455, "layernorm_linear_attention_beta": 1.0,
  "layernorm_mlp_alpha": 3.5565588200778455, "layernorm_mlp_beta": 1.0})";
// Of the published model/ config registry; the vocabulary is Llama 2's. The paper's 7B is mega-7.3b
// with chunks of 4096 tokens and a rotary base of 1e5.
constexpr std::string_view kMega200M = R"({
  "model_type": "megalodon", "num_layers": 12, "model_dim": 1024, "num_heads": 1, "z_dim": 256,
  "value_dim": 2048, "ffn_hidden_dim": 2560, "swiglu": false, "cema_ndim": 16, "chunk_size": 2048,
  "norm_num_groups": 32, "norm_eps": 1e-5, "vocab_size": 32000, "share_emb": false,
  "scale_emb": false})";
constexpr std::string_view kMega1_3B = R"({
  "model_type": "megalodon", "num_layers": 24, "model_dim": 2048, "num_heads": 2, "z_dim": 512,
  "value_dim": 4096, "ffn_hidden_dim": 4864, "swiglu": false, "cema_ndim": 16, "chunk_size": 2048,
  "norm_num_groups": 64, "norm_eps": 1e-5, "vocab_size": 32000, "share_emb": false,
  "scale_emb": false})";
constexpr std::string_view kMega1_3BPg19 = R"({
  "model_type": "megalodon", "num_layers": 24, "model_dim": 2048, "num_heads": 2, "z_dim": 512,
  "value_dim": 4096, "ffn_hidden_dim": 3584, "swiglu": true, "cema_ndim": 16, "chunk_size": 2048,
  "norm_num_groups": 64, "norm_eps": 1e-5, "vocab_size": 32000, "share_emb": true,
  "scale_emb": true})";
constexpr std::string_view kMega7_1B = R"({
  "model_type": "megalodon", "num_layers": 32, "model_dim": 4096, "num_heads": 4, "z_dim": 1024,
  "value_dim": 8192, "ffn_hidden_dim": 11264, "swiglu": false, "cema_ndim": 16, "chunk_size": 2048,
  "norm_num_groups": 64, "norm_eps": 1e-5, "vocab_size": 32000, "share_emb": false,
  "scale_emb": false})";
constexpr std::string_view kMega7_3B = R"({
  "model_type": "megalodon", "num_layers": 32, "model_dim": 4096, "num_heads": 4, "z_dim": 1024,
  "value_dim": 8192, "ffn_hidden_dim": 8192, "swiglu": true, "cema_ndim": 16, "chunk_size": 2048,
  "norm_num_groups": 64, "norm_eps": 1e-5, "vocab_size": 32000, "share_emb": false,
  "scale_emb": false})";

constexpr Preset kPresets[] = {
    {"transnormer-385m", "2405.17381 (ablations: vocabulary 50272) and the hub's class",
     kTransnormer385M},
    {"transnormer-1b", "hub TransNormerLLM-1B", kTransnormer1B},
    {"transnormer-7b", "hub TransNormerLLM-7B", kTransnormer7B},
    {"llama-7b", "2302.13971", kLlama7B},
    {"llama-3-8b", "2407.21783", kLlama3_8B},
    {"llama-2-70b", "2307.09288", kLlama2_70B},
    {"minimax-text-01", "2501.08313 and hub MiniMax-Text-01", kMinimaxText01},
    {"mega-200m", "2404.08801's published code: mega200M", kMega200M},
    {"mega-1.3b", "2404.08801's published code: mega1.3B", kMega1_3B},
    {"mega-1.3b-pg19", "2404.08801's published code: mega1.3B_pg19", kMega1_3BPg19},
    {"mega-7.1b", "2404.08801's published code: mega7.1B", kMega7_1B},
    {"mega-7.3b", "2404.08801's published code: mega7.3B", kMega7_3B},
};

}  // namespace

std::span<const Preset> presets() { return kPresets; }

Result<ModelConfig> preset(std::string_view name) {
  std::vector<std::string> names;
  for (const Preset& known : kPresets) {
    names.emplace_back(known.name);
    if (known.name != name) continue;
    const auto json = nlohmann::json::parse(known.json, nullptr, /*allow_exceptions=*/false);
    return config_from_published(json, cat("preset ", name));
  }
  const std::string near = nearest(name, names);
  return invalid_argument("\"", name, "\" is not a preset; known: ", join(names, ", "),
                          near.empty() ? "" : cat(". Did you mean \"", near, "\"?"));
}

}  // namespace everlong
