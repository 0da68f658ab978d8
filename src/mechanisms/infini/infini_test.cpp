// The operator beyond the laws: what is cut, masked or bypassed, and rounding over a long text.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "mechanisms/infini/op.h"
#include "ops/causal_attention.h"

namespace everlong::infini {
namespace {

struct Inputs {
  at::Tensor q, k, v, beta;
};
Inputs draw(std::int64_t tokens, at::ScalarType dtype = at::kDouble, std::int64_t heads = 4,
            std::int64_t kv_heads = 2, std::int64_t dim = 8) {
  at::manual_seed(static_cast<std::uint64_t>(tokens));
  const auto make = [&](std::int64_t h) {
    return at::randn({2, tokens, h, dim}, at::kDouble).to(dtype);
  };
  return {make(heads), make(kv_heads), make(kv_heads), at::randn({heads}, at::kDouble).to(dtype)};
}

Options options(std::int64_t segment, Update update = Update::kLinear) {
  Options o;
  o.segment = segment;
  o.update = update;
  return o;
}

double error(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).abs().max() / b.abs().max()).item<double>();
}

TEST(Infini, UpToOneSegmentItIsSoftmaxAttentionBitForBit) {
  for (const std::int64_t tokens : {1, 7, 32})
    for (const auto dtype : {at::kFloat, at::kDouble}) {
      const Inputs in = draw(tokens, dtype);
      Options o = options(32);
      o.rope = Rope::kNone;
      const Mixed mixed = infini_attention(in.q, in.k, in.v, in.beta, {}, {}, o);
      EXPECT_TRUE(
          at::equal(mixed.out_BTHV, causal_attention(in.q, in.k, in.v, scale_of(o, 8), true)));
    }
}

TEST(Infini, CutGradientsEqualTheReferenceAndDoNotDependOnPieces) {
  for (const char* update : {"linear", "delta"})
    for (const std::int64_t every : {1, 2, 3}) {
      OpShape shape{.batch = 2, .tokens = 70, .initial_state = true, .seed = 5};
      shape.params = {{"segment", 8}, {"update", update}, {"bptt_segments", every}};
      const Operator& op = attention_operator();
      OpCall call = op.sample(shape);
      const auto plain = op.run("reference", call);
      ASSERT_TRUE(plain.ok()) << plain.status().message();
      at::manual_seed(3);
      for (const auto& [name, x] : plain->out) call.grad_out[name] = at::randn_like(x);
      call.grad_out["state.M"] = at::randn_like(plain->state.at("M"));
      const auto expected = op.run("reference", call);
      for (const char* form : {"composite", "naive"}) {
        const auto given = op.run(form, call);
        for (const auto& [name, x] : expected->grad)
          EXPECT_LE((given->grad.at(name) - x).abs().max().item<double>(),
                    1e-11 * (1 + x.abs().max().item<double>()))
              << form << " " << name << " every " << every;
      }
    }
}

TEST(Infini, GammaOfArmtGivesItsReferencesGradients) {
  OpShape shape{.batch = 2, .tokens = 70, .heads = 4, .initial_state = true, .seed = 5};
  shape.params = {{"segment", 8}, {"update", "delta"}, {"delta_z", "armt"}};
  const Operator& op = attention_operator();
  OpCall call = op.sample(shape);
  call.state["z"] *= 1e-2;  // so that gamma lies inside (0, 1) and moves
  const auto plain = op.run("reference", call);
  ASSERT_TRUE(plain.ok()) << plain.status().message();
  at::manual_seed(3);
  call.grad_out["o"] = at::randn_like(plain->out.at("o"));
  const auto expected = op.run("reference", call), given = op.run("composite", call);
  EXPECT_LE(error(given->out.at("o"), expected->out.at("o")), 1e-12);
  for (const auto& [name, x] : expected->grad)
    EXPECT_LE((given->grad.at(name) - x).abs().max().item<double>(),
              1e-11 * (1 + x.abs().max().item<double>()))
        << name;
  OpCall paper = call;
  paper.params["delta_z"] = "paper";
  EXPECT_GT(error(op.run("reference", paper)->state.at("z"), expected->state.at("z")), 0.01);
}

TEST(Infini, ATokenOfWeightZeroMayHoldAnything) {
  for (const Update update : {Update::kLinear, Update::kDelta}) {
    const Inputs in = draw(24);
    at::Tensor weight = at::ones({2, 24}, at::kDouble);
    weight.narrow(1, 5, 1).zero_();
    at::Tensor k = in.k.clone(), v = in.v.clone();
    k.narrow(1, 5, 1).fill_(std::nan(""));
    v.narrow(1, 5, 1).fill_(std::numeric_limits<double>::infinity());
    const Options o = options(8, update);
    const Mixed clean = infini_attention(in.q, in.k, in.v, in.beta, weight, {}, o);
    const Mixed other = infini_attention(in.q, k, v, in.beta, weight, {}, o);
    EXPECT_TRUE(at::equal(clean.after.M_NGKV, other.after.M_NGKV));
    EXPECT_TRUE(at::equal(clean.after.z_NGK, other.after.z_NGK));
    // Segments after the first see it through memory alone.
    EXPECT_TRUE(at::equal(clean.out_BTHV.narrow(1, 8, 16), other.out_BTHV.narrow(1, 8, 16)));
  }
}

TEST(Infini, AWeightOfThreeIsWritingThreeTimes) {
  const Inputs in = draw(8);
  const Options o = options(8);
  const auto twice = [](const at::Tensor& x) {
    return at::cat({x.narrow(1, 0, 2), x.narrow(1, 1, 1), x.narrow(1, 1, 1), x.narrow(1, 2, 6)}, 1);
  };
  at::Tensor weight = at::ones({2, 8}, at::kDouble);
  weight.narrow(1, 1, 1).fill_(3);
  const Mixed weighed = infini_attention(in.q, in.k, in.v, in.beta, weight, {}, o);
  const Mixed written =
      infini_attention(twice(in.q), twice(in.k), twice(in.v), in.beta, {}, {}, options(10));
  EXPECT_LE(error(weighed.after.M_NGKV, written.after.M_NGKV), 1e-13);
  EXPECT_LE(error(weighed.after.z_NGK, written.after.z_NGK), 1e-13);
}

TEST(Infini, GatesOfEveryGranularityMixTheirOwnPart) {
  const Inputs in = draw(20);
  const Options o = options(8);
  const auto out = [&](const at::Tensor& beta) {
    return infini_attention(in.q, in.k, in.v, beta, {}, {}, o).out_BTHV;
  };
  const at::Tensor by_head = out(in.beta);
  EXPECT_LE(error(out(in.beta.repeat_interleave(8)), by_head), 1e-14);
  EXPECT_LE(error(out(at::full({1}, 0.3, at::kDouble)), out(at::full({4}, 0.3, at::kDouble))),
            1e-14);
  // beta -> -inf: local attention, whatever the memory holds.
  const at::Tensor closed = out(at::full({4}, -800., at::kDouble));
  const auto fold = [](const at::Tensor& x) {
    return x.narrow(1, 0, 16).unflatten(1, {2, 8}).flatten(0, 1);
  };
  Options plain = o;
  plain.rope = Rope::kNone;
  const at::Tensor without =
      infini_attention(in.q, in.k, in.v, at::full({4}, -800., at::kDouble), {}, {}, plain).out_BTHV;
  const at::Tensor local =
      causal_attention(fold(in.q), fold(in.k), fold(in.v), scale_of(o, 8), true)
          .unflatten(0, {2, 2})
          .flatten(1, 2);
  EXPECT_LE(error(without.narrow(1, 0, 16), local), 1e-14);
  EXPECT_GT(error(closed, by_head), 1e-3);
}

TEST(Infini, MemoryDoesNotSeeTheOwnSegment) {
  const Inputs in = draw(16);
  const Options o = options(8);
  const at::Tensor k = in.k.clone().set_requires_grad(true),
                   v = in.v.clone().set_requires_grad(true);
  const at::Tensor mem = infini_attention(in.q, k, v, {}, {}, {}, o).out_BTHV;
  mem.narrow(1, 8, 8).sum().backward();
  EXPECT_EQ(v.grad().narrow(1, 8, 8).abs().max().item<double>(), 0);
  EXPECT_GT(v.grad().narrow(1, 0, 8).abs().min().item<double>(), 0);
  EXPECT_EQ(k.grad().narrow(1, 8, 8).abs().max().item<double>(), 0);
}

TEST(Infini, LargeKeysStayFiniteInLowPrecision) {
  const Inputs in = draw(64, at::kFloat);
  for (const Update update : {Update::kLinear, Update::kDelta}) {
    const at::Tensor k = (in.k.sign() * 20).set_requires_grad(true);
    const Mixed mixed = infini_attention(in.q * 5, k, in.v, in.beta, {}, {}, options(16, update));
    mixed.out_BTHV.sum().backward();
    EXPECT_TRUE(at::isfinite(mixed.out_BTHV).all().item<bool>());
    EXPECT_TRUE(at::isfinite(k.grad()).all().item<bool>());
  }
}

// A million tokens in fp32 against fp64: sums of per-segment sums, so rounding grows with the root
// of 488 segments and not with the tokens.
TEST(Infini, AMillionTokensInFp32) {
  const at::NoGradGuard no_grad;
  constexpr std::int64_t kChunk = 65536, kChunks = 16;
  for (const Update update : {Update::kLinear, Update::kDelta}) {
    const Options o = options(2048, update);
    Carried fine, coarse;
    at::Tensor a, b;
    for (std::int64_t i = 0; i < kChunks; ++i) {
      at::manual_seed(static_cast<std::uint64_t>(i));
      const at::Tensor k = at::randn({1, kChunk, 1, 16}, at::kFloat), v = at::randn_like(k),
                       q = at::randn_like(k);
      const auto feed = [&](at::ScalarType dtype, Carried& state) {
        Mixed mixed = infini_attention(q.to(dtype), k.to(dtype), v.to(dtype), {}, {}, state, o);
        state = std::move(mixed.after);
        return mixed.out_BTHV.narrow(1, kChunk - 2048, 2048).to(at::kDouble);
      };
      a = feed(at::kDouble, fine);
      b = feed(at::kFloat, coarse);
    }
    EXPECT_LE(error(b, a), update == Update::kLinear ? 1e-4 : 1e-3);
    RecordProperty(update == Update::kLinear ? "linear" : "delta", cat(error(b, a)));
  }
}

TEST(Infini, TheCpuKernelRunsWhereItCan) {
  const Inputs f = draw(5, at::kFloat), b = draw(5, at::kBFloat16), d = draw(5);
  EXPECT_EQ(path_taken(f.q, f.k, f.v), "cpu");
  EXPECT_EQ(path_taken(b.q, b.k, b.v), "cpu");
  EXPECT_EQ(path_taken(d.q, d.k, d.v), "composite");
  EXPECT_EQ(path_taken(f.q, f.k, f.v, Path::kComposite), "composite");
  EXPECT_THROW((void)infini_attention(d.q, d.k, d.v, d.beta, {}, {}, options(8), Path::kCpu),
               std::exception);
  const Inputs wide = draw(2, at::kFloat, 2, 1, 257);
  EXPECT_EQ(path_taken(wide.q, wide.k, wide.v), "composite");
}

// Dims off and on the vector and block sizes, groups of heads, tiles that end in the middle, gates
// a channel, both conventions of the empty memory: against the composite form in fp64.
TEST(Infini, TheCpuKernelEqualsTheCompositeForm) {
  struct Sizes {
    std::int64_t heads, kv_heads, dim, segment, tokens;
  };
  for (const Sizes& c :
       {Sizes{2, 2, 1, 3, 10}, Sizes{6, 2, 8, 33, 100}, Sizes{5, 1, 17, 97, 200},
        Sizes{2, 1, 64, 100, 250}, Sizes{1, 1, 128, 50, 101}, Sizes{2, 2, 256, 20, 45}})
    for (const Empty empty : {Empty::kBypass, Empty::kZero}) {
      Options o = options(c.segment);
      o.rope = Rope::kNone;
      o.empty = empty;
      const Inputs in = draw(c.tokens, at::kDouble, c.heads, c.kv_heads, c.dim);
      const at::Tensor beta = at::randn({c.heads * c.dim}, at::kDouble),
                       weight = at::rand({2, c.tokens}, at::kDouble).round(),
                       go = at::randn_like(in.q);
      const auto run = [&](at::ScalarType dtype, Path path) {
        std::vector<at::Tensor> leaves;
        for (const at::Tensor& x : {in.q, in.k, in.v, beta})
          leaves.push_back(x.to(dtype).clone().set_requires_grad(true));
        const Mixed mixed = infini_attention(leaves[0], leaves[1], leaves[2], leaves[3],
                                             weight.to(dtype), {}, o, path);
        ((mixed.out_BTHV * go.to(dtype)).sum() + mixed.after.M_NGKV.sum()).backward();
        std::vector<at::Tensor> results = {mixed.out_BTHV.detach(), mixed.after.M_NGKV.detach(),
                                           mixed.after.z_NGK.detach()};
        for (const at::Tensor& x : leaves) results.push_back(x.grad());
        return results;
      };
      const auto exact = run(at::kDouble, Path::kComposite), kernel = run(at::kFloat, Path::kCpu);
      for (std::size_t i = 0; i < exact.size(); ++i)
        EXPECT_LE(error(kernel[i].to(at::kDouble), exact[i]), 1e-5)  // sums of 250 terms in fp32
            << "result " << i << " of dim " << c.dim << " segment " << c.segment;
    }
}

TEST(Infini, SigmaOfFp32HasNoExactZerosAndTwoUlps) {
  const at::Tensor x = at::arange(-80, 40, 0.25, at::kFloat), s = sigma(x);
  EXPECT_GT(s.min().item<float>(), 0);
  EXPECT_TRUE((s.narrow(0, 1, s.numel() - 1) > s.narrow(0, 0, s.numel() - 1)).all().item<bool>());
  const float at14 = sigma(at::full({1}, -14., at::kFloat)).item<float>();
  EXPECT_NEAR(at14, 8.3152871910356788e-7F, 2 * 5.7e-14F);
}

TEST(Infini, MemoryElementsAreThoseOfThePapersTable) {
  // Table 2: 12 layers, 8 heads of 128; 1.6 million elements, 114 times fewer than Memorizing
  // Transformers.
  const MemoryTable table = memory_table(12, 8, 128, 2048);
  EXPECT_EQ(table.infini, 1585152);
  EXPECT_NEAR(table.memorizing / 1e6, 183.4, 0.1);
  EXPECT_NEAR(table.transformer_xl / 1e6, 50.3, 0.1);
  EXPECT_EQ(std::floor(std::round(table.memorizing / 1e6) / (std::round(table.infini / 1e5) / 10)),
            114);
  // With the open segment that decoding holds: three and a half.
  EXPECT_NEAR(table.memorizing / (table.infini + table.local), 3.5, 0.1);
}

}  // namespace
}  // namespace everlong::infini
