// Attention inside chunks in ATen: the rest of an unfinished chunk, all whole chunks as one batch,
// and what is left over.
#include <ATen/ATen.h>

#include <algorithm>
#include <functional>
#include <limits>

#include "mechanisms/megalodon/op_rows.h"
#include "ops/rope.h"

namespace everlong::megalodon {
namespace {

at::Tensor whole_chunks(const at::Tensor& x_RTHD, const Piece& piece) {
  return x_RTHD.narrow(1, piece.begin, piece.chunks * piece.length)
      .unflatten(1, {piece.chunks, piece.length})
      .flatten(0, 1);
}

// Rows that share `past` keys of an unfinished chunk; k and v are the new ones, `cache` the past.
at::Tensor attend_rows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       std::int64_t past, std::int64_t chunk, const ChunkCache& cache,
                       Attend attend) {
  std::vector<at::Tensor> outputs;
  for (const Piece& piece : pieces_of(past, q.size(1), chunk)) {
    if (piece.past > 0) {
      const auto with_past = [&](const at::Tensor& before, const at::Tensor& fresh) {
        return at::cat({before.narrow(1, 0, past), fresh.narrow(1, 0, piece.length)}, 1);
      };
      outputs.push_back(attend(q.narrow(1, 0, piece.length), with_past(cache.k_NPHK, k),
                               with_past(cache.v_NPHV, v)));
      continue;
    }
    const at::Tensor o =
        attend(whole_chunks(q, piece), whole_chunks(k, piece), whole_chunks(v, piece));
    outputs.push_back(o.reshape({q.size(0), piece.chunks * piece.length, v.size(2), v.size(3)}));
  }
  if (outputs.empty()) return at::zeros_like(v);
  return outputs.size() == 1 ? outputs.front().contiguous() : at::cat(outputs, 1);
}

// The rows of the unfinished chunk after these tokens.
at::Tensor kept_rows(const at::Tensor& before, const at::Tensor& fresh, std::int64_t past,
                     std::int64_t chunk) {
  const std::int64_t tokens = fresh.size(1), kept = (past + tokens) % chunk;
  if (kept <= tokens) return fresh.narrow(1, tokens - kept, kept).clone();
  return at::cat({before.narrow(1, 0, past), fresh}, 1);
}

// Neighbouring rows in one phase, attended together.
struct Group {
  std::int64_t first, count, past;
};
std::vector<Group> groups_of(const std::vector<std::int64_t>& counts) {
  std::vector<Group> groups;
  for (std::size_t n = 0; n < counts.size(); ++n) {
    if (!groups.empty() && groups.back().past == counts[n])
      ++groups.back().count;
    else
      groups.push_back({static_cast<std::int64_t>(n), 1, counts[n]});
  }
  return groups;
}

using AttendRows =
    std::function<at::Tensor(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             std::int64_t past, std::int64_t chunk, const ChunkCache& cache)>;

Attended attend_groups(const at::Tensor& z, const at::Tensor& v, const at::Tensor& gamma,
                       const at::Tensor& beta, const AttentionShape& shape, const ChunkCache& cache,
                       AttendRows attend_one) {
  const QueriesAndKeys qk = queries_and_keys(z, gamma, beta, shape, cache.counts);
  std::vector<at::Tensor> outputs;
  std::vector<ChunkCache> caches;
  for (const Group& g : groups_of(cache.counts)) {
    const auto mine = [&](const at::Tensor& x) { return x.narrow(0, g.first, g.count); };
    const ChunkCache before = rows_of(cache, g.first, g.count);
    const at::Tensor k = mine(qk.k_BTHK), values = mine(v);
    outputs.push_back(attend_one(mine(qk.q_BTHK), k, values, g.past, shape.chunk, before));
    const std::int64_t kept = (g.past + z.size(1)) % shape.chunk;
    caches.push_back({std::vector<std::int64_t>(static_cast<std::size_t>(g.count), kept),
                      kept_rows(before.k_NPHK, k, g.past, shape.chunk),
                      kept_rows(before.v_NPHV, values, g.past, shape.chunk)});
  }
  return {outputs.size() == 1 ? outputs.front() : at::cat(outputs, 0), joined(caches)};
}

// One chunk after another, all of its scores at once, in the working dtype.
at::Tensor attend_naively(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          std::int64_t past, std::int64_t chunk, const ChunkCache& cache) {
  const auto dtype = working_dtype(q);
  const at::Tensor keys = at::cat({cache.k_NPHK.narrow(1, 0, past), k}, 1).to(dtype),
                   values = at::cat({cache.v_NPHV.narrow(1, 0, past), v}, 1).to(dtype);
  const at::Tensor place = at::arange(past + q.size(1), q.options().dtype(at::kLong)),
                   mine = place.narrow(0, past, q.size(1)).unsqueeze(1);
  const at::Tensor hidden =
      at::logical_or(place > mine, at::floor_divide(place, chunk) != at::floor_divide(mine, chunk));
  const at::Tensor scores = at::matmul(q.to(dtype).transpose(1, 2), keys.permute({0, 2, 3, 1}));
  const at::Tensor weights =
      scores.masked_fill(hidden, -std::numeric_limits<double>::infinity()).softmax(-1);
  return at::matmul(weights, values.transpose(1, 2)).transpose(1, 2).to(v.scalar_type());
}

}  // namespace

at::Tensor attend_composite(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const std::int64_t m = q.size(1), S = k.size(1);
  const auto dtype = working_dtype(q);
  at::Tensor scores = at::matmul(q.transpose(1, 2), k.permute({0, 2, 3, 1})).to(dtype);
  if (m > 1) {
    const auto flags = at::TensorOptions().dtype(at::kBool).device(q.device());
    const at::Tensor later = at::ones({m, S}, flags).triu(S - m + 1);
    scores = scores.masked_fill(later, -std::numeric_limits<double>::infinity());
  }
  return at::matmul(scores.softmax(-1).to(v.scalar_type()), v.transpose(1, 2)).transpose(1, 2);
}

QueriesAndKeys queries_and_keys(const at::Tensor& z_BTHK, const at::Tensor& gamma_2C,
                                const at::Tensor& beta_2C, const AttentionShape& shape,
                                std::span<const std::int64_t> starts) {
  const std::int64_t T = z_BTHK.size(1), H = z_BTHK.size(2), K = z_BTHK.size(3);
  const auto dtype = working_dtype(z_BTHK);
  const bool alike = std::ranges::all_of(starts, [&](auto start) { return start == starts[0]; });
  std::vector<std::int64_t> positions;
  for (const std::int64_t start : alike ? starts.first(1) : starts)
    for (std::int64_t t = 0; t < T; ++t) positions.push_back((start + t) % shape.chunk);
  const RopeTable table =
      make_rope_table(positions, alike ? 1 : z_BTHK.size(0), rope_frequencies(shape.rope_base, K),
                      RopePairs::kInterleaved, dtype, z_BTHK.device());
  const at::Tensor z = z_BTHK.to(dtype);
  const at::Tensor zn = z * (z.square().mean(-1, /*keepdim=*/true) + shape.eps).rsqrt();
  const at::Tensor gain = (gamma_2C.to(dtype) + 1) / std::sqrt(static_cast<double>(K));
  const auto head = [&](std::int64_t which) {
    const at::Tensor x = at::addcmul(beta_2C.to(dtype).select(0, which).view({H, K}), zn,
                                     gain.select(0, which).view({H, K}));
    return apply_rope(x, table).to(z_BTHK.scalar_type());
  };
  return {head(0), head(1)};
}

ChunkCache empty_cache(std::int64_t sequences, const at::Tensor& z_BTHK, const at::Tensor& v_BTHV) {
  return {std::vector<std::int64_t>(static_cast<std::size_t>(sequences), 0),
          at::zeros({sequences, 0, z_BTHK.size(2), z_BTHK.size(3)}, z_BTHK.options()),
          at::zeros({sequences, 0, v_BTHV.size(2), v_BTHV.size(3)}, v_BTHV.options())};
}

Attended composite_chunk_attention(const at::Tensor& z, const at::Tensor& v,
                                   const at::Tensor& gamma, const at::Tensor& beta,
                                   const AttentionShape& shape, const ChunkCache& cache,
                                   Attend attend) {
  return attend_groups(z, v, gamma, beta, shape, cache,
                       [&](auto&&... arguments) { return attend_rows(arguments..., attend); });
}

// A call that stays in its chunk reads keys where they lie; one that crosses a border leaves the
// rows of the new chunk behind.
at::Tensor append_and_attend(const at::Tensor& z, const at::Tensor& v, const at::Tensor& gamma,
                             const at::Tensor& beta, const AttentionShape& shape,
                             const ChunkCache& cache, Attend attend) {
  const QueriesAndKeys qk = queries_and_keys(z, gamma, beta, shape, cache.counts);
  const std::int64_t T = z.size(1);
  std::vector<at::Tensor> outputs;
  for (const Group& g : groups_of(cache.counts)) {
    const auto mine = [&](const at::Tensor& x) { return x.narrow(0, g.first, g.count); };
    const at::Tensor q = mine(qk.q_BTHK), k = mine(qk.k_BTHK), values = mine(v);
    const at::Tensor keys = mine(cache.k_NPHK), past_values = mine(cache.v_NPHV);
    if (T == 0) {
      outputs.push_back(values);
    } else if (g.past + T <= shape.chunk) {
      keys.narrow(1, g.past, T).copy_(k);
      past_values.narrow(1, g.past, T).copy_(values);
      outputs.push_back(
          attend(q, keys.narrow(1, 0, g.past + T), past_values.narrow(1, 0, g.past + T)));
    } else {
      outputs.push_back(
          attend_rows(q, k, values, g.past, shape.chunk, rows_of(cache, g.first, g.count), attend));
      const std::int64_t kept = (g.past + T) % shape.chunk;
      keys.narrow(1, 0, kept).copy_(k.narrow(1, T - kept, kept));
      past_values.narrow(1, 0, kept).copy_(values.narrow(1, T - kept, kept));
    }
  }
  return outputs.size() == 1 ? outputs.front() : at::cat(outputs, 0);
}

Attended naive_chunk_attention(const at::Tensor& z, const at::Tensor& v, const at::Tensor& gamma,
                               const at::Tensor& beta, const AttentionShape& shape,
                               const ChunkCache& cache) {
  return attend_groups(z, v, gamma, beta, shape, cache, attend_naively);
}

}  // namespace everlong::megalodon
