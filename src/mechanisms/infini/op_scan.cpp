#include "mechanisms/infini/op_scan.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

namespace everlong::infini {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Autograd functions take no undefined tensors: nothing to subtract is a tensor without elements.
bool subtracts(const at::Tensor& take) { return take.numel() > 0; }

struct ScanFunction : torch::autograd::Function<ScanFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& start, const at::Tensor& add,
                            const at::Tensor& take, const std::vector<std::int64_t>& cut) {
    const std::int64_t S = add.size(1);
    auto sizes = add.sizes().vec();
    sizes[1] = S + 1;
    at::Tensor all = at::empty(sizes, add.options());
    all.select(1, 0).copy_(start);
    for (std::int64_t s = 0; s < S; ++s) {
      at::Tensor next = all.select(1, s + 1);
      at::add_out(next, all.select(1, s), add.select(1, s));
      if (subtracts(take)) next.sub_(at::matmul(take.select(1, s), all.select(1, s)));
    }
    ctx->save_for_backward({subtracts(take) ? all : take, take});
    ctx->saved_data["cut"] = cut;
    return all;
  }

  // G_s = dL/dx_s: what is read at s and what flows on; dL/dadd_s = G_{s+1}, dL/dtake_s = - G_{s+1}
  // x_s^T.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &all = saved[0], &take = saved[1];
    const auto cut = ctx->saved_data["cut"].toIntVector();
    const at::Tensor G = grads[0].clone();
    const std::int64_t S = G.size(1) - 1;
    at::Tensor grad_take;
    if (subtracts(take)) grad_take = at::empty_like(take);
    for (std::int64_t s = S; s >= 0; --s) {
      const at::Tensor now = G.select(1, s);
      if (s < S) {
        const at::Tensor later = G.select(1, s + 1);
        now.add_(later);
        if (subtracts(take)) {
          now.sub_(at::matmul(take.select(1, s).mT(), later));
          grad_take.select(1, s).copy_(at::matmul(later, all.select(1, s).mT()).neg_());
        }
      }
      if (cut[static_cast<std::size_t>(s)] != 0) now.zero_();
    }
    return {G.select(1, 0), G.narrow(1, 1, S), grad_take, {}};
  }
};

}  // namespace

at::Tensor scan_segments(const at::Tensor& start, const at::Tensor& add, const at::Tensor& take,
                         const std::vector<std::int64_t>& cut) {
  return ScanFunction::apply(start, add, take.defined() ? take : at::empty({0}, add.options()),
                             cut);
}

}  // namespace everlong::infini
