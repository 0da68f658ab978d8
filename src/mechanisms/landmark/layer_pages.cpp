#include "mechanisms/landmark/layer_pages.h"

#include <ATen/ATen.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "mechanisms/landmark/kernel_pages_read.h"

namespace everlong::landmark {
namespace {

PageShape page_shape(const MemoryShape& shape, DType dtype) {
  return {shape.kv_heads, shape.retrieval.block, shape.key_dim, shape.value_dim, dtype};
}

std::vector<std::int64_t> range(std::int64_t begin, std::int64_t count) {
  std::vector<std::int64_t> list;
  for (std::int64_t i = 0; i < count; ++i) list.push_back(begin + i);
  return list;
}

at::Tensor turned(const at::Tensor& x_BTHK, const std::vector<std::int64_t>& positions,
                  const Reader& reader) {
  if (reader.frequencies.empty()) return x_BTHK;
  return apply_rope(x_BTHK, make_rope_table(positions, 1, reader.frequencies, reader.pairs,
                                            x_BTHK.scalar_type(), x_BTHK.device()));
}

// Rows [from, from + count) of [G, rows, D] as the pages take them.
ConstTensorView view_of(const at::Tensor& x_GRD, DType dtype, std::int64_t from,
                        std::int64_t count) {
  return {static_cast<const std::byte*>(x_GRD.const_data_ptr()) +
              from * x_GRD.stride(1) * x_GRD.element_size(),
          dtype,
          {1, x_GRD.size(0), count, x_GRD.size(2)},
          {0, x_GRD.stride(0), x_GRD.stride(1), 1}};
}

// One group of tokens of one sequence. Legend: t tokens, H query heads, G key heads, R = H / G, P
// picks.
class GroupReader {
 public:
  GroupReader(const BlockPages& pages, const at::Tensor& q_1tHK, const Group& group,
              const Reader& reader)
      : pages_(pages), reader_(reader), frame_(reader.retrieval, group.first_local) {
    t_ = q_1tHK.size(1);
    H_ = q_1tHK.size(2);
    K_ = q_1tHK.size(3);
    G_ = pages.shape().kv_heads;
    V_ = pages.shape().value_dim;
    P_ = frame_.picks;
    const std::int64_t at = group.begin - frame_.shift();
    local_q_ = turned(q_1tHK, range(at, t_), reader);
    if (P_ == 0) return;
    std::vector<std::int64_t> positions;
    for (std::int64_t s = 0; s <= P_; ++s)
      for (std::int64_t i = 0; i < t_; ++i) positions.push_back(at + i - s * frame_.block);
    const at::Tensor all =
        turned(q_1tHK.expand({P_ + 1, t_, H_, K_}).reshape({1, -1, H_, K_}), positions, reader);
    // [G, P + 1, t R, K]
    places_ = all.to(at::kFloat)
                  .view({P_ + 1, t_, G_, H_ / G_, K_})
                  .permute({2, 0, 1, 3, 4})
                  .reshape({G_, P_ + 1, t_ * (H_ / G_), K_})
                  .contiguous();
  }

  struct Result {
    at::Tensor out, selected;  // [1, t, H, V], int64 [1, t, H, P]
    PagedMemory::Certificates certificates;
  };
  // k, v [1, rows, G, D]: rows from the frame's first local block on, the group's own last.
  Result read(const at::Tensor& k, const at::Tensor& v,
              const std::optional<PagedMemory::Certify>& certify) const {
    const std::int64_t block = frame_.block, rows = k.size(1);
    std::vector<std::int64_t> bases;
    for (std::int64_t r = 0; r < rows; ++r)
      bases.push_back(frame_.first_local * block - frame_.shift() + r / block * block);
    const auto marks = regular_landmarks(0, rows, block);
    const Attended local =
        attention(local_q_, turned(k, bases, reader_), v,
                  at::tensor(at::ArrayRef<std::uint8_t>(marks), at::kByte).unsqueeze(0),
                  {.scale = reader_.scale, .path = reader_.path});
    if (P_ == 0) {
      const at::Tensor zero = at::zeros({1, t_, H_}, at::kDouble);
      return {local.out, at::empty({1, t_, H_, 0}, at::kLong), {zero, zero, zero.to(at::kLong)}};
    }
    const at::Tensor near = local.lse.select(0, 0).t().to(at::kFloat);  // [t, H]
    const std::int64_t n = t_ * (H_ / G_);
    const at::Tensor near_of = near.view({t_, G_, H_ / G_}).permute({1, 0, 2}).contiguous();
    const at::Tensor far = at::empty({G_, n, P_, V_}), gates = at::empty({G_, n, P_});
    const at::Tensor selected = at::empty({G_, n, P_}, at::kLong);
    const auto picks = pick();
    for (std::int64_t g = 0; g < G_; ++g) {
      const auto& of_head = picks[static_cast<std::size_t>(g)];
      throw_if_error(read_picked(pages_, queries(g), of_head,
                                 near_of.const_data_ptr<float>() + g * n,
                                 far.mutable_data_ptr<float>() + g * n * P_ * V_,
                                 gates.mutable_data_ptr<float>() + g * n * P_));
      auto* to = selected.mutable_data_ptr<std::int64_t>() + g * n * P_;
      for (const auto& of_query : of_head)
        for (const Pick& p : of_query) *to++ = p.block;
    }
    const at::Tensor one = near_of.view({G_, n, 1});
    at::Tensor all = at::logsumexp(at::cat({one, gates}, -1), {-1}, true);  // [G, n, 1]
    const at::Tensor nearby = local.out.select(0, 0)
                                  .to(at::kFloat)
                                  .view({t_, G_, H_ / G_, V_})
                                  .permute({1, 0, 2, 3})
                                  .reshape({G_, n, V_});
    at::Tensor mixed = at::matmul(gates.sub(all).exp().unsqueeze(-2), far).squeeze(-2) +
                       one.sub(all).exp() * nearby;
    Result result;
    if (certify) result.certificates = certified(picks, *certify, mixed, all);
    result.out = by_token(mixed).to(local.out.scalar_type());
    result.selected = by_token(selected);
    return result;
  }

 private:
  using Picks = std::vector<std::vector<Pick>>;  // of each query of a head

  PageQueries queries(std::int64_t g) const {
    const std::int64_t n = t_ * (H_ / G_);
    return {frame_, g, n, places_.const_data_ptr<float>() + g * (P_ + 1) * n * K_, reader_.scale};
  }

  // [G, t R, D] -> [1, t, H, D]
  at::Tensor by_token(const at::Tensor& x) const {
    return x.view({G_, t_, H_ / G_, x.size(2)})
        .permute({1, 0, 2, 3})
        .reshape({1, t_, H_, x.size(2)});
  }

  // Takes more blocks into mixed [G, t R, V] and lse [G, t R, 1].
  PagedMemory::Certificates certified(const std::vector<Picks>& picks,
                                      const PagedMemory::Certify& certify, at::Tensor& mixed,
                                      at::Tensor& lse) const {
    const std::int64_t n = t_ * (H_ / G_);
    mixed = mixed.contiguous();
    lse = lse.contiguous();
    const at::Tensor numbers = at::empty({G_, n, 3}, at::kDouble);
    std::vector<Certified> of_head(static_cast<std::size_t>(n));
    for (std::int64_t g = 0; g < G_; ++g) {
      throw_if_error(read_certified(pages_, queries(g), picks[static_cast<std::size_t>(g)],
                                    certify.epsilon, certify.at_most,
                                    mixed.mutable_data_ptr<float>() + g * n * V_,
                                    lse.mutable_data_ptr<float>() + g * n, of_head));
      auto* to = numbers.mutable_data_ptr<double>() + g * n * 3;
      for (const Certified& one : of_head) {
        *to++ = one.certificate.bound;
        *to++ = one.certificate.unread_share;
        *to++ = static_cast<double>(one.more);
      }
    }
    const auto parts = by_token(numbers).unbind(-1);
    return {parts[0], parts[1], parts[2].to(at::kLong)};
  }

  std::vector<Picks> pick() const {
    std::vector<Picks> picks(static_cast<std::size_t>(G_));
    if (reader_.retrieval.granularity == Granularity::kTokenHead) {
      for (std::int64_t g = 0; g < G_; ++g)
        throw_if_error(pick_blocks(pages_, queries(g), picks[static_cast<std::size_t>(g)]));
      return picks;
    }
    // Tokens or heads decide together: all scores at once, t H count of them.
    const at::Tensor scores = all_scores();  // [G, t, R, count]
    at::Tensor deciding = at::log_softmax(scores, -1);
    deciding = reader_.retrieval.granularity == Granularity::kHeadMaxOverTokens
                   ? deciding.amax(1, true).expand_as(scores)
                   : deciding.amax({0, 2}, true).expand_as(scores);
    const at::Tensor chosen = picked_blocks(deciding, P_).contiguous();
    const at::Tensor own = scores.gather(-1, chosen).contiguous();
    const auto* block = chosen.const_data_ptr<std::int64_t>();
    const auto* score = own.const_data_ptr<float>();
    for (Picks& of_head : picks)
      for (std::int64_t i = 0; i < t_ * (H_ / G_); ++i) {
        of_head.emplace_back();
        for (std::int64_t p = 0; p < P_; ++p)
          of_head.back().push_back({*block++ + frame_.oldest, *score++});
      }
    return picks;
  }

  at::Tensor all_scores() const {
    const std::int64_t count = frame_.count(), n = t_ * (H_ / G_);
    const at::Tensor scores = at::empty({G_, n, count});
    for (std::int64_t g = 0; g < G_; ++g)
      for (std::int64_t i = 0; i < n; ++i) {
        float* to = scores.mutable_data_ptr<float>() + (g * n + i) * count;
        const auto score = [&](std::int64_t begin, std::int64_t end) {
          const float* q = queries(g).q_SnK + (frame_.slot(begin) * n + i) * K_;
          throw_if_error(
              pages_.scores(g, {q, begin, end}, reader_.scale,
                            {to + (begin - frame_.oldest), static_cast<std::size_t>(end - begin)}));
        };
        const std::int64_t recent = frame_.first_local - P_;
        if (recent > frame_.oldest) score(frame_.oldest, recent);
        for (std::int64_t b = recent; b < frame_.first_local; ++b) score(b, b + 1);
      }
    return scores.view({G_, t_, H_ / G_, count});
  }

  const BlockPages& pages_;
  const Reader& reader_;
  Frame frame_;
  std::int64_t t_ = 0, H_ = 0, K_ = 0, G_ = 0, V_ = 0, P_ = 0;
  at::Tensor local_q_;  // [1, t, H, K]
  at::Tensor places_;   // [G, P + 1, t R, K]
};

}  // namespace

PagedMemory::PagedMemory(std::int64_t sequences, const MemoryShape& shape,
                         const at::TensorOptions& options, std::shared_ptr<PageStore> store,
                         const StoreOptions& tiers)
    : TieredState(sequences),
      shape_(shape),
      options_(options),
      store_(std::move(store)),
      tiers_(tiers) {
  for (std::int64_t n = 0; n < sequences; ++n) lines_.push_back(fresh_line());
}

Result<std::unique_ptr<PagedMemory>> PagedMemory::create(std::int64_t sequences,
                                                         const MemoryShape& shape,
                                                         const at::TensorOptions& options,
                                                         const StoreOptions& tiers) {
  const auto type = c10::typeMetaToScalarType(options.dtype());
  if (!options.device().is_cpu())
    return unsupported("landmark: blocks in tiers live on the CPU; the weights are on ",
                       options.device().str());
  if (type != at::kFloat && type != at::kBFloat16)
    return unsupported("landmark: blocks in tiers are fp32 or bf16, not ", c10::toString(type));
  if (shape.retrieval.top_k < 1 || !shape.retrieval.has_landmarks())
    return invalid_argument(
        "landmark: blocks in tiers need landmarks and a top_k of 1 or more, not ",
        shape.retrieval.top_k, " (0 reads every block for every token)");
  EVERLONG_ASSIGN(
      auto store,
      PageStore::open(page_shape(shape, type == at::kFloat ? DType::kFloat32 : DType::kBFloat16),
                      tiers));
  return std::unique_ptr<PagedMemory>(
      new PagedMemory(sequences, shape, options, std::move(store), tiers));
}

Status check_pages(const PageSettings& pages, const Retrieval& retrieval) {
  if (pages.folder.empty() && (pages.epsilon || pages.most_more > 0))
    return invalid_argument(
        "epsilon and epsilon_blocks certify what blocks in pages leave out; give pages (a folder) "
        "as well");
  if (!pages.epsilon && pages.most_more > 0)
    return invalid_argument("epsilon_blocks = ", pages.most_more,
                            " limits what epsilon reads; give epsilon as well");
  if (!pages.folder.empty() && !retrieval.has_landmarks())
    return unsupported("pages = \"", pages.folder,
                       "\" with score \"mean\" or \"max\": pages find blocks by their landmarks; ",
                       "leave pages out");
  if (pages.folder.empty() || retrieval.top_k > 0) return {};
  return invalid_argument("pages = \"", pages.folder, "\" with top_k = ", retrieval.top_k,
                          "; a top_k of 1 or more is needed (0 reads every block for every token), "
                          "or no pages");
}

std::unique_ptr<State> make_paged_state(std::int64_t sequences, const MemoryShape& shape,
                                        const at::TensorOptions& options,
                                        const PageSettings& pages) {
  static std::atomic<std::int64_t> count{0};  // layers and streams of this process
  const fs::path folder = pages.folder;
  throw_if_error(make_directories(folder));
  auto state = PagedMemory::create(
      sequences, shape, options,
      {.ram_bytes = pages.megabytes << 20,
       .file = folder / cat("landmark_", ::getpid(), "_", count.fetch_add(1), ".pages"),
       .temporary = true});
  throw_if_error(state.status());
  if (pages.epsilon)
    (*state)->set_certify(PagedMemory::Certify{
        *pages.epsilon,
        pages.most_more > 0 ? pages.most_more : std::numeric_limits<std::int64_t>::max()});
  return *std::move(state);
}

PagedMemory::Line PagedMemory::fresh_line() const {
  return {BlockPages(store_, kept_blocks(shape_.retrieval)),
          at::empty({shape_.kv_heads, 0, shape_.key_dim}, options_),
          at::empty({shape_.kv_heads, 0, shape_.value_dim}, options_), 0};
}

// Gives the complete blocks at the front of the tail to the pages, and cuts what no token will see
// as local.
void PagedMemory::close_blocks(Line& line, std::int64_t end) const {
  const std::int64_t block = shape_.retrieval.block;
  const DType dtype = store_->shape().dtype;
  while ((line.pages.end() + 1) * block <= end) {
    const std::int64_t from = line.pages.end() * block - line.tail_first;
    TORCH_CHECK(from >= 0, "landmark: block ", line.pages.end(), " left before it was stored");
    throw_if_error(line.pages.append(view_of(line.k, dtype, from, block),
                                     view_of(line.v, dtype, from, block)));
  }
  const std::int64_t first =
      std::max<std::int64_t>(end / block - shape_.retrieval.window, 0) * block;
  if (first == line.tail_first) return;
  for (at::Tensor* x : {&line.k, &line.v})
    *x = x->narrow(1, first - line.tail_first, end - first).clone(at::MemoryFormat::Contiguous);
  line.tail_first = first;
}

PagedMemory::LineRead PagedMemory::attend_line(Line& line, std::int64_t position,
                                               const at::Tensor& q, const at::Tensor& k,
                                               const at::Tensor& v, const Reader& reader) const {
  const Retrieval& r = reader.retrieval;
  const at::Tensor keys = turned_in_block(k, position, reader);
  std::vector<at::Tensor> outs{q.new_empty({1, 0, q.size(2), v.size(3)})},
      selected{at::empty({1, 0, q.size(2), r.top_k}, at::kLong)}, bounds, shares, more;
  for (const Group& group : groups_of(r, position, q.size(1))) {
    const std::int64_t from = group.begin - position, count = group.end - group.begin;
    const auto extended = [&](const at::Tensor& tail, const at::Tensor& fresh) {
      return at::cat({tail, fresh.narrow(1, from, count).select(0, 0).transpose(0, 1)}, 1)
          .contiguous();
    };
    line.k = extended(line.k, keys);
    line.v = extended(line.v, v);
    const std::int64_t hidden = group.first_local * r.block - line.tail_first;
    const auto local = [&](const at::Tensor& tail) {
      return tail.narrow(1, hidden, tail.size(1) - hidden).transpose(0, 1).unsqueeze(0);
    };
    const auto one = GroupReader(line.pages, q.narrow(1, from, count), group, reader)
                         .read(local(line.k), local(line.v), certify_);
    outs.push_back(one.out);
    selected.push_back(at::constant_pad_nd(one.selected, {0, r.top_k - one.selected.size(3)}, -1));
    if (certify_) {
      bounds.push_back(one.certificates.bound);
      shares.push_back(one.certificates.unread_share);
      more.push_back(one.certificates.more);
    }
    close_blocks(line, group.end);
  }
  LineRead all{at::cat(outs, 1), at::cat(selected, 1), {}};
  if (!bounds.empty())
    all.certificates = {at::cat(bounds, 1), at::cat(shares, 1), at::cat(more, 1)};
  return all;
}

Read PagedMemory::attend(const at::Tensor& q_BTHK, const at::Tensor& k_BTGK,
                         const at::Tensor& v_BTGV, const Sequences& sequences, const Reader& reader,
                         bool want_picks) {
  TORCH_CHECK_VALUE(broken_.empty(), "landmark: this state cannot go on: ", broken_,
                    ". Restore a saved one");
  TORCH_CHECK_VALUE(!at::GradMode::is_enabled(),
                    "landmark: blocks in tiers carry no gradients; call under no_grad, or use the "
                    "plain memory");
  const Retrieval &given = reader.retrieval, &made = shape_.retrieval;
  TORCH_CHECK_VALUE(
      given.top_k > 0 && given.block == made.block && given.window == made.window &&
          (made.max_blocks == 0 || (given.max_blocks > 0 && given.max_blocks <= made.max_blocks)),
      "landmark: blocks in tiers were made for block = ", made.block, ", window = ", made.window,
      ", max_blocks = ", made.max_blocks,
      " and top_k > 0; make a new state for other ways of reading");
  settle();
  const std::int64_t T = q_BTHK.size(1);
  const bool packed = !sequences.offsets.empty();
  std::vector<at::Tensor> outs, selected, bounds, shares, more;
  try {
    for (std::int64_t n = 0; n < this->sequences(); ++n) {
      const auto index = static_cast<std::size_t>(n);
      const auto mine = [&](const at::Tensor& x) {
        return x.narrow(0, packed ? 0 : n, 1)
            .narrow(1, packed ? sequences.offsets[index] : 0, sequences.length(n, T));
      };
      const LineRead one = attend_line(lines_[index], positions()[index], mine(q_BTHK),
                                       mine(k_BTGK), mine(v_BTGV), reader);
      positions()[index] += sequences.length(n, T);
      outs.push_back(one.out);
      selected.push_back(one.selected);
      if (!one.certificates.bound.defined()) continue;
      bounds.push_back(one.certificates.bound);
      shares.push_back(one.certificates.unread_share);
      more.push_back(one.certificates.more);
    }
  } catch (const std::exception& failure) {
    broken_ = failure.what();
    throw;
  }
  const std::int64_t along = packed ? 1 : 0;
  certificates_ = {};
  if (!bounds.empty())
    certificates_ = {at::cat(bounds, along), at::cat(shares, along), at::cat(more, along)};
  count(certificates_);
  Read all;
  all.out = outs.empty() ? q_BTHK.new_empty({q_BTHK.size(0), T, q_BTHK.size(2), v_BTGV.size(3)})
                         : at::cat(outs, along);
  if (want_picks && !selected.empty()) all.selected = at::cat(selected, along);
  return all;
}

}  // namespace everlong::landmark
