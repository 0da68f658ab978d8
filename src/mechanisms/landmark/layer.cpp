#include "mechanisms/landmark/layer.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/settings.h"
#include "layers/layer_call.h"
#include "mechanisms/landmark/layer_memory.h"

namespace everlong::landmark {
namespace {

constexpr std::int64_t kMostHeads = 65536, kMostDim = 65536, kMostBlocks = std::int64_t{1} << 40;

// [B, T] on the CPU, 1 where a stream has a landmark in each sequence.
at::Tensor regular_marks(std::int64_t batch, std::int64_t tokens, const Sequences& sequences,
                         const std::vector<std::int64_t>& starts, const Retrieval& retrieval) {
  const at::Tensor marks = at::zeros({batch, tokens}, at::kByte);
  for (std::int64_t n = 0; n < sequences.count(batch); ++n) {
    const std::int64_t length = sequences.length(n, tokens);
    const auto row =
        landmarks_of(retrieval, starts.empty() ? 0 : starts[static_cast<std::size_t>(n)], length);
    const bool packed = !sequences.offsets.empty();
    std::copy(row.begin(), row.end(),
              marks.mutable_data_ptr<std::uint8_t>() +
                  (packed ? sequences.offsets[static_cast<std::size_t>(n)] : n * tokens));
  }
  return marks;
}

}  // namespace

Result<LayerSettings> read_settings(const LayerSpec& spec) {
  Settings s(spec.settings, cat("landmark, layer ", spec.layer_index));
  LayerSettings out;
  out.hidden_size = spec.hidden_size;
  out.num_layers = spec.num_layers;
  out.num_heads =
      s.integer("num_heads", std::max<std::int64_t>(spec.hidden_size / 64, 1), 1, kMostHeads);
  out.num_kv_heads = s.integer("num_kv_heads", out.num_heads, 1, kMostHeads);
  const std::int64_t even_share = spec.hidden_size / out.num_heads;
  out.head_dim = s.integer("head_dim", std::max<std::int64_t>(even_share, 1), 1, kMostDim);
  out.rope = s.choice("rope", "half_split", {"half_split", "interleaved", "none"});
  out.rope_theta = s.number("rope_theta", 10000, 1, 1e30);
  out.fused = s.choice("projections", "split", {"split", "fused"}) == "fused";
  if (s.has("scale")) out.scale = s.number("scale", 1, 1e-30, 1e30);
  out.dense_training = s.choice("training", "dense", {"dense", "as_streamed"}) == "dense";
  Retrieval& r = out.retrieval;
  r.block = s.integer("block", 64, 2, std::int64_t{1} << 20);
  r.top_k = s.integer("top_k", 0, -1, kMostBlocks);
  r.window = s.integer("window", 0, 0, kMostBlocks);
  r.max_blocks = s.integer("max_blocks", 0, 0, kMostBlocks);
  r.chunked = s.choice("mode", "window", {"window", "chunk"}) == "chunk";
  const std::string granularity = s.choice(
      "granularity", "token_head", {"token_head", "head_max_over_tokens", "token_max_over_heads"});
  if (auto parsed = parse_granularity(granularity); parsed.ok()) r.granularity = *parsed;
  if (auto score = parse_block_score(s.choice("score", "landmark", {"landmark", "mean", "max"}));
      score.ok())
    r.score = *score;
  out.pages.folder = s.text("pages", "");
  out.pages.megabytes = s.integer("page_megabytes", out.pages.megabytes, 1, std::int64_t{1} << 24);
  out.pages.device_megabytes =
      s.integer("device_megabytes", out.pages.device_megabytes, 1, std::int64_t{1} << 24);
  if (s.has("epsilon")) out.pages.epsilon = s.number("epsilon", 1e-3, 1e-12, 1e12);
  out.pages.most_more = s.integer("epsilon_blocks", 0, 0, kMostBlocks);
  if (const Status status = check_pages(out.pages, r); !status.ok()) s.fail(status);
  if (!s.has("head_dim") && spec.hidden_size % out.num_heads != 0)
    s.fail(invalid_argument("hidden_size ", spec.hidden_size, " does not divide among num_heads ",
                            out.num_heads,
                            "; give head_dim, or a number of heads that divides it"));
  if (out.num_heads % out.num_kv_heads != 0)
    s.fail(invalid_argument("num_heads ", out.num_heads, " is not a multiple of num_kv_heads ",
                            out.num_kv_heads,
                            "; query heads share key/value heads in equal groups"));
  if (out.fused && out.num_heads != out.num_kv_heads)
    s.fail(unsupported("projections = \"fused\" with num_kv_heads ", out.num_kv_heads, " of ",
                       out.num_heads, " heads; joined projections have as many of each"));
  if (out.rope != "none" && out.head_dim % 2 != 0)
    s.fail(invalid_argument("head_dim ", out.head_dim, " is odd; coordinates turn in pairs"));
  if (const Status status = validate(r); !status.ok()) s.fail(status);
  EVERLONG_RETURN_IF_ERROR(s.finish());
  return out;
}

LandmarkAttention::LandmarkAttention(const LayerSettings& s) : settings_(s) {
  const std::int64_t inner = s.num_heads * s.head_dim, shared = s.num_kv_heads * s.head_dim;
  reader_.retrieval = s.retrieval;
  reader_.scale = s.scale.value_or(default_scale(s.head_dim));
  if (s.rope != "none") reader_.frequencies = rope_frequencies(s.rope_theta, s.head_dim);
  reader_.pairs = s.rope == "interleaved" ? RopePairs::kInterleaved : RopePairs::kHalfSplit;
  const auto back = std::make_shared<Linear>(inner, s.hidden_size, residual_gain(s.num_layers));
  if (s.fused) {
    c_attn_ = register_module("c_attn", std::make_shared<Linear>(s.hidden_size, 3 * inner));
    o_proj_ = register_module("c_proj", back);
    return;
  }
  q_proj_ = register_module("q_proj", std::make_shared<Linear>(s.hidden_size, inner));
  k_proj_ = register_module("k_proj", std::make_shared<Linear>(s.hidden_size, shared));
  v_proj_ = register_module("v_proj", std::make_shared<Linear>(s.hidden_size, shared));
  o_proj_ = register_module("o_proj", back);
}

std::unique_ptr<State> LandmarkAttention::make_state(std::int64_t sequences) const {
  const MemoryShape shape{settings_.num_kv_heads, settings_.head_dim, settings_.head_dim,
                          settings_.retrieval};
  const auto options = o_proj_->weight().options().requires_grad(false);
  if (!settings_.pages.folder.empty())
    return make_paged_state(sequences, shape, options, settings_.pages);
  return std::make_unique<BlockMemory>(sequences, shape, options);
}

std::string LandmarkAttention::path(at::Device device) const {
  if (!device.is_cpu()) return "composite (ATen)";
  const auto options = o_proj_->weight().options().requires_grad(false).device(device);
  const at::Tensor probe = at::empty({1, 0, 1, settings_.head_dim}, options);
  return path_taken(probe, probe, probe, {}) == "cpu" ? "cpu kernel" : "composite (ATen)";
}

Status LandmarkAttention::set_reading(const Retrieval& retrieval) {
  if (retrieval.block != settings_.retrieval.block)
    return invalid_argument("landmark: block = ", retrieval.block, " of a layer with blocks of ",
                            settings_.retrieval.block, "; the text decides it");
  EVERLONG_RETURN_IF_ERROR(validate(retrieval));
  EVERLONG_RETURN_IF_ERROR(check_pages(settings_.pages, retrieval));
  settings_.retrieval = reader_.retrieval = retrieval;
  return {};
}

void LandmarkAttention::check(const at::Tensor& x_BTD, const Sequences& sequences,
                              const State* state) const {
  check_layer_call("landmark", x_BTD, settings_.hidden_size, sequences, state,
                   dynamic_cast<const BlockMemory*>(state) != nullptr ||
                       dynamic_cast<const PagedMemory*>(state) != nullptr);
  if (sequences.marks.defined())
    TORCH_CHECK_VALUE(
        sequences.marks.is_cpu() && sequences.marks.sizes() == x_BTD.sizes().slice(0, 2) &&
            (sequences.marks.scalar_type() == at::kBool ||
             sequences.marks.scalar_type() == at::kByte),
        "landmark: marks are ", sequences.marks.scalar_type(), " ", sequences.marks.sizes(),
        "; bool [", x_BTD.size(0), ", ", x_BTD.size(1), "] on the CPU is needed");
}

void LandmarkAttention::check_marks(const Sequences& sequences, const at::Tensor& x_BTD,
                                    const State* state) const {
  if (!sequences.marks.defined()) return;
  const std::int64_t block = settings_.retrieval.block;
  const auto wanted = regular_marks(
      x_BTD.size(0), x_BTD.size(1), sequences,
      state == nullptr ? std::vector<std::int64_t>{} : state->positions(), settings_.retrieval);
  TORCH_CHECK_VALUE(settings_.retrieval.has_landmarks() || !sequences.marks.any().item<bool>(),
                    "landmark: the text has landmarks, but score = \"mean\" or \"max\" reads texts "
                    "without; set score to \"landmark\", or landmark_id of config.json to -1");
  TORCH_CHECK_VALUE(sequences.marks.to(at::kByte).equal(wanted),
                    "landmark: the landmarks of the text are not at every position ", block - 1,
                    " mod ", block,
                    " of its sequences, where a stream needs them; insert one "
                    "after every ",
                    block - 1, " tokens from the start");
}

LandmarkAttention::Projected LandmarkAttention::project(const at::Tensor& x_BTD) const {
  const std::int64_t K = settings_.head_dim, H = settings_.num_heads, G = settings_.num_kv_heads;
  if (settings_.fused) {
    const auto parts = c_attn_->forward(x_BTD).unflatten(2, {3, H, K}).unbind(2);
    return {parts[0], parts[1], parts[2]};
  }
  return {q_proj_->forward(x_BTD).unflatten(2, {H, K}),
          k_proj_->forward(x_BTD).unflatten(2, {G, K}),
          v_proj_->forward(x_BTD).unflatten(2, {G, K})};
}

at::Tensor LandmarkAttention::attend_densely(const Projected& x, const Sequences& sequences) const {
  const std::int64_t B = x.q.size(0), T = x.q.size(1);
  at::Tensor q = x.q, k = x.k;
  if (!reader_.frequencies.empty()) {
    std::vector<std::int64_t> positions;
    const std::int64_t lines = sequences.offsets.empty() ? 1 : sequences.count(B);
    for (std::int64_t n = 0; n < lines; ++n)
      for (std::int64_t t = 0; t < sequences.length(n, T); ++t) positions.push_back(t);
    const RopeTable table = make_rope_table(positions, 1, reader_.frequencies, reader_.pairs,
                                            q.scalar_type(), q.device());
    q = apply_rope(q, table);
    k = apply_rope(k, table);
  }
  const at::Tensor marks = sequences.marks.defined()
                               ? sequences.marks
                               : regular_marks(B, T, sequences, {}, settings_.retrieval);
  const Options options{.scale = reader_.scale, .path = reader_.path};
  if (sequences.offsets.empty()) return attention(q, k, x.v, marks, options).out;
  std::vector<at::Tensor> parts;
  for (std::int64_t n = 0; n < sequences.count(B); ++n) {
    const std::int64_t from = sequences.offsets[static_cast<std::size_t>(n)];
    const auto part = [&](const at::Tensor& all) {
      return all.narrow(1, from, sequences.length(n, T));
    };
    parts.push_back(attention(part(q), part(k), part(x.v), part(marks), options).out);
  }
  return parts.empty() ? attention(q, k, x.v, marks, options).out : at::cat(parts, 1);
}

at::Tensor LandmarkAttention::attend_as_streamed(const Projected& x, const Sequences& sequences) {
  const std::int64_t block = settings_.retrieval.block, T = x.q.size(1);
  const auto read = [&](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    const Stored stored{stored_rows(turned_in_block(k, 0, reader_), block), stored_rows(v, block),
                        0};
    return read_blocks(q, stored, 0, reader_, record_);
  };
  std::vector<at::Tensor> outs, picks;
  const std::int64_t lines = sequences.offsets.empty() ? 1 : sequences.count(1);
  for (std::int64_t n = 0; n < lines; ++n) {
    const std::int64_t from = sequences.offsets.empty() ? 0 : sequences.offsets[n];
    const auto part = [&](const at::Tensor& all) {
      return all.narrow(1, from, sequences.length(n, T));
    };
    const Read one = read(part(x.q), part(x.k), part(x.v));
    outs.push_back(one.out);
    if (one.selected.defined()) picks.push_back(one.selected);
  }
  if (!picks.empty()) picks_ = at::cat(picks, 1);
  return outs.empty() ? read(x.q, x.k, x.v).out : at::cat(outs, 1);
}

at::Tensor LandmarkAttention::forward(const at::Tensor& x_BTD, const Sequences& sequences,
                                      State* state) {
  check(x_BTD, sequences, state);
  const bool dense = state == nullptr && settings_.dense_training;
  if (!dense || !settings_.retrieval.has_landmarks()) check_marks(sequences, x_BTD, state);
  const Projected x = project(x_BTD);
  picks_ = at::Tensor();
  at::Tensor out;
  if (state != nullptr) {
    auto* const paged = dynamic_cast<PagedMemory*>(state);
    const Read read = paged != nullptr ? paged->attend(x.q, x.k, x.v, sequences, reader_, record_)
                                       : static_cast<BlockMemory*>(state)->attend(
                                             x.q, x.k, x.v, sequences, reader_, record_);
    out = read.out;
    picks_ = read.selected;
  } else {
    out = dense ? attend_densely(x, sequences) : attend_as_streamed(x, sequences);
  }
  return o_proj_->forward(out.flatten(2));
}

}  // namespace everlong::landmark
