// The two published kinds of models with Landmark Attention (epfml/landmark-attention).
#pragma once
#include "models/config.h"

namespace everlong {

// "landmark_llama": a LLaMA config.json with the keys of landmark models, of which either set is
// read: mem_id, mem_freq, include_landmark_in_loss, train_context_length (the authors'), mem_top_k,
// mem_max_seq_len, mem_max_cache_size (models of others). What is absent is as in the released 7B:
// 32001, 50, true, 5 blocks.
Result<ModelConfig> read_landmark_llama(const nlohmann::json& object, const std::string& place);
Result<nlohmann::json> write_landmark_llama(const ModelConfig& config);

// "landmark_gpt": the options of lm_benchmark's GPTBase, under their names there.
Result<ModelConfig> read_landmark_gpt(const nlohmann::json& object, const std::string& place);
Result<nlohmann::json> write_landmark_gpt(const ModelConfig& config);

}  // namespace everlong
