#include <ATen/ATen.h>

#include <algorithm>

#include "golden_kinds.h"
#include "models/checkpoint.h"

namespace everlong::golden {
namespace {

struct ModelKind {
  const char *mechanism, *kind;
};
constexpr ModelKind kKinds[] = {
    {"lightning", "tnl_model"}, {"lightning", "minimax_model"}, {"softmax", "llama_model"}};
constexpr std::int64_t kSteps = 5;

Verdict failed(std::string detail) { return {Outcome::kFailed, std::move(detail)}; }

// Prefill, then single tokens.
at::Tensor streamed_logits(Decoder& model, const at::Tensor& ids_BT) {
  ModelState state = model.make_state(ids_BT.size(0));
  const std::int64_t T = ids_BT.size(1), prefill = std::max<std::int64_t>(T - kSteps, 0);
  std::vector<at::Tensor> pieces = {model.hidden(ids_BT.narrow(1, 0, prefill), {}, &state)};
  for (std::int64_t t = prefill; t < T; ++t)
    pieces.push_back(model.hidden(ids_BT.narrow(1, t, 1), {}, &state));
  return model.logits(at::cat(pieces, 1));
}

// The likeliest token, again and again, end tokens as any other.
at::Tensor greedy(Decoder& model, const at::Tensor& ids_BT, std::int64_t steps) {
  ModelState state = model.make_state(ids_BT.size(0));
  at::Tensor next = ids_BT;
  std::vector<at::Tensor> chosen;
  for (std::int64_t i = 0; i < steps; ++i) {
    const at::Tensor hidden = model.hidden(next, {}, &state);
    next = model.logits(hidden.narrow(1, hidden.size(1) - 1, 1)).argmax(-1);
    chosen.push_back(next);
  }
  return at::cat(chosen, 1);
}

// What ran and its largest error.
Result<std::string> run(Decoder& model, const Case& wanted, const at::Tensor& ids_BT,
                        const Shares& more) {
  const at::NoGradGuard off;
  OpResult result;
  result.out["logits"] =
      model.logits(model.hidden(ids_BT, Sequences{wanted.call.cu_seqlens}, nullptr));
  const auto expected = wanted.out.find("greedy");
  const bool continues = expected != wanted.out.end() && expected->second.dim() == 2;
  if (continues) result.out["greedy"] = greedy(model, ids_BT, expected->second.size(1));
  double worst = 0;
  if (const auto why = difference(wanted, result, worst, more))
    return invalid_argument("one pass: ", *why);
  std::string forms = "one pass";
  if (wanted.call.cu_seqlens.empty()) {
    result.out["logits"] = streamed_logits(model, ids_BT);
    if (const auto why = difference(wanted, result, worst, more))
      return invalid_argument("prefill and steps: ", *why);
    forms += ", prefill and steps";
  }
  if (continues) forms += cat(", ", expected->second.size(1), " greedy tokens");
  return cat(forms, ", largest error ", worst);
}

}  // namespace

Verdict check_model(const Case& wanted, const std::string& mechanism, const std::string& kind,
                    const fs::path& folder) {
  const bool known = std::ranges::any_of(
      kKinds, [&](const ModelKind& k) { return mechanism == k.mechanism && kind == k.kind; });
  if (!known)
    return {Outcome::kNotApplicable, cat(mechanism, " has no model of kind \"", kind, "\"")};
  const std::string model_dir = wanted.call.params.value("model_dir", "");
  const auto ids = wanted.call.inputs.find("input_ids");
  if (model_dir.empty() || ids == wanted.call.inputs.end())
    return failed("params model_dir and in.input_ids are needed");
  std::string detail;
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    const auto model = load_model(folder / model_dir, at::kCPU, dtype);
    if (!model.ok()) return failed(model.status().message());
    const auto more = dtype == at::kFloat ? everywhere(wanted, kLayerFloat32) : Shares{};
    const auto ran = run(**model, wanted, ids->second, more);
    const std::string name = dtype == at::kFloat ? "fp32" : "fp64";
    if (!ran.ok()) return failed(cat(name, ", ", ran.status().message()));
    detail += cat(detail.empty() ? "" : "; ", name, ": ", *ran);
  }
  return {Outcome::kPassed, detail};
}

}  // namespace everlong::golden
