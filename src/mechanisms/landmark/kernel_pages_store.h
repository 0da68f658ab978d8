// Pages in two tiers: memory under a byte budget, and a file for what does not fit.
//
// A page is immutable once added. It lives in memory, in the file, or both; which one changes
// nothing but time. Pages leave memory by the gate mass that readers gave them, the least recently
// weighty first: a page's weight is the sum of its masses, halved every `slots` reads.
//
// The store owns no threads. prefetch asks the system to read ahead and returns.
#pragma once
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <unordered_map>

#include "mechanisms/landmark/kernel_pages_file.h"
#include "mechanisms/landmark/kernel_pages_weight.h"

namespace everlong::landmark {

struct StoreOptions {
  std::int64_t ram_bytes = std::int64_t{256} << 20;  // for pages; at least one must fit
  fs::path file = {};                                // empty: no second tier
  bool temporary = false;  // the file loses its name at once and its space with the process
};

struct StoreCounts {
  std::int64_t hits = 0, misses = 0;  // reads from memory, from the file
  std::int64_t spilled = 0;           // pages written to the file
  std::int64_t evicted = 0;           // pages that left memory
};

class PageStore;

// A page's bytes in memory, and the promise that they stay there. Keep few: the budget cannot give
// way. Holds the page alive.
class PinnedPage {
 public:
  PinnedPage() = default;
  PinnedPage(PinnedPage&& other) noexcept { *this = std::move(other); }
  PinnedPage& operator=(PinnedPage&& other) noexcept;
  ~PinnedPage();

  std::span<const std::byte> bytes() const { return bytes_; }  // PageShape says how they lie

 private:
  friend class PageStore;
  std::shared_ptr<PageStore> store_;
  std::uint32_t page_ = 0;
  std::span<const std::byte> bytes_;
};

// Thread safe: one mutex, held while the file is read or written.
class PageStore : public std::enable_shared_from_this<PageStore> {
 public:
  using Page = std::uint32_t;

  // Refuses a budget below one page and what PageFile::open refuses.
  static Result<std::shared_ptr<PageStore>> open(const PageShape& shape,
                                                 const StoreOptions& options);

  const PageShape& shape() const { return shape_; }
  bool has_file() const { return file_.has_value(); }
  bool temporary() const { return temporary_; }
  std::uint64_t file_id() const { return file_ ? file_->id() : 0; }
  std::int64_t torn_bytes() const { return file_ ? file_->cut_bytes() : 0; }

  // A new page with one owner, the caller. When memory is full the lightest page leaves it, written
  // to the file first; without a file that is kUnsupported, with a message that names the budget.
  Result<Page> add(std::int64_t block, std::int64_t head, std::span<const std::byte> bytes);
  void retain(Page page);   // one more owner
  void release(Page page);  // one less; the last frees memory and file space
  // The page in memory, `mass` in [0, 1] added to its weight. kNotFound and kCorrupt for pages that
  // the file lost or damaged; kUnsupported when pins fill the budget.
  Result<PinnedPage> pin(Page page, double mass);
  void prefetch(Page page);

  // Every page named is in the file, and the file on disk.
  Status commit(std::span<const Page> pages);

  // --- for saved states (kernel_pages.h) ---
  PageFile::Place place(Page page) const;
  // Pages that the file already holds, one owner each and marked as saved: checks that each is
  // there and the one meant. A page that is alive already gets one more owner. On failure nothing
  // has changed and *failed says which.
  Result<std::vector<Page>> adopt(std::span<const PageFile::Place> places, std::size_t* failed);
  // A saved state names these pages (or no longer): while one does, their records outlive their
  // owners.
  void mark_saved(std::span<const Page> pages, bool saved);
  // Gives back the space of every record that no page owns: what a killed program had appended and
  // no saved state names. Call it when all states that live in the file are restored.
  void reclaim();

  // What memory the store holds, and what it may hold with so many pages alive at once.
  std::int64_t resident_bytes() const;
  static std::int64_t resident_bound(const PageShape& shape, const StoreOptions& options,
                                     std::int64_t pages);
  // Space in the file, and its bound with so many pages alive or named by saved states.
  std::int64_t file_bytes() const;
  static std::int64_t file_bound(const PageShape& shape, std::int64_t pages) {
    return kFileUnit + pages * record_bytes(shape);
  }
  std::int64_t pages() const;       // alive
  std::int64_t most_pages() const;  // alive at once, so far: tables and slots do not shrink
  StoreCounts counts() const;

 private:
  friend class PinnedPage;
  static constexpr std::uint32_t kNone = ~std::uint32_t{0};
  struct Entry {
    std::uint32_t slot = kNone;  // where in memory; or, of a free entry, the next free one
    std::uint32_t owners = 0;
    std::int64_t record : 48 = -1;
    std::int64_t saves : 16 = 0;
    std::uint64_t checksum = 0;
  };
  static constexpr std::int64_t kEntryRun = 4096;  // entries allocated at a time
  struct Slot {
    std::unique_ptr<std::byte[]> bytes;
    std::int64_t block = 0, head = 0;  // of a page that is not in the file yet
    Page page = kNone;
    std::uint32_t pins = 0;
    double weight = 0;
  };

  PageStore(const PageShape& shape, const StoreOptions& options);
  Entry& entry(Page page) { return entries_[page / kEntryRun][page % kEntryRun]; }
  const Entry& entry(Page page) const { return entries_[page / kEntryRun][page % kEntryRun]; }
  Page new_entry();
  void drop_entry(Page page);
  Result<std::uint32_t> free_slot();
  Status write_out(Page page);
  void unpin(Page page);
  void release_locked(Page page);
  std::unordered_map<std::int64_t, Page> pages_by_record() const;

  const PageShape shape_;
  const std::int64_t slot_limit_;
  const bool temporary_;
  GateWeights weights_;
  mutable std::mutex mutex_;
  std::optional<PageFile> file_;
  std::vector<std::unique_ptr<Entry[]>> entries_;
  Page first_free_ = kNone;
  std::int64_t alive_ = 0, most_alive_ = 0;
  std::vector<Slot> slots_;
  std::vector<std::uint32_t> free_slots_;
  std::set<std::pair<double, std::uint32_t>> by_weight_;  // slots that are not pinned
  StoreCounts counts_;
};

}  // namespace everlong::landmark
