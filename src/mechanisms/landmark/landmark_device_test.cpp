// The tier on a GPU against the plain memory of the same device. Its code runs on the CPU as well,
// with a pool there, so most of it is tested without a GPU.
#include "mechanisms/landmark/landmark_paged_test.h"
#include "ops/runtime.h"

namespace everlong::landmark {
namespace {

// Before any other call of torch, which would remember that there is no CUDA.
const bool gpu = load_cuda_backend().ok() && at::hasCUDA();

class LandmarkDeviceTier : public testing::TestWithParam<at::DeviceType> {
 protected:
  void SetUp() override {
    if (GetParam() == at::kCUDA && !gpu) GTEST_SKIP() << "no GPU here";
  }
  Case on_device(Case c, std::int64_t pool) const {
    c.device = at::Device(GetParam());
    c.pool = pool;
    return c;
  }
  const Folder folder_;
};

// What one token of all key heads reads.
std::int64_t least(const Case& c) { return c.kv_heads * c.retrieval.top_k; }

TEST_P(LandmarkDeviceTier, ReadsWhatThePlainMemoryReads) {
  const auto cases = all_cases();
  for (std::size_t i = 0; i < cases.size(); ++i)
    for (const std::int64_t more : {0, 3, 1000}) {
      const Case c = on_device(cases[i], least(cases[i]) + more);
      const Text text(c, 160);
      // fp32: sums of 8 and 6 terms in another order; bf16: rounded to the other neighbour.
      const double tolerance = c.dtype == at::kFloat ? 1e-5 : 2e-2;
      BlockMemory plain(c.batch, c.shape(), c.options());
      const auto paged = c.paged(folder_, 3, cat("pages_", i, "_", more).c_str());
      const auto wanted = feed(plain, c, text, 0, 160, cuts(160, 1));
      const auto got = feed(*paged, c, text, 0, 160, cuts(160, 1));
      EXPECT_TRUE(got.selected.equal(wanted.selected)) << "case " << i;
      EXPECT_LE(largest(got.out - wanted.out), tolerance) << "case " << i;
      EXPECT_LE(paged->bytes(), paged->bytes_bound(160));
      const auto counts = paged->counts();
      EXPECT_GT(counts.at("device_misses"), 0);
      EXPECT_GT(counts.at("device_hits"), 0);
      EXPECT_EQ(counts.at("page_hits") + counts.at("page_misses"), counts.at("device_misses"))
          << "the host's tiers are asked for nothing else";
    }
}

TEST_P(LandmarkDeviceTier, ASmallPoolOnlyCostsTime) {
  Case c = on_device({}, 0);
  c.retrieval.window = 1;
  const Text text(c, 300);
  double misses = 0;
  at::Tensor out;
  for (const std::int64_t pool : {least(c), 4 * least(c), std::int64_t{1000}}) {
    c.pool = pool;
    const auto paged = c.paged(folder_, 4, cat("pool_", pool).c_str());
    const at::Tensor mine = feed(*paged, c, text, 0, 300, cuts(300, 3)).out;
    const double now = paged->counts().at("device_misses");
    if (out.defined()) {
      EXPECT_LE(largest(mine - out), 1e-6) << "sums of rows that go side by side or not";
      EXPECT_LT(now, misses);
    }
    out = mine;
    misses = now;
  }
  EXPECT_LE(misses, 2.0 * 300 / 5) << "with room for all every page comes once";
}

TEST_P(LandmarkDeviceTier, ForksGoTheirOwnWays) {
  Case c = on_device({}, 8);
  const Text text(c, 100);
  const auto paged = c.paged(folder_, 4);
  feed(*paged, c, text, 0, 63, cuts(63, 1));
  const std::int64_t both[] = {0, 0};
  const auto chosen = paged->select(both);
  auto& pair = dynamic_cast<PagedMemory&>(*chosen);
  Case two = c;
  two.batch = 2;
  Text more(two, 100);
  for (auto [to, from] : {std::pair{&more.q, &text.q}, {&more.k, &text.k}, {&more.v, &text.v}})
    to->select(0, 0).copy_(from->select(0, 0));
  const at::Tensor forked = feed(pair, two, more, 63, 100, cuts(37, 2)).out;
  const at::Tensor own = feed(*paged, c, text, 63, 100, cuts(37, 2)).out;
  EXPECT_TRUE(forked[0].equal(own[0]));
  EXPECT_GT(largest(forked[1] - own[0]), 0.01) << "it read another text";
  // The second line against a stream that saw its text alone.
  const auto alone = c.paged(folder_, 4, "alone");
  feed(*alone, c, text, 0, 63, cuts(63, 1));
  Text second = text;
  for (auto [to, from] :
       {std::pair{&second.q, &more.q}, {&second.k, &more.k}, {&second.v, &more.v}})
    *to = from->narrow(0, 1, 1);
  EXPECT_TRUE(forked[1].equal(feed(*alone, c, second, 63, 100, cuts(37, 2)).out[0]));
}

TEST_P(LandmarkDeviceTier, ComesBackFromItsFolderAndFromTensors) {
  for (const std::int64_t max_blocks : {0, 7}) {
    Case c = on_device({}, 9);
    c.batch = 2;
    c.retrieval.window = 1;
    c.retrieval.max_blocks = max_blocks;
    const Text text(c, 400);
    const auto name = cat("pages_", max_blocks), state = cat("state_", max_blocks);
    at::Tensor wanted;
    TensorMap tensors;
    {
      const auto paged = c.paged(folder_, 4, name.c_str());
      feed(*paged, c, text, 0, 333, cuts(333, 1));  // ends within a block
      const Status saved = paged->save_pages(folder_.path / state);
      ASSERT_TRUE(saved.ok()) << saved.message();
      tensors = paged->tensors();
      EXPECT_EQ(tensors.at("k").device().type(), GetParam());
      wanted = feed(*paged, c, text, 333, 400, cuts(67, 2)).out;
    }
    const auto paged = c.paged(folder_, 4, name.c_str());
    const Status back = paged->restore_pages(folder_.path / state);
    ASSERT_TRUE(back.ok()) << back.message();
    EXPECT_TRUE(feed(*paged, c, text, 333, 400, cuts(67, 2)).out.equal(wanted));
    const auto other = c.paged(folder_, 4, cat(name, "_other").c_str());
    other->positions() = {333, 333};
    ASSERT_TRUE(other->restore(tensors).ok());
    EXPECT_TRUE(feed(*other, c, text, 333, 400, cuts(67, 2)).out.equal(wanted));
  }
}

TEST_P(LandmarkDeviceTier, CertifiesAsTheHostDoes) {
  Case host;
  host.retrieval.window = 1;
  const Case c = on_device(host, 12);
  const Text text(host, 200), same(c, 200);
  const PagedMemory::Certify certify{.epsilon = 0.1};
  const auto one = host.paged(folder_, 6, "host"), other = c.paged(folder_, 6, "device");
  one->set_certify(certify);
  other->set_certify(certify);
  const at::Tensor wanted = feed(*one, host, text, 0, 200, {200}).out,
                   got = feed(*other, c, same, 0, 200, {200}).out;
  EXPECT_LE(largest(got.cpu() - wanted), 1e-4) << "a block more or less may be read, within 0.1";
  const auto a = one->certificates(), b = other->certificates();
  EXPECT_LE(largest(b.bound), certify.epsilon * 1.0001);
  EXPECT_LE(largest(a.unread_share - b.unread_share), 1e-4);
  EXPECT_TRUE(a.more.equal(b.more));
}

TEST_P(LandmarkDeviceTier, RefusesAPoolThatIsTooSmall) {
  const Case c = on_device({}, least({}) - 1);
  const auto made = PagedMemory::create(1, c.shape(), c.options(), {1 << 20, folder_.path / "x"},
                                        c.pool * c.page_bytes());
  ASSERT_FALSE(made.ok());
  EXPECT_NE(made.status().message().find("device_megabytes"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(, LandmarkDeviceTier, testing::Values(at::kCPU, at::kCUDA),
                         [](const auto& one) { return one.param == at::kCPU ? "Cpu" : "Cuda"; });

}  // namespace
}  // namespace everlong::landmark
