#include "mechanisms/landmark/layer_pages_group.h"

#include <ATen/ATen.h>

namespace everlong::landmark {
namespace {

// Legend: t tokens, H query heads, G key heads, R = H / G, n = t R.
struct Dims {
  std::int64_t t, H, G;
  std::int64_t R() const { return H / G; }
  // [G, n, D] -> [1, t, H, D]
  at::Tensor by_token(const at::Tensor& x) const {
    return x.view({G, t, R(), x.size(2)}).permute({1, 0, 2, 3}).reshape({1, t, H, x.size(2)});
  }
  // [t, H, D] -> [G, n, D]
  at::Tensor by_head(const at::Tensor& x) const {
    return x.view({t, G, R(), x.size(2)}).permute({1, 0, 2, 3}).reshape({G, t * R(), x.size(2)});
  }
};

// The queries as blocks see them that are s = 0 .. picks blocks into the frame: [G, S, n, K], fp32.
at::Tensor places_of(const at::Tensor& q_1tHK, const Frame& frame, std::int64_t at, const Dims& d,
                     const Reader& reader, TurnTables& tables) {
  const std::int64_t S = frame.picks + 1, K = q_1tHK.size(3);
  std::vector<std::int64_t> positions;
  for (std::int64_t s = 0; s < S; ++s)
    for (std::int64_t i = 0; i < d.t; ++i) positions.push_back(at + i - s * frame.block);
  return tables.turned(q_1tHK.expand({S, d.t, d.H, K}).reshape({1, -1, d.H, K}), positions, reader)
      .to(at::kFloat)
      .view({S, d.t, d.G, d.R(), K})
      .permute({2, 0, 1, 3, 4})
      .reshape({d.G, S, d.t * d.R(), K})
      .contiguous();
}

// Takes more blocks into mixed [G, n, V] and lse [G, n, 1], both on the CPU.
void certify_reads(GroupRead& read, const BlockPages& pages, const PastQueries& queries,
                   const at::Tensor& selected_GnP, const Certify& certify, const Dims& d,
                   const at::Tensor& mixed, const at::Tensor& lse) {
  const std::int64_t n = mixed.size(1), V = mixed.size(2), P = selected_GnP.size(2);
  const at::Tensor numbers = at::empty({d.G, n, 3}, at::kDouble);
  const auto* block = selected_GnP.const_data_ptr<std::int64_t>();
  std::vector<Certified> of_head(static_cast<std::size_t>(n));
  for (std::int64_t g = 0; g < d.G; ++g) {
    std::vector<std::vector<Pick>> picks(static_cast<std::size_t>(n));
    for (auto& of_query : picks)
      for (std::int64_t p = 0; p < P; ++p) of_query.push_back({*block++, 0});
    throw_if_error(read_certified(pages, page_queries(queries, g), picks, certify.epsilon,
                                  certify.at_most, mixed.mutable_data_ptr<float>() + g * n * V,
                                  lse.mutable_data_ptr<float>() + g * n, of_head));
    auto* to = numbers.mutable_data_ptr<double>() + g * n * 3;
    for (const Certified& one : of_head) {
      *to++ = one.certificate.bound;
      *to++ = one.certificate.unread_share;
      *to++ = static_cast<double>(one.more);
    }
  }
  const auto parts = d.by_token(numbers).unbind(-1);
  read.bound = parts[0];
  read.unread_share = parts[1];
  read.more = parts[2].to(at::kLong);
}

}  // namespace

at::Tensor TurnTables::turned(const at::Tensor& x_nTHK, const std::vector<std::int64_t>& positions,
                              const Reader& reader) {
  if (reader.frequencies.empty()) return x_nTHK;
  for (const Entry& e : entries_)
    if (e.positions == positions && e.frequencies == reader.frequencies &&
        e.dtype == x_nTHK.scalar_type() && e.device == x_nTHK.device() &&
        e.table.pairs == reader.pairs)
      return apply_rope(x_nTHK, e.table);
  Entry fresh{positions, reader.frequencies, x_nTHK.scalar_type(), x_nTHK.device(),
              make_rope_table(positions, 1, reader.frequencies, reader.pairs, x_nTHK.scalar_type(),
                              x_nTHK.device())};
  const RopeTable table = fresh.table;
  if (entries_.size() < kMost) {
    entries_.push_back(std::move(fresh));
  } else {
    entries_[next_] = std::move(fresh);
    next_ = (next_ + 1) % kMost;
  }
  return apply_rope(x_nTHK, table);
}

GroupRead read_group(const at::Tensor& q_1tHK, const at::Tensor& k_1RGK, const at::Tensor& v_1RGV,
                     const Group& group, const Reader& reader, const BlockPages& pages,
                     const PastReader& past, const std::optional<Certify>& certify,
                     TurnTables& tables) {
  const Dims d{q_1tHK.size(1), q_1tHK.size(2), k_1RGK.size(2)};
  const Frame frame(reader.retrieval, group.first_local);
  const std::int64_t block = frame.block, rows = k_1RGK.size(1), at = group.begin - frame.shift();
  std::vector<std::int64_t> own, bases;
  for (std::int64_t i = 0; i < d.t; ++i) own.push_back(at + i);
  for (std::int64_t r = 0; r < rows; ++r)
    bases.push_back(frame.first_local * block - frame.shift() + r / block * block);
  const auto marks = regular_landmarks(0, rows, block);
  const Attended local =
      attention(tables.turned(q_1tHK, own, reader), tables.turned(k_1RGK, bases, reader), v_1RGV,
                at::tensor(at::ArrayRef<std::uint8_t>(marks), at::kByte).unsqueeze(0),
                {.scale = reader.scale, .path = reader.path});
  GroupRead read;
  if (frame.picks == 0) {
    read.out = local.out;
    read.selected = at::empty({1, d.t, d.H, 0}, q_1tHK.options().dtype(at::kLong));
    if (certify) {
      read.bound = read.unread_share = at::zeros({1, d.t, d.H}, at::kDouble);
      read.more = at::zeros({1, d.t, d.H}, at::kLong);
    }
    return read;
  }
  const at::Tensor near =
      d.by_head(local.lse.select(0, 0).t().to(at::kFloat).unsqueeze(-1)).contiguous();  // [G, n, 1]
  const PastQueries queries{frame,
                            places_of(q_1tHK, frame, at, d, reader, tables),
                            near.squeeze(-1),
                            d.t,
                            reader.scale,
                            reader.retrieval.granularity};
  const PastRead far = past.read(queries);
  at::Tensor lse = at::logsumexp(at::cat({near, far.gates_GnP}, -1), {-1}, true);
  at::Tensor mixed =
      at::matmul(far.gates_GnP.sub(lse).exp().unsqueeze(-2), far.out_GnPV).squeeze(-2) +
      near.sub(lse).exp() * d.by_head(local.out.select(0, 0).to(at::kFloat));
  if (certify) {
    PastQueries here = queries;
    here.places_GSnK = queries.places_GSnK.cpu();
    mixed = mixed.cpu().contiguous();
    lse = lse.cpu().contiguous();
    certify_reads(read, pages, here, far.selected_GnP.cpu().contiguous(), *certify, d, mixed, lse);
    mixed = mixed.to(q_1tHK.device());
  }
  read.out = d.by_token(mixed).to(local.out.scalar_type());
  read.selected = d.by_token(far.selected_GnP);
  return read;
}

}  // namespace everlong::landmark
