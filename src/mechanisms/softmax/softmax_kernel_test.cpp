#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "mechanisms/softmax/kernel.h"
#include "mechanisms/softmax/reference.h"

namespace everlong::softmax {
namespace {

// A pool for tests: tasks are dealt to threads of its own.
class Threads final : public Executor {
 public:
  explicit Threads(int count) : count_(count) {}
  int threads() const override { return count_; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& task) const override {
    std::atomic<std::int64_t> next = 0;
    std::vector<std::thread> pool;
    for (int thread = 0; thread < count_; ++thread)
      pool.emplace_back([&, thread] {
        for (std::int64_t i = next++; i < tasks; i = next++) {
          task(i, thread);
        }
      });
    for (auto& one : pool) one.join();
  }

 private:
  int count_;
};

struct Case {
  std::int64_t batch = 1, tokens, keys, heads, kv_heads, key_dim, value_dim, window = 0;
  std::vector<std::int64_t> offsets = {};
};

// [B, T, H, D] with room around each vector.
struct Tensor {
  std::vector<float> data;
  TensorView view;

  Tensor(std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t d) {
    view.sizes = {b, t, h, d};
    view.strides = {t * (h * (d + 2) + 3) + 7, h * (d + 2) + 3, d + 2, 1};
    data.assign(static_cast<std::size_t>(b * view.strides[0] + 1),
                std::numeric_limits<float>::quiet_NaN());
    view.data = data.data();
  }
  float& at(std::int64_t b, std::int64_t t, std::int64_t h, std::int64_t d) {
    const auto& s = view.strides;
    return data[static_cast<std::size_t>(b * s[0] + t * s[1] + h * s[2] + d)];
  }
  // Rows [from, to) of one batch row, dense.
  std::vector<double> dense(std::int64_t b, std::int64_t from, std::int64_t to) {
    std::vector<double> list;
    for (std::int64_t t = from; t < to; ++t)
      for (std::int64_t h = 0; h < view.sizes[2]; ++h)
        for (std::int64_t d = 0; d < view.sizes[3]; ++d) list.push_back(at(b, t, h, d));
    return list;
  }
};

struct Problem {
  const Case& c;
  Tensor q, k, v, go;
  KernelCall call;

  explicit Problem(const Case& given)
      : c(given),
        q(c.batch, c.tokens, c.heads, c.key_dim),
        k(c.batch, c.keys, c.kv_heads, c.key_dim),
        v(c.batch, c.keys, c.kv_heads, c.value_dim),
        go(c.batch, c.tokens, c.heads, c.value_dim) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (Tensor* x : {&q, &k, &v, &go})
      for (std::int64_t b = 0; b < c.batch; ++b)
        for (std::int64_t t = 0; t < x->view.sizes[1]; ++t)
          for (std::int64_t h = 0; h < x->view.sizes[2]; ++h)
            for (std::int64_t d = 0; d < x->view.sizes[3]; ++d) x->at(b, t, h, d) = normal(random);
    call = {q.view, k.view, v.view, c.offsets, c.window, 0.25};
  }
};

struct Outcome {
  Tensor o, lse, dq, dk, dv;

  Outcome(Problem& p, const Executor& executor)
      : o(p.c.batch, p.c.tokens, p.c.heads, p.c.value_dim),
        lse(1, p.c.batch, p.c.heads, p.c.tokens),
        dq(p.c.batch, p.c.tokens, p.c.heads, p.c.key_dim),
        dk(p.c.batch, p.c.keys, p.c.kv_heads, p.c.key_dim),
        dv(p.c.batch, p.c.keys, p.c.kv_heads, p.c.value_dim) {
    const auto poisoned = [](std::vector<float>& memory, std::int64_t bytes) {
      memory.assign(static_cast<std::size_t>(bytes / 4 + 16),
                    std::numeric_limits<float>::quiet_NaN());
      const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
      return std::span<std::byte>(
          reinterpret_cast<std::byte*>(memory.data()) + (64 - address % 64) % 64,
          static_cast<std::size_t>(bytes));
    };
    std::vector<float> memory;
    Status status =
        forward(p.call, o.view, lse.view,
                poisoned(memory, forward_workspace_bytes(p.call, executor.threads())), executor);
    EXPECT_TRUE(status.ok()) << status.message();
    status =
        backward(p.call, {o.view, lse.view, p.go.view, dq.view, dk.view, dv.view},
                 poisoned(memory, backward_workspace_bytes(p.call, executor.threads())), executor);
    EXPECT_TRUE(status.ok()) << status.message();
  }
};

void expect_near(const std::vector<double>& got, const std::vector<double>& want,
                 const char* what) {
  ASSERT_EQ(got.size(), want.size());
  double most = 1;
  for (const double x : want) most = std::max(most, std::abs(x));
  for (std::size_t i = 0; i < want.size(); ++i)  // sums of a few hundred fp32 terms of that size
    ASSERT_LE(std::abs(got[i] - want[i]), 1e-5 * most) << what << " " << i;
}

std::vector<Case> cases() {
  return {
      {.tokens = 1, .keys = 1, .heads = 1, .kv_heads = 1, .key_dim = 1, .value_dim = 1},
      {.tokens = 1, .keys = 300, .heads = 8, .kv_heads = 2, .key_dim = 64, .value_dim = 64},
      {.batch = 2,
       .tokens = 200,
       .keys = 200,
       .heads = 3,
       .kv_heads = 1,
       .key_dim = 24,
       .value_dim = 40},
      {.tokens = 97,
       .keys = 400,
       .heads = 2,
       .kv_heads = 2,
       .key_dim = 16,
       .value_dim = 8,
       .window = 100},
      {.tokens = 300,
       .keys = 300,
       .heads = 10,
       .kv_heads = 2,
       .key_dim = 8,
       .value_dim = 16,
       .window = 7},
      {.tokens = 150, .keys = 40, .heads = 2, .kv_heads = 1, .key_dim = 12, .value_dim = 20},
      {.tokens = 20, .keys = 30, .heads = 194, .kv_heads = 2, .key_dim = 8, .value_dim = 8},
      {.tokens = 5, .keys = 0, .heads = 2, .kv_heads = 1, .key_dim = 8, .value_dim = 8},
      {.tokens = 0, .keys = 9, .heads = 2, .kv_heads = 1, .key_dim = 8, .value_dim = 8},
      {.tokens = 330,
       .keys = 330,
       .heads = 4,
       .kv_heads = 2,
       .key_dim = 32,
       .value_dim = 32,
       .offsets = {0, 100, 100, 101, 330}},
      {.tokens = 330,
       .keys = 330,
       .heads = 2,
       .kv_heads = 2,
       .key_dim = 16,
       .value_dim = 16,
       .window = 50,
       .offsets = {0, 0, 7, 330}},
      // Tiles that share their keys: 7 of a head, the last of 2 rows.
      {.tokens = 289, .keys = 289, .heads = 64, .kv_heads = 32, .key_dim = 4, .value_dim = 5},
      {.tokens = 289,
       .keys = 400,
       .heads = 64,
       .kv_heads = 32,
       .key_dim = 4,
       .value_dim = 4,
       .window = 60},
      {.tokens = 400,
       .keys = 400,
       .heads = 32,
       .kv_heads = 32,
       .key_dim = 4,
       .value_dim = 4,
       .offsets = {0, 5, 290, 400}},
      {.tokens = 700, .keys = 700, .heads = 1, .kv_heads = 1, .key_dim = 16, .value_dim = 16},
  };
}

TEST(SoftmaxKernel, EqualsTheReferenceInValuesAndGradients) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(cat("T ", c.tokens, " S ", c.keys, " H ", c.heads, "/", c.kv_heads, " window ",
                     c.window, c.offsets.empty() ? "" : " packed"));
    Problem p(c);
    Outcome got(p, SerialExecutor());
    const bool packed = !c.offsets.empty();
    const std::int64_t sequences =
        packed ? static_cast<std::int64_t>(c.offsets.size()) - 1 : c.batch;
    for (std::int64_t n = 0; n < sequences; ++n) {
      const auto i = static_cast<std::size_t>(n);
      const std::int64_t row = packed ? 0 : n, from = packed ? c.offsets[i] : 0,
                         to = packed ? c.offsets[i + 1] : c.tokens, keys_to = packed ? to : c.keys;
      // The reference wants at least as many keys as tokens: the others see nothing.
      const std::int64_t blind = std::max<std::int64_t>(to - from - (keys_to - from), 0);
      const auto q = p.q.dense(row, from + blind, to), k = p.k.dense(row, from, keys_to),
                 v = p.v.dense(row, from, keys_to), go = p.go.dense(row, from + blind, to);
      const reference::Problem exact{to - from - blind,
                                     keys_to - from - (to - from - blind),
                                     c.heads,
                                     c.kv_heads,
                                     c.key_dim,
                                     c.value_dim,
                                     c.window,
                                     0.25,
                                     q,
                                     k,
                                     v};
      expect_near(got.o.dense(row, from + blind, to), reference::parallel(exact), "o");
      const auto grads = reference::gradients(exact, go);
      expect_near(got.dq.dense(row, from + blind, to), grads.q, "dq");
      expect_near(got.dk.dense(row, from, keys_to), grads.k, "dk");
      expect_near(got.dv.dense(row, from, keys_to), grads.v, "dv");
      for (const double x : got.o.dense(row, from, from + blind)) EXPECT_EQ(x, 0);
      for (const double x : got.dq.dense(row, from, from + blind)) EXPECT_EQ(x, 0);
      for (std::int64_t t = from; t < from + blind; ++t)
        EXPECT_EQ(got.lse.at(0, row, 0, t), -std::numeric_limits<float>::infinity());
    }
  }
}

TEST(SoftmaxKernel, BitsDoNotDependOnTheNumberOfThreads) {
  for (const Case& c : cases()) {
    Problem p(c);
    Outcome one(p, SerialExecutor());
    for (const int count : {2, 3, 7}) {
      const Threads threads(count);
      Outcome many(p, threads);
      for (const auto& [a, b] : {std::pair(&one.o, &many.o), std::pair(&one.lse, &many.lse),
                                 std::pair(&one.dq, &many.dq), std::pair(&one.dk, &many.dk),
                                 std::pair(&one.dv, &many.dv)})
        EXPECT_EQ(0, std::memcmp(a->data.data(), b->data.data(), a->data.size() * sizeof(float)));
    }
  }
}

// Counts what it is asked for, and does it in turn.
class Counting final : public Executor {
 public:
  int threads() const override { return 8; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& task) const override {
    fewest = std::min(fewest, tasks);
    for (std::int64_t i = 0; i < tasks; ++i) task(i, static_cast<int>(i));
  }
  mutable std::int64_t fewest = 1000;
};

TEST(SoftmaxKernel, OneHeadOfOneSequenceIsWorkForManyThreads) {
  const Case c{
      .tokens = 1500, .keys = 1500, .heads = 1, .kv_heads = 1, .key_dim = 16, .value_dim = 16};
  Problem p(c);
  const Counting executor;
  Outcome run(p, executor);
  EXPECT_EQ(executor.fewest, 8);
}

TEST(SoftmaxKernel, RefusesWhatItCannotDo) {
  const Case c{.tokens = 4, .keys = 4, .heads = 1, .kv_heads = 1, .key_dim = 8, .value_dim = 8};
  Problem p(c);
  std::vector<float> none(32);
  Tensor o(1, 4, 1, 8), lse(1, 1, 1, 4);
  const auto status = [&](KernelCall call) {
    return forward(call, o.view, lse.view, std::as_writable_bytes(std::span(none)),
                   SerialExecutor());
  };
  EXPECT_EQ(status(p.call).code(), StatusCode::kInvalidArgument);  // a workspace too small
  KernelCall call = p.call;
  call.q.dtype = DType::kFloat64;
  EXPECT_EQ(status(call).code(), StatusCode::kUnsupported);
  call = p.call;
  call.q.sizes[3] = call.k.sizes[3] = 257;
  EXPECT_EQ(status(call).code(), StatusCode::kUnsupported);
  call = p.call;
  call.v.strides[3] = 2;
  EXPECT_EQ(status(call).code(), StatusCode::kUnsupported);
}

}  // namespace
}  // namespace everlong::softmax
