#include "mechanisms/landmark/layer_pages.h"

#include <ATen/ATen.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
namespace everlong::landmark {
namespace {

PageShape page_shape(const MemoryShape& shape, DType dtype) {
  return {shape.kv_heads, shape.retrieval.block, shape.key_dim, shape.value_dim, dtype};
}

// A block [G, L, D] as the pages take it.
ConstTensorView view_of(const at::Tensor& x_GLD, DType dtype) {
  return {x_GLD.const_data_ptr(),
          dtype,
          {1, x_GLD.size(0), x_GLD.size(1), x_GLD.size(2)},
          {0, x_GLD.stride(0), x_GLD.stride(1), 1}};
}

}  // namespace

PagedMemory::PagedMemory(std::int64_t sequences, const MemoryShape& shape,
                         const at::TensorOptions& options, std::shared_ptr<PageStore> store,
                         const StoreOptions& tiers, std::int64_t device_bytes)
    : TieredState(sequences),
      shape_(shape),
      options_(options),
      store_(std::move(store)),
      tiers_(tiers),
      device_bytes_(device_bytes) {
  if (device_bytes > 0)
    pool_ = std::make_unique<DevicePool>(store_->shape(), options, device_bytes);
  for (std::int64_t n = 0; n < sequences; ++n) lines_.push_back(fresh_line());
}

Result<std::unique_ptr<PagedMemory>> PagedMemory::create(std::int64_t sequences,
                                                         const MemoryShape& shape,
                                                         const at::TensorOptions& options,
                                                         const StoreOptions& tiers,
                                                         std::int64_t device_bytes) {
  const auto type = c10::typeMetaToScalarType(options.dtype());
  if (type != at::kFloat && type != at::kBFloat16)
    return unsupported("landmark: blocks in tiers are fp32 or bf16, not ", c10::toString(type));
  if (shape.retrieval.top_k < 1 || !shape.retrieval.has_landmarks())
    return invalid_argument(
        "landmark: blocks in tiers need landmarks and a top_k of 1 or more, not ",
        shape.retrieval.top_k, " (0 reads every block for every token)");
  const PageShape pages =
      page_shape(shape, type == at::kFloat ? DType::kFloat32 : DType::kBFloat16);
  const std::int64_t a_token = shape.kv_heads * shape.retrieval.top_k * pages.page_bytes();
  if ((device_bytes > 0 || !options.device().is_cpu()) && device_bytes < a_token)
    return invalid_argument("landmark: ", device_bytes, " bytes for pages on ",
                            options.device().str(), "; one token reads ",
                            shape.kv_heads * shape.retrieval.top_k, " of ", pages.page_bytes(),
                            " bytes: raise device_megabytes");
  EVERLONG_ASSIGN(auto store, PageStore::open(pages, tiers));
  return std::unique_ptr<PagedMemory>(
      new PagedMemory(sequences, shape, options, std::move(store), tiers, device_bytes));
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
       .temporary = true},
      options.device().is_cpu() ? 0 : pages.device_megabytes << 20);
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
          at::empty({shape_.kv_heads, 0, shape_.value_dim}, options_)};
}

// Of each key head, what its query heads' last token picked, of selected [1, T, H, top_k].
std::vector<std::vector<Pick>> PagedMemory::picks_of_last(const at::Tensor& selected) const {
  const at::Tensor last =
      selected.select(0, 0).select(0, selected.size(1) - 1).contiguous();  // [H, top_k]
  const auto* block = last.const_data_ptr<std::int64_t>();
  std::vector<std::vector<Pick>> picks(static_cast<std::size_t>(shape_.kv_heads));
  const std::int64_t each = last.numel() / shape_.kv_heads;
  for (auto& of_head : picks)
    for (std::int64_t i = 0; i < each; ++i, ++block)
      if (*block >= 0) of_head.push_back({*block, 0});
  return picks;
}

// Gives the complete blocks at the front of the tail to the pages, and cuts what no token will see
// as local.
void PagedMemory::close_blocks(Line& line, std::int64_t end) const {
  const std::int64_t block = shape_.retrieval.block;
  const DType dtype = store_->shape().dtype;
  while ((line.pages.end() + 1) * block <= end) {
    const std::int64_t from = line.pages.end() * block - line.tail_first;
    TORCH_CHECK(from >= 0, "landmark: block ", line.pages.end(), " left before it was stored");
    const std::int64_t K = shape_.key_dim;
    const auto part = [&](const at::Tensor& x) { return x.narrow(1, from, block); };
    if (line.k.is_cpu()) {
      const at::Tensor k = part(line.k), v = part(line.v);
      throw_if_error(line.pages.append(view_of(k, dtype), view_of(v, dtype)));
    } else {  // in one transfer
      const at::Tensor both = at::cat({part(line.k), part(line.v)}, 2).cpu();
      throw_if_error(line.pages.append(view_of(both.narrow(2, 0, K), dtype),
                                       view_of(both.narrow(2, K, shape_.value_dim), dtype)));
    }
    if (!pool_) continue;
    line.landmarks.append(line.k.narrow(1, from + block - 1, 1));
    line.landmarks.drop_before(line.pages.first());
  }
  const std::int64_t first =
      std::max<std::int64_t>(end / block - shape_.retrieval.window, 0) * block;
  if (first == line.tail_first) return;
  for (at::Tensor* x : {&line.k, &line.v})
    *x = x->narrow(1, first - line.tail_first, end - first).clone(at::MemoryFormat::Contiguous);
  line.tail_first = first;
}

PagedMemory::LineRead PagedMemory::attend_line(std::int64_t number, const at::Tensor& q,
                                               const at::Tensor& k, const at::Tensor& v,
                                               const Reader& reader) {
  Line& line = lines_[static_cast<std::size_t>(number)];
  const std::int64_t position = positions()[static_cast<std::size_t>(number)];
  const Retrieval& r = reader.retrieval;
  for (std::size_t g = 0; g < line.last_picks.size(); ++g)
    line.pages.prefetch(static_cast<std::int64_t>(g), line.last_picks[g]);
  const HostPast host(line.pages);
  std::optional<DevicePast> device;
  if (pool_) device.emplace(line.pages, line.landmarks, *pool_, number);
  const PastReader& past = device ? static_cast<const PastReader&>(*device) : host;
  const at::Tensor keys = turned_in_block(k, position, reader);
  std::vector<at::Tensor> outs{q.new_empty({1, 0, q.size(2), v.size(3)})},
      selected{at::empty({1, 0, q.size(2), r.top_k}, q.options().dtype(at::kLong))}, bounds, shares,
      more;
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
    const GroupRead one = read_group(q.narrow(1, from, count), local(line.k), local(line.v), group,
                                     reader, line.pages, past, certify_, tables_);
    outs.push_back(one.out);
    selected.push_back(at::constant_pad_nd(one.selected, {0, r.top_k - one.selected.size(3)}, -1));
    if (certify_) {
      bounds.push_back(one.bound);
      shares.push_back(one.unread_share);
      more.push_back(one.more);
    }
    close_blocks(line, group.end);
  }
  LineRead all{at::cat(outs, 1), at::cat(selected, 1), {}};
  if (!bounds.empty())
    all.certificates = {at::cat(bounds, 1), at::cat(shares, 1), at::cat(more, 1)};
  if (!pool_ && store_->has_file() && q.size(1) > 0) line.last_picks = picks_of_last(all.selected);
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
      const LineRead one = attend_line(n, mine(q_BTHK), mine(k_BTGK), mine(v_BTGV), reader);
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
