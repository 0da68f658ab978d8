#include "mechanisms/megalodon/layer_norm_memory.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <tuple>

namespace everlong::megalodon {
namespace {

// Mean and variance of blocks [N, R, G] of equal length taken together.
std::pair<at::Tensor, at::Tensor> merged(const at::Tensor& mean_NRG, const at::Tensor& var_NRG) {
  const at::Tensor mean = mean_NRG.mean(1);
  return {mean, var_NRG.mean(1) + (mean_NRG - mean.unsqueeze(1)).square().mean(1)};
}

at::Tensor with_newest(const at::Tensor& blocks_NRG, const at::Tensor& newest_NG) {
  return at::cat({blocks_NRG.narrow(1, 1, blocks_NRG.size(1) - 1), newest_NG.unsqueeze(1)}, 1);
}

}  // namespace

Status check_tensor(const TensorMap& given, const char* name, const at::Tensor& mine,
                    std::vector<std::int64_t> wanted) {
  const auto found = given.find(name);
  if (found == given.end()) return invalid_argument("megalodon: the state lacks the tensor ", name);
  const at::Tensor& x = found->second;
  bool fits = x.defined() && x.scalar_type() == mine.scalar_type() &&
              x.dim() == static_cast<std::int64_t>(wanted.size());
  for (std::size_t i = 0; fits && i < wanted.size(); ++i)
    fits = wanted[i] < 0 || x.size(static_cast<std::int64_t>(i)) == wanted[i];
  if (fits) return {};
  std::vector<std::string> sizes;
  for (const auto size : wanted) sizes.push_back(size < 0 ? "rows" : cat(size));
  return invalid_argument("megalodon: state ", name, " is ",
                          x.defined() ? cat(x.scalar_type(), " ", x.sizes()) : "undefined", "; ",
                          mine.scalar_type(), " [", join(sizes, ", "), "] is needed");
}

NormMemory::NormMemory(std::int64_t sequences, std::int64_t groups, const NormWindow& window,
                       at::Device device)
    : window_(window) {
  const auto zeros = [&](at::IntArrayRef sizes) {
    return at::zeros(sizes, at::TensorOptions().dtype(at::kDouble).device(device));
  };
  mean_NG_ = zeros({sequences, groups});
  var_NG_ = zeros({sequences, groups});
  block_mean_NRG_ = zeros({sequences, window.blocks, groups});
  block_var_NRG_ = zeros({sequences, window.blocks, groups});
}

void NormMemory::add_to(TensorMap& tensors, const std::string& prefix) const {
  tensors[prefix + "mean"] = mean_NG_;
  tensors[prefix + "var"] = var_NG_;
  if (!window_.bounded()) return;
  tensors[prefix + "block_mean"] = block_mean_NRG_;
  tensors[prefix + "block_var"] = block_var_NRG_;
}

Status NormMemory::restore(const TensorMap& given, const std::string& prefix) {
  TensorMap mine;
  add_to(mine, prefix);
  for (const auto& [name, x] : mine)
    EVERLONG_RETURN_IF_ERROR(check_tensor(given, name.c_str(), x, x.sizes().vec()));
  const auto take = [&](const char* name, at::Tensor& x) {
    x = given.at(prefix + name).to(x.device());
  };
  take("mean", mean_NG_);
  take("var", var_NG_);
  if (!window_.bounded()) return {};
  take("block_mean", block_mean_NRG_);
  take("block_var", block_var_NRG_);
  return {};
}

NormMemory NormMemory::select(std::span<const std::int64_t> sequences) const {
  NormMemory out(window_);
  out.mean_NG_ = select_sequences(mean_NG_, sequences);
  out.var_NG_ = select_sequences(var_NG_, sequences);
  out.block_mean_NRG_ = select_sequences(block_mean_NRG_, sequences);
  out.block_var_NRG_ = select_sequences(block_var_NRG_, sequences);
  return out;
}

NormMemory NormMemory::rows(std::int64_t first, std::int64_t count) const {
  NormMemory out(window_);
  out.mean_NG_ = mean_NG_.narrow(0, first, count);
  out.var_NG_ = var_NG_.narrow(0, first, count);
  out.block_mean_NRG_ = block_mean_NRG_.narrow(0, first, count);
  out.block_var_NRG_ = block_var_NRG_.narrow(0, first, count);
  return out;
}

std::int64_t NormMemory::bytes_per_sequence() const {
  return 2 * 8 * mean_NG_.size(1) * (1 + window_.blocks);
}

NormState NormMemory::state(const std::vector<std::int64_t>& positions) const {
  return {positions, mean_NG_, var_NG_};
}

void NormMemory::set(const NormState& state) {
  mean_NG_ = state.mean_NG;
  var_NG_ = state.var_NG;
}

at::Tensor NormMemory::forward(const at::Tensor& x_BTD, const at::Tensor& weight_D,
                               const at::Tensor& bias_D, double eps, Offsets offsets,
                               const std::vector<std::int64_t>& positions) {
  if (!window_.bounded()) {
    Normalised out = timestep_norm(x_BTD, weight_D, bias_D, eps, offsets, state(positions));
    set(out.state);
    return out.y_BTD;
  }
  const bool together = offsets.empty() && std::ranges::all_of(positions, [&](std::int64_t at) {
                          return at == positions.front();
                        });
  if (together && !positions.empty())
    return forward_rows(x_BTD, weight_D, bias_D, eps, positions.front());
  std::vector<at::Tensor> ys, means, vars, block_means, block_vars;
  for (std::size_t i = 0; i < positions.size(); ++i) {
    const auto n = static_cast<std::int64_t>(i);
    const at::Tensor x = offsets.empty() ? x_BTD.narrow(0, n, 1)
                                         : x_BTD.narrow(1, offsets[i], offsets[i + 1] - offsets[i]);
    NormMemory one = rows(n, 1);
    ys.push_back(one.forward_rows(x, weight_D, bias_D, eps, positions[i]));
    means.push_back(one.mean_NG_);
    vars.push_back(one.var_NG_);
    block_means.push_back(one.block_mean_NRG_);
    block_vars.push_back(one.block_var_NRG_);
  }
  if (ys.empty()) return x_BTD.clone();
  mean_NG_ = at::cat(means);
  var_NG_ = at::cat(vars);
  block_mean_NRG_ = at::cat(block_means);
  block_var_NRG_ = at::cat(block_vars);
  return at::cat(ys, offsets.empty() ? 0 : 1);
}

// Inside a block the rule is the cumulative one, from the statistics of the complete blocks.
at::Tensor NormMemory::forward_rows(const at::Tensor& x_BTD, const at::Tensor& weight_D,
                                    const at::Tensor& bias_D, double eps, std::int64_t position) {
  const std::int64_t T = x_BTD.size(1), block = window_.tokens;
  std::vector<at::Tensor> ys;
  std::int64_t begin = 0;
  do {
    const std::int64_t inside = position % block, count = std::min(T - begin, block - inside),
                       complete = std::min(window_.blocks, position / block);
    const std::vector<std::int64_t> counts(static_cast<std::size_t>(x_BTD.size(0)),
                                           complete * block + inside);
    Normalised out = timestep_norm(x_BTD.narrow(1, begin, count), weight_D, bias_D, eps, {},
                                   {counts, mean_NG_, var_NG_});
    ys.push_back(std::move(out.y_BTD));
    set(out.state);
    begin += count;
    position += count;
    if (count > 0 && position % block == 0) complete_block(complete);
  } while (begin < T);
  return ys.size() == 1 ? ys.front() : at::cat(ys, 1);
}

// What the finished block adds to the `before` complete ones is its own share; the oldest leaves.
void NormMemory::complete_block(std::int64_t before) {
  const std::int64_t kept = window_.blocks;
  at::Tensor mean = mean_NG_, var = var_NG_;
  if (before > 0) {
    const auto [old_mean, old_var] = merged(block_mean_NRG_.narrow(1, kept - before, before),
                                            block_var_NRG_.narrow(1, kept - before, before));
    const auto weight = static_cast<double>(before);
    mean = mean_NG_ + weight * (mean_NG_ - old_mean);
    var = ((weight + 1) * var_NG_ - weight * (old_var + (old_mean - mean_NG_).square()) -
           (mean - mean_NG_).square())
              .clamp_min(0);
  }
  block_mean_NRG_ = with_newest(block_mean_NRG_, mean);
  block_var_NRG_ = with_newest(block_var_NRG_, var);
  const std::int64_t complete = std::min(kept, before + 1);
  std::tie(mean_NG_, var_NG_) = merged(block_mean_NRG_.narrow(1, kept - complete, complete),
                                       block_var_NRG_.narrow(1, kept - complete, complete));
}

}  // namespace everlong::megalodon
