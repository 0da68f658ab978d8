#include "layers/row_cache.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

namespace everlong {
namespace {

constexpr std::int64_t kRowStep = 256;
constexpr std::int64_t kMostTokens = std::int64_t{1} << 60;  // sizes above stay within 64 bits

std::int64_t round_up(std::int64_t rows, std::int64_t step) {
  return (rows + step - 1) / step * step;
}

Status check_buffer(const RowPolicy& policy, const char* name, const at::Tensor& mine,
                    const at::Tensor& given) {
  if (given.dim() == 4 && given.scalar_type() == mine.scalar_type() &&
      given.size(0) == mine.size(0) && given.size(1) == mine.size(1) &&
      given.size(3) == mine.size(3) && given.size(2) % policy.step == 0)
    return {};
  return invalid_argument(
      policy.room, ": state ", name, " is ", given.scalar_type(), " ", given.sizes(), "; ",
      mine.scalar_type(), " [", mine.size(0), ", ", mine.size(1), ", rows, ", mine.size(3),
      "] is needed", policy.step > 1 ? cat(", rows a multiple of ", policy.step) : std::string());
}

// A buffer of its own with room for `rows`, holding what this one does.
at::Tensor resized(const at::Tensor& buffer, std::int64_t rows) {
  at::Tensor fresh =
      at::zeros({buffer.size(0), buffer.size(1), rows, buffer.size(3)}, buffer.options());
  const std::int64_t same = std::min(rows, buffer.size(2));
  fresh.narrow(2, 0, same).copy_(buffer.narrow(2, 0, same));
  return fresh;
}

}  // namespace

std::int64_t RowPolicy::first_row(std::int64_t position) const {
  return ring > 0 ? std::max<std::int64_t>(position / ring - 1, 0) * ring : 0;
}

std::int64_t RowPolicy::capacity_for(std::int64_t rows) const {
  std::int64_t capacity = 0;
  while (capacity < rows)
    capacity = round_up(capacity + std::max(kRowStep, capacity / 8), kRowStep);
  capacity = round_up(capacity, step);
  return ring > 0 ? std::min(capacity, 2 * ring) : capacity;
}

RowCache::RowCache(std::int64_t sequences, const RowPolicy& policy,
                   const at::TensorOptions& options)
    : State(sequences),
      policy_(policy),
      k_(at::zeros({sequences, policy.kv_heads, 0, policy.key_dim}, options)),
      v_(at::zeros({sequences, policy.kv_heads, 0, policy.value_dim}, options)) {}

Status RowCache::restore(const TensorMap& tensors) {
  if (tensors.size() != 2 || !tensors.contains("k") || !tensors.contains("v"))
    return invalid_argument(policy_.room, ": the state needs the tensors k and v, and no other");
  const at::Tensor &k = tensors.at("k"), &v = tensors.at("v");
  EVERLONG_RETURN_IF_ERROR(check_buffer(policy_, "k", k_, k));
  EVERLONG_RETURN_IF_ERROR(check_buffer(policy_, "v", v_, v));
  if (k.size(2) != v.size(2))
    return invalid_argument(policy_.room, ": state k has ", k.size(2), " rows and v ", v.size(2),
                            "; they must agree");
  const at::Device device = k_.device();
  k_ = k.to(device);
  v_ = v.to(device);
  shared_ = true;
  return {};
}

std::unique_ptr<State> RowCache::select(std::span<const std::int64_t> sequences) const {
  check_rows();
  auto picked = fresh(static_cast<std::int64_t>(sequences.size()));
  picked->positions() = selected_positions(sequences);
  std::int64_t rows = 0;
  for (const std::int64_t position : picked->positions())
    rows = std::max(rows, policy_.held_rows(position));
  const auto take = [&](const at::Tensor& buffer) {
    // Rows behind what the longest picked sequence holds are cut; behind a shorter one's they are
    // zeros already.
    const at::Tensor held = buffer.narrow(2, 0, std::min(rows, buffer.size(2)));
    return padded_rows(select_sequences(held, sequences), policy_.capacity_for(rows));
  };
  picked->k_ = take(k_);
  picked->v_ = take(v_);
  return picked;
}

std::int64_t RowCache::bytes_bound(std::int64_t tokens) const {
  // The longest holding so far: it peaks just before rows leave.
  const std::int64_t ring = policy_.ring, most_tokens = std::min(tokens, kMostTokens);
  const std::int64_t rows = ring > 0 ? std::min(most_tokens, 2 * ring - 1) : most_tokens;
  const double a_row =
      static_cast<double>(policy_.kv_heads * (policy_.key_dim + policy_.value_dim)) *
      static_cast<double>(k_.element_size());
  const double most = static_cast<double>(sequences()) *
                      (8 + a_row * static_cast<double>(policy_.capacity_for(rows)));
  if (most > 0x1p62) return std::numeric_limits<std::int64_t>::max();
  return static_cast<std::int64_t>(most);
}

void RowCache::check_rows() const {
  for (const std::int64_t position : positions())
    TORCH_CHECK_VALUE(position >= 0 && policy_.held_rows(position) <= k_.size(2), policy_.room,
                      ": a state at position ", position, " needs ", policy_.held_rows(position),
                      " rows; its tensors have ", k_.size(2),
                      ". Restore the tensors that belong to the position.");
}

std::int64_t RowCache::longest_after(const std::vector<StatePart>& parts) const {
  std::int64_t rows = 0;
  for (const StatePart& p : parts) rows = std::max(rows, policy_.held_rows(p.position + p.tokens));
  return rows;
}

bool RowCache::any_leaves(const std::vector<StatePart>& parts) const {
  return std::ranges::any_of(parts, [&](const StatePart& p) {
    return policy_.first_row(p.position) != policy_.first_row(p.position + p.tokens);
  });
}

void RowCache::own_buffers(std::int64_t capacity) {
  if (!shared_ && capacity == k_.size(2)) return;
  k_ = resized(k_, capacity);
  v_ = resized(v_, capacity);
  shared_ = false;
}

void RowCache::take_buffers(const std::vector<at::Tensor>& keys,
                            const std::vector<at::Tensor>& values, std::int64_t capacity) {
  if (keys.empty()) return;
  const auto joined = [&](const std::vector<at::Tensor>& list) {
    std::vector<at::Tensor> filled;
    for (const at::Tensor& rows : list) filled.push_back(padded_rows(rows, capacity));
    return filled.size() == 1 ? filled.front() : at::cat(filled, 0);
  };
  k_ = joined(keys);
  v_ = joined(values);
  shared_ = false;
}

at::Tensor padded_rows(const at::Tensor& rows, std::int64_t capacity) {
  return at::constant_pad_nd(rows, {0, 0, 0, capacity - rows.size(2)});
}

}  // namespace everlong
