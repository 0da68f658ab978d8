#include "mechanisms/landmark/landmark_pages_test.h"

#include <sys/resource.h>
#include <sys/stat.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <fstream>
#include <numeric>
#include <thread>

#include "kernels/cpu/every_target_test.h"
#include "mechanisms/landmark/params.h"

namespace everlong::landmark {
namespace {

constexpr std::uint64_t kSeed = 7;
const PageShape kShape{.kv_heads = 2, .block = 5, .key_dim = 8, .value_dim = 6};
const PageShape kHalf{
    .kv_heads = 3, .block = 4, .key_dim = 6, .value_dim = 10, .dtype = DType::kBFloat16};

void append_blocks(BlockPages& pages, std::int64_t count, std::uint64_t seed = kSeed) {
  for (std::int64_t i = 0; i < count; ++i) {
    const Status status = TestBlock(pages.shape(), seed, pages.end()).append_to(pages);
    ASSERT_TRUE(status.ok()) << status.message();
  }
}

void expect_blocks(const BlockPages& pages, std::int64_t begin, std::int64_t end,
                   std::uint64_t seed = kSeed) {
  for (std::int64_t b = begin; b < end; ++b) ASSERT_EQ(compare_block(pages, seed, b), "");
}

void write_bytes(const fs::path& path, std::int64_t offset, std::string_view bytes) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(offset);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

std::string read_bytes(const fs::path& path, std::int64_t offset, std::int64_t count) {
  std::ifstream file(path, std::ios::binary);
  file.seekg(offset);
  std::string bytes(static_cast<std::size_t>(count), '\0');
  file.read(bytes.data(), count);
  return bytes;
}

TEST(LandmarkPages, BlocksComeBackFromEveryTier) {
  for (const PageShape& shape : {kShape, kHalf}) {
    const TestFolder folder;
    const auto store = open_store(shape, 5, folder / "pages");
    BlockPages pages(store, 0);
    append_blocks(pages, 150);
    Random random{1};
    for (int i = 0; i < 500; ++i) {
      const std::int64_t block = random.below(150);
      ASSERT_EQ(compare_block(pages, kSeed, block), "");
    }
    const StoreCounts counts = store->counts();
    EXPECT_GT(counts.evicted, 0);
    EXPECT_GT(counts.misses, 0);
    EXPECT_LE(counts.spilled, 150 * shape.kv_heads) << "a page is written once";
    const StoreOptions options{5 * shape.page_bytes(), folder / "pages"};
    EXPECT_LE(store->resident_bytes(),
              PageStore::resident_bound(shape, options, 150 * shape.kv_heads));
    EXPECT_LE(store->file_bytes(), PageStore::file_bound(shape, 150 * shape.kv_heads));
  }
}

// What query j of the scans finds, by sorting all scores.
void expect_best(const std::vector<Pick>& picks, const PageShape& shape, std::int64_t head,
                 const std::vector<Scan>& scans, std::int64_t j, float scale, std::int64_t count) {
  std::vector<Pick> all;
  for (const Scan& scan : scans)
    for (std::int64_t block = scan.begin; block < scan.end; ++block) {
      const TestBlock content(shape, kSeed, block);
      float score = 0;
      for (std::int64_t i = 0; i < shape.key_dim; ++i)
        score += scan.q_nK[j * shape.key_dim + i] * content.key(head, shape.tokens(), i);
      all.push_back({block, score * scale});
    }
  std::ranges::sort(all, [](const Pick& x, const Pick& y) {
    return x.score != y.score ? x.score > y.score : x.block > y.block;
  });
  all.resize(std::min<std::size_t>(all.size(), static_cast<std::size_t>(count)));
  std::ranges::sort(all, {}, &Pick::block);
  ASSERT_EQ(picks.size(), all.size());
  for (std::size_t i = 0; i < picks.size(); ++i) {
    EXPECT_EQ(picks[i].block, all[i].block);
    EXPECT_EQ(picks[i].score, all[i].score);
  }
}

void check_search() {
  for (const PageShape& shape : {kShape, kHalf}) {
    const auto store = open_store(shape, 4000);
    BlockPages pages(store, 0);
    append_blocks(pages, 333);
    Random random{2};
    for (int round = 0; round < 60; ++round) {
      // Small integers: many equal scores, all exact. Queries fill tiles of sums, and leave rests.
      const std::int64_t n = random.between(1, 21);
      std::vector<std::vector<float>> queries(3);
      for (auto& q : queries)
        for (std::int64_t i = 0; i < n * shape.key_dim; ++i)
          q.push_back(static_cast<float>(random.between(-2, 2)));
      const std::int64_t a = random.below(200), b = random.between(a, 330);
      const std::vector<Scan> scans{{queries[1].data(), b, b + 1},
                                    {queries[0].data(), a, b},
                                    {queries[2].data(), b + 1, 333}};
      const std::int64_t head = random.below(shape.kv_heads), count = random.between(0, 40);
      std::vector<std::vector<Pick>> picks;
      ASSERT_TRUE(pages.search(head, scans, n, 0.5, count, picks).ok());
      ASSERT_EQ(std::ssize(picks), n);
      for (std::int64_t j = 0; j < n; ++j) {
        SCOPED_TRACE(cat("query ", j, " of ", n));
        expect_best(picks[static_cast<std::size_t>(j)], shape, head, scans, j, 0.5F, count);
      }
    }
    std::vector<std::vector<Pick>> picks;
    const std::vector<float> q(static_cast<std::size_t>(shape.key_dim));
    const Scan beyond[] = {{q.data(), 300, 334}};
    EXPECT_EQ(pages.search(0, beyond, 1, 1, 2, picks).code(), StatusCode::kNotFound);
    const Scan twice[] = {{q.data(), 0, 10}, {q.data(), 9, 20}};
    EXPECT_EQ(pages.search(0, twice, 1, 1, 2, picks).code(), StatusCode::kInvalidArgument);
  }
}

TEST(LandmarkPages, SearchFindsTheBestAndTheYoungerOfEquals) { cpu::on_every_target(check_search); }

// All queries but one are ordinary; what a NaN does to one must not show in another.
TEST(LandmarkPages, NanIsPickedBehindEveryNumber) {
  const auto store = open_store(kShape, 4000);
  BlockPages pages(store, 0);
  append_blocks(pages, 70);
  const std::int64_t n = 6, K = kShape.key_dim;
  std::vector<float> q(static_cast<std::size_t>(n * K), 1.0F);
  q[static_cast<std::size_t>(2 * K)] = NAN;
  const Scan all[] = {{q.data(), 0, 70}};
  std::vector<std::vector<Pick>> picks;
  ASSERT_TRUE(pages.search(0, all, n, 0.5, 3, picks).ok());
  for (std::int64_t j = 0; j < n; ++j)
    if (j != 2) expect_best(picks[static_cast<std::size_t>(j)], kShape, 0, {all[0]}, j, 0.5F, 3);
  EXPECT_EQ(picks[2].size(), 3U);
}

TEST(LandmarkPages, ScoresThatRoundAlikeAreEqual) {
  BestBlocks best(2, kScoreGrid32);
  const auto grid = static_cast<float>(kScoreGrid32);
  // Young to old: 5 differs from 4 by less than the grid tells apart; 2 is the largest.
  best.offer(4, std::vector<float>{1.0F + 0.3F * grid, 1.0F}, 2.0F);
  best.offer(0, std::vector<float>{1.0F + 0.4F * grid, NAN, 3.0F, 0.5F}, 3.0F);
  const auto picks = best.rising();
  ASSERT_EQ(picks.size(), 2U);
  EXPECT_EQ(picks[0].block, 2);
  EXPECT_EQ(picks[1].block, 5);
}

TEST(LandmarkPages, AStreamMayBeginAtAnyBlock) {
  const TestFolder folder;
  const auto store = open_store(kShape, 6, folder / "pages");
  for (const std::int64_t max_blocks : {0, 20}) {
    BlockPages pages(store, max_blocks, 37);
    append_blocks(pages, 300);
    EXPECT_EQ(pages.end(), 337);
    EXPECT_EQ(pages.first(), max_blocks > 0 ? 317 : 37);
    expect_blocks(pages, pages.first(), 337);
    EXPECT_EQ(pages.read(36, 0, 1).status().code(), StatusCode::kNotFound);
    ASSERT_TRUE(pages.save(folder / "state").ok());
    auto back = BlockPages::restore(store, folder / "state", 0, nullptr);
    ASSERT_TRUE(back.ok()) << back.status().message();
    expect_blocks(*back, back->first(), 337);
  }
}

TEST(LandmarkPages, TemporaryFilesHaveNoName) {
  const TestFolder folder;
  auto store = PageStore::open(
      kShape, {.ram_bytes = 3 * kShape.page_bytes(), .file = folder / "pages", .temporary = true});
  ASSERT_TRUE(store.ok()) << store.status().message();
  EXPECT_FALSE(fs::exists(folder / "pages"));
  BlockPages pages(*store, 0);
  append_blocks(pages, 30);
  EXPECT_GT((*store)->counts().spilled, 0);
  expect_blocks(pages, 0, 30);
  EXPECT_EQ(pages.save(folder / "state").code(), StatusCode::kUnsupported);
}

TEST(LandmarkPages, ForksShareWhatTheyHaveAndGoOnAlone) {
  const TestFolder folder;
  const auto store = open_store(kShape, 6, folder / "pages");
  BlockPages parent(store, 0);
  append_blocks(parent, 300);  // one full segment and a part
  {
    BlockPages child = parent.fork();
    EXPECT_EQ(store->pages(), 300 * kShape.kv_heads) << "pages are shared";
    append_blocks(parent, 70);
    append_blocks(child, 30, kSeed + 1);
    EXPECT_EQ(child.end(), 330);
    expect_blocks(parent, 0, 370);
    expect_blocks(child, 0, 300);
    expect_blocks(child, 300, 330, kSeed + 1);
    BlockPages grandchild = child.fork();
    expect_blocks(grandchild, 300, 330, kSeed + 1);
  }
  EXPECT_EQ(store->pages(), 370 * kShape.kv_heads) << "the child's own pages went with it";
  expect_blocks(parent, 0, 370);
  EXPECT_LE(parent.resident_bytes(), BlockPages::resident_bound(kShape, 0, 370));
}

TEST(LandmarkPages, MaxBlocksForgetsTheOldestAndItsSpace) {
  constexpr std::int64_t kKept = 20, kBlocks = 1500;
  const TestFolder folder;
  const StoreOptions options{8 * kShape.page_bytes(), folder / "pages"};
  const auto store = open_store(kShape, 8, folder / "pages");
  BlockPages pages(store, kKept);
  const std::int64_t alive = BlockPages::pages_bound(kShape, kKept, kBlocks);
  for (std::int64_t i = 0; i < kBlocks; ++i) {
    append_blocks(pages, 1);
    EXPECT_LE(store->pages(), alive);
    EXPECT_LE(store->resident_bytes(), PageStore::resident_bound(kShape, options, alive));
    EXPECT_LE(pages.resident_bytes(), BlockPages::resident_bound(kShape, kKept, kBlocks));
    EXPECT_LE(store->file_bytes(), PageStore::file_bound(kShape, alive));
  }
  EXPECT_EQ(pages.first(), kBlocks - kKept);
  expect_blocks(pages, pages.first(), pages.end());
  EXPECT_EQ(pages.read(pages.first() - 1, 0, 1).status().code(), StatusCode::kNotFound);
  ASSERT_TRUE(pages.save(folder / "state").ok());
  struct ::stat about {};
  ASSERT_EQ(::stat((folder / "pages").c_str(), &about), 0);
  EXPECT_GT(about.st_size, 10 * PageStore::file_bound(kShape, alive)) << "the file's length grows";
  EXPECT_LE(about.st_blocks * 512, 2 * PageStore::file_bound(kShape, alive))
      << "its space does not";
}

TEST(LandmarkPages, SavedStreamsComeBackAndSoDoTheirForks) {
  const TestFolder folder;
  const std::vector<std::byte> extra{std::byte{1}, std::byte{2}, std::byte{3}};
  {
    const auto store = open_store(kHalf, 4, folder / "pages");
    BlockPages pages(store, 0), other(store, 0);
    append_blocks(pages, 75);
    append_blocks(other, 20, kSeed + 5);
    ASSERT_TRUE(other.save(folder / "other").ok());
    ASSERT_TRUE(pages.save(folder / "state", extra).ok());
    append_blocks(pages, 10);                            // not saved
    fs::copy_file(folder / "pages", folder / "killed");  // before the store closes in order
  }
  const auto closed = fs::file_size(folder / "pages");
  fs::rename(folder / "killed", folder / "pages");
  EXPECT_GE(fs::file_size(folder / "pages"), closed);
  const auto store = open_store(kHalf, 4, folder / "pages");
  std::vector<std::byte> found;
  auto pages = BlockPages::restore(store, folder / "state", 0, &found);
  ASSERT_TRUE(pages.ok()) << pages.status().message();
  EXPECT_EQ(found, extra);
  EXPECT_EQ(pages->end(), 75);
  auto again = BlockPages::restore(store, folder / "state", 30, nullptr);
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(store->pages(), 75 * kHalf.kv_heads) << "two streams of one state share its pages";
  EXPECT_EQ(again->first(), 45);
  auto other = BlockPages::restore(store, folder / "other", 0, nullptr);
  ASSERT_TRUE(other.ok()) << other.status().message();
  const std::int64_t before = store->file_bytes();
  store->reclaim();
  EXPECT_EQ(before - store->file_bytes(), (10 * kHalf.kv_heads - 4) * record_bytes(kHalf))
      << "what nobody saved; 4 never spilled";
  append_blocks(*pages, 20);
  append_blocks(*again, 20);
  expect_blocks(*pages, 0, 95);
  expect_blocks(*again, again->first(), 95);
  expect_blocks(*other, 0, 20, kSeed + 5);
}

TEST(LandmarkPages, WhatASavedStateNamesOutlivesMaxBlocksUntilTheNextSave) {
  const TestFolder folder;
  {
    const auto store = open_store(kShape, 4, folder / "pages");
    BlockPages pages(store, 16);
    append_blocks(pages, 50);
    ASSERT_TRUE(pages.save(folder / "state").ok());
    append_blocks(pages, 200);
    EXPECT_LE(store->pages(), BlockPages::pages_bound(kShape, 16, 250, 200));
  }
  {
    const auto store = open_store(kShape, 4, folder / "pages");
    auto pages = BlockPages::restore(store, folder / "state", 16, nullptr);
    ASSERT_TRUE(pages.ok()) << pages.status().message();
    expect_blocks(*pages, 34, 50);
    append_blocks(*pages, 100);
    ASSERT_TRUE(pages->save(folder / "state").ok());
    EXPECT_LE(store->pages(), BlockPages::pages_bound(kShape, 16, 150, 0))
        << "the old save is over";
  }
  const auto store = open_store(kShape, 4, folder / "pages");
  auto pages = BlockPages::restore(store, folder / "state", 16, nullptr);
  ASSERT_TRUE(pages.ok()) << pages.status().message();
  expect_blocks(*pages, 134, 150);
}

TEST(LandmarkPages, DamageIsReportedAndNeverRead) {
  const std::int64_t stride = record_bytes(kShape);
  const auto build = [&](const TestFolder& folder) {
    const auto store = open_store(kShape, 2, folder / "pages");
    BlockPages pages(store, 0);
    append_blocks(pages, 30);
    ASSERT_TRUE(pages.save(folder / "state").ok());
  };
  const auto read_all = [&](const TestFolder& folder) {  // the first failure
    const auto store = open_store(kShape, 2, folder / "pages");
    auto pages = BlockPages::restore(store, folder / "state", 0, nullptr);
    if (!pages.ok()) return pages.status();
    for (std::int64_t b = 0; b < 30; ++b)
      for (std::int64_t g = 0; g < kShape.kv_heads; ++g) {
        const auto pinned = pages->read(b, g, 1);
        if (!pinned.ok()) return pinned.status();
        EXPECT_TRUE(std::ranges::equal(pinned->bytes(), TestBlock(kShape, kSeed, b).page(g)));
      }
    return Status();
  };
  const auto place = [&](std::int64_t record) { return kFileUnit + record * stride; };
  {
    const TestFolder folder;
    build(folder);
    EXPECT_TRUE(read_all(folder).ok());
  }
  Random random{3};
  for (int i = 0; i < 40; ++i) {  // any bit of any record's head or page
    const TestFolder folder;
    build(folder);
    const std::int64_t at =
        place(random.below(60)) + random.below(kRecordHeadBytes + kShape.page_bytes());
    std::string byte = read_bytes(folder / "pages", at, 1);
    byte[0] = static_cast<char>(byte[0] ^ (1 << random.below(8)));
    write_bytes(folder / "pages", at, byte);
    const Status status = read_all(folder);
    EXPECT_TRUE(status.code() == StatusCode::kCorrupt || status.code() == StatusCode::kNotFound)
        << "byte " << at << ": " << status.message();
  }
  {  // a good record at another's place
    const TestFolder folder;
    build(folder);
    write_bytes(folder / "pages", place(3), read_bytes(folder / "pages", place(9), stride));
    EXPECT_EQ(read_all(folder).code(), StatusCode::kCorrupt);
  }
  {  // the end is missing
    const TestFolder folder;
    build(folder);
    fs::resize_file(folder / "pages", static_cast<std::uintmax_t>(place(50) + 100));
    EXPECT_EQ(read_all(folder).code(), StatusCode::kNotFound);
  }
  for (int i = 0; i < 20; ++i) {  // the state file
    const TestFolder folder;
    build(folder);
    const auto size = static_cast<std::int64_t>(fs::file_size(folder / "state"));
    const std::int64_t at = random.below(size);
    std::string byte = read_bytes(folder / "state", at, 1);
    byte[0] = static_cast<char>(byte[0] ^ (1 << random.below(8)));
    write_bytes(folder / "state", at, byte);
    EXPECT_FALSE(read_all(folder).ok());
    fs::resize_file(folder / "state", static_cast<std::uintmax_t>(at));
    EXPECT_FALSE(read_all(folder).ok());
  }
}

TEST(LandmarkPages, ATornEndIsCutAndWhatWasThereStays) {
  const TestFolder folder;
  {
    const auto store = open_store(kShape, 2, folder / "pages");
    BlockPages pages(store, 0);
    append_blocks(pages, 10);
    ASSERT_TRUE(pages.save(folder / "state").ok());
  }
  const auto whole = fs::file_size(folder / "pages");
  Random random{4};
  for (int i = 0; i < 30; ++i) {  // junk, partial records, zeros
    std::string torn(static_cast<std::size_t>(random.between(1, 3 * record_bytes(kShape))), '\0');
    if (i % 3 != 0)
      for (char& c : torn) c = static_cast<char>(random());
    write_bytes(folder / "pages", static_cast<std::int64_t>(whole), torn);
    const auto store = open_store(kShape, 2, folder / "pages");
    EXPECT_EQ(store->torn_bytes(), static_cast<std::int64_t>(torn.size()));
    EXPECT_EQ(fs::file_size(folder / "pages"), whole);
    auto pages = BlockPages::restore(store, folder / "state", 0, nullptr);
    ASSERT_TRUE(pages.ok()) << pages.status().message();
    expect_blocks(*pages, 0, 10);
  }
}

TEST(LandmarkPages, OneWriterAFileAndNoForeignFiles) {
  const TestFolder folder;
  const auto store = open_store(kShape, 2, folder / "pages");
  const StoreOptions same{1 << 20, folder / "pages"};
  EXPECT_EQ(PageStore::open(kShape, same).status().code(), StatusCode::kIo);
  ASSERT_TRUE(write_file(folder / "text", "not pages").ok());
  EXPECT_EQ(PageStore::open(kShape, {1 << 20, folder / "text"}).status().code(),
            StatusCode::kCorrupt);
  EXPECT_EQ(*read_file(folder / "text"), "not pages");
  { const auto other = open_store(kHalf, 2, folder / "half"); }
  EXPECT_EQ(PageStore::open(kShape, {1 << 20, folder / "half"}).status().code(),
            StatusCode::kInvalidArgument);
  // Killed while it wrote the header: no record can exist, so the file starts anew.
  fs::resize_file(folder / "half", 20);
  EXPECT_TRUE(PageStore::open(kShape, {1 << 20, folder / "half"}).ok());
}

TEST(LandmarkPages, HeavyBlocksStayInMemoryAndOldMassFades) {
  const TestFolder folder;
  const auto store =
      open_store(PageShape{.block = 3, .key_dim = 4, .value_dim = 4}, 8, folder / "pages");
  BlockPages pages(store, 0);
  append_blocks(pages, 40);
  const auto missed = [&](std::int64_t block, double mass) {
    const std::int64_t before = store->counts().misses;
    EXPECT_TRUE(pages.read(block, 0, mass).ok());
    return store->counts().misses - before;
  };
  missed(3, 0.9);  // read once with weight; then many light reads of others
  for (std::int64_t b = 10; b < 22; ++b) missed(b, 0.01);
  EXPECT_EQ(missed(3, 0.9), 0) << "a block of large mass stays";
  // Recency alone would have kept the last light ones; and mass does not keep a block for ever.
  for (int round = 0; round < 20; ++round)
    for (std::int64_t b = 10; b < 22; ++b) missed(b, 0.01);
  EXPECT_EQ(missed(3, 0.9), 1) << "old mass fades";
}

TEST(LandmarkPages, ABudgetThatCannotHoldIsRefusedWithAdvice) {
  EXPECT_EQ(PageStore::open(kShape, {.ram_bytes = 10}).status().code(),
            StatusCode::kInvalidArgument);
  const auto store = open_store(kShape, 7);  // three blocks of two heads, and one page
  BlockPages pages(store, 0);
  append_blocks(pages, 3);
  const Status status = TestBlock(kShape, kSeed, 3).append_to(pages);
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_NE(status.message().find("max_blocks"), std::string::npos) << status.message();
  EXPECT_EQ(pages.end(), 3);
  EXPECT_EQ(store->pages(), 6) << "a block that does not fit leaves no page behind";
  expect_blocks(pages, 0, 3);
  EXPECT_EQ(pages.save("/nowhere").code(), StatusCode::kUnsupported);

  const TestFolder folder;
  const auto small = open_store(kShape, 2, folder / "pages");
  BlockPages spilled(small, 0);
  append_blocks(spilled, 5);
  const auto first = spilled.read(0, 0, 1), second = spilled.read(0, 1, 1);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(spilled.read(3, 0, 1).status().code(), StatusCode::kUnsupported) << "all are pinned";
  EXPECT_TRUE(std::ranges::equal(first->bytes(), TestBlock(kShape, kSeed, 0).page(0)));
}

TEST(LandmarkPages, AFullDiskIsReportedAndTheStreamGoesOnWhenThereIsRoom) {
  const TestFolder folder;
  const auto store = open_store(kShape, 4, folder / "pages");
  BlockPages pages(store, 0);
  append_blocks(pages, 10);
  ::rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ::rlimit full = before;  // in the middle of a record to come
  full.rlim_cur =
      fs::file_size(folder / "pages") + 2 * static_cast<std::uint64_t>(record_bytes(kShape)) + 1000;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &full), 0);
  Status status;
  while (status.ok() && pages.end() < 30)
    status = TestBlock(kShape, kSeed, pages.end()).append_to(pages);
  EXPECT_EQ(status.code(), StatusCode::kIo) << status.message();
  EXPECT_EQ(pages.save(folder / "state").code(), StatusCode::kIo);
  const std::int64_t end = pages.end();
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  expect_blocks(pages, 0, end);
  append_blocks(pages, 20);
  ASSERT_TRUE(pages.save(folder / "state").ok());
  expect_blocks(pages, 0, end + 20);
}

TEST(LandmarkPages, ForksOnThreadsShareAStore) {
  const TestFolder folder;
  const auto store = open_store(kShape, 9, folder / "pages");
  BlockPages root(store, 0);
  append_blocks(root, 70);
  std::vector<BlockPages> forks;
  for (int i = 0; i < 3; ++i) forks.push_back(root.fork());
  std::vector<std::string> wrong(3);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&, i] {
      Random random{static_cast<std::uint64_t>(i)};
      for (int step = 0; step < 300 && wrong[i].empty(); ++step) {
        wrong[i] = compare_block(forks[i], kSeed, random.below(70));
        if (step % 3 == 0) {
          const Status status = TestBlock(kShape, 100 + i, forks[i].end()).append_to(forks[i]);
          if (!status.ok()) wrong[i] = status.message();
        }
      }
    });
  for (auto& thread : threads) thread.join();
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(wrong[i], "");
    expect_blocks(forks[i], 70, 170, 100 + i);
  }
}

// Resident memory of the process now, bytes; 0 under sanitizers, which keep what is freed.
std::int64_t resident_now() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return 0;
#endif
  std::ifstream file("/proc/self/statm");
  std::int64_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

TEST(LandmarkPages, AMillionLandmarksTakeWhatTheFormulaSays) {
  const PageShape shape{.kv_heads = 1, .block = 2, .key_dim = 16, .value_dim = 16};
  constexpr std::int64_t kBlocks = 1'000'000;
  const StoreOptions options{kBlocks * shape.page_bytes(), {}};
  const std::int64_t before = resident_now();
  auto opened = PageStore::open(shape, options);
  ASSERT_TRUE(opened.ok());
  BlockPages pages(*opened, 0);
  const std::vector<float> q(64 * 16, 0.25F);
  std::vector<std::vector<Pick>> picks;
  const TestBlock some[] = {{shape, kSeed, 0}, {shape, kSeed, 1}, {shape, kSeed, 2}};
  double rate = 0;
  for (std::int64_t n = 1000; n <= kBlocks; n *= 10) {
    while (pages.end() < n) ASSERT_TRUE(some[pages.end() % 3].append_to(pages).ok());
    const Scan all[] = {{q.data(), 0, n}};
    for (const std::int64_t queries : {1, 64}) {
      double best = 1e9;  // the least of several: other programs only add
      for (int i = 0; i < 10; ++i) {
        const auto start = std::chrono::steady_clock::now();
        ASSERT_TRUE(pages.search(0, all, queries, 1, 8, picks).ok());
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        best = std::min(best, taken.count());
      }
      rate = best / static_cast<double>(n * queries);
      std::printf("%8ld landmarks, keys of 16, %2ld queries: %9.1f us, %.2f ns a landmark\n",
                  static_cast<long>(n), static_cast<long>(queries), best * 1e6, rate * 1e9);
    }
  }
  const std::int64_t bound = BlockPages::resident_bound(shape, 0, kBlocks) +
                             PageStore::resident_bound(shape, options, kBlocks);
  const std::int64_t counted = pages.resident_bytes() + (*opened)->resident_bytes();
  const std::int64_t taken = resident_now() - before;
  std::printf("%ld blocks: %.1f MB counted, %.1f MB of the process, bound %.1f MB\n",
              static_cast<long>(kBlocks), static_cast<double>(counted) / 1e6,
              static_cast<double>(taken) / 1e6, static_cast<double>(bound) / 1e6);
  EXPECT_LE(counted, bound);
  EXPECT_LE(taken, bound);
  EXPECT_GE(counted, bound / 2) << "the bound should say something";
  EXPECT_LT(rate, 1e-6) << "a landmark of 16 numbers takes nanoseconds";
}

TEST(LandmarkPages, LongStreamsStayWithinTheirBounds) {
  const PageShape shape{.kv_heads = 1, .block = 64, .key_dim = 16, .value_dim = 16};
  const TestBlock some[] = {{shape, kSeed, 0}, {shape, kSeed, 1}, {shape, kSeed, 2}};
  const std::vector<float> q(16, 0.25F);
  for (const auto& [tokens, max_blocks] : {std::pair{1'000'000, 0}, {2'000'000, 500}}) {
    const TestFolder folder;
    const std::int64_t before = resident_now(), blocks = tokens / shape.block;
    const StoreOptions options{std::int64_t{8} << 20, folder / "pages"};
    auto opened = PageStore::open(shape, options);
    ASSERT_TRUE(opened.ok());
    BlockPages pages(*opened, max_blocks);
    std::vector<std::vector<Pick>> picks;
    for (std::int64_t b = 0; b < blocks; ++b) {
      ASSERT_TRUE(some[b % 3].append_to(pages).ok());
      if (b % 64 != 63) continue;
      const Scan all[] = {{q.data(), pages.first(), pages.end()}};
      ASSERT_TRUE(pages.search(0, all, 1, 1, 8, picks).ok());
      pages.prefetch(0, picks[0]);
      for (const Pick& pick : picks[0]) ASSERT_TRUE(pages.read(pick.block, 0, 0.1).ok());
    }
    const std::int64_t alive = BlockPages::pages_bound(shape, max_blocks, blocks);
    const std::int64_t bound = BlockPages::resident_bound(shape, max_blocks, blocks) +
                               PageStore::resident_bound(shape, options, alive);
    EXPECT_LE(pages.resident_bytes() + (*opened)->resident_bytes(), bound);
    EXPECT_LE(resident_now() - before, bound + (1 << 20)) << "1 MB: what a process needs anyway";
    EXPECT_LE((*opened)->file_bytes(), PageStore::file_bound(shape, alive));
    std::printf("%d tokens, %d blocks kept: bounds %.1f MB of memory, %.1f MB of file\n", tokens,
                max_blocks, static_cast<double>(bound) / 1e6,
                static_cast<double>(PageStore::file_bound(shape, alive)) / 1e6);
  }
}

}  // namespace
}  // namespace everlong::landmark
