#include "mechanisms/landmark/layer_memory.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

namespace everlong::landmark {
namespace {

constexpr std::int64_t kRowStep = 256;
constexpr std::int64_t kMostTokens = std::int64_t{1} << 60;  // sizes above stay within 64 bits

std::int64_t round_up(std::int64_t rows, std::int64_t step) {
  return (rows + step - 1) / step * step;
}

// Tokens of the blocks that leave together; 0: none ever do.
std::int64_t ring_of(const Retrieval& r) {
  return r.max_blocks > 0 ? (r.max_blocks + r.window + 1) * r.block : 0;
}

at::Tensor tokens_of(const at::Tensor& x_BTHD, std::int64_t row, std::int64_t rows,
                     std::int64_t token, std::int64_t tokens) {
  return x_BTHD.narrow(0, row, rows).narrow(1, token, tokens);
}

// [n, G, rows, D] with zeros behind, up to `capacity` rows.
at::Tensor padded(const at::Tensor& rows, std::int64_t capacity) {
  return at::constant_pad_nd(rows, {0, 0, 0, capacity - rows.size(2)});
}

}  // namespace

std::int64_t first_row(std::int64_t position, const Retrieval& r) {
  const std::int64_t ring = ring_of(r);
  return ring > 0 ? std::max<std::int64_t>(position / ring - 1, 0) * ring : 0;
}

std::int64_t held_rows(std::int64_t position, const Retrieval& r) {
  return position - first_row(position, r);
}

std::int64_t capacity_for(std::int64_t rows, const Retrieval& r) {
  std::int64_t capacity = 0;
  while (capacity < rows)
    capacity = round_up(capacity + std::max(kRowStep, capacity / 8), kRowStep);
  capacity = round_up(capacity, r.block);
  const std::int64_t ring = ring_of(r);
  return ring > 0 ? std::min(capacity, 2 * ring) : capacity;
}

BlockMemory::BlockMemory(std::int64_t sequences, const MemoryShape& shape,
                         const at::TensorOptions& options)
    : State(sequences),
      shape_(shape),
      k_(at::zeros({sequences, shape.kv_heads, 0, shape.key_dim}, options)),
      v_(at::zeros({sequences, shape.kv_heads, 0, shape.value_dim}, options)) {}

Status BlockMemory::restore(const TensorMap& tensors) {
  if (tensors.size() != 2 || !tensors.contains("k") || !tensors.contains("v"))
    return invalid_argument("landmark: the state needs the tensors k and v, and no other");
  const auto check = [&](const char* name, const at::Tensor& mine, const at::Tensor& given) {
    if (given.dim() == 4 && given.scalar_type() == mine.scalar_type() &&
        given.size(0) == mine.size(0) && given.size(1) == mine.size(1) &&
        given.size(3) == mine.size(3) && given.size(2) % shape_.retrieval.block == 0)
      return Status();
    return invalid_argument("landmark: state ", name, " is ", given.scalar_type(), " ",
                            given.sizes(), "; ", mine.scalar_type(), " [", mine.size(0), ", ",
                            mine.size(1), ", rows, ", mine.size(3),
                            "] is needed, rows a multiple of ", shape_.retrieval.block);
  };
  const at::Tensor &k = tensors.at("k"), &v = tensors.at("v");
  EVERLONG_RETURN_IF_ERROR(check("k", k_, k));
  EVERLONG_RETURN_IF_ERROR(check("v", v_, v));
  if (k.size(2) != v.size(2))
    return invalid_argument("landmark: state k has ", k.size(2), " rows and v ", v.size(2),
                            "; they must agree");
  const at::Device device = k_.device();
  k_ = k.to(device);
  v_ = v.to(device);
  shared_ = true;
  return {};
}

std::unique_ptr<State> BlockMemory::select(std::span<const std::int64_t> sequences) const {
  check_rows();
  auto picked = std::make_unique<BlockMemory>(static_cast<std::int64_t>(sequences.size()), shape_,
                                              k_.options());
  picked->positions() = selected_positions(sequences);
  std::int64_t rows = 0;
  for (const std::int64_t position : picked->positions())
    rows = std::max(rows, held_rows(position, shape_.retrieval));
  const auto take = [&](const at::Tensor& buffer) {
    // Rows behind what the longest picked sequence holds are cut; behind a shorter one's they are
    // zeros already.
    const at::Tensor held = buffer.narrow(2, 0, std::min(rows, buffer.size(2)));
    return padded(select_sequences(held, sequences), capacity_for(rows, shape_.retrieval));
  };
  picked->k_ = take(k_);
  picked->v_ = take(v_);
  return picked;
}

std::int64_t BlockMemory::bytes_bound(std::int64_t tokens) const {
  // The longest holding so far: it peaks just before blocks leave.
  const std::int64_t ring = ring_of(shape_.retrieval), most_tokens = std::min(tokens, kMostTokens);
  const std::int64_t rows = ring > 0 ? std::min(most_tokens, 2 * ring - 1) : most_tokens;
  const double a_row = static_cast<double>(shape_.kv_heads * (shape_.key_dim + shape_.value_dim)) *
                       static_cast<double>(k_.element_size());
  const double most = static_cast<double>(sequences()) *
                      (8 + a_row * static_cast<double>(capacity_for(rows, shape_.retrieval)));
  if (most > 0x1p62) return std::numeric_limits<std::int64_t>::max();
  return static_cast<std::int64_t>(most);
}

void BlockMemory::check_rows() const {
  for (const std::int64_t position : positions())
    TORCH_CHECK_VALUE(position >= 0 && held_rows(position, shape_.retrieval) <= k_.size(2),
                      "landmark: a state at position ", position, " needs ",
                      held_rows(position, shape_.retrieval), " rows; its tensors have ", k_.size(2),
                      ". Restore the tensors that belong to the position.");
}

std::vector<BlockMemory::Part> BlockMemory::parts(std::int64_t tokens,
                                                  const Sequences& sequences) const {
  std::vector<Part> list;
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

// A buffer of its own with room for `rows`, holding what this one does.
at::Tensor BlockMemory::grown(const at::Tensor& buffer, std::int64_t rows) const {
  at::Tensor larger =
      at::zeros({buffer.size(0), buffer.size(1), rows, buffer.size(3)}, buffer.options());
  const std::int64_t same = std::min(rows, buffer.size(2));
  larger.narrow(2, 0, same).copy_(buffer.narrow(2, 0, same));
  return larger;
}

Read BlockMemory::attend(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK,
                         const at::Tensor& v_BTGV, const Sequences& sequences, const Reader& reader,
                         bool want_picks) {
  check_rows();
  const Retrieval& kept = shape_.retrieval;
  const auto list = parts(q_BTHK.size(1), sequences);
  std::int64_t rows_after = 0;
  bool leaving = false;  // some sequence drops rows from its front
  for (const Part& p : list) {
    const std::int64_t end = p.position + p.tokens;
    rows_after = std::max(rows_after, held_rows(end, kept));
    leaving = leaving || first_row(p.position, kept) != first_row(end, kept);
  }
  const std::int64_t capacity = capacity_for(rows_after, kept);
  const bool in_place = !at::GradMode::is_enabled() && !leaving;
  if (in_place && (shared_ || capacity != k_.size(2))) {
    k_ = grown(k_, capacity);
    v_ = grown(v_, capacity);
    shared_ = false;
  }

  std::vector<at::Tensor> outputs, picks, keys, values;
  for (const Part& p : list) {
    const at::Tensor q = tokens_of(q_BTHK, p.row, p.count, p.token, p.tokens);
    const at::Tensor k =
        turned_in_block(tokens_of(k_BTGK, p.row, p.count, p.token, p.tokens), p.position, reader)
            .transpose(1, 2);
    const at::Tensor v = tokens_of(v_BTGV, p.row, p.count, p.token, p.tokens).transpose(1, 2);
    const std::int64_t start = first_row(p.position, kept), held = p.position - start;
    const auto extended = [&](const at::Tensor& buffer, const at::Tensor& fresh) {
      const at::Tensor mine = buffer.narrow(0, p.first, p.count);
      if (in_place) {
        mine.narrow(2, held, p.tokens).copy_(fresh);
        return mine;
      }
      const std::int64_t rows = held + p.tokens;
      return padded(at::cat({mine.narrow(2, 0, held), fresh}, 2), round_up(rows, kept.block));
    };
    const Stored stored{extended(k_, k), extended(v_, v), start};
    Read read = read_blocks(q, stored, p.position, reader, want_picks);
    outputs.push_back(read.out);
    if (read.selected.defined()) picks.push_back(read.selected);
    if (in_place) continue;
    const std::int64_t end = p.position + p.tokens, gone = first_row(end, kept) - start;
    for (const auto& [to, from] : {std::pair{&keys, &stored.k}, {&values, &stored.v}})
      to->push_back(padded(from->narrow(2, gone, held_rows(end, kept)), capacity));
  }
  if (!in_place && !list.empty()) {
    k_ = at::cat(keys, 0);
    v_ = at::cat(values, 0);
    shared_ = false;
  }
  for (const Part& p : list)
    for (std::int64_t n = p.first; n < p.first + p.count; ++n)
      positions()[static_cast<std::size_t>(n)] += p.tokens;
  const std::int64_t along = sequences.offsets.empty() ? 0 : 1;
  Read all;
  all.out = outputs.size() == 1 ? outputs.front() : at::cat(outputs, along);
  if (!picks.empty()) all.selected = at::cat(picks, along);
  return all;
}

}  // namespace everlong::landmark
