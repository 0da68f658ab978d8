// What a timestep norm carries from call to call, and how it moves on: over the whole text, which
// is the published rule, or over the newest of it. The published evaluation of long texts renews
// its statistics from the last six chunks after every call; here blocks of two chunks fall out one
// by one, so a result depends on positions alone and nothing is read twice.
#pragma once
#include "layers/state.h"
#include "mechanisms/megalodon/op.h"

namespace everlong::megalodon {

// `given` has the tensor `name` in the dtype of `mine` and of the sizes `wanted`, of which a
// negative one is free.
Status check_tensor(const TensorMap& given, const char* name, const at::Tensor& mine,
                    std::vector<std::int64_t> wanted);

// The statistics of a token cover its own block up to itself and the `blocks` complete ones before
// it. Blocks begin at multiples of `tokens`. blocks = 0: everything is covered.
struct NormWindow {
  std::int64_t tokens = 1, blocks = 0;
  bool bounded() const { return blocks > 0; }
};

// Not thread safe.
class NormMemory {
 public:
  NormMemory(std::int64_t sequences, std::int64_t groups, const NormWindow& window,
             at::Device device);

  // "mean" and "var" [N, G] fp64, of what a token to come builds on; with a window also
  // "block_mean" and "block_var" [N, blocks, G], of the complete blocks, the newest last.
  void add_to(TensorMap& tensors, const std::string& prefix) const;
  Status restore(const TensorMap& tensors, const std::string& prefix);
  NormMemory select(std::span<const std::int64_t> sequences) const;
  std::int64_t bytes_per_sequence() const;
  std::int64_t tensor_count() const { return window_.bounded() ? 4 : 2; }

  // Without a window: the norm's state at these positions, and what it became.
  NormState state(const std::vector<std::int64_t>& positions) const;
  void set(const NormState& state);

  // TimestepNorm(x) of op.h from `positions` (one a sequence), which stay; `state` moves. Rows of
  // different positions, and the sequences of a packed line, go one after the other.
  at::Tensor forward(const at::Tensor& x_BTD, const at::Tensor& weight_D, const at::Tensor& bias_D,
                     double eps, Offsets offsets, const std::vector<std::int64_t>& positions);

 private:
  explicit NormMemory(const NormWindow& window) : window_(window) {}
  NormMemory rows(std::int64_t first, std::int64_t count) const;
  at::Tensor forward_rows(const at::Tensor& x_BTD, const at::Tensor& weight_D,
                          const at::Tensor& bias_D, double eps, std::int64_t position);
  void complete_block(std::int64_t before);

  NormWindow window_;
  at::Tensor mean_NG_, var_NG_, block_mean_NRG_, block_var_NRG_;
};

}  // namespace everlong::megalodon
