#include "mechanisms/landmark/op_blocks.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "mechanisms/landmark/op_search.h"

namespace everlong::landmark {
namespace {

// Elements of keys that are gathered at a time: groups are taken together up to this.
constexpr std::int64_t kCpuGathered = std::int64_t{1} << 21, kGpuGathered = std::int64_t{1} << 27;

at::ScalarType wide_of(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

at::Tensor turned(const at::Tensor& x_nTHK, const std::vector<std::int64_t>& positions,
                  const Reader& reader) {
  if (reader.frequencies.empty()) return x_nTHK;
  return apply_rope(x_nTHK, make_rope_table(positions, 1, reader.frequencies, reader.pairs,
                                            x_nTHK.scalar_type(), x_nTHK.device()));
}

std::vector<std::int64_t> range(std::int64_t begin, std::int64_t count) {
  std::vector<std::int64_t> list;
  for (std::int64_t i = 0; i < count; ++i) list.push_back(begin + i);
  return list;
}

at::Tensor regular_marks(std::int64_t rows, std::int64_t count, const Retrieval& retrieval) {
  const auto marks = landmarks_of(retrieval, 0, count);
  return at::tensor(at::ArrayRef<std::uint8_t>(marks), at::kByte).unsqueeze(0).expand({rows, -1});
}

// Stored rows [begin, end) of positions, keys turned to `base` of their block's first token (in
// blocks from the first row's): [n, rows, G, D].
at::Tensor placed_rows(const at::Tensor& rows_nRGD, std::int64_t base, const Reader& reader) {
  const std::int64_t block = reader.retrieval.block;
  std::vector<std::int64_t> positions;
  for (std::int64_t r = 0; r < rows_nRGD.size(1); ++r)
    positions.push_back(base + r / block * block);
  return turned(rows_nRGD, positions, reader);
}

// Tokens that see every block before them: attention with landmarks at true positions.
at::Tensor read_all(const at::Tensor& q, const Stored& stored, std::int64_t start,
                    const Reader& reader) {
  const std::int64_t end = start + q.size(1);
  const auto rows = [&](const at::Tensor& x) { return x.narrow(2, 0, end).transpose(1, 2); };
  const at::Tensor keys = placed_rows(rows(stored.k), 0, reader);
  const at::Tensor queries = turned(q, range(start, q.size(1)), reader);
  return attention(queries, keys, rows(stored.v), regular_marks(q.size(0), end, reader.retrieval),
                   {.scale = reader.scale, .path = reader.path})
      .out;
}

// Whether one key stands for a block and the kernel may compare them.
bool searched(const at::Tensor& q, const Reader& reader) {
  return q.is_cpu() && wide_of(q) == at::kFloat && reader.path != Path::kComposite &&
         reader.retrieval.granularity == Granularity::kTokenHead &&
         reader.retrieval.score != BlockScore::kMax;
}

// Groups that lie alike: group j is `tokens` tokens at the same places of its block, `first_local`
// + j. Legend: n sequences, m groups, t tokens of a group, P picks.
struct Lot {
  Frame frame;  // of the first group
  std::int64_t groups = 1, tokens = 0;
  std::int64_t begin = 0;  // position of the first group's first token
};

class LotReader {
 public:
  LotReader(const at::Tensor& q_nTHK, const Stored& stored, const Lot& lot, const Reader& reader)
      : stored_(stored), lot_(lot), reader_(reader), wide_(wide_of(q_nTHK)) {
    n_ = q_nTHK.size(0);
    m_ = lot.groups;
    t_ = lot.tokens;
    H_ = q_nTHK.size(2);
    G_ = stored.k.size(1);
    K_ = q_nTHK.size(3);
    V_ = stored.v.size(3);
    picks_ = lot.frame.picks;
    last_ = lot.frame.first_local + m_ - 1;
    // The queries as every place of a block sees them: place s is s blocks into the frame.
    const std::int64_t at = lot.begin - lot.frame.shift();
    std::vector<std::int64_t> positions;
    for (std::int64_t s = 0; s <= picks_; ++s)
      for (std::int64_t i = 0; i < t_; ++i) positions.push_back(at + i - s * lot.frame.block);
    const at::Tensor q = q_nTHK.reshape({n_ * m_, 1, t_, H_, K_})
                             .expand({n_ * m_, picks_ + 1, t_, H_, K_})
                             .reshape({n_ * m_, (picks_ + 1) * t_, H_, K_});
    q_ = turned(q, positions, reader).view({n_, m_, picks_ + 1, t_, H_, K_});
  }

  Read read() {
    const auto local = read_local();
    if (picks_ == 0)
      return {local.out.reshape({n_, m_ * t_, H_, V_}),
              at::empty({n_, m_ * t_, H_, 0}, q_.options().dtype(at::kLong))};
    const at::Tensor blocks = pick();               // [n, m, t, H, P]
    const auto [out, gates] = read_picked(blocks);  // [n, m, t, H, P, V], [n, m, t, H, P]
    const at::Tensor near = local.lse.transpose(1, 2).reshape({n_, m_, t_, H_, 1});
    const at::Tensor all = at::logsumexp(at::cat({near, gates}, -1), {-1}, true);
    const at::Tensor mixed =
        at::matmul(gates.sub(all).exp().unsqueeze(-2), out).squeeze(-2) +
        near.sub(all).exp() * local.out.to(wide_).reshape({n_, m_, t_, H_, V_});
    return {mixed.to(q_.scalar_type()).reshape({n_, m_ * t_, H_, V_}),
            blocks.reshape({n_, m_ * t_, H_, picks_})};
  }

 private:
  std::int64_t block() const { return lot_.frame.block; }
  // Whole stored blocks from `from` on, [n, G, count, L, D].
  at::Tensor stored_blocks(const at::Tensor& x, std::int64_t from, std::int64_t count) const {
    return x.narrow(2, from * block() - stored_.first, count * block())
        .unflatten(2, {count, block()});
  }

  // The keys that stand for blocks: [n, G, count, e, K] with e of them each.
  at::Tensor candidate_keys(std::int64_t oldest, std::int64_t count) const {
    const at::Tensor keys = stored_blocks(stored_.k, oldest, count).to(wide_);
    switch (reader_.retrieval.score) {
      case BlockScore::kLandmark:
        return keys.narrow(3, block() - 1, 1);
      case BlockScore::kMean:
        return keys.mean(3, true);
      case BlockScore::kMax:
        break;
    }
    return keys;
  }

  // Scores of the candidates [n, m, t, H, count], -inf where a block is not of a group's past.
  at::Tensor candidate_scores(std::int64_t oldest, std::int64_t count) const {
    const at::Tensor keys = candidate_keys(oldest, count);
    const std::int64_t each = keys.size(3);
    const auto by_head = [&](const at::Tensor& q) {  // [n, m, t, H, K] -> [n, G, m t R, K]
      return q.to(wide_).unflatten(3, {G_, H_ / G_}).permute({0, 3, 1, 2, 4, 5}).flatten(2, 4);
    };
    const auto by_token = [&](const at::Tensor& s) {
      return s.unflatten(2, {m_, t_, H_ / G_}).permute({0, 2, 3, 1, 4, 5}).flatten(3, 4);
    };
    at::Tensor scores =
        by_token(at::matmul(by_head(q_.select(2, 0)), keys.flatten(2, 3).mT())).contiguous();
    if (each > 1) scores = scores.unflatten(4, {count, each}).amax(-1);
    const auto integers = scores.options().dtype(at::kLong);
    const at::Tensor number = at::arange(oldest, oldest + count, integers);
    const at::Tensor local = at::arange(lot_.frame.first_local, last_ + 1, integers);
    // The last picks of each group are scored at their true distance.
    for (std::int64_t s = 1; s <= picks_; ++s) {
      const at::Tensor recent = local - (picks_ - s + 1) - oldest;  // [m]
      const at::Tensor near =
          keys.index_select(2, recent).transpose(1, 2).reshape({n_, m_, 1, G_, 1, each, K_});
      const at::Tensor q = q_.select(2, s).to(wide_).unflatten(3, {G_, H_ / G_}).unsqueeze(-2);
      const at::Tensor score = (q * near).sum(-1).amax(-1).flatten(3, 4);  // [n, m, t, H]
      scores.scatter_(4, recent.view({1, m_, 1, 1, 1}).expand({n_, m_, t_, H_, 1}),
                      score.unsqueeze(-1));
    }
    scores.mul_(reader_.scale);
    at::Tensor other = number.ge(local.unsqueeze(1));
    if (reader_.retrieval.max_blocks > 0)
      other = other.logical_or(number.lt((local - reader_.retrieval.max_blocks).unsqueeze(1)));
    return scores.masked_fill_(other.view({1, m_, 1, 1, count}), -kInfinity);
  }

  at::Tensor pick() const {
    const at::NoGradGuard constant;
    const std::int64_t oldest = lot_.frame.oldest, count = last_ - oldest;
    if (searched(q_, reader_))
      return search_blocks(q_, candidate_keys(oldest, count).squeeze(3), reader_.retrieval,
                           lot_.frame.first_local, reader_.scale);
    at::Tensor scores = candidate_scores(oldest, count);
    switch (reader_.retrieval.granularity) {
      case Granularity::kTokenHead:
        break;
      case Granularity::kHeadMaxOverTokens:
        scores = at::log_softmax(scores, -1).amax(2, true).expand_as(scores);
        break;
      case Granularity::kTokenMaxOverHeads:
        scores = at::log_softmax(scores, -1).amax(3, true).expand_as(scores);
        break;
    }
    return picked_blocks(scores, picks_).add_(oldest);
  }

  Attended read_local() const {
    const std::int64_t first = lot_.frame.first_local * block();
    const std::int64_t rows = lot_.begin + t_ - first;
    const auto near = [&](const at::Tensor& x) {  // [n m, rows, G, D]
      return x.narrow(2, first - stored_.first, (m_ - 1) * block() + rows)
          .unfold(2, rows, block())
          .permute({0, 2, 4, 1, 3})
          .reshape({n_ * m_, rows, G_, x.size(3)});
    };
    const at::Tensor keys = placed_rows(near(stored_.k), first - lot_.frame.shift(), reader_);
    return attention(q_.select(2, 0).flatten(0, 1), keys, near(stored_.v),
                     regular_marks(n_ * m_, rows, reader_.retrieval),
                     {.scale = reader_.scale, .path = reader_.path});
  }

  // What a token takes from each picked block, and the block's score at the place it is read at.
  std::pair<at::Tensor, at::Tensor> read_picked(const at::Tensor& blocks) const {
    const auto integers = blocks.options();
    const at::Tensor local =
        at::arange(lot_.frame.first_local, last_ + 1, integers).view({1, m_, 1, 1, 1});
    const at::Tensor place =
        at::arange(picks_, integers).add(blocks.ge(local - picks_).to(at::kLong));
    const at::Tensor q = q_.permute({0, 1, 3, 4, 2, 5})
                             .gather(4, place.unsqueeze(-1).expand({-1, -1, -1, -1, -1, K_}));
    const at::Tensor head = at::arange(H_, integers).div(H_ / G_, "floor").view({H_, 1});
    const at::Tensor row = at::arange(n_, integers).view({n_, 1, 1, 1, 1});
    const std::int64_t count = stored_.k.size(2) / block(), first = stored_.first / block();
    const at::Tensor index = ((row * G_ + head) * count + (blocks - first)).flatten();
    const auto gathered = [&](const at::Tensor& x) {  // [n, m, t, H, P, L, D]
      return x.reshape({n_ * G_ * count, block(), x.size(3)})
          .index_select(0, index)
          .to(wide_)
          .view({n_, m_, t_, H_, picks_, block(), x.size(3)});
    };
    const at::Tensor scores =
        at::matmul(gathered(stored_.k), q.to(wide_).unsqueeze(-1)).squeeze(-1) * reader_.scale;
    const bool marked = reader_.retrieval.has_landmarks();
    const std::int64_t content = marked ? block() - 1 : block();
    const at::Tensor inside = at::softmax(scores.narrow(-1, 0, content), -1);
    const at::Tensor values = gathered(stored_.v).narrow(-2, 0, content);
    return {at::matmul(inside.unsqueeze(-2), values).squeeze(-2),
            marked ? scores.select(-1, content) : at::logsumexp(scores, {-1})};
  }

  const Stored& stored_;
  const Lot& lot_;
  const Reader& reader_;
  at::ScalarType wide_;
  at::Tensor q_;  // [n, m, places, t, H, K]
  std::int64_t n_, m_, t_, H_, G_, K_, V_, picks_, last_;
};

bool reads_all(const Frame& frame) { return frame.picks == frame.count() && frame.oldest == 0; }

// How many groups from `begin` on lie alike and are worth taking together.
std::int64_t alike(const std::vector<Group>& groups, std::size_t begin, const Reader& reader,
                   std::int64_t most) {
  const Frame first(reader.retrieval, groups[begin].first_local);
  const std::int64_t tokens = groups[begin].end - groups[begin].begin;
  std::size_t end = begin + 1;
  while (end < groups.size() && static_cast<std::int64_t>(end - begin) < most &&
         tokens == reader.retrieval.block && groups[end].end - groups[end].begin == tokens &&
         groups[end].first_local == groups[end - 1].first_local + 1 &&
         Frame(reader.retrieval, groups[end].first_local).picks == first.picks)
    ++end;
  return static_cast<std::int64_t>(end - begin);
}

// Every block of the past, padded with -1.
at::Tensor all_blocks(const at::Tensor& q, const std::vector<Group>& groups, std::size_t count,
                      std::int64_t width) {
  std::vector<at::Tensor> parts;
  for (std::size_t i = 0; i < count; ++i) {
    const at::Tensor blocks = at::arange(width, at::TensorOptions().dtype(at::kLong));
    parts.push_back(blocks.masked_fill(blocks.ge(groups[i].first_local), -1)
                        .view({1, 1, 1, width})
                        .expand({q.size(0), groups[i].end - groups[i].begin, q.size(2), width}));
  }
  return at::cat(parts, 1).to(q.device());
}

}  // namespace

at::Tensor turned_in_block(const at::Tensor& k_nTGK, std::int64_t start, const Reader& reader) {
  std::vector<std::int64_t> places;
  for (std::int64_t i = 0; i < k_nTGK.size(1); ++i)
    places.push_back((start + i) % reader.retrieval.block);
  return turned(k_nTGK, places, reader);
}

at::Tensor stored_rows(const at::Tensor& x_nTGD, std::int64_t block) {
  const std::int64_t rest = (block - x_nTGD.size(1) % block) % block;
  return at::constant_pad_nd(x_nTGD.transpose(1, 2), {0, 0, 0, rest}).contiguous();
}

at::Tensor picked_blocks(const at::Tensor& scores, std::int64_t picks) {
  const std::int64_t count = scores.size(-1);
  const double grid = scores.scalar_type() == at::kDouble ? kScoreGrid64 : kScoreGrid32;
  const at::Tensor level = scores.div(grid).round_();
  const at::Tensor least = std::get<0>(level.topk(picks, -1)).narrow(-1, picks - 1, 1);
  const at::Tensor number = at::arange(count, scores.options().dtype(at::kLong));
  const at::Tensor rank = at::where(level.gt(least), number + count,
                                    number.expand_as(level).masked_fill(level.ne(least), -1));
  return std::get<0>(std::get<1>(rank.topk(picks, -1)).sort(-1));
}

Read read_blocks(const at::Tensor& q, const Stored& stored, std::int64_t start,
                 const Reader& reader, bool want_selected) {
  const Retrieval& r = reader.retrieval;
  const auto groups = groups_of(r, start, q.size(1));
  std::vector<at::Tensor> outs, selected;
  std::size_t next = 0;
  while (next < groups.size() && reads_all(Frame(r, groups[next].first_local))) ++next;
  if (next > 0) {
    const std::int64_t end = groups[next - 1].end;
    outs.push_back(read_all(q.narrow(1, 0, end - start), stored, start, reader));
    if (want_selected && r.top_k > 0) selected.push_back(all_blocks(q, groups, next, r.top_k));
  }
  const std::int64_t room = q.is_cuda() ? kGpuGathered : kCpuGathered;
  while (next < groups.size()) {
    const Frame frame(r, groups[next].first_local);
    const std::int64_t tokens = groups[next].end - groups[next].begin;
    const std::int64_t scores =
        searched(q, reader) ? 0 : frame.count() * (r.score == BlockScore::kMax ? r.block : 1);
    const std::int64_t a_group = q.size(0) * tokens * q.size(2) *
                                 (frame.picks * r.block * (q.size(3) + stored.v.size(3)) + scores);
    const std::int64_t most = std::max<std::int64_t>(room / std::max<std::int64_t>(a_group, 1), 1);
    const Lot lot{frame, alike(groups, next, reader, most), tokens, groups[next].begin};
    Read part =
        LotReader(q.narrow(1, lot.begin - start, lot.groups * tokens), stored, lot, reader).read();
    outs.push_back(part.out);
    if (want_selected && r.top_k > 0)
      selected.push_back(at::constant_pad_nd(part.selected, {0, r.top_k - frame.picks}, -1));
    next += static_cast<std::size_t>(lot.groups);
  }
  Read all;
  all.out = outs.empty()       ? q.new_empty({q.size(0), 0, q.size(2), stored.v.size(3)})
            : outs.size() == 1 ? outs.front()
                               : at::cat(outs, 1);
  if (!selected.empty()) all.selected = at::cat(selected, 1);
  return all;
}

}  // namespace everlong::landmark
