// Operators without a token dimension to cut: the bare softmax.
#include <ATen/ATen.h>

#include "mechanisms/landmark/op_call.h"
#include "ops/reference_call.h"

namespace everlong::landmark {
namespace {

struct GroupedCall {
  std::int64_t prefix = 0;
  bool drop_empty = false;
};

Result<GroupedCall> read_grouped(const OpCall& call) {
  EVERLONG_RETURN_IF_ERROR(check_names(call.inputs, {"scores", "is_landmark"},
                                       {"mask", "is_mem", "last_section"}, "input"));
  EVERLONG_RETURN_IF_ERROR(check_names(call.state, {}, {}, "state"));
  if (!call.cu_seqlens.empty())
    return invalid_argument("landmark: grouped_softmax takes no offsets; rows are of one length");
  const at::Tensor& scores = call.inputs.at("scores");
  if (scores.dim() != 4)
    return invalid_argument("landmark: scores have shape ", scores.sizes(),
                            "; [B, H, T, S] is needed");
  EVERLONG_RETURN_IF_ERROR(check_numbers({{"scores", scores}}));
  EVERLONG_RETURN_IF_ERROR(
      check_marks("is_landmark", call.inputs.at("is_landmark"), {scores.size(0), scores.size(3)}));
  Settings s(call.params, "landmark: params");
  GroupedCall about;
  about.prefix = s.integer("prefix", scores.size(3) - scores.size(2), 0, INT64_MAX);
  if (about.prefix + scores.size(2) > scores.size(3))
    s.fail(invalid_argument("landmark: prefix = ", about.prefix, " and ", scores.size(2),
                            " rows pass the ", scores.size(3), " columns"));
  about.drop_empty = read_drop_empty(s);
  s.choice("variant", "lm_benchmark", {"lm_benchmark", "llama"});  // the same numbers
  s.raw("seed");
  EVERLONG_RETURN_IF_ERROR(s.finish());
  return about;
}

OpResult by_reference(const OpCall& call, const GroupedCall& about) {
  const at::Tensor& scores = call.inputs.at("scores");
  const std::int64_t B = scores.size(0), H = scores.size(1), T = scores.size(2), S = scores.size(3);
  const auto numbers = to_doubles(scores);
  const at::Tensor marks = call.inputs.at("is_landmark").to(at::kCPU, at::kByte).contiguous();
  const auto found = call.grad_out.find("probs");
  const auto incoming =
      to_doubles(found == call.grad_out.end() ? at::zeros_like(scores) : found->second);
  std::vector<double> probs, slopes;
  for (std::int64_t row = 0; row < B * H * T; ++row) {
    const auto part = [&](const std::vector<double>& x) {
      return std::span(x).subspan(static_cast<std::size_t>(row * S), static_cast<std::size_t>(S));
    };
    const std::span lm(marks.const_data_ptr<std::uint8_t>() + row / (H * T) * S,
                       static_cast<std::size_t>(S));
    const std::int64_t own = about.prefix + row % T;
    const auto append = [](std::vector<double>& to, const std::vector<double>& from) {
      to.insert(to.end(), from.begin(), from.end());
    };
    append(probs, reference::grouped_softmax(part(numbers), lm, own, about.drop_empty));
    append(slopes, reference::grouped_softmax_gradient(part(numbers), lm, own, about.drop_empty,
                                                       part(incoming)));
  }
  OpResult result;
  result.out["probs"] = from_doubles(probs, scores.sizes());
  if (!call.grad_out.empty()) result.grad["scores"] = from_doubles(slopes, scores.sizes());
  return result;
}

class GroupedSoftmax final : public Operator {
 public:
  std::string_view kind() const override { return "grouped_softmax"; }
  std::vector<OpForm> forms() const override {
    return {{.name = "reference"}, {.name = "composite", .cuda = true, .low_precision = true}};
  }
  bool is_sequence() const override { return false; }

  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    EVERLONG_ASSIGN(const GroupedCall about, read_grouped(call));
    if (form == "reference") {
      EVERLONG_RETURN_IF_ERROR(require_reference_input(call.inputs.at("scores"), "landmark", form));
      return by_reference(call, about);
    }
    if (form != "composite")
      return invalid_argument("landmark: \"", form,
                              "\" is not a form of grouped_softmax; known: composite, reference");
    return run_by_autograd(call, [&](const TensorMap& inputs, const TensorMap&) {
      OpResult result;
      result.out["probs"] =
          grouped_softmax(inputs.at("scores"), inputs.at("is_landmark").to(at::kCPU), about.prefix,
                          about.drop_empty);
      return result;
    });
  }

  OpCall sample(const OpShape&) const override { return {}; }
  std::vector<std::string> token_inputs() const override { return {}; }
  std::vector<OpShape> law_shapes() const override { return {}; }
  std::vector<std::pair<std::string, OpCall>> refusals() const override { return {}; }
  OpCost cost(const OpShape&, std::string_view, std::size_t) const override { return {}; }
};

}  // namespace

const Operator& grouped_softmax_operator() {
  static const GroupedSoftmax kOperator;
  return kOperator;
}

}  // namespace everlong::landmark
