#include "session/stream.h"

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "layers/tiered_state.h"
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

// The sum of what `ask` answers for the layers' states that lie in tiers.
template <class Ask>
std::int64_t over_tiers(const ModelState& state, const Ask& ask) {
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < state.num_layers(); ++i)
    if (const auto* tiers = dynamic_cast<const TieredState*>(&state.layer(i))) sum += ask(*tiers);
  return sum;
}

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
      landmarks_(LandmarkRule::of(model_->config())),
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

void Stream::predict(const at::Tensor& hidden_1TD, std::int64_t row) {
  const at::Tensor logits =
      model_->logits(hidden_1TD.select(1, row)).to(at::kCPU, at::kFloat).contiguous();
  const float* data = logits.const_data_ptr<float>();
  logits_.assign(data, data + logits.numel());
}

LandmarkRule::Marked Stream::marked(std::span<const std::int32_t> text) const {
  return landmarks_ ? landmarks_->mark(text, position()) : LandmarkRule::Marked{};
}

Status Stream::feed(std::span<const std::int32_t> tokens) {
  EVERLONG_RETURN_IF_ERROR(check_tokens(tokens));
  const WithoutAutograd guard;
  const auto chunk = static_cast<std::size_t>(chunk_);
  const auto with_landmarks = marked(tokens);
  if (landmarks_) tokens = with_landmarks.ids;
  while (!tokens.empty()) {
    const auto piece = tokens.first(std::min(tokens.size(), chunk));
    const at::Tensor hidden = run(piece);
    tokens = tokens.subspan(piece.size());
    // The last is never a landmark, unless landmarks are what predicts.
    if (tokens.empty()) predict(hidden, hidden.size(1) - 1);
  }
  return {};
}

Result<std::vector<float>> Stream::score(std::span<const std::int32_t> tokens) {
  EVERLONG_RETURN_IF_ERROR(check_tokens(tokens));
  const WithoutAutograd guard;
  const auto chunk = static_cast<std::size_t>(chunk_);
  std::vector<float> scores(tokens.size(), std::numeric_limits<float>::quiet_NaN());
  const auto with_landmarks = marked(tokens);
  if (landmarks_) tokens = with_landmarks.ids;
  const auto text_index = [&](std::size_t i) {
    return landmarks_ ? with_landmarks.from[i] : static_cast<std::int64_t>(i);
  };
  for (std::size_t begin = 0; begin < tokens.size(); begin += chunk) {
    const auto piece = tokens.subspan(begin, std::min(tokens.size() - begin, chunk));
    // Which row predicts which token of the piece. A landmark that is not predicted predicts
    // nothing: the row before it speaks for the token after it. Row -1 is what logits_ holds.
    std::vector<std::int64_t> rows, targets, places;
    std::int64_t speaker = -1;
    for (std::size_t t = 0; t < piece.size(); ++t) {
      const std::int64_t place = text_index(begin + t);
      if (place >= 0 && speaker >= 0) {
        rows.push_back(speaker);
        targets.push_back(piece[t]);
        places.push_back(place);
      } else if (place >= 0 && !logits_.empty()) {
        scores[static_cast<std::size_t>(place)] = log_probability(logits_, piece[t]);
      }
      if (place >= 0 || landmarks_->predicted()) speaker = static_cast<std::int64_t>(t);
    }
    const at::Tensor hidden_1TD = run(piece);
    const auto count = static_cast<std::int64_t>(rows.size());
    const bool in_a_row = count == 0 || rows.back() == count - 1;
    const at::Tensor speaking =
        in_a_row ? hidden_1TD[0].narrow(0, 0, count)
                 : hidden_1TD[0].index_select(
                       0, at::tensor(at::ArrayRef(rows), at::kLong).to(model_->device()));
    const at::Tensor nll =
        linear_cross_entropy(speaking, model_->head_weight(),
                             at::tensor(at::ArrayRef(targets), at::kLong).to(model_->device()))
            .nll_N;
    const at::Tensor out = nll.neg().to(at::kCPU, at::kFloat).contiguous();
    for (std::int64_t i = 0; i < count; ++i)
      scores[static_cast<std::size_t>(places[static_cast<std::size_t>(i)])] =
          out.const_data_ptr<float>()[i];
    // The last speaker waits in logits_ for whatever comes.
    if (speaker >= 0) predict(hidden_1TD, speaker);
  }
  return scores;
}

Result<std::int32_t> Stream::generate(Sampler& sampler) {
  if (logits_.empty())
    return invalid_argument(
        "a fresh stream predicts nothing yet; feed at least one token, for instance <bos>");
  std::vector<float> without;  // a landmark comes by its place, not by chance
  if (landmarks_) {
    without = logits_;
    without[static_cast<std::size_t>(landmarks_->id())] = -std::numeric_limits<float>::infinity();
  }
  EVERLONG_ASSIGN(const std::int32_t token, sampler.draw(landmarks_ ? without : logits_));
  EVERLONG_RETURN_IF_ERROR(feed({&token, 1}));
  return token;
}

std::int64_t Stream::position() const { return state_.positions().front(); }
std::int64_t Stream::text_position() const {
  return landmarks_ ? landmarks_->text_tokens(position()) : position();
}
std::int64_t Stream::state_bytes() const { return state_.bytes(); }
std::int64_t Stream::state_bytes_bound() const { return state_.bytes_bound(position()); }

std::int64_t Stream::file_bytes() const {
  return over_tiers(state_, [](const TieredState& tiers) { return tiers.file_bytes(); });
}
std::int64_t Stream::file_bytes_bound() const {
  return over_tiers(state_,
                    [&](const TieredState& tiers) { return tiers.file_bytes_bound(position()); });
}

std::map<std::string, double> Stream::state_counts() const {
  std::map<std::string, double> sums;
  over_tiers(state_, [&](const TieredState& tiers) {
    for (const auto& [name, count] : tiers.counts()) sums[name] += count;
    return 0;
  });
  return sums;
}

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
