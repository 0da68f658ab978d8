#include "mechanisms/lightning/layer_state.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>

#include "mechanisms/lightning/kernel_cuda.h"
#include "mechanisms/lightning/op_cuda.h"
#include "ops/describe.h"

namespace everlong::lightning {
namespace {

constexpr std::int64_t kRing = 16;  // rings of 8 and of 32 are slower (docs/benchmarks.md)

// Writing behind saves the write of S to memory, so it pays where the states of a layer do not stay
// in the level 2 cache (50 MB on an H200, through which all other layers pass between two tokens).
// With 2 MiB a session, 64 sessions take 0.66 of the plain step's time, a single one 1.13.
constexpr std::int64_t kBytesThatPay = std::int64_t{32} << 20;

bool writes_behind(const at::Tensor& S, WriteBehind wish, at::ScalarType token_dtype) {
  constexpr std::array kDtypes = {at::kFloat, at::kBFloat16, at::kHalf};
  if (wish == WriteBehind::kOff || S.numel() == 0 || S.scalar_type() != at::kFloat) return false;
  if (wish == WriteBehind::kAuto && static_cast<std::int64_t>(S.nbytes()) < kBytesThatPay)
    return false;
  // The sweep asks for the same GPUs and number of heads.
  return std::ranges::find(kDtypes, token_dtype) != kDtypes.end() &&
         S.size(2) <= kCudaRingMaxKeyDim &&
         takes_cuda_sweep(S.device(), token_dtype, S.size(1), S.size(2), S.size(3));
}

}  // namespace

LightningState::LightningState(at::Tensor S_NHKV, Decay decay, WriteBehind write_behind,
                               at::ScalarType token_dtype)
    : State(S_NHKV.size(0)),
      S_(std::move(S_NHKV)),
      decay_(std::move(decay)),
      write_behind_(write_behind),
      token_dtype_(token_dtype),
      behind_(writes_behind(S_, write_behind, token_dtype)) {}

at::Tensor LightningState::matrices() const {
  fold();
  return S_;
}

void LightningState::set_matrices(at::Tensor S_NHKV) {
  S_ = std::move(S_NHKV);
  drop_rings();
}

at::Tensor LightningState::step_behind(const at::Tensor& q, const at::Tensor& k,
                                       const at::Tensor& v) {
  const auto plain = [&](const at::Tensor& x) {
    return x.size(1) == 1 && x.scalar_type() == token_dtype_ && x.device() == S_.device();
  };
  if (!behind_ || !plain(q) || !plain(k) || !plain(v)) return {};
  if (at::GradMode::is_enabled() &&
      (q.requires_grad() || k.requires_grad() || v.requires_grad() || S_.requires_grad()))
    return {};
  if (waiting_ == 0) open_rings();
  at::Tensor o = step_with_rings(
      q, k, v, decay_,
      {S_, keys_, values_, counts_[static_cast<std::size_t>(waiting_)], /*slot_B=*/{}});
  waiting_ = (waiting_ + 1) % kRing;  // a full ring has been folded
  return o;
}

// From here on S is written in place. A snapshot, another state or autograd may hold it: they keep
// the old one. A gradient that came with it ends here, as it does where S is made anew.
void LightningState::open_rings() {
  if (S_.requires_grad() || !S_.is_contiguous() || S_.use_count() > 1 ||
      S_.storage().use_count() > 1) {
    const at::NoGradGuard off;
    S_ = S_.clone(at::MemoryFormat::Contiguous);
  }
  if (!counts_.empty()) return;
  const std::int64_t N = S_.size(0), H = S_.size(1);
  const auto options = S_.options().dtype(token_dtype_);
  keys_ = at::empty({N, H, kRing, S_.size(2)}, options);
  values_ = at::empty({N, H, kRing, S_.size(3)}, options);
  // Every count there is, once: none has to be sent to the device for a token.
  counts_ = at::arange(kRing, S_.options().dtype(at::kInt)).unsqueeze(1).repeat({1, N}).unbind(0);
}

void LightningState::fold() const {
  if (waiting_ == 0) return;
  step_with_rings({}, {}, {}, decay_,
                  {S_, keys_, values_, counts_[static_cast<std::size_t>(waiting_)], /*slot_B=*/{}});
  waiting_ = 0;
}

void LightningState::drop_rings() {
  keys_.reset();
  values_.reset();
  counts_.clear();
  waiting_ = 0;
}

Status LightningState::restore(const TensorMap& tensors) {
  const auto found = tensors.find("S");
  if (found == tensors.end() || tensors.size() != 1)
    return invalid_argument("lightning: a state has one tensor, S; given ", tensors.size(),
                            " tensors", found == tensors.end() ? " without S" : "");
  const at::Tensor& S = found->second;
  if (!S.defined() || S.sizes() != S_.sizes() || S.scalar_type() != S_.scalar_type())
    return invalid_argument("lightning: S is ", describe(S), "; this state holds ", describe(S_));
  set_matrices(S.to(S_.device()));
  return {};
}

std::unique_ptr<State> LightningState::select(std::span<const std::int64_t> sequences) const {
  auto out = std::make_unique<LightningState>(select_sequences(matrices(), sequences), decay_,
                                              write_behind_, token_dtype_);
  out->positions() = selected_positions(sequences);
  return out;
}

std::int64_t LightningState::bytes() const {
  std::size_t total = positions().size() * sizeof(std::int64_t) + S_.storage().nbytes();
  if (!counts_.empty())
    total +=
        keys_.storage().nbytes() + values_.storage().nbytes() + counts_.front().storage().nbytes();
  return static_cast<std::int64_t>(total);
}

std::int64_t LightningState::bytes_bound(std::int64_t /*tokens*/) const {
  const std::int64_t N = sequences(), H = S_.size(1), K = S_.size(2), V = S_.size(3);
  const auto element = static_cast<std::int64_t>(at::elementSize(token_dtype_));
  const std::int64_t rings = kRing * N * (H * (K + V) * element + 4);  // 4: of a count
  return static_cast<std::int64_t>(S_.nbytes()) + N * 8 + (behind_ ? rings : 0);
}

}  // namespace everlong::lightning
