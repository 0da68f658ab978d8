#include "mechanisms/infini/layer_state.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "ops/describe.h"

namespace everlong::infini {
namespace {

at::Tensor part_of(const at::Tensor& x, std::int64_t row, std::int64_t rows, std::int64_t token,
                   std::int64_t tokens) {
  return x.narrow(0, row, rows).narrow(1, token, tokens);
}

// [n, f, ..] with zero rows behind, up to `rows`.
at::Tensor padded(const at::Tensor& x, std::int64_t rows) {
  std::vector<std::int64_t> behind(static_cast<std::size_t>(2 * (x.dim() - 2)), 0);
  behind.insert(behind.end(), {0, rows - x.size(1)});
  return at::constant_pad_nd(x, behind);
}

}  // namespace

InfiniState::InfiniState(std::int64_t sequences, const StateShape& shape, const Options& options,
                         const at::TensorOptions& weights)
    : State(sequences), shape_(shape), options_(options) {
  const auto dtype = weights.dtype().toScalarType();
  const auto wide = weights.dtype(dtype == at::kDouble ? at::kDouble : at::kFloat);
  const std::int64_t C = options.segment, G = shape.kv_heads;
  M_ = at::zeros({sequences, G, shape.key_dim, shape.value_dim}, wide);
  z_ = at::zeros({sequences, G, shape.key_dim}, wide);
  k_ = at::zeros({sequences, C, G, shape.key_dim}, weights);
  v_ = at::zeros({sequences, C, G, shape.value_dim}, weights);
  weight_ = at::zeros({sequences, C}, wide);
}

TensorMap InfiniState::tensors() const {
  return {{"M", M_}, {"z", z_}, {"k", k_}, {"v", v_}, {"weight", weight_}};
}

Status InfiniState::restore(const TensorMap& tensors) {
  const TensorMap mine = this->tensors();
  for (const auto& [name, own_tensor] : mine) {
    const auto found = tensors.find(name);
    if (found == tensors.end() || tensors.size() != mine.size())
      return invalid_argument(
          "infini: the state needs the tensors M, z, k, v and weight, and no other");
    const at::Tensor& given = found->second;
    if (!given.defined() || given.sizes() != own_tensor.sizes() ||
        given.scalar_type() != own_tensor.scalar_type())
      return invalid_argument("infini: state ", name, " is ", describe(given), "; ",
                              describe(own_tensor), " is needed");
  }
  const at::Device device = M_.device();
  for (const auto& [name, to] :
       {std::pair{"M", &M_}, {"z", &z_}, {"k", &k_}, {"v", &v_}, {"weight", &weight_}})
    *to = tensors.at(name).to(device);
  shared_ = true;
  return {};
}

std::unique_ptr<State> InfiniState::select(std::span<const std::int64_t> sequences) const {
  auto picked = std::make_unique<InfiniState>(0, shape_, options_, k_.options());
  picked->M_ = select_sequences(M_, sequences);
  picked->z_ = select_sequences(z_, sequences);
  picked->k_ = select_sequences(k_, sequences);
  picked->v_ = select_sequences(v_, sequences);
  picked->weight_ = select_sequences(weight_, sequences);
  picked->positions() = selected_positions(sequences);
  return picked;
}

std::int64_t InfiniState::bytes_bound(std::int64_t /*tokens*/) const {
  std::int64_t bytes = 8 * sequences();
  for (const auto& [name, x] : tensors())
    bytes += x.numel() * static_cast<std::int64_t>(x.element_size());
  return bytes;
}

Status InfiniState::merge(const InfiniState& other) {
  if (options_.update != Update::kLinear)
    return unsupported(
        "infini: states merge under update = \"linear\" only; what the delta rule writes depends "
        "on what was there before");
  if (other.M_.sizes() != M_.sizes() || other.M_.scalar_type() != M_.scalar_type() ||
      other.options_.segment != options_.segment)
    return invalid_argument("infini: a state with M ", describe(other.M_), " and segments of ",
                            other.options_.segment, " cannot merge into one with ", describe(M_),
                            " and segments of ", options_.segment);
  M_ = M_ + other.M_;
  z_ = z_ + other.z_;
  return {};
}

Carried InfiniState::carried(const StatePart& g) const {
  Carried c;
  c.segment_number = g.position / options_.segment;
  // A merged memory may be there before the first segment of one's own.
  const at::Tensor z = z_.narrow(0, g.first, g.count);
  c.M_NGKV = M_.narrow(0, g.first, g.count);
  c.z_NGK = z;
  const std::int64_t open = g.position % options_.segment;
  if (open == 0) return c;
  c.k_NFGK = part_of(k_, g.first, g.count, 0, open);
  c.v_NFGV = part_of(v_, g.first, g.count, 0, open);
  c.weight_NF = part_of(weight_, g.first, g.count, 0, open);
  return c;
}

void InfiniState::own() {
  if (!shared_) return;
  for (at::Tensor* x : {&M_, &z_, &k_, &v_, &weight_}) *x = x->clone();
  shared_ = false;
}

at::Tensor InfiniState::mix(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const at::Tensor& beta, const at::Tensor& weight,
                            const Sequences& sequences) {
  const auto parts = state_parts(*this, q.size(1), sequences);
  const std::int64_t C = options_.segment;
  const bool in_place = !at::GradMode::is_enabled() && std::ranges::all_of(parts, [&](auto& g) {
    return g.position % C + g.tokens < C;
  });
  if (in_place) own();
  std::vector<at::Tensor> outputs;
  std::map<std::string, std::vector<at::Tensor>> next;
  for (const StatePart& g : parts) {
    const auto mine = [&](const at::Tensor& x) { return g.tokens_of(x); };
    const Carried before = carried(g);
    if (in_place) {
      const std::int64_t open = g.position % C, rows = open + g.tokens;
      part_of(k_, g.first, g.count, open, g.tokens).copy_(mine(k));
      part_of(v_, g.first, g.count, open, g.tokens).copy_(mine(v));
      const at::Tensor to = part_of(weight_, g.first, g.count, open, g.tokens);
      weight.defined() ? to.copy_(mine(weight)) : to.fill_(1);
      outputs.push_back(attend_open_segment(mine(q), part_of(k_, g.first, g.count, 0, rows),
                                            part_of(v_, g.first, g.count, 0, rows), beta,
                                            before.M_NGKV, before.z_NGK, options_));
      continue;
    }
    const Mixed mixed =
        infini_attention(mine(q), mine(k), mine(v), beta, mine(weight), before, options_);
    outputs.push_back(mixed.out_BTHV);
    const Carried& after = mixed.after;
    next["M"].push_back(after.M_NGKV);
    next["z"].push_back(after.z_NGK);
    next["k"].push_back(padded(after.k_NFGK, C));
    next["v"].push_back(padded(after.v_NFGV, C));
    next["weight"].push_back(padded(after.weight_NF.defined()
                                        ? after.weight_NF
                                        : at::ones({g.count, after.open()}, weight_.options()),
                                    C));
  }
  if (!in_place && !parts.empty()) {
    const auto join = [&](const char* name, at::Tensor& to) {
      to = at::cat(next.at(name), 0).to(to.scalar_type());
    };
    join("M", M_);
    join("z", z_);
    join("k", k_);
    join("v", v_);
    join("weight", weight_);
    shared_ = false;
  }
  move_on(*this, parts);
  return outputs.size() == 1 ? outputs.front()
                             : at::cat(outputs, sequences.offsets.empty() ? 0 : 1);
}

}  // namespace everlong::infini
