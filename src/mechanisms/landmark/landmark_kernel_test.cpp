#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

#include "mechanisms/landmark/kernel.h"
#include "mechanisms/landmark/reference.h"

namespace everlong::landmark {
namespace {

// fp32: sums of some hundred terms of size 1 in another order, as tolerance.h allows a form. bf16:
// inputs and outputs rounded once each.
constexpr double kFloat32 = 2e-5, kBfloat16 = 2e-2;
constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}
float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// [B, T, H, D] in either dtype.
struct Array {
  std::array<std::int64_t, 4> sizes;
  DType dtype;
  std::vector<float> wide;
  std::vector<std::uint16_t> low;

  Array(std::array<std::int64_t, 4> shape, DType type, std::uint64_t seed, float size = 1)
      : sizes(shape), dtype(type) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0, size);
    const auto count = static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]);
    for (std::size_t i = 0; i < count; ++i) {
      const float x = seed == 0 ? kPoison : normal(random);
      low.push_back(to_bf16(x));
      wide.push_back(dtype == DType::kBFloat16 ? from_bf16(low.back()) : x);
    }
  }
  TensorView view() {
    void* data = dtype == DType::kBFloat16 ? static_cast<void*>(low.data()) : wide.data();
    return {data, dtype, sizes, {sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1}};
  }
  double at(std::size_t i) const { return dtype == DType::kBFloat16 ? from_bf16(low[i]) : wide[i]; }
  // Of one row of the batch.
  std::vector<double> row(std::int64_t b) const {
    const auto count = static_cast<std::size_t>(sizes[1] * sizes[2] * sizes[3]);
    std::vector<double> out;
    for (std::size_t i = 0; i < count; ++i)
      out.push_back(at(static_cast<std::size_t>(b) * count + i));
    return out;
  }
};

// As many threads as asked for, in turn: units fall to other threads than with one.
class Turns final : public Executor {
 public:
  explicit Turns(int threads) : threads_(threads) {}
  int threads() const override { return threads_; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& task) const override {
    for (std::int64_t i = 0; i < tasks; ++i) task(i, static_cast<int>(i) % threads_);
  }

 private:
  int threads_;
};

class Workspace {
 public:
  explicit Workspace(std::int64_t bytes)
      : bytes_((bytes + 63) / 64 * 64),
        memory_(std::aligned_alloc(64, static_cast<std::size_t>(bytes_)), std::free) {
    std::fill_n(static_cast<float*>(memory_.get()), bytes_ / 4, kPoison);
  }
  std::span<std::byte> bytes() const {
    return {static_cast<std::byte*>(memory_.get()), static_cast<std::size_t>(bytes_)};
  }

 private:
  std::int64_t bytes_;
  std::unique_ptr<void, void (*)(void*)> memory_;
};

struct Shape {
  std::int64_t tokens, past, heads, kv_heads, key_dim, value_dim;
};

struct Trial {
  Array q, k, v, go, o, lse, dq, dk, dv;
  std::vector<std::vector<std::uint8_t>> marks;
  std::vector<Section> sections;
  std::vector<std::int64_t> first = {0};
  bool drop = false;

  Trial(const Shape& s, DType dtype, std::vector<std::vector<std::uint8_t>> landmarks)
      : q({std::ssize(landmarks), s.tokens, s.heads, s.key_dim}, dtype, 1),
        k({std::ssize(landmarks), s.tokens + s.past, s.kv_heads, s.key_dim}, dtype, 2),
        v({std::ssize(landmarks), s.tokens + s.past, s.kv_heads, s.value_dim}, dtype, 3),
        go({std::ssize(landmarks), s.tokens, s.heads, s.value_dim}, dtype, 4),
        o({std::ssize(landmarks), s.tokens, s.heads, s.value_dim}, dtype, 0),
        lse({1, std::ssize(landmarks), s.heads, s.tokens}, DType::kFloat32, 0),
        dq(q.sizes, dtype, 0),
        dk(k.sizes, dtype, 0),
        dv(v.sizes, dtype, 0),
        marks(std::move(landmarks)) {
    for (const auto& row : marks) {
      const auto list = sections_of(row);
      sections.insert(sections.end(), list.begin(), list.end());
      first.push_back(std::ssize(sections));
    }
  }
  KernelCall call() { return {q.view(), k.view(), v.view(), sections, first, 0.3, drop}; }
  void compute(int threads) {
    const KernelCall c = call();
    const Turns executor(threads);
    const Workspace space(forward_workspace_bytes(c, threads));
    ASSERT_TRUE(forward(c, o.view(), lse.view(), space.bytes(), executor).ok());
    const KernelGrads grads{o.view(), lse.view(), go.view(), {}, dq.view(), dk.view(), dv.view()};
    const Workspace back(backward_workspace_bytes(c, threads));
    ASSERT_TRUE(backward(c, grads, back.bytes(), executor).ok());
  }
  // The largest difference from the reference, relative to values of size 1.
  double error() const {
    double worst = 0;
    for (std::int64_t b = 0; b < q.sizes[0]; ++b) {
      const auto rq = q.row(b), rk = k.row(b), rv = v.row(b);
      const reference::Problem problem{q.sizes[1], k.sizes[1] - q.sizes[1],
                                       q.sizes[2], k.sizes[2],
                                       q.sizes[3], v.sizes[3],
                                       0.3,        drop,
                                       rq,         rk,
                                       rv,         marks[static_cast<std::size_t>(b)]};
      const auto d = reference::gradients(problem, go.row(b));
      const auto compare = [&](const Array& mine, const std::vector<double>& truth) {
        double size = 1;
        for (const double x : truth) size = std::max(size, std::abs(x));
        const auto own = mine.row(b);
        for (std::size_t i = 0; i < truth.size(); ++i) {
          const double off = std::abs(own[i] - truth[i]) / size;
          worst = std::isfinite(off) ? std::max(worst, off) : INFINITY;
        }
      };
      compare(o, reference::parallel(problem));
      compare(dq, d.q);
      compare(dk, d.k);
      compare(dv, d.v);
    }
    return worst;
  }
};

std::vector<std::uint8_t> uneven(std::int64_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::uint8_t> marks;
  for (std::int64_t i = 0; i < count; ++i) marks.push_back(random() % 9 == 0 ? 1 : 0);
  return marks;
}

TEST(LandmarkKernel, AgreesWithTheReferenceForEveryBlockLengthAndHeadShape) {
  // Two rows of the batch, each with a phase of its own. Blocks of 128 take the form for long
  // sections, 3 queries that for a handful of rows.
  for (const std::int64_t block : {2, 16, 51, 64, 97, 98, 128, 1000})
    for (const Shape& s : {Shape{230, 0, 2, 2, 16, 16}, Shape{100, 150, 8, 2, 24, 40},
                           Shape{3, 200, 1, 1, 64, 64}, Shape{60, 0, 4, 1, 7, 5}}) {
      const std::int64_t keys = s.tokens + s.past;
      Trial run(s, DType::kFloat32,
                {regular_landmarks(0, keys, block), regular_landmarks(0, keys, block, 17)});
      run.compute(2);
      EXPECT_LT(run.error(), kFloat32) << block << " " << s.tokens << " " << s.heads;
    }
}

TEST(LandmarkKernel, UnevenAndEmptySectionsAgree) {
  for (const bool drop : {false, true})
    for (const std::uint64_t seed : {1, 2, 3}) {
      auto first = uneven(170, seed), second = uneven(170, seed + 9);
      first[0] = first[1] = 1;                                  // rows that see nothing
      std::fill(second.begin() + 20, second.begin() + 140, 0);  // a long section in between
      Trial run({170, 0, 2, 1, 32, 32}, DType::kFloat32, {first, second});
      run.drop = drop;
      run.compute(1);
      EXPECT_LT(run.error(), kFloat32);
      std::fill(second.begin() + 30, second.end(), 1);  // landmarks alone
      Trial marked({170, 0, 2, 1, 32, 32}, DType::kFloat32, {first, second});
      marked.drop = drop;
      marked.compute(1);
      EXPECT_LT(marked.error(), kFloat32);
    }
}

TEST(LandmarkKernel, LargeHeadsAndBfloat16Agree) {
  for (const std::int64_t dim : {64, 128, 256}) {
    Trial run({140, 0, 2, 1, dim, dim}, DType::kBFloat16, {regular_landmarks(0, 140, 51, 3)});
    run.compute(2);
    EXPECT_LT(run.error(), kBfloat16) << dim;
  }
}

TEST(LandmarkKernel, ScoresOfThirtyNeitherOverflowNorBecomeNaN) {
  for (const std::int64_t block : {16, 128}) {
    Trial run({200, 0, 2, 2, 32, 32}, DType::kFloat32, {regular_landmarks(0, 200, block)});
    for (float& x : run.q.wide) x *= 30;
    run.compute(1);
    // Exponents of size 300 carry the rounding of their products, 300 ulps.
    EXPECT_LT(run.error(), 2e-3) << block;
  }
}

TEST(LandmarkKernel, TheNumberOfThreadsDoesNotChangeABit) {
  for (const std::int64_t block : {51, 128}) {
    const Shape s{300, 20, 4, 2, 32, 32};
    Trial one(s, DType::kFloat32, {regular_landmarks(0, 320, block)});
    Trial many(s, DType::kFloat32, {regular_landmarks(0, 320, block)});
    one.compute(1);
    many.compute(5);
    EXPECT_EQ(one.o.wide, many.o.wide);
    EXPECT_EQ(one.dq.wide, many.dq.wide);
    EXPECT_EQ(one.dk.wide, many.dk.wide);
    EXPECT_EQ(one.dv.wide, many.dv.wide);
  }
}

TEST(LandmarkKernel, ValuesOfLandmarksAreNotReadAndHaveNoGradient) {
  for (const std::int64_t block : {16, 128}) {
    Trial run({150, 0, 2, 2, 16, 16}, DType::kFloat32, {regular_landmarks(0, 150, block)});
    for (std::size_t j = 0; j < 150; ++j)
      if (run.marks[0][j] != 0) std::fill_n(run.v.wide.begin() + j * 32, 32, kPoison);
    run.compute(1);
    for (const float x : run.o.wide) ASSERT_TRUE(std::isfinite(x));
    for (std::size_t j = 0; j < 150; ++j)
      for (std::size_t i = 0; run.marks[0][j] != 0 && i < 32; ++i)
        EXPECT_EQ(run.dv.wide[j * 32 + i], 0);
  }
}

// L = sum of lse: its gradient is that of the gates and own tokens alone; against differences.
TEST(LandmarkKernel, TheGradientOfTheLogSumAgreesWithDifferences) {
  for (const std::int64_t block : {8, 120}) {
    const Shape s{130, 0, 1, 1, 8, 8};
    Trial run(s, DType::kFloat32, {regular_landmarks(0, 130, block)});
    Array grad_lse({1, 1, 1, 130}, DType::kFloat32, 5);
    std::fill(run.go.wide.begin(), run.go.wide.end(), 0.0F);
    const SerialExecutor executor;
    const auto value = [&] {
      const Workspace space(forward_workspace_bytes(run.call(), 1));
      EXPECT_TRUE(forward(run.call(), run.o.view(), run.lse.view(), space.bytes(), executor).ok());
      double sum = 0;
      for (std::size_t i = 0; i < 130; ++i) sum += grad_lse.at(i) * run.lse.at(i);
      return sum;
    };
    (void)value();
    const Workspace back(backward_workspace_bytes(run.call(), 1));
    const KernelGrads grads{run.o.view(),  run.lse.view(), run.go.view(), grad_lse.view(),
                            run.dq.view(), run.dk.view(),  run.dv.view()};
    ASSERT_TRUE(backward(run.call(), grads, back.bytes(), executor).ok());
    for (auto [x, d] : {std::pair{&run.q, &run.dq}, {&run.k, &run.dk}}) {
      const Array direction(x->sizes, DType::kFloat32, 6);
      const auto original = x->wide;
      const auto at = [&](float step) {
        for (std::size_t i = 0; i < original.size(); ++i)
          x->wide[i] = original[i] + step * direction.wide[i];
        return value();
      };
      const double numeric = (at(1e-2F) - at(-1e-2F)) / 2e-2;
      x->wide = original;
      double exact = 0;
      for (std::size_t i = 0; i < original.size(); ++i) exact += d->at(i) * direction.at(i);
      // Differences of fp32 sums of 130 numbers: 1e-5 / 1e-2, and the step's square.
      EXPECT_NEAR(numeric, exact, 2e-2 * std::max(1.0, std::abs(exact))) << block;
    }
  }
}

TEST(LandmarkKernel, RefusesWhatItCannotDo) {
  Trial run({10, 0, 1, 1, 300, 16}, DType::kFloat32, {regular_landmarks(0, 10, 4)});
  EXPECT_FALSE(check_kernel_call(run.call()).ok());
  Trial good({10, 0, 1, 1, 16, 16}, DType::kFloat32, {regular_landmarks(0, 10, 4)});
  KernelCall call = good.call();
  call.q.dtype = DType::kFloat64;
  EXPECT_FALSE(check_kernel_call(call).ok());
  call = good.call();
  call.k.strides[3] = 2;
  EXPECT_FALSE(check_kernel_call(call).ok());
  const SerialExecutor executor;
  EXPECT_FALSE(forward(good.call(), good.o.view(), good.lse.view(), {}, executor).ok());
}

}  // namespace
}  // namespace everlong::landmark
