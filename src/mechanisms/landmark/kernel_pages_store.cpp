#include "mechanisms/landmark/kernel_pages_store.h"

#include <algorithm>
#include <cstring>
#include <system_error>

namespace everlong::landmark {
namespace {

// A fresh page counts as if the newest token had read it with all its weight.
constexpr double kFreshMass = 1;

constexpr std::int64_t kMostPages = std::int64_t{0xFFFFFFFE};
// What a slot costs beside its page: the slot, its place in the order and its place in the free
// list, with what the allocator adds to each.
constexpr std::int64_t kSlotOverhead = 192;

}  // namespace

PinnedPage& PinnedPage::operator=(PinnedPage&& other) noexcept {
  std::swap(store_, other.store_);
  std::swap(page_, other.page_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

PinnedPage::~PinnedPage() {
  if (store_) store_->unpin(page_);
}

PageStore::PageStore(const PageShape& shape, const StoreOptions& options)
    : shape_(shape),
      slot_limit_(std::min(options.ram_bytes / shape.page_bytes(), kMostPages)),
      temporary_(options.temporary),
      weights_(slot_limit_) {}

Result<std::shared_ptr<PageStore>> PageStore::open(const PageShape& shape,
                                                   const StoreOptions& options) {
  EVERLONG_RETURN_IF_ERROR(validate(shape));
  if (options.ram_bytes < shape.page_bytes())
    return invalid_argument("landmark pages: a budget of ", options.ram_bytes,
                            " bytes of memory; one page takes ", shape.page_bytes(),
                            ", and a reader needs as many as it pins at once");
  std::shared_ptr<PageStore> store(new PageStore(shape, options));
  if (!options.file.empty()) {
    EVERLONG_ASSIGN(auto file, PageFile::open(options.file, shape));
    store->file_.emplace(std::move(file));
    if (std::error_code error; options.temporary && !fs::remove(options.file, error))
      return io_error(options.file.string(), ": cannot be removed: ", error.message());
  }
  return store;
}

PageStore::Page PageStore::new_entry() {
  if (first_free_ == kNone) {
    const auto start = static_cast<Page>(static_cast<std::int64_t>(entries_.size()) * kEntryRun);
    entries_.push_back(std::make_unique<Entry[]>(kEntryRun));
    for (Page i = kEntryRun; i-- > 0;) {
      entry(start + i).slot = first_free_;
      first_free_ = start + i;
    }
  }
  const Page page = first_free_;
  first_free_ = entry(page).slot;
  entry(page) = Entry{};
  entry(page).owners = 1;
  most_alive_ = std::max(most_alive_, ++alive_);
  return page;
}

void PageStore::drop_entry(Page page) {
  entry(page) = Entry{};
  entry(page).slot = first_free_;
  first_free_ = page;
  --alive_;
}

Status PageStore::write_out(Page page) {
  Entry& e = entry(page);
  if (e.record >= 0) return {};
  const Slot& slot = slots_[e.slot];
  const auto size = static_cast<std::size_t>(shape_.page_bytes());
  EVERLONG_ASSIGN(const auto place, file_->append(slot.block, slot.head, {slot.bytes.get(), size}));
  e.record = place.record;
  e.checksum = place.checksum;
  ++counts_.spilled;
  return {};
}

// A slot that holds nothing, by making room if it must.
Result<std::uint32_t> PageStore::free_slot() {
  if (!free_slots_.empty()) {
    const std::uint32_t slot = free_slots_.back();
    free_slots_.pop_back();
    return slot;
  }
  if (static_cast<std::int64_t>(slots_.size()) < slot_limit_) {
    if (slots_.size() == slots_.capacity())  // a quarter at a time: the bound counts on it
      slots_.reserve(static_cast<std::size_t>(std::min<std::int64_t>(
          slot_limit_, static_cast<std::int64_t>(slots_.size() + slots_.size() / 4 + 16))));
    slots_.emplace_back();
    slots_.back().bytes.reset(new std::byte[static_cast<std::size_t>(shape_.page_bytes())]);
    return static_cast<std::uint32_t>(slots_.size() - 1);
  }
  if (by_weight_.empty())
    return unsupported("landmark pages: all ", slot_limit_,
                       " pages that the budget holds are being read; raise the budget");
  const std::uint32_t slot = by_weight_.begin()->second;
  if (!file_ && entry(slots_[slot].page).record < 0)
    return unsupported("landmark pages: ", alive_, " pages of ", shape_.page_bytes(),
                       " bytes fill the budget of ", slot_limit_,
                       " and there is no file to spill to; raise the budget, name a file, or "
                       "bound the blocks by max_blocks");
  EVERLONG_RETURN_IF_ERROR(write_out(slots_[slot].page));
  by_weight_.erase(by_weight_.begin());
  entry(slots_[slot].page).slot = kNone;
  slots_[slot].page = kNone;
  ++counts_.evicted;
  return slot;
}

Result<PageStore::Page> PageStore::add(std::int64_t block, std::int64_t head,
                                       std::span<const std::byte> bytes) {
  if (static_cast<std::int64_t>(bytes.size()) != shape_.page_bytes())
    return invalid_argument("landmark pages: ", bytes.size(), " bytes for a page of ",
                            shape_.page_bytes());
  const std::lock_guard lock(mutex_);
  if (alive_ >= kMostPages) return unsupported("landmark pages: ", alive_, " are alive already");
  EVERLONG_ASSIGN(const std::uint32_t index, free_slot());
  Slot& slot = slots_[index];
  std::memcpy(slot.bytes.get(), bytes.data(), bytes.size());
  slot.block = block;
  slot.head = head;
  slot.page = new_entry();
  entry(slot.page).slot = index;
  slot.weight = weights_.first(kFreshMass);
  by_weight_.emplace(slot.weight, index);
  return slot.page;
}

void PageStore::retain(Page page) {
  const std::lock_guard lock(mutex_);
  ++entry(page).owners;
}

void PageStore::release(Page page) {
  const std::lock_guard lock(mutex_);
  release_locked(page);
}

void PageStore::release_locked(Page page) {
  Entry& e = entry(page);
  if (--e.owners > 0) return;
  if (e.slot != kNone) {
    by_weight_.erase({slots_[e.slot].weight, e.slot});
    slots_[e.slot].page = kNone;
    free_slots_.push_back(e.slot);
  }
  if (e.record >= 0 && e.saves == 0) file_->release(e.record);
  drop_entry(page);
}

Result<PinnedPage> PageStore::pin(Page page, double mass) {
  const std::lock_guard lock(mutex_);
  const bool resident = entry(page).slot != kNone;
  if (!resident) {
    EVERLONG_ASSIGN(const std::uint32_t index, free_slot());
    Slot& slot = slots_[index];
    const Entry& e = entry(page);
    const Status read = file_->read(
        {e.record, e.checksum}, {slot.bytes.get(), static_cast<std::size_t>(shape_.page_bytes())});
    if (!read.ok()) {
      free_slots_.push_back(index);
      return read;
    }
    slot.page = page;
    entry(page).slot = index;
  }
  ++(resident ? counts_.hits : counts_.misses);
  const std::uint32_t index = entry(page).slot;
  Slot& slot = slots_[index];
  if (resident && slot.pins == 0) by_weight_.erase({slot.weight, index});
  slot.weight = resident ? weights_.again(slot.weight, mass) : weights_.first(mass);
  ++slot.pins;
  ++entry(page).owners;
  PinnedPage pinned;
  pinned.store_ = shared_from_this();
  pinned.page_ = page;
  pinned.bytes_ = {slot.bytes.get(), static_cast<std::size_t>(shape_.page_bytes())};
  return pinned;
}

void PageStore::unpin(Page page) {
  const std::lock_guard lock(mutex_);
  const std::uint32_t index = entry(page).slot;
  if (--slots_[index].pins == 0) by_weight_.emplace(slots_[index].weight, index);
  release_locked(page);
}

void PageStore::prefetch(Page page) {
  const std::lock_guard lock(mutex_);
  const Entry& e = entry(page);
  if (e.slot == kNone && e.record >= 0) file_->prefetch(e.record);
}

Status PageStore::commit(std::span<const Page> pages) {
  const std::lock_guard lock(mutex_);
  if (!file_)
    return unsupported("landmark pages: this store has no file; open it with one to save streams");
  if (temporary_)
    return unsupported(
        "landmark pages: this store's file is temporary; open one that stays to "
        "save streams");
  for (const Page page : pages) EVERLONG_RETURN_IF_ERROR(write_out(page));
  return file_->sync();
}

PageFile::Place PageStore::place(Page page) const {
  const std::lock_guard lock(mutex_);
  return {entry(page).record, entry(page).checksum};
}

std::unordered_map<std::int64_t, PageStore::Page> PageStore::pages_by_record() const {
  std::unordered_map<std::int64_t, Page> pages;
  for (std::size_t run = 0; run < entries_.size(); ++run)
    for (std::int64_t i = 0; i < kEntryRun; ++i)
      if (const Entry& e = entries_[run][i]; e.owners > 0 && e.record >= 0)
        pages.emplace(e.record, static_cast<Page>(static_cast<std::int64_t>(run) * kEntryRun + i));
  return pages;
}

Result<std::vector<PageStore::Page>> PageStore::adopt(std::span<const PageFile::Place> places,
                                                      std::size_t* failed) {
  *failed = 0;
  const std::lock_guard lock(mutex_);
  if (!file_) return unsupported("landmark pages: this store has no file to restore from");
  if (alive_ + static_cast<std::int64_t>(places.size()) > kMostPages)
    return unsupported("landmark pages: ", alive_, " are alive already");
  auto known = pages_by_record();
  for (std::size_t i = 0; i < places.size(); ++i) {
    *failed = i;
    EVERLONG_RETURN_IF_ERROR(file_->check(places[i]));
  }
  std::vector<Page> pages;
  pages.reserve(places.size());
  for (const PageFile::Place& place : places) {
    const auto [it, fresh] = known.try_emplace(place.record, kNone);
    if (fresh) {
      it->second = new_entry();
      entry(it->second).record = place.record;
      entry(it->second).checksum = place.checksum;
    } else {
      ++entry(it->second).owners;
    }
    entry(it->second).saves = entry(it->second).saves + 1;
    pages.push_back(it->second);
  }
  return pages;
}

void PageStore::mark_saved(std::span<const Page> pages, bool saved) {
  const std::lock_guard lock(mutex_);
  for (const Page page : pages) entry(page).saves = entry(page).saves + (saved ? 1 : -1);
}

void PageStore::reclaim() {
  const std::lock_guard lock(mutex_);
  if (!file_) return;
  const auto owned = pages_by_record();
  file_->release_others([&](std::int64_t record) { return owned.contains(record); });
}

std::int64_t PageStore::resident_bytes() const {
  const std::lock_guard lock(mutex_);
  const auto slots = static_cast<std::int64_t>(slots_.size());
  return static_cast<std::int64_t>(sizeof(PageStore)) + slots * shape_.page_bytes() +
         static_cast<std::int64_t>(slots_.capacity() * sizeof(Slot)) + slots * 80 +
         static_cast<std::int64_t>(free_slots_.capacity() * sizeof(std::uint32_t)) +
         static_cast<std::int64_t>(entries_.size()) *
             (kEntryRun * static_cast<std::int64_t>(sizeof(Entry)) + 32) +
         (file_ ? record_bytes(shape_) : 0);
}

std::int64_t PageStore::resident_bound(const PageShape& shape, const StoreOptions& options,
                                       std::int64_t pages) {
  const std::int64_t runs = (pages + kEntryRun - 1) / kEntryRun;
  const std::int64_t slots = std::min(options.ram_bytes / shape.page_bytes(), pages);
  return 4096 + slots * (shape.page_bytes() + kSlotOverhead) + 16 * kSlotOverhead +
         runs * (kEntryRun * static_cast<std::int64_t>(sizeof(Entry)) + 32) +
         (options.file.empty() ? 0 : record_bytes(shape));
}

std::int64_t PageStore::file_bytes() const {
  const std::lock_guard lock(mutex_);
  return file_ ? file_->bytes() : 0;
}

std::int64_t PageStore::pages() const {
  const std::lock_guard lock(mutex_);
  return alive_;
}

std::int64_t PageStore::most_pages() const {
  const std::lock_guard lock(mutex_);
  return most_alive_;
}

StoreCounts PageStore::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

}  // namespace everlong::landmark
