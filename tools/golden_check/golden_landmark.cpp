// Blocks and models with Landmark Attention: trained on dense windows, read in chunks with a cache.
#include <ATen/ATen.h>

#include <algorithm>

#include "golden_kinds.h"
#include "mechanisms/landmark/layer.h"
#include "models/checkpoint.h"

namespace everlong::golden {
namespace {

using landmark::LandmarkAttention;
using nlohmann::json;

Verdict failed(std::string detail) { return {Outcome::kFailed, std::move(detail)}; }

const at::Tensor* input(const Case& wanted, const std::string& name) {
  const auto found = wanted.call.inputs.find(name);
  return found == wanted.call.inputs.end() ? nullptr : &found->second;
}

// The length of the blocks where landmarks are regular from the first token on; else 0.
std::int64_t regular_block(const at::Tensor& marks) {
  const at::Tensor first = marks.select(0, 0).nonzero();
  if (first.size(0) == 0) return 0;
  const std::int64_t block = first[0][0].item<std::int64_t>() + 1;
  if (block < 2) return 0;
  const auto regular = landmark::regular_landmarks(0, marks.size(1), block);
  return marks.eq(at::tensor(at::ArrayRef<std::uint8_t>(regular), at::kByte)).all().item<bool>()
             ? block
             : 0;
}

LandmarkAttention& attention_of(Mixer& mixer) { return dynamic_cast<LandmarkAttention&>(mixer); }

// The block of lm_benchmark with the case's weights.
Result<std::shared_ptr<Block>> make_gpt_block(const Case& wanted, std::int64_t block_length) {
  const json& params = wanted.call.params;
  ModelConfig config;
  config.block = "gpt";
  config.hidden_size = wanted.call.inputs.at("x").size(2);
  config.intermediate_size = 4 * config.hidden_size;
  if (const at::Tensor* fc = input(wanted, "w.mlp.c_fc.weight"))
    config.intermediate_size = fc->size(0);
  config.norm_eps = params.value("ln_eps", 1e-5);
  config.layer_types = {"landmark"};
  config.mechanisms["landmark"] = {{"num_heads", params.value("n_head", 1)},
                                   {"rope", params.value("rope", "interleaved")},
                                   {"rope_theta", params.value("rope_base", 10000.0)},
                                   {"projections", "fused"},
                                   {"block", block_length > 0 ? block_length : 64}};
  if (params.value("bias", false)) return unsupported("projections have no bias");
  if (params.value("gelu", "erf") != "erf") return unsupported("the GELU is the exact one");
  EVERLONG_ASSIGN(auto block, make_block(config, 0));
  block->to(at::kDouble);
  const at::NoGradGuard off;
  for (auto& item : block->named_parameters()) {
    const at::Tensor* given = input(wanted, "w." + item.key());
    if (given == nullptr || given->sizes() != item.value().sizes())
      return corrupt("the case has no w.", item.key(), " of shape ", item.value().sizes());
    item.value().copy_(*given);
  }
  return block;
}

// x in pieces through one state, or (no pieces) without any; with gradients where the case has
// them.
OpResult run_block(const Case& wanted, Block& block, const std::vector<std::int64_t>& pieces) {
  const auto dtype = block.parameters().front().scalar_type();
  const at::Tensor x = wanted.call.inputs.at("x").detach().to(dtype).set_requires_grad(true);
  const at::Tensor& marks = wanted.call.inputs.at("is_landmark");
  OpResult result;
  if (pieces.empty()) {
    result.out["x"] = block.forward(x, Sequences{.offsets = {}, .marks = marks}, nullptr);
  } else {
    const auto state = block.mixer().make_state(x.size(0));
    std::vector<at::Tensor> ys;
    std::int64_t begin = 0;
    for (const std::int64_t count : pieces) {
      ys.push_back(block.forward(x.narrow(1, begin, count),
                                 Sequences{.offsets = {}, .marks = marks.narrow(1, begin, count)},
                                 state.get()));
      begin += count;
    }
    result.out["x"] = at::cat(ys, 1);
  }
  const auto grad = wanted.call.grad_out.find("x");
  if (grad == wanted.call.grad_out.end()) return result;
  block.zero_grad();
  (result.out["x"] * grad->second.to(dtype)).sum().backward();
  result.grad["x"] = x.grad();
  for (const auto& item : block.named_parameters())
    result.grad["w." + item.key()] = item.value().grad().clone();
  return result;
}

Verdict check_gpt_block(const Case& wanted) {
  const at::Tensor *x = input(wanted, "x"), *marks = input(wanted, "is_landmark");
  if (x == nullptr || x->dim() != 3 || marks == nullptr)
    return failed("the case has no in.x of three dimensions with in.is_landmark");
  const std::int64_t T = x->size(1), length = regular_block(*marks);
  const auto block = make_gpt_block(wanted, length);
  if (!block.ok()) return failed(block.status().message());
  double worst = 0, rounding = 0;
  std::vector<std::vector<std::int64_t>> ways = {{}};
  if (length > 0 && T > 2) ways.push_back({T / 2, 1, T - T / 2 - 1});
  for (const auto& pieces : ways)
    if (const auto why = difference(wanted, run_block(wanted, **block, pieces), worst))
      return failed(cat(pieces.empty() ? "one pass: " : "in pieces: ", *why));
  (*block)->to(at::kFloat);
  if (const auto why = difference(wanted, run_block(wanted, **block, {}), rounding,
                                  everywhere(wanted, kLayerFloat32)))
    return failed(cat("in fp32: ", *why));
  return {Outcome::kPassed, cat("one pass", ways.size() > 1 ? " and in pieces" : "",
                                "; largest error ", worst, "; in fp32 ", rounding)};
}

// Logits, loss and gradients of a dense window.
OpResult run_training(Decoder& model, const Case& wanted) {
  const at::Tensor& ids = wanted.call.inputs.at("ids");
  OpResult result;
  const at::Tensor logits = model.logits(model.hidden(ids, {}, nullptr));
  result.out["logits"] = logits.detach();
  const at::Tensor* targets = input(wanted, "targets");
  if (targets == nullptr) return result;
  const at::Tensor loss = at::cross_entropy_loss(logits.flatten(0, 1), targets->flatten(), {},
                                                 at::Reduction::Mean, /*ignore_index=*/-1);
  result.out["loss"] = loss.detach().view({1});
  if (wanted.grad.empty()) return result;
  model.zero_grad();
  loss.backward();
  for (const auto& item : model.named_parameters())
    if (item.value().grad().defined()) result.grad[item.key()] = item.value().grad().clone();
  return result;
}

Verdict check_training(const Case& wanted, const fs::path& folder) {
  std::string detail;
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    const auto model = load_model(folder, at::kCPU, dtype);
    if (!model.ok()) return failed(model.status().message());
    const bool wide = dtype == at::kDouble;
    double worst = 0;
    if (const auto why = difference(wanted, run_training(**model, wanted), worst,
                                    wide ? Shares{} : everywhere(wanted, kLayerFloat32)))
      return failed(cat(wide ? "fp64: " : "fp32: ", *why));
    detail += cat(wide ? "one window, fp64: largest error " : "; fp32: ", worst);
  }
  return {Outcome::kPassed, detail};
}

// The settings that params.cache names.
Result<landmark::Retrieval> read_cache(const json& cache) {
  landmark::Retrieval r;
  r.block = cache.value("block", r.block);
  r.top_k = cache.value("top_k", std::int64_t{0});
  r.window = cache.value("window", std::int64_t{0});
  r.chunked = cache.value("mode", "chunk") == "chunk";
  const auto kept = cache.find("max_blocks");
  if (kept != cache.end() && kept->is_number_integer()) r.max_blocks = kept->get<std::int64_t>();
  EVERLONG_ASSIGN(r.granularity,
                  landmark::parse_granularity(cache.value("granularity", "token_head")));
  if (cache.value("positions", "slots") != "slots")
    return unsupported("positions other than \"slots\"");
  return r;
}

Result<OpResult> run_cached(Decoder& model, const Case& wanted) {
  const json& cache = wanted.call.params.at("cache");
  EVERLONG_ASSIGN(const auto reading, read_cache(cache));
  for (std::int64_t i = 0; i < model.config().num_layers(); ++i) {
    EVERLONG_RETURN_IF_ERROR(attention_of(model.mixer(i)).set_reading(reading));
    attention_of(model.mixer(i)).record_picks(true);
  }
  const at::NoGradGuard off;
  const at::Tensor& ids = wanted.call.inputs.at("ids");
  ModelState state = model.make_state(ids.size(0));
  std::vector<at::Tensor> hidden;
  std::vector<std::vector<at::Tensor>> picks(static_cast<std::size_t>(model.config().num_layers()));
  std::int64_t begin = 0;
  for (const auto count : cache.at("chunks").get<std::vector<std::int64_t>>()) {
    hidden.push_back(model.hidden(ids.narrow(1, begin, count), {}, &state));
    for (std::size_t i = 0; i < picks.size(); ++i)
      picks[i].push_back(attention_of(model.mixer(static_cast<std::int64_t>(i))).picks());
    begin += count;
  }
  OpResult result;
  at::Tensor logits = model.logits(at::cat(hidden, 1));
  // The published GPT gives no logits of landmarks.
  const auto expected = wanted.out.find("logits");
  if (expected != wanted.out.end() && expected->second.size(1) != logits.size(1))
    logits = logits.index_select(
        1, ids.select(0, 0).ne(model.config().landmark_id).nonzero().squeeze(1));
  result.out["logits"] = logits;
  std::vector<at::Tensor> layers;
  for (const auto& of_layer : picks) layers.push_back(at::cat(of_layer, 1));
  result.out["selected"] = at::stack(layers, 0);
  return result;
}

Verdict check_cached(const Case& wanted, const fs::path& folder) {
  const auto model = load_model(folder, at::kCPU, at::kDouble);
  if (!model.ok()) return failed(model.status().message());
  const auto result = run_cached(**model, wanted);
  if (!result.ok()) return failed(result.status().message());
  double worst = 0;
  if (const auto why = difference(wanted, *result, worst)) return failed(cat("chunks: ", *why));
  return {Outcome::kPassed,
          cat("in ", wanted.call.params.at("cache").at("chunks").size(),
              " chunks with a cache, the same blocks picked; largest error ", worst)};
}

Verdict check_landmark_model(const Case& wanted, const fs::path& folder) {
  const json& params = wanted.call.params;
  const std::string model_dir = params.value("model_dir", "");
  if (model_dir.empty() || input(wanted, "ids") == nullptr)
    return failed("params model_dir and in.ids are needed");
  const std::string mode = params.value("mode", "training");
  if (mode == "training") return check_training(wanted, folder / model_dir);
  if (mode != "cached" || !params.contains("cache"))
    return {Outcome::kNotApplicable, cat("mode \"", mode, "\" is not known; training, cached are")};
  return check_cached(wanted, folder / model_dir);
}

}  // namespace

std::optional<Verdict> check_landmark(const Case& wanted, const std::string& kind,
                                      const fs::path& folder) {
  try {
    if (kind == "landmark_gpt_block") return check_gpt_block(wanted);
    if (kind == "landmark_gpt_model" || kind == "landmark_llama_model")
      return check_landmark_model(wanted, folder);
  } catch (const std::exception& error) {
    return failed(error.what());
  }
  return std::nullopt;
}

}  // namespace everlong::golden
