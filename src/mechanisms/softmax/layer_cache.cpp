#include "mechanisms/softmax/layer_cache.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

namespace everlong::softmax {
namespace {

constexpr std::int64_t kRowBlock = 256;
constexpr std::int64_t kMostTokens = std::int64_t{1} << 60;  // sizes above stay within 64 bits

std::int64_t round_up(std::int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock * kRowBlock; }

at::Tensor tokens_of(const at::Tensor& x_BTHD, std::int64_t row, std::int64_t rows,
                     std::int64_t token, std::int64_t tokens) {
  return x_BTHD.narrow(0, row, rows).narrow(1, token, tokens);
}

// [n, G, rows, D] with zeros behind, up to `capacity` rows.
at::Tensor padded(const at::Tensor& rows, std::int64_t capacity) {
  return at::constant_pad_nd(rows, {0, 0, 0, capacity - rows.size(2)});
}

}  // namespace

std::int64_t first_row(std::int64_t position, std::int64_t window) {
  return window > 0 ? std::max<std::int64_t>(position / window - 1, 0) * window : 0;
}

std::int64_t held_rows(std::int64_t position, std::int64_t window) {
  return position - first_row(position, window);
}

std::int64_t capacity_for(std::int64_t rows, std::int64_t window) {
  std::int64_t capacity = 0;
  while (capacity < rows) capacity = round_up(capacity + std::max(kRowBlock, capacity / 8));
  return window > 0 ? std::min(capacity, 2 * window) : capacity;
}

KvState::KvState(std::int64_t sequences, const CacheShape& shape, const at::TensorOptions& options)
    : State(sequences),
      shape_(shape),
      k_(at::zeros({sequences, shape.kv_heads, 0, shape.key_dim}, options)),
      v_(at::zeros({sequences, shape.kv_heads, 0, shape.value_dim}, options)) {}

Status KvState::restore(const TensorMap& tensors) {
  if (tensors.size() != 2 || !tensors.contains("k") || !tensors.contains("v"))
    return invalid_argument("softmax: the state needs the tensors k and v, and no other");
  const auto check = [](const char* name, const at::Tensor& mine, const at::Tensor& given) {
    if (given.dim() == 4 && given.scalar_type() == mine.scalar_type() &&
        given.size(0) == mine.size(0) && given.size(1) == mine.size(1) &&
        given.size(3) == mine.size(3))
      return Status();
    return invalid_argument("softmax: state ", name, " is ", given.scalar_type(), " ",
                            given.sizes(), "; ", mine.scalar_type(), " [", mine.size(0), ", ",
                            mine.size(1), ", rows, ", mine.size(3), "] is needed");
  };
  const at::Tensor &k = tensors.at("k"), &v = tensors.at("v");
  EVERLONG_RETURN_IF_ERROR(check("k", k_, k));
  EVERLONG_RETURN_IF_ERROR(check("v", v_, v));
  if (k.size(2) != v.size(2))
    return invalid_argument("softmax: state k has ", k.size(2), " rows and v ", v.size(2),
                            "; they must agree");
  const at::Device device = k_.device();
  k_ = k.to(device);
  v_ = v.to(device);
  shared_ = true;
  return {};
}

std::unique_ptr<State> KvState::select(std::span<const std::int64_t> sequences) const {
  check_rows();
  auto picked =
      std::make_unique<KvState>(static_cast<std::int64_t>(sequences.size()), shape_, k_.options());
  picked->positions() = selected_positions(sequences);
  std::int64_t rows = 0;
  for (const std::int64_t position : picked->positions())
    rows = std::max(rows, held_rows(position, shape_.window));
  const auto take = [&](const at::Tensor& buffer) {
    // Rows behind what the longest picked sequence holds are cut; behind a shorter one's they are
    // zeros already.
    const at::Tensor held = buffer.narrow(2, 0, std::min(rows, buffer.size(2)));
    return padded(select_sequences(held, sequences), capacity_for(rows, shape_.window));
  };
  picked->k_ = take(k_);
  picked->v_ = take(v_);
  return picked;
}

std::int64_t KvState::bytes_bound(std::int64_t tokens) const {
  // The longest holding so far: a window's peaks just before it drops a block.
  const std::int64_t window = shape_.window, most_tokens = std::min(tokens, kMostTokens);
  const std::int64_t rows = window > 0 ? std::min(most_tokens, 2 * window - 1) : most_tokens;
  const double a_row = static_cast<double>(shape_.kv_heads * (shape_.key_dim + shape_.value_dim)) *
                       static_cast<double>(k_.element_size());
  const double most = static_cast<double>(sequences()) *
                      (8 + a_row * static_cast<double>(capacity_for(rows, window)));
  if (most > 0x1p62) return std::numeric_limits<std::int64_t>::max();
  return static_cast<std::int64_t>(most);
}

void KvState::check_rows() const {
  for (const std::int64_t position : positions())
    TORCH_CHECK_VALUE(position >= 0 && held_rows(position, shape_.window) <= k_.size(2),
                      "softmax: a state at position ", position, " needs ",
                      held_rows(position, shape_.window), " rows; its tensors have ", k_.size(2),
                      ". Restore the tensors that belong to the position.");
}

std::vector<KvState::Group> KvState::groups(std::int64_t tokens, const Sequences& sequences) const {
  std::vector<Group> list;
  const bool packed = !sequences.offsets.empty();
  for (std::int64_t n = 0; n < this->sequences(); ++n) {
    const std::int64_t position = positions()[static_cast<std::size_t>(n)];
    if (!packed && !list.empty() && list.back().position == position) {
      ++list.back().count;
      continue;
    }
    list.push_back({.first = n,
                    .count = 1,
                    .row = packed ? 0 : n,
                    .token = packed ? sequences.offsets[static_cast<std::size_t>(n)] : 0,
                    .tokens = sequences.length(n, tokens),
                    .position = position});
  }
  return list;
}

std::int64_t KvState::longest_after(const std::vector<Group>& groups) const {
  std::int64_t rows = 0;
  for (const Group& g : groups)
    rows = std::max(rows, held_rows(g.position + g.tokens, shape_.window));
  return rows;
}

at::Tensor KvState::attend(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK,
                           const at::Tensor& v_BTGV, const Sequences& sequences,
                           const Options& options) {
  check_rows();
  const auto parts = groups(q_BTHK.size(1), sequences);
  const bool packed = !sequences.offsets.empty();
  const std::int64_t rows = longest_after(parts), capacity = capacity_for(rows, shape_.window);
  // In place only without a graph, and while no sequence drops rows from its front.
  const bool in_place =
      !at::GradMode::is_enabled() && std::ranges::all_of(parts, [&](const Group& g) {
        return first_row(g.position, shape_.window) ==
               first_row(g.position + g.tokens, shape_.window);
      });
  if (in_place && (shared_ || capacity != k_.size(2))) {
    k_ = grown(k_, capacity);
    v_ = grown(v_, capacity);
    shared_ = false;
  }

  std::vector<at::Tensor> outputs, keys, values;
  for (const Group& g : parts) {
    const at::Tensor q = tokens_of(q_BTHK, g.row, g.count, g.token, g.tokens);
    const at::Tensor k = tokens_of(k_BTGK, g.row, g.count, g.token, g.tokens);
    const at::Tensor v = tokens_of(v_BTGV, g.row, g.count, g.token, g.tokens);
    outputs.push_back(in_place ? attend_in_place(g, q, k, v, options)
                               : attend_anew(g, q, k, v, options, keys, values));
  }
  if (!in_place && !parts.empty()) {
    for (auto* list : {&keys, &values})
      for (at::Tensor& buffer : *list) buffer = padded(buffer, capacity);
    k_ = keys.size() == 1 ? keys.front() : at::cat(keys, 0);
    v_ = values.size() == 1 ? values.front() : at::cat(values, 0);
    shared_ = false;
  }
  for (const Group& g : parts)
    for (std::int64_t n = g.first; n < g.first + g.count; ++n)
      positions()[static_cast<std::size_t>(n)] += g.tokens;
  return outputs.size() == 1 ? outputs.front() : at::cat(outputs, packed ? 1 : 0);
}

// A buffer of its own with room for `rows`, holding what this one does.
at::Tensor KvState::grown(const at::Tensor& buffer, std::int64_t rows) const {
  at::Tensor larger =
      at::zeros({buffer.size(0), buffer.size(1), rows, buffer.size(3)}, buffer.options());
  const std::int64_t same = std::min(rows, buffer.size(2));
  larger.narrow(2, 0, same).copy_(buffer.narrow(2, 0, same));
  return larger;
}

at::Tensor KvState::attend_in_place(const Group& g, const at::Tensor& q, const at::Tensor& k,
                                    const at::Tensor& v, const Options& options) {
  const std::int64_t start = first_row(g.position, shape_.window), held = g.position - start;
  // The first key that any of the new tokens sees.
  const std::int64_t seen =
      shape_.window > 0 ? std::max(g.position - shape_.window + 1, start) - start : 0;
  const auto extend = [&](const at::Tensor& buffer, const at::Tensor& fresh) {
    const at::Tensor mine = buffer.narrow(0, g.first, g.count);
    mine.narrow(2, held, g.tokens).copy_(fresh.transpose(1, 2));
    return mine.narrow(2, seen, held + g.tokens - seen).transpose(1, 2);
  };
  const at::Tensor keys = extend(k_, k), values = extend(v_, v);
  return attention(q, keys, values, options);
}

at::Tensor KvState::attend_anew(const Group& g, const at::Tensor& q, const at::Tensor& k,
                                const at::Tensor& v, const Options& options,
                                std::vector<at::Tensor>& keys,
                                std::vector<at::Tensor>& values) const {
  const std::int64_t start = first_row(g.position, shape_.window), held = g.position - start;
  const std::int64_t seen =
      shape_.window > 0 ? std::max(g.position - shape_.window + 1, start) - start : 0;
  const std::int64_t all = held + g.tokens,
                     next = first_row(g.position + g.tokens, shape_.window) - start;
  const auto extend = [&](const at::Tensor& buffer, const at::Tensor& fresh,
                          std::vector<at::Tensor>& list) {
    const at::Tensor mine = buffer.narrow(0, g.first, g.count).narrow(2, 0, held);
    const at::Tensor joined = at::cat({mine, fresh.transpose(1, 2)}, 2);
    list.push_back(joined.narrow(2, next, all - next));
    return joined.narrow(2, seen, all - seen).transpose(1, 2);
  };
  const at::Tensor joined_keys = extend(k_, k, keys), joined_values = extend(v_, v, values);
  return attention(q, joined_keys, joined_values, options);
}

}  // namespace everlong::softmax
