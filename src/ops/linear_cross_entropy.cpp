#include "ops/linear_cross_entropy.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>

namespace everlong {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// On the CPU 16 MB of fp32, half of a common L3. On a GPU the gradient of the weight, which every
// chunk adds to, binds: at 50K words and 4M logits it took a fifth of a training step.
constexpr std::int64_t kLogitsPerChunk = std::int64_t{1} << 22;
constexpr std::int64_t kLogitsPerChunkOnGpu = std::int64_t{1} << 26;

struct Walk {
  at::Tensor nll_N, grad_hidden_ND, grad_weight_VD;  // the gradients undefined when not asked for
};

// Matrix products of low-precision operands with fp32 results: tensor cores keep their fp32
// accumulator; the CPU multiplies in fp32 (its bf16 products are several times slower, toolchain
// notes in docs/benchmarks.md).
at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  return a.scalar_type() == dtype ? at::mm(a, b) : at::mm(a, b, dtype);
}

Walk walk(const at::Tensor& hidden_ND, const at::Tensor& weight_VD, const at::Tensor& targets_N,
          const at::Tensor& weights_N, std::int64_t chunk, bool want_hidden, bool want_weight) {
  const std::int64_t tokens = hidden_ND.size(0), vocabulary = weight_VD.size(0);
  const auto dtype = hidden_ND.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto operand = hidden_ND.is_cuda() ? hidden_ND.scalar_type() : dtype;
  const at::Tensor weight = weight_VD.to(operand);

  Walk out;
  out.nll_N = at::empty({tokens}, hidden_ND.options().dtype(dtype));
  if (want_hidden) out.grad_hidden_ND = at::empty_like(hidden_ND, at::MemoryFormat::Contiguous);
  if (want_weight) out.grad_weight_VD = at::zeros(weight.sizes(), weight.options().dtype(dtype));

  if (chunk <= 0)
    chunk = std::max<std::int64_t>((hidden_ND.is_cuda() ? kLogitsPerChunkOnGpu : kLogitsPerChunk) /
                                       std::max<std::int64_t>(vocabulary, 1),
                                   1);
  for (std::int64_t begin = 0; begin < tokens; begin += chunk) {
    const std::int64_t count = std::min(chunk, tokens - begin);
    at::Tensor hidden = hidden_ND.narrow(0, begin, count).to(operand);
    const at::Tensor targets = targets_N.narrow(0, begin, count);
    const at::Tensor ignored = targets == kIgnoredTarget;
    const at::Tensor picks = targets.masked_fill(ignored, 0).unsqueeze(1);

    at::Tensor scores = at::log_softmax(product(hidden, weight.t(), dtype), -1);
    out.nll_N.narrow(0, begin, count)
        .copy_(scores.gather(1, picks).squeeze(1).neg_().masked_fill_(ignored, 0));
    if (!want_hidden && !want_weight) continue;

    // softmax - onehot. Ignored rows are taken out of the two [count, D] operands below: narrower
    // than the logits.
    at::Tensor delta = scores.exp_();
    delta.scatter_add_(1, picks, at::full_like(picks, -1, delta.options()));
    if (weights_N.defined())
      delta.mul_(weights_N.narrow(0, begin, count).unsqueeze(1).to(delta.scalar_type()));
    delta = delta.to(operand);
    const at::Tensor gone = ignored.unsqueeze(1);
    if (want_hidden)
      out.grad_hidden_ND.narrow(0, begin, count)
          .copy_(product(delta, weight, dtype).masked_fill_(gone, 0));
    if (want_weight) {
      hidden = hidden.masked_fill(gone, 0);
      if (operand == dtype) {
        out.grad_weight_VD.addmm_(delta.t(), hidden);
      } else {
        out.grad_weight_VD.add_(product(delta.t(), hidden, dtype));
      }
    }
  }
  return out;
}

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& hidden_ND,
                               const at::Tensor& weight_VD, const at::Tensor& targets_N,
                               const std::optional<at::Tensor>& given_weights_N, std::int64_t chunk,
                               bool want_hidden, bool want_weight) {
    const at::Tensor weights_N = given_weights_N.value_or(at::Tensor());
    Walk made = walk(hidden_ND, weight_VD, targets_N, weights_N, chunk, want_hidden, want_weight);
    ctx->mark_non_differentiable({made.nll_N});
    if (want_weight) made.grad_weight_VD = made.grad_weight_VD.to(weight_VD.scalar_type());
    ctx->save_for_backward({made.grad_hidden_ND, made.grad_weight_VD});
    const at::Tensor counted =
        weights_N.defined() ? made.nll_N.to(at::kDouble) * weights_N.to(at::kDouble) : made.nll_N;
    return {counted.sum(at::kDouble), made.nll_N};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto scaled = [&](const at::Tensor& g) {
      return g.defined()
                 ? g * grads[0].to(g.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)
                 : g;
    };
    return {scaled(saved[0]), scaled(saved[1]), {}, {}, {}, {}, {}};
  }
};

}  // namespace

LinearCrossEntropy linear_cross_entropy(const at::Tensor& hidden_ND, const at::Tensor& weight_VD,
                                        const at::Tensor& targets_N, std::int64_t chunk,
                                        const at::Tensor& weights_N) {
  TORCH_CHECK_VALUE(
      hidden_ND.dim() == 2 && weight_VD.dim() == 2 && hidden_ND.size(1) == weight_VD.size(1),
      "linear_cross_entropy: hidden ", hidden_ND.sizes(), " and weight ", weight_VD.sizes(),
      " do not fit; [N, D] and [V, D] are needed");
  TORCH_CHECK_VALUE(targets_N.dim() == 1 && targets_N.size(0) == hidden_ND.size(0) &&
                        targets_N.scalar_type() == at::kLong,
                    "linear_cross_entropy: targets are ", targets_N.scalar_type(), " ",
                    targets_N.sizes(), "; int64 [", hidden_ND.size(0),
                    "] is needed, one a row of hidden");
  TORCH_CHECK_VALUE(
      hidden_ND.scalar_type() == weight_VD.scalar_type() && hidden_ND.is_floating_point(),
      "linear_cross_entropy: hidden is ", hidden_ND.scalar_type(), " and weight is ",
      weight_VD.scalar_type(), "; one floating-point dtype for both is needed");
  TORCH_CHECK_VALUE(!weights_N.defined() || (weights_N.sizes() == targets_N.sizes() &&
                                             weights_N.scalar_type() == at::kFloat),
                    "linear_cross_entropy: weights are ", weights_N.scalar_type(), " ",
                    weights_N.sizes(), "; fp32 [", targets_N.size(0), "] is needed, one a target");
  const bool training = at::GradMode::is_enabled();
  // An undefined tensor is no input that autograd takes.
  const auto weights = weights_N.defined() ? std::optional(weights_N) : std::nullopt;
  const auto out = LinearCrossEntropyFunction::apply(hidden_ND, weight_VD, targets_N, weights,
                                                     chunk, training && hidden_ND.requires_grad(),
                                                     training && weight_VD.requires_grad());
  return {out[0], out[1]};
}

}  // namespace everlong
