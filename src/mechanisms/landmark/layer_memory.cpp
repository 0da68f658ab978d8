#include "mechanisms/landmark/layer_memory.h"

#include <ATen/ATen.h>

namespace everlong::landmark {

RowPolicy row_policy(const MemoryShape& shape) {
  const Retrieval& r = shape.retrieval;
  return {.room = "landmark",
          .kv_heads = shape.kv_heads,
          .key_dim = shape.key_dim,
          .value_dim = shape.value_dim,
          .ring = r.max_blocks > 0 ? (r.max_blocks + r.window + 1) * r.block : 0,
          .step = r.block};
}

BlockMemory::BlockMemory(std::int64_t sequences, const MemoryShape& shape,
                         const at::TensorOptions& options)
    : RowCache(sequences, row_policy(shape), options), shape_(shape) {}

std::unique_ptr<RowCache> BlockMemory::fresh(std::int64_t sequences) const {
  return std::make_unique<BlockMemory>(sequences, shape_, keys().options());
}

Read BlockMemory::attend(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK,
                         const at::Tensor& v_BTGV, const Sequences& sequences, const Reader& reader,
                         bool want_picks) {
  check_rows();
  const auto list = state_parts(*this, q_BTHK.size(1), sequences);
  const std::int64_t capacity = policy().capacity_for(longest_after(list));
  const std::int64_t block = shape_.retrieval.block;
  // In place only without a graph, and while no sequence drops rows from its front.
  const bool in_place = !at::GradMode::is_enabled() && !any_leaves(list);
  if (in_place) own_buffers(capacity);

  std::vector<at::Tensor> outputs, picks, all_keys, all_values;
  for (const StatePart& p : list) {
    const std::int64_t start = policy().first_row(p.position), held = p.position - start,
                       rows = held + p.tokens;
    const auto extended = [&](const at::Tensor& buffer, const at::Tensor& fresh_rows) {
      const at::Tensor mine = buffer.narrow(0, p.first, p.count);
      if (in_place) {
        mine.narrow(2, held, p.tokens).copy_(fresh_rows);
        return mine;
      }
      return padded_rows(at::cat({mine.narrow(2, 0, held), fresh_rows}, 2),
                         (rows + block - 1) / block * block);
    };
    const at::Tensor k = turned_in_block(p.tokens_of(k_BTGK), p.position, reader).transpose(1, 2);
    const Stored stored{extended(keys(), k),
                        extended(values(), p.tokens_of(v_BTGV).transpose(1, 2)), start};
    Read read = read_blocks(p.tokens_of(q_BTHK), stored, p.position, reader, want_picks);
    outputs.push_back(read.out);
    if (read.selected.defined()) picks.push_back(read.selected);
    if (in_place) continue;
    const std::int64_t end = p.position + p.tokens, gone = policy().first_row(end) - start;
    all_keys.push_back(stored.k.narrow(2, gone, policy().held_rows(end)));
    all_values.push_back(stored.v.narrow(2, gone, policy().held_rows(end)));
  }
  if (!in_place) take_buffers(all_keys, all_values, capacity);
  move_on(*this, list);
  const std::int64_t along = sequences.offsets.empty() ? 0 : 1;
  Read all;
  all.out = outputs.size() == 1 ? outputs.front() : at::cat(outputs, along);
  if (!picks.empty()) all.selected = at::cat(picks, along);
  return all;
}

}  // namespace everlong::landmark
