#include "layers/experts.h"

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "layers/linear.h"

namespace everlong {
namespace {

// Legend: N tokens, k experts a token, E experts, D width.
struct Choice {
  at::Tensor expert_Nk;  // int64
  at::Tensor weight_Nk;  // they add up to 1
};

class Experts final : public GatedMlp {
 public:
  Experts(std::vector<std::shared_ptr<GatedMlp>> experts, std::int64_t hidden,
          std::int64_t experts_per_token)
      : per_token_(experts_per_token),
        gate_(register_module(
            "gate", std::make_shared<Linear>(hidden, static_cast<std::int64_t>(experts.size())))),
        experts_(std::move(experts)) {
    struct Names : torch::nn::Module {  // gives the experts theirs: "experts.<e>"
      void add(std::size_t e, const std::shared_ptr<GatedMlp>& expert) {
        register_module(std::to_string(e), expert);
      }
    };
    const auto names = register_module("experts", std::make_shared<Names>());
    for (std::size_t e = 0; e < experts_.size(); ++e) names->add(e, experts_[e]);
  }

  at::Tensor forward(const at::Tensor& x) override {
    const at::Tensor x_ND = x.reshape({-1, x.size(-1)});
    if (x_ND.size(0) == 0) return at::zeros_like(x);
    const Choice choice = route(x_ND);
    const at::Tensor chosen = choice.expert_Nk.flatten();
    // The N k (token, expert) pairs, expert by expert, tokens in order within each.
    const at::Tensor order = at::argsort(chosen, /*stable=*/true);
    const at::Tensor token_of = order.div(per_token_, "floor");
    const at::Tensor counts =
        at::bincount(chosen, {}, static_cast<std::int64_t>(experts_.size())).cpu();
    std::vector<at::Tensor> outputs;
    std::int64_t begin = 0;
    for (std::size_t e = 0; e < experts_.size(); ++e) {
      const std::int64_t count = counts.const_data_ptr<std::int64_t>()[e];
      if (count == 0) continue;
      const at::Tensor own = x_ND.index_select(0, token_of.narrow(0, begin, count));
      outputs.push_back(experts_[e]->forward(own));
      begin += count;
    }
    // Back to the order of the tokens; each adds up its own k rows, the likeliest expert first.
    const at::Tensor place = at::argsort(order);
    const at::Tensor rows_NkD =
        at::cat(outputs).index_select(0, place).unflatten(0, {-1, per_token_});
    return (rows_NkD * choice.weight_Nk.to(x.scalar_type()).unsqueeze(-1)).sum(1).view(x.sizes());
  }

 private:
  Choice route(const at::Tensor& x_ND) const {
    const auto wide = x_ND.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor p_NE =
        at::softmax(at::linear(x_ND.to(wide), gate_->weight().to(wide)), /*dim=*/-1);
    const auto [sorted, experts] = at::sort(p_NE, /*stable=*/true, /*dim=*/-1, /*descending=*/true);
    const at::Tensor top = sorted.narrow(-1, 0, per_token_);
    return {experts.narrow(-1, 0, per_token_), top / top.sum(-1, /*keepdim=*/true)};
  }

  std::int64_t per_token_;
  std::shared_ptr<Linear> gate_;
  std::vector<std::shared_ptr<GatedMlp>> experts_;
};

}  // namespace

Result<std::shared_ptr<GatedMlp>> make_experts(std::int64_t hidden_size,
                                               std::int64_t intermediate_size,
                                               std::int64_t num_experts,
                                               std::int64_t experts_per_token,
                                               std::int64_t num_layers) {
  if (num_experts < 1 || experts_per_token < 1 || experts_per_token > num_experts)
    return invalid_argument("each token uses ", experts_per_token, " of ", num_experts,
                            " experts; at least 1 and at most all of them are needed");
  std::vector<std::shared_ptr<GatedMlp>> experts;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    EVERLONG_ASSIGN(auto expert,
                    make_gated_mlp("expert", hidden_size, intermediate_size, num_layers));
    experts.push_back(std::move(expert));
  }
  return std::shared_ptr<GatedMlp>(
      std::make_shared<Experts>(std::move(experts), hidden_size, experts_per_token));
}

}  // namespace everlong
