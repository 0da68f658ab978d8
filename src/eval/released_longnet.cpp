#include "eval/released_longnet.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>

#include "mechanisms/longnet/op_call.h"

namespace everlong {
namespace {

using at::Tensor;

// Largest difference over largest value, as op_gate.cpp allows a form: sums in another order.
constexpr double kAllowedFp32 = 1e-4, kAllowedBf16 = 4e-2;
constexpr double kNotCovered = -1e8;  // the released code's log-sum-exp of a row without keys

std::int64_t up_to_multiple(std::int64_t size, std::int64_t of) { return (of - size % of) % of; }

// The rows and heads of one pattern: segments as a batch, head h at offset h / (padded heads / r).
struct Gathering {
  std::int64_t batch, tokens, heads, dim, segment, ratio;
  std::int64_t added_tokens, added_heads;

  Gathering(const Tensor& x_BTHD, const longnet::Pattern& pattern)
      : batch(x_BTHD.size(0)),
        tokens(x_BTHD.size(1)),
        heads(x_BTHD.size(2)),
        dim(x_BTHD.size(3)),
        segment(std::min(pattern.segment, tokens)),
        ratio(pattern.ratio),
        added_tokens(up_to_multiple(tokens, segment)),
        added_heads(up_to_multiple(heads, ratio)) {}
  std::int64_t segments() const { return (tokens + added_tokens) / segment; }
  std::int64_t shared() const { return (heads + added_heads) / ratio; }  // heads with one offset

  // [B, T, H, D] -> [B segments, H, segment / r, D]
  Tensor sparse(const Tensor& x_BTHD) const {
    const Tensor padded = at::constant_pad_nd(x_BTHD, {0, 0, 0, added_heads, 0, added_tokens});
    return padded.view({batch * segments(), segment / ratio, ratio, ratio, shared(), dim})
        .diagonal(0, 2, 3)         // [B n, l, shared, D, r]
        .permute({0, 4, 2, 1, 3})  // [B n, r, shared, l, D]
        .reshape({batch * segments(), ratio * shared(), segment / ratio, dim})
        .narrow(1, 0, heads);
  }
  // [B segments, H, segment / r, C] -> [B, T, H, C], rows of other offsets 0
  Tensor dense(const Tensor& x) const {
    const std::int64_t channels = x.size(3);
    return at::constant_pad_nd(x, {0, 0, 0, 0, 0, added_heads})
        .view({batch * segments(), ratio, shared(), segment / ratio, channels})
        .permute({0, 3, 2, 4, 1})
        .diag_embed(0, 2, 3)  // [B n, l, r, r, shared, C]
        .reshape({batch, tokens + added_tokens, ratio * shared(), channels})
        .narrow(1, 0, tokens)
        .narrow(2, 0, heads);
  }
};

// torch's attention kernel of the device, with its log-sum-exp [B, H, T].
std::pair<Tensor, Tensor> attend(const Tensor& q_BHTD, const Tensor& k_BHTD, const Tensor& v_BHTD) {
  if (q_BHTD.is_cpu()) {
    auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(q_BHTD, k_BHTD, v_BHTD, 0.0,
                                                                      /*is_causal=*/true);
    return {out, lse};
  }
  const auto all = at::_scaled_dot_product_flash_attention(q_BHTD, k_BHTD, v_BHTD, 0.0,
                                                           /*is_causal=*/true);
  return {std::get<0>(all), std::get<1>(all)};
}

}  // namespace

Result<Tensor> released_dilated_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const longnet::Geometry& geometry) {
  if (q.is_cuda() && q.scalar_type() != at::kBFloat16 && q.scalar_type() != at::kHalf)
    return unsupported(
        "baseline released: torch's flash attention on CUDA takes bf16 and fp16, not ",
        q.scalar_type());
  if (q.sizes() != k.sizes() || q.sizes() != v.sizes() || !geometry.causal ||
      geometry.beyond != longnet::Beyond::kFixed || q.size(1) == 0)
    return invalid_argument(
        "baseline released: q, k and v of one shape, causal attention and beyond = \"fixed\" are "
        "needed; q is ",
        q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(), " on ", q.device().str());
  std::vector<Tensor> outputs, sums;
  for (const auto& pattern : geometry.patterns) {
    const Gathering gathering(q, pattern);
    if (gathering.segment % pattern.ratio != 0)
      return invalid_argument("baseline released: ratio ", pattern.ratio,
                              " does not divide its segment of ", gathering.segment,
                              " tokens, where the released code misplaces rows; give ratios that "
                              "divide the segments and the length");
    const auto [out, lse] = attend(gathering.sparse(q), gathering.sparse(k), gathering.sparse(v));
    outputs.push_back(gathering.dense(out));
    const Tensor sum = gathering.dense(lse.detach().unsqueeze(3));
    sums.push_back(sum.masked_fill(sum == 0, kNotCovered));
  }
  std::vector<Tensor> weights;
  {
    const at::NoGradGuard off;
    const Tensor largest = at::stack(sums).amax(0);
    for (const Tensor& sum : sums) weights.push_back((sum - largest).exp());
    const Tensor total = at::stack(weights).sum(0);
    for (Tensor& weight : weights) weight = weight / total;
  }
  Tensor out = outputs[0] * weights[0].to(q.scalar_type());
  for (std::size_t i = 1; i < outputs.size(); ++i)
    out = out + outputs[i] * weights[i].to(q.scalar_type());
  return out;
}

Result<std::function<void()>> released_longnet_work(const Operator& op, std::string_view form,
                                                    const OpCall& call) {
  if (op.kind() != "dilated_attention" || !call.state.empty() || !call.cu_seqlens.empty())
    return invalid_argument(
        "baseline released is of longnet's dilated_attention, passes forward "
        "and train; given: ",
        op.kind(), call.state.empty() ? "" : " with a state");
  EVERLONG_ASSIGN(const auto params, longnet::read_call(call));
  {
    const at::NoGradGuard off;
    const auto tried = released_dilated_attention(call.inputs.at("q"), call.inputs.at("k"),
                                                  call.inputs.at("v"), params.geometry);
    EVERLONG_RETURN_IF_ERROR(tried.status());
  }
  const auto released = [geometry = params.geometry](const OpCall& given) {
    return run_by_autograd(given, [&](const TensorMap& inputs, const TensorMap&) {
      OpResult result;
      result.out["o"] =
          released_dilated_attention(inputs.at("q"), inputs.at("k"), inputs.at("v"), geometry)
              .value();
      return result;
    });
  };
  OpCall same = call;
  same.params["offset_rule"] = "block";
  same.params["mixing_grad"] = "detached";
  EVERLONG_ASSIGN(const OpResult wanted, op.run(form, same));
  const OpResult found = released(call);
  const double allowed =
      call.inputs.at("q").scalar_type() == at::kBFloat16 ? kAllowedBf16 : kAllowedFp32;
  const auto compare = [&](const std::string& name, const Tensor& a, const Tensor& b) -> Status {
    const double error = (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>() /
                         b.abs().max().item<double>();
    if (error <= allowed) return {};
    return unsupported("baseline released: ", name, " is off by ", error,
                       " of its largest value; allowed ", allowed,
                       ". A wrong baseline has no speed");
  };
  EVERLONG_RETURN_IF_ERROR(compare("o", found.out.at("o"), wanted.out.at("o")));
  for (const auto& [name, gradient] : wanted.grad)
    EVERLONG_RETURN_IF_ERROR(compare(cat("the gradient of ", name), found.grad.at(name), gradient));
  return std::function<void()>([released, &call] { (void)released(call); });
}

}  // namespace everlong
