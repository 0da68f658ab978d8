#include "mechanisms/softmax/layer_cache.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace everlong::softmax {
namespace {

RowPolicy policy_of(const CacheShape& shape) {
  return {.room = "softmax",
          .kv_heads = shape.kv_heads,
          .key_dim = shape.key_dim,
          .value_dim = shape.value_dim,
          .ring = shape.window};
}

}  // namespace

KvState::KvState(std::int64_t sequences, const CacheShape& shape, const at::TensorOptions& options)
    : RowCache(sequences, policy_of(shape), options), shape_(shape) {}

std::unique_ptr<RowCache> KvState::fresh(std::int64_t sequences) const {
  return std::make_unique<KvState>(sequences, shape_, keys().options());
}

std::int64_t KvState::seen_from(const StatePart& part) const {
  const std::int64_t start = policy().first_row(part.position);
  return shape_.window > 0 ? std::max(part.position - shape_.window + 1, start) - start : 0;
}

at::Tensor KvState::attend(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK,
                           const at::Tensor& v_BTGV, const Sequences& sequences,
                           const Options& options) {
  check_rows();
  const auto list = state_parts(*this, q_BTHK.size(1), sequences);
  const std::int64_t capacity = policy().capacity_for(longest_after(list));
  // In place only without a graph, and while no sequence drops rows from its front.
  const bool in_place = !at::GradMode::is_enabled() && !any_leaves(list);
  if (in_place) own_buffers(capacity);

  std::vector<at::Tensor> outputs, all_keys, all_values;
  for (const StatePart& p : list) {
    const std::int64_t start = policy().first_row(p.position), held = p.position - start,
                       rows = held + p.tokens, seen = seen_from(p),
                       gone = policy().first_row(p.position + p.tokens) - start;
    const auto extended = [&](const at::Tensor& buffer, const at::Tensor& fresh_BTGD,
                              std::vector<at::Tensor>& kept) {
      const at::Tensor mine = buffer.narrow(0, p.first, p.count);
      const at::Tensor fresh_rows = p.tokens_of(fresh_BTGD).transpose(1, 2);
      if (in_place) {
        mine.narrow(2, held, p.tokens).copy_(fresh_rows);
        return mine.narrow(2, seen, rows - seen).transpose(1, 2);
      }
      const at::Tensor joined = at::cat({mine.narrow(2, 0, held), fresh_rows}, 2);
      kept.push_back(joined.narrow(2, gone, rows - gone));
      return joined.narrow(2, seen, rows - seen).transpose(1, 2);
    };
    const at::Tensor k = extended(keys(), k_BTGK, all_keys),
                     v = extended(values(), v_BTGV, all_values);
    outputs.push_back(attention(p.tokens_of(q_BTHK), k, v, options));
  }
  if (!in_place) take_buffers(all_keys, all_values, capacity);
  move_on(*this, list);
  return outputs.size() == 1 ? outputs.front()
                             : at::cat(outputs, sequences.offsets.empty() ? 0 : 1);
}

}  // namespace everlong::softmax
