// Softmax attention of packed lattice rows with its log-sum-exp: what a run of segments is for the
// composite form.
#pragma once
#include <ATen/core/Tensor.h>

namespace everlong::longnet {

// The powers of XPos for one channel order: log2 zeta [K] in the wide dtype. Undefined: none.
struct Fade {
  at::Tensor log2_zeta;
  double base = 1;
};
// The channels in interleaved pairs: zeta_j = (2j + 0.4 K) / (1.4 K) for channels 2j and 2j + 1.
Fade make_fade(std::int64_t key_dim, double base, const at::TensorOptions& options);

// M matrices; rows of q are (lattice row, query head of the group). The last query stands at the
// last key.
struct Panel {
  at::Tensor q_MRK, k_MSK, v_MSV;  // dtype of the products' operands
  std::int64_t group = 1;          // R rows a lattice row
  std::int64_t ratio = 1;          // tokens between lattice rows
  std::int64_t phantom = 0;        // zero keys beside
  bool causal = true;
  double scale = 1;
  const Fade* fade = nullptr;

  std::int64_t queries() const { return q_MRK.size(1) / group; }
  std::int64_t keys() const { return k_MSK.size(1); }
};

// The dtype of the products' operands for inputs of `dtype` on `device`, and of their results.
at::ScalarType operand_of(const at::Tensor& x);
at::ScalarType wide_of(at::ScalarType dtype);

struct PanelResult {
  at::Tensor out_MRV, lse_MR1;  // wide; a row that saw nothing: 0 and -inf
};
PanelResult panel_forward(const Panel& panel);

// lse: of the whole softmax that the rows belong to (+inf: zero weights); delta as README.md,
// section 3. Results wide.
struct PanelGrads {
  at::Tensor q_MRK, k_MSK, v_MSV;
};
PanelGrads panel_backward(const Panel& panel, const at::Tensor& grad_out_MRV,
                          const at::Tensor& lse_MR1, const at::Tensor& delta_MR1);

}  // namespace everlong::longnet
