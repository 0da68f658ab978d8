// Blocks in tiers against the plain memory of the same layer.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <fstream>

#include "mechanisms/landmark/landmark_paged_test.h"
#include "mechanisms/landmark/layer.h"

namespace everlong::landmark {
namespace {

TEST(LandmarkPagedMemory, ReadsWhatThePlainMemoryReads) {
  const Folder folder;
  const std::vector<Case> cases = all_cases();
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const Case& c = cases[i];
    const Text text(c, 160);
    // fp32: sums of 8 and 6 terms in another order; bf16: a result rounded to the other neighbour.
    const double tolerance = c.dtype == at::kFloat ? 1e-5 : 2e-2;
    for (const std::uint64_t seed : {1, 2}) {
      BlockMemory plain(c.batch, c.shape(), c.options());
      const auto paged = c.paged(folder, 3, cat("pages_", i, "_", seed).c_str());
      const auto wanted = feed(plain, c, text, 0, 160, cuts(160, seed));
      const auto got = feed(*paged, c, text, 0, 160, cuts(160, seed));
      EXPECT_TRUE(got.selected.equal(wanted.selected)) << "case " << i;
      EXPECT_LE(largest(got.out - wanted.out), tolerance) << "case " << i;
      EXPECT_GT(paged->store().counts().misses, 0);
    }
  }
}

TEST(LandmarkPagedMemory, TiersAndCutsChangeNothing) {
  const Folder folder;
  Case c;
  c.retrieval.window = 1;
  const Text text(c, 150);
  const auto small = c.paged(folder, 2, "small"), large = c.paged(folder, 1000, "large"),
             other = c.paged(folder, 4, "other");
  const auto pieces = cuts(150, 3);
  const Read one = feed(*small, c, text, 0, 150, pieces),
             all = feed(*large, c, text, 0, 150, pieces);
  EXPECT_TRUE(one.out.equal(all.out)) << "where a page lies changes no bit";
  EXPECT_EQ(large->store().counts().spilled, 0);
  const Read cut = feed(*other, c, text, 0, 150, {1, 2, 3, 100, 44});
  EXPECT_LE(largest(cut.out - all.out), 1e-5);
  EXPECT_TRUE(cut.selected.equal(all.selected));
  EXPECT_TRUE(other->tensors().at("k").equal(large->tensors().at("k")));
  EXPECT_TRUE(other->tensors().at("v").equal(large->tensors().at("v")));
}

TEST(LandmarkPagedMemory, TensorsPassBetweenPlainAndPaged) {
  const Folder folder;
  for (const std::int64_t max_blocks : {0, 4}) {
    Case c;
    c.retrieval.max_blocks = max_blocks;
    c.retrieval.window = 1;
    const Text text(c, 120);
    for (const std::int64_t at : {3, 40, 87}) {
      const auto name = cat(max_blocks, "_", at);
      BlockMemory plain(1, c.shape(), c.options());
      const auto paged = c.paged(folder, 3, name.c_str());
      feed(plain, c, text, 0, at, {1000});
      feed(*paged, c, text, 0, at, {1000});
      BlockMemory from_paged(1, c.shape(), c.options());
      const auto from_plain = c.paged(folder, 3, cat(name, "b").c_str());
      from_paged.positions() = from_plain->positions() = {at};
      ASSERT_TRUE(from_paged.restore(paged->tensors()).ok());
      ASSERT_TRUE(from_plain->restore(plain.tensors()).ok());
      EXPECT_LE(paged->bytes(), paged->bytes_bound(at));
      const auto pieces = cuts(120 - at, 5);
      const at::Tensor wanted = feed(plain, c, text, at, 120, pieces).out;
      EXPECT_LE(largest(feed(from_paged, c, text, at, 120, pieces).out - wanted), 1e-5);
      EXPECT_LE(largest(feed(*from_plain, c, text, at, 120, pieces).out - wanted), 1e-5);
    }
  }
}

TEST(LandmarkPagedMemory, SelectsForksFreshOnesAndOrders) {
  const Folder folder;
  Case c;
  c.batch = 2;
  const Text text(c, 100);
  const auto paged = c.paged(folder, 4);
  feed(*paged, c, text, 0, 63, cuts(63, 1));
  const std::vector<std::int64_t> wanted{1, 1, -1, 0};
  const auto chosen = paged->select(wanted);
  auto& state = dynamic_cast<PagedMemory&>(*chosen);
  EXPECT_EQ(state.positions(), (std::vector<std::int64_t>{63, 63, 0, 63}));
  Text more = text;
  const at::Tensor rows = at::tensor(at::ArrayRef<std::int64_t>({1, 1, 0, 0}));
  for (at::Tensor* x : {&more.q, &more.k, &more.v}) *x = x->index_select(0, rows);
  Case four = c;
  four.batch = 4;
  const at::Tensor out = feed(state, four, more, 63, 100, cuts(37, 2)).out;
  const at::Tensor own = feed(*paged, c, text, 63, 100, cuts(37, 2)).out;
  EXPECT_TRUE(out[0].equal(own[1]));
  EXPECT_TRUE(out[1].equal(own[1]));
  EXPECT_TRUE(out[3].equal(own[0]));
}

TEST(LandmarkPagedMemory, ComesBackFromItsFolderBitForBit) {
  const Folder folder;
  Case c;
  c.batch = 2;
  c.retrieval.window = 1;
  c.retrieval.max_blocks = 7;
  const Text text(c, 140);
  at::Tensor wanted, k;
  {
    const auto paged = c.paged(folder, 4);
    feed(*paged, c, text, 0, 93, cuts(93, 1));  // ends within a block
    const Status saved = paged->save_pages(folder.path / "state");
    ASSERT_TRUE(saved.ok()) << saved.message();
    k = paged->tensors().at("k");
    wanted = feed(*paged, c, text, 93, 140, cuts(47, 2)).out;
  }
  const auto paged = c.paged(folder, 4);
  const Status back = paged->restore_pages(folder.path / "state");
  ASSERT_TRUE(back.ok()) << back.message();
  EXPECT_EQ(paged->positions(), (std::vector<std::int64_t>{93, 93}));
  EXPECT_TRUE(paged->tensors().at("k").equal(k));
  EXPECT_TRUE(feed(*paged, c, text, 93, 140, cuts(47, 2)).out.equal(wanted));
}

TEST(LandmarkPagedMemory, CertificatesBoundWhatUnreadBlocksWouldChange) {
  const Folder folder;
  Case c;
  c.retrieval.window = 1;
  const Text text(c, 200);
  const auto read = [&](std::optional<PagedMemory::Certify> certify) {
    static int number = 0;
    const auto paged = c.paged(folder, 6, cat("certify_", number++).c_str());
    paged->set_certify(certify);
    const at::Tensor out = feed(*paged, c, text, 0, 200, {200}).out;
    return std::pair{out, paged->certificates()};
  };
  const at::Tensor plain = read({}).first;
  const auto [whole, all] = read(PagedMemory::Certify{.epsilon = 0});
  EXPECT_EQ(largest(all.bound), 0);
  EXPECT_EQ(all.more.max().item<std::int64_t>(), 200 / 5 - 1 - 1 - 3)
      << "what is past, less 3 picks";
  double before = 1e9;
  for (const double epsilon : {100.0, 0.3, 0.03, 0.003}) {
    const auto [out, certificates] = read(PagedMemory::Certify{.epsilon = epsilon});
    const at::Tensor error = (out - whole).to(at::kDouble).norm(2, {3});
    EXPECT_LE(largest((error - certificates.bound).clamp_min(0)), 2e-5) << "rounding of fp32";
    EXPECT_LE(largest(certificates.bound), epsilon * 1.0001);
    EXPECT_LE(largest(error), before + 2e-5);
    if (epsilon == 100) {
      EXPECT_EQ(largest(certificates.more), 0);
      EXPECT_TRUE(out.equal(plain));
      EXPECT_GT(largest(error), 0.01) << "top_k alone leaves something out";
    } else {
      const double share = certificates.more.to(at::kDouble).mean().item<double>() /
                           all.more.to(at::kDouble).mean().item<double>();
      EXPECT_GT(share, 0);
      EXPECT_LT(share, 1);
      std::printf("epsilon %.3f: %.2f of the other blocks read\n", epsilon, share);
    }
    before = epsilon;
  }
  const auto [some, limited] = read(PagedMemory::Certify{.epsilon = 0, .at_most = 4});
  EXPECT_EQ(largest(limited.more), 4);
  EXPECT_GT(largest(limited.bound), 0);
  EXPECT_LE(largest(((some - whole).to(at::kDouble).norm(2, {3}) - limited.bound).clamp_min(0)),
            2e-5);
}

TEST(LandmarkPagedMemory, ALayerWithPagesGivesWhatItGivesWithout) {
  const Folder folder;
  LayerSettings settings;
  settings.hidden_size = 24;
  settings.num_heads = 4;
  settings.num_kv_heads = 2;
  settings.head_dim = 6;
  settings.retrieval = {.block = 5, .top_k = 2, .window = 1};
  LandmarkAttention plain(settings);
  settings.pages.folder = folder.path.string();
  settings.pages.megabytes = 1;
  LandmarkAttention paged(settings);
  const at::NoGradGuard no_grad;
  for (auto& parameter : paged.named_parameters())
    parameter.value().copy_(plain.named_parameters()[parameter.key()]);
  const at::Tensor x = at::randn({2, 90, 24}, at::detail::createCPUGenerator(4));
  const auto one = plain.make_state(2), other = paged.make_state(2);
  EXPECT_TRUE(fs::is_empty(folder.path)) << "its file is temporary";
  std::int64_t at = 0;
  for (const std::int64_t piece : cuts(90, 8)) {
    const at::Tensor part = x.narrow(1, at, piece);
    const at::Tensor wanted = plain.forward(part, {}, one.get());
    EXPECT_LE(largest(paged.forward(part, {}, other.get()) - wanted), 1e-5);
    at += piece;
  }
  EXPECT_EQ(other->positions(), one->positions());
  const auto read = [](const char* text) {
    LayerSpec spec;
    spec.hidden_size = 64;
    spec.settings = nlohmann::json::parse(text);
    return read_settings(spec).status();
  };
  EXPECT_TRUE(read(R"({"top_k": 4, "pages": "here", "page_megabytes": 2})").ok());
  EXPECT_FALSE(read(R"({"pages": "here"})").ok()) << "top_k = 0 reads everything";
  EXPECT_FALSE(read(R"({"top_k": 4, "pages": "here", "score": "mean"})").ok());
  EXPECT_TRUE(read(R"({"top_k": 4, "pages": "here", "epsilon": 0.01})").ok());
  EXPECT_FALSE(read(R"({"top_k": 4, "epsilon": 0.01})").ok()) << "without pages";
  EXPECT_FALSE(read(R"({"top_k": 4, "pages": "here", "epsilon_blocks": 3})").ok());
}

// What is held is asked without making the tensors, and stays within its bounds at every length.
TEST(LandmarkPagedMemory, TellsWhatMemoryAndFileHold) {
  const Folder folder;
  at::set_num_threads(1);  // a second thread would only wait for work this small
  LayerSettings settings;
  settings.hidden_size = 16;
  settings.num_heads = settings.num_kv_heads = 2;
  settings.head_dim = 32;
  settings.pages.folder = folder.path.string();
  settings.pages.megabytes = 1;
  settings.pages.epsilon = 0.5;
  settings.pages.most_more = 2;
  constexpr std::int64_t kTokens = 4'000, kFeed = 500, kRow = 2 * (32 + 32) * 4;
  for (const std::int64_t max_blocks : {0, 200}) {
    settings.retrieval = {.block = 4, .top_k = 2, .window = 1, .max_blocks = max_blocks};
    LandmarkAttention layer(settings);
    const auto state = layer.make_state(1);
    const auto& tiers = dynamic_cast<const TieredState&>(*state);
    const at::NoGradGuard no_grad;
    for (std::int64_t fed = 0; fed < kTokens; fed += kFeed) {
      (void)layer.forward(at::randn({1, kFeed, 16}), {}, state.get());
      EXPECT_EQ(state->bytes(), tiers.memory_bytes());
      EXPECT_LE(state->bytes(), state->bytes_bound(fed + kFeed)) << fed;
      EXPECT_LE(tiers.file_bytes(), tiers.file_bytes_bound(fed + kFeed)) << fed;
    }
    if (max_blocks == 0) {  // 1 MiB in memory, the rest of 3 rows a block in the file
      EXPECT_GT(tiers.file_bytes(), kTokens * 3 / 4 * kRow - (1 << 20));
      EXPECT_GT(state->bytes(), 1 << 20);
      EXPECT_GT(tiers.counts().at("page_misses"), 0);
    } else {
      EXPECT_LT(state->bytes_bound(std::int64_t{1} << 40), 2 << 20);
      EXPECT_EQ(tiers.file_bytes_bound(std::int64_t{1} << 40), tiers.file_bytes_bound(kTokens));
    }
    // A fresh state of the same store is not asked for more than it may hold.
    const std::int64_t fresh = -1;
    const auto other = state->select({&fresh, 1});
    EXPECT_LE(other->bytes(), other->bytes_bound(0));
    const auto counts = tiers.counts();
    EXPECT_EQ(counts.at("queries"), kTokens * 2);
    EXPECT_GT(counts.at("queries_certified"), 0) << "the first tokens read everything";
    EXPECT_LT(counts.at("queries_certified"), kTokens * 2) << "two blocks more are not all";
    EXPECT_GT(counts.at("blocks_more"), 0);
    EXPECT_GT(counts.at("page_hits"), 0);
  }
}

TEST(LandmarkPagedMemory, RefusesWhatItCannotDo) {
  const Folder folder;
  Case c;
  const Text text(c, 60);
  const StoreOptions tiers{1 << 20, folder.path / "x"};
  EXPECT_FALSE(PagedMemory::create(1, c.shape(), c.options().dtype(at::kDouble), tiers).ok());
  Case all = c;
  all.retrieval.top_k = 0;
  EXPECT_FALSE(PagedMemory::create(1, all.shape(), c.options(), tiers).ok());
  const auto paged = c.paged(folder, 2);
  EXPECT_THROW(paged->attend(text.q, text.k, text.v, {}, c.reader(), false), c10::Error)
      << "gradients";
  feed(*paged, c, text, 0, 40, {40});
  std::fstream file(folder.path / "pages", std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(kFileUnit + 60);
  file.write("damage", 6);
  file.close();
  EXPECT_THROW(
      {
        for (int i = 0; i < 20; ++i) feed(*paged, c, Text(c, 60), 40, 60, {20});
      },
      std::exception);
  EXPECT_THROW(feed(*paged, c, text, 40, 60, {1}), c10::Error) << "it is broken";
}

}  // namespace
}  // namespace everlong::landmark
