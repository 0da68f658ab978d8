#include "mechanisms/landmark/layer_pages_device.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

namespace everlong::landmark {
namespace {

// Elements of scores, and of gathered pages, at a time.
constexpr std::int64_t kMostElements = std::int64_t{1} << 27;
constexpr std::int64_t kFirstSlots = 64;

std::int64_t page_elements(const PageShape& s) { return s.page_bytes() / s.element(); }

}  // namespace

DevicePool::DevicePool(const PageShape& shape, const at::TensorOptions& options, std::int64_t bytes)
    : shape_(shape),
      options_(options),
      slots_(bytes / shape.page_bytes()),
      weights_(std::max<std::int64_t>(slots_, 1)) {
  clear();
}

void DevicePool::clear() {
  pool_ = at::empty({0, page_elements(shape_)}, options_);
  staging_ = at::Tensor();
  where_.clear();
  held_.clear();
  by_weight_.clear();
}

std::int64_t DevicePool::room_for_one() {
  if (std::ssize(held_) < slots_) {
    held_.emplace_back();
    return std::ssize(held_) - 1;
  }
  const std::int64_t slot = by_weight_.begin()->second;  // what this call takes is not in it
  by_weight_.erase(by_weight_.begin());
  where_.erase(held_[static_cast<std::size_t>(slot)].key);
  return slot;
}

std::vector<std::int64_t> DevicePool::take(std::int64_t line, const BlockPages& pages,
                                           std::span<const Want> wants) {
  TORCH_CHECK(std::ssize(wants) <= slots_, "landmark: ", wants.size(), " pages at once of ",
              slots_);
  std::vector<std::int64_t> slots(wants.size(), -1);
  std::vector<std::size_t> absent;
  for (std::size_t i = 0; i < wants.size(); ++i) {
    const auto found = where_.find({line, wants[i].block, wants[i].head});
    if (found == where_.end()) {
      absent.push_back(i);
      continue;
    }
    slots[i] = found->second;
    Slot& slot = held_[static_cast<std::size_t>(slots[i])];
    by_weight_.erase({slot.weight, slots[i]});
    slot.weight = weights_.again(slot.weight, wants[i].mass);
  }
  hits_ += std::ssize(wants) - std::ssize(absent);
  misses_ += std::ssize(absent);
  if (!absent.empty()) {
    const auto count = std::ssize(absent);
    if (!staging_.defined() || staging_.size(0) < count)
      staging_ = at::empty({count, page_elements(shape_)},
                           options_.device(at::kCPU).pinned_memory(options_.device().is_cuda()));
    auto* to = static_cast<std::byte*>(staging_.mutable_data_ptr());
    std::vector<std::int64_t> fresh;
    for (const std::size_t i : absent) {
      const Want& want = wants[i];
      const auto page = pages.read(want.block, want.head, want.mass);
      throw_if_error(page.status());  // the state is broken then; restore() clears the pool
      std::memcpy(to, page->bytes().data(), page->bytes().size());
      to += shape_.page_bytes();
    }
    for (const std::size_t i : absent) {
      slots[i] = room_for_one();
      held_[static_cast<std::size_t>(slots[i])] = {{line, wants[i].block, wants[i].head},
                                                   weights_.first(wants[i].mass)};
      where_[held_[static_cast<std::size_t>(slots[i])].key] = slots[i];
      fresh.push_back(slots[i]);
    }
    if (pool_.size(0) < std::ssize(held_)) {
      const std::int64_t room =
          std::min(slots_, std::max({2 * pool_.size(0), std::ssize(held_), kFirstSlots}));
      const at::Tensor larger = at::empty({room, pool_.size(1)}, options_);
      larger.narrow(0, 0, pool_.size(0)).copy_(pool_);
      pool_ = larger;
    }
    pool_.index_copy_(0, at::tensor(at::ArrayRef<std::int64_t>(fresh)).to(pool_.device()),
                      staging_.narrow(0, 0, count).to(pool_.device(), /*non_blocking=*/true));
  }
  for (const std::int64_t slot : slots)
    by_weight_.emplace(held_[static_cast<std::size_t>(slot)].weight, slot);
  return slots;
}

at::Tensor DevicePool::keys() const {
  return pool_.narrow(1, 0, shape_.tokens() * shape_.key_dim)
      .unflatten(1, {shape_.tokens(), shape_.key_dim});
}

at::Tensor DevicePool::values() const {
  return pool_.narrow(1, shape_.tokens() * shape_.key_dim, shape_.tokens() * shape_.value_dim)
      .unflatten(1, {shape_.tokens(), shape_.value_dim});
}

std::int64_t DevicePool::bytes() const {
  return static_cast<std::int64_t>(pool_.nbytes()) +
         (staging_.defined() ? static_cast<std::int64_t>(staging_.nbytes()) : 0);
}

void DeviceLandmarks::append(const at::Tensor& keys_GcK) {
  const std::int64_t count = keys_GcK.size(1);
  if (!rows_.defined() || end_ + count - first_ > rows_.size(1)) {
    const std::int64_t kept = end_ - std::clamp(first_kept_, first_, end_);
    const std::int64_t room = std::max(2 * (kept + count), kLeast);
    const at::Tensor larger =
        at::empty({keys_GcK.size(0), room, keys_GcK.size(2)}, keys_GcK.options());
    if (kept > 0) larger.narrow(1, 0, kept).copy_(rows_.narrow(1, end_ - first_ - kept, kept));
    rows_ = larger;
    first_ = end_ - kept;
  }
  rows_.narrow(1, end_ - first_, count).copy_(keys_GcK);
  end_ += count;
}

DeviceLandmarks DeviceLandmarks::fork() const {
  DeviceLandmarks other = *this;
  if (rows_.defined()) other.rows_ = rows_.clone();
  return other;
}

std::int64_t DeviceLandmarks::bytes_bound(const PageShape& shape, std::int64_t kept,
                                          std::int64_t blocks) {
  // Room is made for twice what is kept; with `kept` of them, one more came when it was.
  const std::int64_t most = kept > 0 ? std::min(blocks, kept + 1) : blocks;
  return std::max(2 * most, kLeast) * shape.kv_heads * shape.key_dim * shape.element();
}

at::Tensor DevicePast::pick(const PastQueries& queries) const {
  const Frame& frame = queries.frame;
  const std::int64_t P = frame.picks, count = frame.count();
  const at::Tensor keys = landmarks_.keys(frame.oldest, frame.first_local).to(at::kFloat);
  const auto scored = [&](const at::Tensor& places_GSnK) {  // [G, n, count]
    const at::Tensor scores = at::matmul(places_GSnK.select(1, 0), keys.mT());
    // The last picks are scored at their true distance.
    for (std::int64_t s = 1; s <= P; ++s) {
      const std::int64_t b = count - P + s - 1;
      scores.select(2, b).copy_(
          at::matmul(places_GSnK.select(1, s), keys.select(1, b).unsqueeze(-1)).squeeze(-1));
    }
    return scores.mul_(queries.scale);
  };
  if (queries.granularity != Granularity::kTokenHead)
    return picked_blocks(deciding_scores(scored(queries.places_GSnK), queries), P);
  const std::int64_t n = queries.places_GSnK.size(2);
  const std::int64_t rows =
      std::max<std::int64_t>(kMostElements / std::max<std::int64_t>(keys.size(0) * count, 1), 1);
  std::vector<at::Tensor> parts;
  for (std::int64_t from = 0; from < n; from += rows)
    parts.push_back(
        picked_blocks(scored(queries.places_GSnK.narrow(2, from, std::min(rows, n - from))), P));
  return at::cat(parts, 1);
}

// Attention within the pages at slots_GnP, in runs of rows.
void DevicePast::read_rows(const at::Tensor& q_GnPK, const at::Tensor& slots_GnP, double scale,
                           const at::Tensor& out_GnPV) const {
  const PageShape& s = pages_.shape();
  const std::int64_t n = q_GnPK.size(1);
  const std::int64_t a_row =
      q_GnPK.size(0) * q_GnPK.size(2) * s.tokens() * std::max(s.key_dim, s.value_dim);
  const std::int64_t rows = std::max<std::int64_t>(kMostElements / a_row, 1);
  for (std::int64_t from = 0; from < n; from += rows) {
    const std::int64_t count = std::min(rows, n - from);
    const at::Tensor slots = slots_GnP.narrow(1, from, count);
    const auto gathered = [&](const at::Tensor& pages) {  // [G, rows, P, L - 1, D]
      return pages.index_select(0, slots.flatten()).to(at::kFloat).unflatten(0, slots.sizes());
    };
    const at::Tensor scores =
        at::matmul(gathered(pool_.keys()), q_GnPK.narrow(1, from, count).unsqueeze(-1))
            .squeeze(-1)
            .mul_(scale);
    out_GnPV.narrow(1, from, count)
        .copy_(at::matmul(at::softmax(scores, -1).unsqueeze(-2), gathered(pool_.values()))
                   .squeeze(-2));
  }
}

// The end of the rows from `from` on that name at most slots() distinct pages.
std::int64_t DevicePast::rows_that_fit(const std::int64_t* block_GnP, std::int64_t from,
                                       std::int64_t G, std::int64_t n, std::int64_t P) const {
  if ((n - from) * G * P <= pool_.slots()) return n;
  std::set<std::pair<std::int64_t, std::int64_t>> named;  // (head, block)
  for (std::int64_t row = from; row < n; ++row) {
    for (std::int64_t g = 0; g < G; ++g)
      for (std::int64_t p = 0; p < P; ++p) named.insert({g, block_GnP[(g * n + row) * P + p]});
    if (std::ssize(named) > pool_.slots()) return std::max(row, from + 1);
  }
  return n;
}

PastRead DevicePast::read(const PastQueries& queries) const {
  const Frame& frame = queries.frame;
  const at::Tensor& places = queries.places_GSnK;
  const std::int64_t G = places.size(0), n = places.size(2), K = places.size(3), P = frame.picks;
  const at::Tensor chosen = pick(queries);  // from frame.oldest on
  const at::Tensor landmarks = landmarks_.keys(frame.oldest, frame.first_local)
                                   .to(at::kFloat)
                                   .unsqueeze(1)
                                   .expand({G, n, frame.count(), K})
                                   .gather(2, chosen.unsqueeze(-1).expand({G, n, P, K}));
  const at::Tensor place =
      at::arange(P, chosen.options()).add(chosen.ge(frame.count() - P).to(at::kLong));
  const at::Tensor q =
      places.permute({0, 2, 1, 3}).gather(2, place.unsqueeze(-1).expand({G, n, P, K}));
  PastRead all;
  all.gates_GnP = (q * landmarks).sum(-1).mul_(queries.scale);
  all.selected_GnP = chosen + frame.oldest;
  all.out_GnPV = at::empty({G, n, P, pages_.shape().value_dim}, places.options());

  // Which pages, on the host. This waits for the device, so it is done with earlier takes too.
  const at::Tensor sum =
      at::logsumexp(at::cat({queries.near_Gn.unsqueeze(-1), all.gates_GnP}, -1), {-1}, true);
  const at::Tensor mass_of = all.gates_GnP.sub(sum).exp().cpu().contiguous();
  const at::Tensor block_of = all.selected_GnP.cpu().contiguous();
  const auto* mass = mass_of.const_data_ptr<float>();
  const auto* block = block_of.const_data_ptr<std::int64_t>();
  const at::Tensor slot_of = at::empty({G, n, P}, at::kLong);
  auto* slot = slot_of.mutable_data_ptr<std::int64_t>();
  struct Wanted {
    DevicePool::Want page;
    std::int64_t entry;  // of [G, n, P]
  };
  std::vector<Wanted> wants;
  // Rows [from, to) at a time whose distinct pages fit the pool together.
  for (std::int64_t from = 0; from < n;) {
    const std::int64_t to = rows_that_fit(block, from, G, n, P);
    wants.clear();
    for (std::int64_t g = 0; g < G; ++g)
      for (std::int64_t i = (g * n + from) * P; i < (g * n + to) * P; ++i)
        wants.push_back({{block[i], g, mass[i]}, i});
    std::ranges::sort(wants, {},
                      [](const Wanted& w) { return std::pair(w.page.head, w.page.block); });
    std::vector<DevicePool::Want> pages;
    for (const Wanted& w : wants) {
      if (pages.empty() || pages.back().block != w.page.block || pages.back().head != w.page.head)
        pages.push_back(w.page);
      pages.back().mass = std::max(pages.back().mass, w.page.mass);
    }
    const auto lies = pool_.take(line_, pages_, pages);
    std::size_t at = 0;
    for (const Wanted& w : wants) {
      if (pages[at].block != w.page.block || pages[at].head != w.page.head) ++at;
      slot[w.entry] = lies[at];
    }
    const auto part = [&](const at::Tensor& x) { return x.narrow(1, from, to - from); };
    read_rows(part(q), part(slot_of).to(places.device()), queries.scale, part(all.out_GnPV));
    from = to;
    // The next take may overwrite the buffer that this one's copy still reads.
    if (from < n && places.is_cuda()) (void)all.out_GnPV.flatten()[0].item<float>();
  }
  return all;
}

}  // namespace everlong::landmark
