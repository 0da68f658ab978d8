#include "session/stream.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/linear_cross_entropy.h"

namespace everlong {
namespace {

// Logits of score() are held for this many numbers at a time, 16 MiB of fp32, whatever the
// vocabulary.
constexpr std::int64_t kScoreElements = std::int64_t{1} << 22;

// Without gradients, and past the dispatch of autograd altogether: that is a seventh of a decode
// step. Not InferenceMode: what a layer caches here must stay usable in training.
struct WithoutAutograd {
  at::NoGradGuard off;
  at::AutoDispatchBelowADInplaceOrView below;
};

// log softmax(logits)[token], in double.
float log_probability(std::span<const float> logits, std::int32_t token) {
  const float largest = std::ranges::max(logits);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
  return static_cast<float>(static_cast<double>(logits[token]) - largest - std::log(sum));
}

}  // namespace

Stream::Stream(std::shared_ptr<Decoder> model, std::int64_t chunk)
    : model_(std::move(model)),
      state_(model_->make_state(1)),
      chunk_(std::max<std::int64_t>(chunk, 1)) {}

Status Stream::check_tokens(std::span<const std::int32_t> tokens) const {
  const std::int64_t vocabulary = model_->config().vocab_size;
  for (std::size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || tokens[i] >= vocabulary)
      return invalid_argument("token ", i, " of ", tokens.size(), " has the id ", tokens[i],
                              "; this model knows ids 0 to ", vocabulary - 1, ". Nothing was fed.");
  return {};
}

at::Tensor Stream::run(std::span<const std::int32_t> piece) {
  static const Sequences one;
  at::Tensor tokens = at::empty({1, static_cast<std::int64_t>(piece.size())}, at::kLong);
  std::ranges::copy(piece, tokens.mutable_data_ptr<std::int64_t>());
  return model_->hidden(tokens.to(model_->device()), one, &state_);
}

void Stream::predict(const at::Tensor& hidden_1TD) {
  const at::Tensor last = hidden_1TD.select(1, hidden_1TD.size(1) - 1);
  const at::Tensor logits = model_->logits(last).to(at::kCPU, at::kFloat).contiguous();
  const float* data = logits.const_data_ptr<float>();
  logits_.assign(data, data + logits.numel());
}

Status Stream::feed(std::span<const std::int32_t> tokens) {
  EVERLONG_RETURN_IF_ERROR(check_tokens(tokens));
  const WithoutAutograd guard;
  const auto chunk = static_cast<std::size_t>(chunk_);
  while (!tokens.empty()) {
    const auto piece = tokens.first(std::min(tokens.size(), chunk));
    const at::Tensor hidden = run(piece);
    tokens = tokens.subspan(piece.size());
    if (tokens.empty()) predict(hidden);
  }
  return {};
}

Result<std::vector<float>> Stream::score(std::span<const std::int32_t> tokens) {
  EVERLONG_RETURN_IF_ERROR(check_tokens(tokens));
  const WithoutAutograd guard;
  const auto chunk = static_cast<std::size_t>(chunk_);
  std::vector<float> scores;
  scores.reserve(tokens.size());
  while (!tokens.empty()) {
    const auto piece = tokens.first(std::min(tokens.size(), chunk));
    scores.push_back(logits_.empty() ? std::numeric_limits<float>::quiet_NaN()
                                     : log_probability(logits_, piece[0]));
    const at::Tensor hidden_1TD = run(piece);
    // Row t predicts token t + 1; the last row waits in logits_ for whatever comes.
    const std::vector<std::int64_t> next(piece.begin() + 1, piece.end());
    const auto count = static_cast<std::int64_t>(next.size());
    const at::Tensor targets = at::tensor(at::ArrayRef(next), at::kLong).to(model_->device());
    const at::Tensor nll =
        linear_cross_entropy(hidden_1TD[0].narrow(0, 0, count), model_->head_weight(), targets)
            .nll_N;
    const at::Tensor out = nll.neg().to(at::kCPU, at::kFloat).contiguous();
    scores.insert(scores.end(), out.const_data_ptr<float>(), out.const_data_ptr<float>() + count);
    predict(hidden_1TD);
    tokens = tokens.subspan(piece.size());
  }
  return scores;
}

Result<std::int32_t> Stream::generate(Sampler& sampler) {
  if (logits_.empty())
    return invalid_argument(
        "a fresh stream predicts nothing yet; feed at least one token, for instance <bos>");
  EVERLONG_ASSIGN(const std::int32_t token, sampler.draw(logits_));
  EVERLONG_RETURN_IF_ERROR(feed({&token, 1}));
  return token;
}

std::int64_t Stream::position() const { return state_.positions().front(); }
std::int64_t Stream::state_bytes() const { return state_.bytes(); }
std::int64_t Stream::state_bytes_bound() const { return state_.bytes_bound(position()); }

void Stream::reset() {
  state_ = model_->make_state(1);
  logits_.clear();
}

Stream Stream::clone() const {
  const at::NoGradGuard off;
  Stream fork(model_, chunk_);
  fork.state_ = state_.clone();
  fork.logits_ = logits_;
  fork.fingerprint_ = fingerprint_;
  return fork;
}

}  // namespace everlong
