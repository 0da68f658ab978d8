// The CPU kernel alone, without torch, against the float64 reference.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>

#include "kernels/cpu/spread.h"
#include "mechanisms/longnet/kernel.h"
#include "mechanisms/longnet/reference.h"

namespace everlong::longnet {
namespace {

// Scores of size 3, 700 keys: sums of 700 terms round at about 1e-6 in fp32.
constexpr double kOutput = 5e-6, kGradient = 2e-5;

template <class T>
auto view(T* data, std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) {
  using Void = std::conditional_t<std::is_const_v<T>, const void, void>;
  return BasicTensorView<Void>{data, DType::kFloat32, {a, b, c, d}, {b * c * d, c * d, d, 1}};
}

using Floats = std::vector<float>;
Floats floats(const std::vector<double>& x) { return {x.begin(), x.end()}; }

double error(const Floats& actual, const std::vector<double>& expected) {
  EXPECT_EQ(actual.size(), expected.size());
  double worst = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double off = std::abs(actual[i] - expected[i]) / (1 + std::abs(expected[i]));
    if (!(off <= worst)) worst = off;  // a NaN stays
  }
  return worst;
}

class Threads final : public Executor {
 public:
  explicit Threads(int count) : count_(count) {}
  int threads() const override { return count_; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& task) const override {
    std::vector<std::thread> pool;
    for (int thread = 0; thread < count_; ++thread)
      pool.emplace_back([&, thread] {
        for (std::int64_t i = thread; i < tasks; i += count_) task(i, thread);
      });
    for (auto& thread : pool) thread.join();
  }

 private:
  int count_;
};

// One sequence, its past made of `position` tokens, and everything the kernel makes of it.
struct Sequence {
  static constexpr std::int64_t K = 16, V = 24;
  static constexpr double kScale = 0.7;
  reference::Problem problem, before;
  std::vector<double> q, k, v, grad_o, past_q, past_k, past_v;
  Floats out, lse, dq, dk, dv;
  std::vector<Floats> grad_past_k, grad_past_v;

  Sequence(const Geometry& g, std::int64_t T, std::int64_t position, std::int64_t H,
           std::int64_t G) {
    std::mt19937_64 random(static_cast<std::uint64_t>(T * 7 + position));
    std::normal_distribution<float> normal;
    const auto draw = [&](std::int64_t n) {
      std::vector<double> x(static_cast<std::size_t>(n));
      for (double& value : x) value = normal(random);
      return x;
    };
    problem.geometry = g, problem.tokens = T, problem.position = position;
    problem.heads = H, problem.kv_heads = G, problem.key_dim = K, problem.value_dim = V;
    problem.scale = kScale;
    q = draw(T * H * K), k = draw(T * G * K), v = draw(T * G * V), grad_o = draw(T * H * V);
    problem.q = q, problem.k = k, problem.v = v;
    if (position == 0) return;
    before = problem;
    before.tokens = position, before.position = 0;
    past_q = draw(position * H * K), past_k = draw(position * G * K);
    past_v = draw(position * G * V);
    before.q = past_q, before.k = past_k, before.v = past_v;
    problem.past = reference::final_buffers(before);
  }

  void compute(const Executor& executor) {
    const auto& p = problem;
    const std::int64_t T = p.tokens, H = p.heads, G = p.kv_heads;
    const Floats fq = floats(q), fk = floats(k), fv = floats(v), fgo = floats(grad_o);
    out.assign(static_cast<std::size_t>(T * H * V), 0);
    lse.assign(static_cast<std::size_t>(T * H), -INFINITY);
    dq.assign(fq.size(), 0), dk.assign(fk.size(), 0), dv.assign(fv.size(), 0);
    std::vector<KernelPiece> pieces;
    const auto& patterns = p.geometry.patterns;
    for (std::size_t i = 0; i < patterns.size(); ++i)
      for (const HeadClass& c : head_classes(p.geometry.offset_rule, G, patterns[i].ratio))
        for (const LatticeRun& run : make_runs(p.geometry, i, c.offset, p.position, T))
          pieces.push_back({i, patterns[i].segment, patterns[i].ratio, c, run});
    std::vector<Floats> old_k, old_v;
    std::vector<ConstTensorView> view_k, view_v;
    std::vector<TensorView> to_k, to_v;
    grad_past_k.clear(), grad_past_v.clear();
    for (std::size_t i = 0; i < p.past.k.size(); ++i) {
      old_k.push_back(floats(p.past.k[i])), old_v.push_back(floats(p.past.v[i]));
      grad_past_k.emplace_back(old_k[i].size(), 0), grad_past_v.emplace_back(old_v[i].size(), 0);
    }
    for (std::size_t i = 0; i < old_k.size(); ++i) {
      const std::int64_t m = patterns[i].rows();
      view_k.push_back(view(std::as_const(old_k[i]).data(), 1, G, m, K));
      view_v.push_back(view(std::as_const(old_v[i]).data(), 1, G, m, V));
      to_k.push_back(view(grad_past_k[i].data(), 1, G, m, K));
      to_v.push_back(view(grad_past_v[i].data(), 1, G, m, V));
    }
    const KernelCall call{view(fq.data(), 1, T, H, K),
                          view(fk.data(), 1, T, G, K),
                          view(fv.data(), 1, T, G, V),
                          pieces,
                          view_k,
                          view_v,
                          p.geometry.causal,
                          kScale};
    const int threads = executor.threads();
    const std::int64_t bytes =
        std::max(forward_workspace_bytes(call, threads), backward_workspace_bytes(call, threads));
    const std::unique_ptr<std::byte, void (*)(void*)> memory(
        static_cast<std::byte*>(std::aligned_alloc(64, static_cast<std::size_t>(bytes) + 64)),
        std::free);
    // Property 17: NaN everywhere before each call.
    const auto poisoned = [&] {
      std::fill_n(memory.get(), bytes, std::byte{0xff});
      return std::span(memory.get(), static_cast<std::size_t>(bytes));
    };
    EXPECT_TRUE(forward(call, view(out.data(), 1, T, H, V), view(lse.data(), 1, T, H, 1),
                        poisoned(), executor)
                    .ok());
    const KernelGrads grads{view(std::as_const(out).data(), 1, T, H, V),
                            view(std::as_const(lse).data(), 1, T, H, 1),
                            view(fgo.data(), 1, T, H, V),
                            view(dq.data(), 1, T, H, K),
                            view(dk.data(), 1, T, G, K),
                            view(dv.data(), 1, T, G, V),
                            to_k,
                            to_v};
    EXPECT_TRUE(backward(call, grads, poisoned(), executor).ok());
  }
};

std::vector<Geometry> geometries() {
  const std::vector<std::vector<Pattern>> sets = {{{8, 1}, {16, 2}, {32, 4}},
                                                  {{8, 1}, {20, 3}},
                                                  {{6, 2}, {24, 5}},
                                                  {{300, 1}, {600, 2}},
                                                  {{5, 1}, {30, 9}}};
  std::vector<Geometry> list;
  for (const auto& patterns : sets)
    for (const int mode : {0, 1, 2, 3}) {
      Geometry g;
      g.patterns = patterns;
      g.offset_rule = mode == 1 ? OffsetRule::kBlock : OffsetRule::kMod;
      g.causal = mode != 2;
      g.phantom = mode == 2;
      g.beyond = mode == 3 ? Beyond::kGrow : Beyond::kFixed;
      list.push_back(g);
    }
  return list;
}

TEST(LongnetKernel, EqualsTheReferenceForwardAndBackward) {
  for (const Geometry& g : geometries())
    for (const std::int64_t tokens : {1, 7, 40, 137, 700})
      for (const std::int64_t position : {0, 11})
        for (const auto& [heads, kv] : {std::pair<std::int64_t, std::int64_t>{4, 4}, {6, 2}}) {
          if (!g.causal && position > 0) continue;
          if (tokens == 700 && heads == 6) continue;  // the reference's time
          Sequence run(g, tokens, position, heads, kv);
          run.compute(SerialExecutor());
          const auto want = reference::gradients(run.problem, run.grad_o);
          EXPECT_LT(error(run.out, reference::closed_form(run.problem)), kOutput);
          EXPECT_LT(error(run.dq, want.q), kGradient);
          EXPECT_LT(error(run.dk, want.k), kGradient);
          EXPECT_LT(error(run.dv, want.v), kGradient);
          for (std::size_t i = 0; i < run.grad_past_k.size(); ++i) {
            EXPECT_LT(error(run.grad_past_k[i], want.past.k[i]), kGradient);
            EXPECT_LT(error(run.grad_past_v[i], want.past.v[i]), kGradient);
          }
        }
}

// Trap 17: the log-sum-exp is the natural one, over all patterns, and -inf where none covers.
TEST(LongnetKernel, LogSumExpIsNaturalAndMinusInfinityWhereNothingIsSeen) {
  for (const Geometry& g : geometries()) {
    Sequence run(g, 61, 0, 4, 4);
    run.compute(SerialExecutor());
    const auto want = reference::merged(run.problem).lse;
    for (std::size_t i = 0; i < want.size(); ++i)
      EXPECT_TRUE(want[i] == run.lse[i] || std::abs(want[i] - run.lse[i]) < kOutput)
          << want[i] << " " << run.lse[i];
  }
}

TEST(LongnetKernel, BitsDoNotDependOnThreads) {
  for (const Geometry& g : geometries()) {
    Sequence one(g, 300, 0, 4, 2), three(g, 300, 0, 4, 2);
    one.compute(SerialExecutor());
    three.compute(Threads(3));
    EXPECT_EQ(one.out, three.out);
    EXPECT_EQ(one.dq, three.dq);
    EXPECT_EQ(one.dk, three.dk);
    EXPECT_EQ(one.dv, three.dv);
  }
}

TEST(LongnetKernel, RefusesWhatItCannotRun) {
  KernelCall call;
  call.q.sizes = call.k.sizes = call.v.sizes = {1, 1, 1, 16};
  call.q.strides = call.k.strides = call.v.strides = {16, 16, 16, 1};
  EXPECT_TRUE(check_kernel_call(call).ok());
  KernelCall wide = call;
  wide.v.sizes[3] = 257;
  EXPECT_NE(check_kernel_call(wide).message().find("1 to 256"), std::string::npos);
  KernelCall mixed = call;
  mixed.k.dtype = DType::kBFloat16;
  EXPECT_NE(check_kernel_call(mixed).message().find("fp32 or bf16"), std::string::npos);
  KernelCall strided = call;
  strided.k.strides[3] = 2;
  EXPECT_NE(check_kernel_call(strided).message().find("contiguous"), std::string::npos);
  EXPECT_FALSE(forward(call, {}, {}, {}, SerialExecutor()).ok());
}

}  // namespace
}  // namespace everlong::longnet
