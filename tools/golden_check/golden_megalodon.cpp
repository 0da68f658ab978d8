// Megalodon's cases: operators also in pieces, its layers with the published state's names and its
// model with the weights in the file.
#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <numeric>

#include "golden_kinds.h"
#include "mechanisms/megalodon/layer.h"
#include "models/megalodon_block.h"
#include "models/published.h"

namespace everlong::golden {
namespace {

using nlohmann::json;
using Pieces = std::vector<std::int64_t>;

constexpr double kEps = megalodon::kNormEps;

Verdict failed(std::string detail) { return {Outcome::kFailed, std::move(detail)}; }

bool is_after(const std::string& name) { return name.starts_with("after"); }

// The case without what only the run in its own pieces leaves behind.
Case without_after(Case wanted) {
  std::erase_if(wanted.out, [](const auto& item) { return is_after(item.first); });
  return wanted;
}

std::vector<Pieces> ways_of(const Case& wanted, std::int64_t tokens) {
  std::vector<Pieces> ways = {{tokens}};
  if (tokens > 2) ways.push_back({tokens / 2, 1, tokens - tokens / 2 - 1});
  const auto own = wanted.call.params.value("pieces", Pieces{});
  if (!own.empty()) ways.push_back(own);
  return ways;
}

// --- Operators: outputs and states of the pieces, without gradients (the laws cut those).

Result<OpResult> in_pieces(const Operator& op, const std::string& form, const OpCall& whole,
                           const Pieces& pieces) {
  OpResult joined;
  std::map<std::string, std::vector<at::Tensor>> outputs;
  joined.state = whole.state;
  std::int64_t begin = 0;
  std::vector<std::string> tokens = op.token_inputs();
  for (const char* name : {"padding_mask", "reset"})
    if (whole.inputs.contains(name)) tokens.emplace_back(name);
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    OpCall call = whole;
    call.grad_out.clear();
    call.state = joined.state;
    for (const auto& name : tokens)
      call.inputs[name] = whole.inputs.at(name).narrow(1, begin, pieces[i]);
    if (i > 0 && call.params.value("prior_count", 0) > 0) {  // the prior is in the state by now
      call.params["prior_count"] = 0;
      call.inputs.erase("w.prior_mean");
      call.inputs.erase("w.prior_logv");
    }
    EVERLONG_ASSIGN(const OpResult part, op.run(form, call));
    for (const auto& [name, x] : part.out) outputs[name].push_back(x);
    for (const auto& [name, x] : part.state) joined.out[cat("after", i, ".", name)] = x;
    joined.state = part.state;
    begin += pieces[i];
  }
  for (const auto& [name, parts] : outputs) joined.out[name] = at::cat(parts, 1);
  return joined;
}

Verdict check_op(const Case& wanted, const std::string& kind) {
  const Case whole = without_after(wanted);
  Verdict verdict = check_operator(whole, "megalodon", kind);
  if (verdict.outcome != Outcome::kPassed || !wanted.call.cu_seqlens.empty()) return verdict;
  const auto room = find_mechanism("megalodon");
  const auto found = std::ranges::find_if((*room)->operators,
                                          [&](const Operator* op) { return op->kind() == kind; });
  const Operator& op = **found;
  const std::int64_t tokens = wanted.call.inputs.at(op.token_inputs().front()).size(1);
  double worst = 0;
  for (const OpForm& form : op.forms()) {
    if (!form.cpu || !form.float64) continue;
    const auto ways = ways_of(wanted, tokens);
    for (std::size_t i = 1; i < ways.size(); ++i) {
      const bool own = i > 1;
      Case expected = own ? wanted : whole;
      expected.grad.clear();
      const auto result = in_pieces(op, form.name, wanted.call, ways[i]);
      if (!result.ok()) return failed(cat(form.name, " in pieces: ", result.status().message()));
      if (const auto why = difference(expected, *result, worst))
        return failed(cat(form.name, " in ", ways[i].size(), " pieces: ", *why));
    }
  }
  verdict.detail += cat("; in pieces ", worst);
  return verdict;
}

// --- Layers and models.

// A state by the name that the published one has in front: "", "layers.0.", "output.".
struct Carried {
  std::string prefix;
  State* state;
};

struct Subject {
  std::shared_ptr<torch::nn::Module> module;
  std::int64_t chunk = 1;
  bool carries = true;
  // Inputs of one piece, state (null: none) -> the output.
  std::function<at::Tensor(const TensorMap& inputs, ModelState* state)> forward;
  std::function<ModelState(std::int64_t sequences)> make_state;
  std::string input = "x", output = "y";
};

std::vector<Carried> carried_of(const Subject& subject, ModelState& state) {
  if (subject.input == "x") return {{"", &state.layer(0)}};
  std::vector<Carried> list;
  for (std::size_t i = 0; i + 1 < state.num_layers(); ++i)
    list.push_back({cat("layers.", i, "."), &state.layer(i)});
  list.push_back({"output.", &state.layer(state.num_layers() - 1)});
  return list;
}

bool is_norm(const State& state) { return state.tensors().contains("mean"); }

void restore(const Subject& subject, const TensorMap& given, TensorMap& leaves, ModelState& state) {
  for (const auto& [prefix, own] : carried_of(subject, state)) {
    const at::Tensor count = given.at(prefix + (is_norm(*own) ? "count" : "norm.count"));
    for (std::int64_t n = 0; n < own->sequences(); ++n)
      own->positions()[static_cast<std::size_t>(n)] = count[n].item<std::int64_t>();
    TensorMap tensors;
    for (const auto& [name, mine] : own->tensors()) {
      const std::string full = prefix + name;
      tensors[name] = given.at(full).detach().to(mine.scalar_type()).set_requires_grad(true);
      leaves[full] = tensors[name];
    }
    throw_if_error(own->restore(tensors));
    const auto phase = given.find(prefix + "attn.count");
    for (const std::int64_t position : own->positions())
      TORCH_CHECK(
          phase == given.end() || position % subject.chunk == phase->second[0].item<std::int64_t>(),
          prefix, "norm.count and attn.count name different places in a chunk");
  }
}

void collect(const Subject& subject, ModelState& state, const std::string& front, TensorMap& out) {
  for (const auto& [prefix, own] : carried_of(subject, state)) {
    const at::Tensor positions = at::tensor(own->positions(), at::kLong);
    for (auto [name, x] : own->tensors()) {
      if (name.starts_with("attn.cache"))  // rows behind those in use are spare
        x = x.narrow(1, 0, own->positions().front() % subject.chunk);
      out[front + prefix + name] = x;
    }
    if (is_norm(*own)) {
      out[front + prefix + "count"] = positions;
    } else {
      out[front + prefix + "norm.count"] = positions;
      out[front + prefix + "attn.count"] = positions.narrow(0, 0, 1) % subject.chunk;
    }
  }
}

OpResult run(const Case& wanted, const Subject& subject, const Pieces& pieces, bool with_state) {
  TensorMap inputs, leaves;
  for (const auto& [name, x] : wanted.call.inputs)
    if (!name.starts_with("w."))
      inputs[name] = x.is_floating_point() ? x.detach().clone().set_requires_grad(true) : x;
  const std::int64_t batch = inputs.at(subject.input).size(0);
  std::optional<ModelState> state;
  if (with_state) {
    state = subject.make_state(batch);
    if (!wanted.call.state.empty()) restore(subject, wanted.call.state, leaves, *state);
  }
  OpResult result;
  std::vector<at::Tensor> outputs;
  std::int64_t begin = 0;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    TensorMap piece;
    for (const auto& [name, x] : inputs) piece[name] = x.narrow(1, begin, pieces[i]);
    outputs.push_back(subject.forward(piece, state ? &*state : nullptr));
    if (state) collect(subject, *state, cat("after", i, "."), result.out);
    begin += pieces[i];
  }
  result.out[subject.output] = at::cat(outputs, 1);
  if (state) collect(subject, *state, "", result.state);
  at::Tensor loss;
  for (const auto& [name, grad] : wanted.call.grad_out) {
    const at::Tensor& value =
        name.starts_with("state.") ? result.state.at(name.substr(6)) : result.out.at(name);
    const at::Tensor term = (value * grad.to(value.scalar_type())).sum();
    loss = loss.defined() ? loss + term : term;
  }
  if (!loss.defined()) return result;
  subject.module->zero_grad();
  loss.backward();
  const auto keep = [&](const std::string& name, const at::Tensor& x) {
    if (x.grad().defined()) result.grad[name] = x.grad().clone();
  };
  for (const auto& [name, x] : inputs) keep(name, x);
  for (const auto& [name, x] : leaves) keep("state." + name, x);
  for (const auto& item : subject.module->named_parameters()) keep("w." + item.key(), item.value());
  return result;
}

Status take_weights(const Case& wanted, const Subject& subject) {
  subject.module->to(at::kDouble);
  std::size_t used = 0, given = 0;
  for (const auto& [name, x] : wanted.call.inputs) given += name.starts_with("w.") ? 1 : 0;
  const at::NoGradGuard off;
  for (auto& item : subject.module->named_parameters()) {
    const auto found = wanted.call.inputs.find("w." + item.key());
    if (found == wanted.call.inputs.end() || found->second.sizes() != item.value().sizes())
      return corrupt("the case has no w.", item.key(), " of shape ", item.value().sizes());
    item.value().copy_(found->second);
    ++used;
  }
  if (used != given)
    return corrupt("the case has ", given, " weights and the model ", used, " parameters");
  return {};
}

LayerSpec spec_of(const json& params) {
  LayerSpec spec;
  spec.hidden_size = params.at("mdim");
  spec.norm_eps = params.value("norm_eps", kEps);
  spec.settings = {{"num_heads", params.at("num_heads")},
                   {"z_dim", params.at("zdim")},
                   {"value_dim", params.at("hdim")},
                   {"cema_ndim", params.at("ndim")},
                   {"chunk_size", params.at("chunk_size")},
                   {"norm_num_groups", params.at("norm_num_groups")},
                   {"norm_affine", params.value("norm_affine", true)}};
  if (params.contains("rope_base") && !params.at("rope_base").is_null())
    spec.settings["rope_base"] = params.at("rope_base");
  return spec;
}

ModelState one_state(const Mixer& mixer, std::int64_t sequences) {
  std::vector<std::unique_ptr<State>> states;
  states.push_back(mixer.make_state(sequences));
  return ModelState(std::move(states));
}

Result<Subject> make_layer(const json& params, const std::string& kind) {
  Subject subject;
  if (kind == "normalized_ffn") {
    auto ffn = std::make_shared<megalodon::NormalizedFfn>(
        megalodon::FfnSettings{.width = params.at("model_dim"),
                               .hidden = params.at("ffn_hidden_dim"),
                               .swiglu = params.at("swiglu"),
                               .rescale = params.at("rescale"),
                               .affine = params.value("norm_affine", true),
                               .eps = params.value("norm_eps", kEps)});
    subject.module = ffn;
    subject.carries = false;
    subject.forward = [ffn](const TensorMap& in, ModelState*) {
      return ffn->forward(in.at("x"), in.at("residual"));
    };
    return subject;
  }
  const LayerSpec spec = spec_of(params);
  subject.chunk = params.at("chunk_size");
  if (kind == "moving_average_gated_attention") {
    EVERLONG_ASSIGN(const auto settings, megalodon::read_settings(spec));
    auto mixer = std::make_shared<megalodon::GatedAttention>(settings);
    subject.module = mixer;
    subject.forward = [mixer](const TensorMap& in, ModelState* state) {  // with its residual
      return in.at("x") +
             mixer->forward(in.at("x"), {}, state == nullptr ? nullptr : &state->layer(0));
    };
    subject.make_state = [mixer](std::int64_t n) { return one_state(*mixer, n); };
    return subject;
  }
  if (kind != "megalodon_block")
    return unsupported("megalodon has no layer of kind \"", kind, "\"");
  ModelConfig config;
  config.block = "megalodon";
  config.hidden_size = spec.hidden_size;
  config.norm_eps = spec.norm_eps;
  config.intermediate_size = params.at("ffn_hidden_dim");
  config.gated_mlp = params.at("swiglu");
  config.rescale_mlp = params.at("rescale_nffn");
  config.layer_types = {"megalodon"};
  config.mechanisms["megalodon"] = spec.settings;
  EVERLONG_ASSIGN(auto block, make_megalodon_block(config, 0));
  subject.module = block;
  subject.forward = [block](const TensorMap& in, ModelState* state) {
    return block->forward(in.at("x"), {}, state == nullptr ? nullptr : &state->layer(0));
  };
  subject.make_state = [block](std::int64_t n) { return one_state(block->mixer(), n); };
  return subject;
}

Result<Subject> make_model(const json& params) {
  if (!params.contains("config")) return corrupt("params config is missing");
  EVERLONG_ASSIGN(const ModelConfig config,
                  config_from_published(params.at("config"), "params config"));
  EVERLONG_ASSIGN(auto model, Decoder::make(config));
  Subject subject;
  subject.module = model;
  subject.input = "tokens";
  subject.output = "logits";
  subject.chunk = params.at("config").at("chunk_size");
  subject.forward = [model](const TensorMap& in, ModelState* state) {
    return model->logits(model->hidden(in.at("tokens"), {}, state));
  };
  subject.make_state = [model](std::int64_t n) { return model->make_state(n); };
  return subject;
}

Verdict check_subject(const Case& wanted, const Subject& subject) {
  const auto leading = wanted.call.inputs.find(subject.input);
  if (leading == wanted.call.inputs.end() || leading->second.dim() < 2)
    return failed(cat("the case has no in.", subject.input, " of [B, T, ..]"));
  if (const Status status = take_weights(wanted, subject); !status.ok())
    return failed(status.message());
  const std::int64_t tokens = leading->second.size(1);
  const Case whole = without_after(wanted);
  const auto ways = ways_of(wanted, tokens);
  double worst = 0;
  for (std::size_t i = 0; i < ways.size(); ++i) {
    const OpResult result = run(wanted, subject, ways[i], subject.carries);
    if (const auto why = difference(i > 1 ? wanted : whole, result, worst))
      return failed(cat("in ", ways[i].size(), " pieces: ", *why));
    // And as streams run, without a graph.
    Case outputs = i > 1 ? wanted : whole;
    outputs.grad.clear();
    outputs.call.grad_out.clear();
    const at::NoGradGuard off;
    if (const auto why =
            difference(outputs, run(outputs, subject, ways[i], subject.carries), worst))
      return failed(cat("in ", ways[i].size(), " pieces without a graph: ", *why));
  }
  std::string forms = cat("in one pass and ", ways.size() - 1, " cuts");
  if (subject.carries && wanted.call.state.empty()) {  // and what training calls: no state at all
    Case outputs = whole;
    outputs.state.clear();
    std::erase_if(outputs.call.grad_out,
                  [](const auto& item) { return item.first.starts_with("state."); });
    if (outputs.call.grad_out.size() != wanted.call.grad_out.size()) outputs.grad.clear();
    if (const auto why = difference(outputs, run(outputs, subject, ways[0], false), worst))
      return failed(cat("without a state: ", *why));
    forms += ", and without a state";
  }
  Case single = wanted;
  single.call = in_float32(wanted.call);
  subject.module->to(at::kFloat);
  double rounding = 0;
  if (const auto why = difference(whole, run(single, subject, ways.back(), subject.carries),
                                  rounding, everywhere(wanted, kLayerFloat32)))
    return failed(cat("in fp32: ", *why));
  return {Outcome::kPassed, cat(forms, "; largest error ", worst, "; in fp32 ", rounding)};
}

}  // namespace

Verdict check_megalodon(const Case& wanted, const std::string& level, const std::string& kind) {
  if (level == "op") return check_op(wanted, kind);
  if (level != "layer" && level != "model")
    return {Outcome::kNotApplicable,
            cat("level \"", level, "\" is not checked here; op, layer and model are")};
  if (level == "model" && kind != "megalodon")
    return {Outcome::kNotApplicable, cat("megalodon has no model of kind \"", kind, "\"")};
  const json& params = wanted.call.params;
  const auto subject = level == "layer" ? make_layer(params, kind) : make_model(params);
  if (!subject.ok())
    return {subject.status().code() == StatusCode::kUnsupported ? Outcome::kNotApplicable
                                                                : Outcome::kFailed,
            subject.status().message()};
  return check_subject(wanted, *subject);
}

}  // namespace everlong::golden
