// A writer is killed with SIGKILL at random moments while it spills and saves; what it had saved
// must be there.
#include <sys/mman.h>
#include <sys/wait.h>

#include <atomic>
#include <csignal>
#include <thread>

#include "mechanisms/landmark/landmark_pages_test.h"

namespace everlong::landmark {
namespace {

constexpr std::uint64_t kSeed = 21;
constexpr int kKills = 100;
const PageShape kShape{.kv_heads = 2, .block = 17, .key_dim = 16, .value_dim = 16};

// What the writer tells the one that kills it, in memory that outlives the writer.
struct Progress {
  std::atomic<std::int64_t> saved{0};    // blocks, once save() has returned
  std::atomic<std::int64_t> spilled{0};  // records appended in this life
  std::atomic<int> failed{0};
};

Result<BlockPages> open_stream(const TestFolder& folder, std::int64_t max_blocks) {
  EVERLONG_ASSIGN(auto store, PageStore::open(kShape, {.ram_bytes = 8 * kShape.page_bytes(),
                                                       .file = folder / "pages"}));
  if (!fs::exists(folder / "state")) return BlockPages(std::move(store), max_blocks);
  std::vector<std::byte> extra;
  EVERLONG_ASSIGN(auto pages, BlockPages::restore(store, folder / "state", max_blocks, &extra));
  std::int64_t end = -1;
  if (extra.size() != sizeof end) return corrupt("the caller's bytes are missing");
  std::memcpy(&end, extra.data(), sizeof end);
  if (end != pages.end()) return corrupt("the caller's bytes are of another state");
  store->reclaim();
  return pages;
}

// Runs until it is killed.
Status write_blocks(const TestFolder& folder, std::int64_t max_blocks, Progress& progress) {
  EVERLONG_ASSIGN(auto pages, open_stream(folder, max_blocks));
  Random random{static_cast<std::uint64_t>(::getpid())};
  while (true) {
    for (std::int64_t more = random.between(1, 40); more > 0; --more) {
      EVERLONG_RETURN_IF_ERROR(TestBlock(kShape, kSeed, pages.end()).append_to(pages));
      progress.spilled = pages.store()->counts().spilled;
      // Reads make other pages leave than the oldest.
      const std::int64_t block = random.between(pages.first(), pages.end() - 1);
      if (const auto wrong = compare_block(pages, kSeed, block); !wrong.empty())
        return corrupt(wrong);
    }
    const std::int64_t end = pages.end();
    EVERLONG_RETURN_IF_ERROR(pages.save(folder / "state", std::as_bytes(std::span(&end, 1))));
    progress.saved = end;
  }
}

// Kills at times that grow from the first instants of a life (opening, cutting, restoring) to
// several saves.
void kill_and_check(std::int64_t max_blocks) {
  const TestFolder folder;
  auto* progress = new (::mmap(nullptr, sizeof(Progress), PROT_READ | PROT_WRITE,
                               MAP_SHARED | MAP_ANONYMOUS, -1, 0)) Progress;
  Random random{5};
  std::int64_t torn = 0, unsaved = 0, spilling = 0;
  for (int kill = 0; kill < kKills; ++kill) {
    progress->spilled = 0;
    const ::pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      const Status status = write_blocks(folder, max_blocks, *progress);
      std::fprintf(stderr, "writer: %s\n", status.message().c_str());
      progress->failed = 1;
      ::_exit(1);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(random.between(100, 40'000)));
    ::kill(child, SIGKILL);
    int how = 0;
    ASSERT_EQ(::waitpid(child, &how, 0), child);
    ASSERT_EQ(progress->failed, 0);
    ASSERT_TRUE(WIFSIGNALED(how));
    spilling += progress->spilled > 0;

    auto pages = open_stream(folder, max_blocks);
    ASSERT_TRUE(pages.ok()) << "after kill " << kill << ": " << pages.status().message();
    torn += pages->store()->torn_bytes() % record_bytes(kShape) != 0;
    ASSERT_GE(pages->end(), progress->saved) << "after kill " << kill;
    unsaved += pages->end() > progress->saved;
    const std::int64_t first =
        max_blocks > 0 ? std::max<std::int64_t>(pages->end() - max_blocks, 0) : 0;
    ASSERT_EQ(pages->first(), first);
    // All of a short stream, else its ends and some between.
    for (std::int64_t b = first; b < pages->end();
         b += b < first + 40 || b >= pages->end() - 80 ? 1 : 17)
      ASSERT_EQ(compare_block(*pages, kSeed, b), "") << "after kill " << kill;
  }
  std::printf(
      "%d kills, %ld while pages were spilled, %ld torn records, %ld between a save and its "
      "report; %ld blocks saved, 0 errors\n",
      kKills, static_cast<long>(spilling), static_cast<long>(torn), static_cast<long>(unsaved),
      static_cast<long>(progress->saved.load()));
  EXPECT_GT(spilling, kKills / 4) << "kills should meet a writer that spills";
  EXPECT_GT(progress->saved, 0);
  ::munmap(progress, sizeof(Progress));
}

TEST(LandmarkPagesCrash, NothingSavedIsLost) { kill_and_check(0); }
TEST(LandmarkPagesCrash, NothingSavedIsLostWhereOldBlocksAreForgotten) { kill_and_check(24); }

}  // namespace
}  // namespace everlong::landmark
