#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <limits>

#include "mechanisms/softmax/op.h"
#include "support/compare.h"

namespace everlong::softmax {
namespace {

constexpr double kFp64 = 1e-12;  // a few hundred fp64 roundings of numbers of size 1 to 10

double largest(const at::Tensor& difference) {
  return difference.numel() == 0 ? 0 : difference.abs().max().item<double>();
}

OpResult run(std::string_view form, const OpCall& call) {
  auto result = attention_operator().run(form, call);
  EXPECT_TRUE(result.ok()) << result.status().message();
  return std::move(result).value();
}

// Incoming gradients for every output and final state.
void want_gradients(OpCall& call) {
  const OpResult plain = run("composite", call);
  at::manual_seed(7);
  for (const auto& [name, tensor] : plain.out) call.grad_out[name] = at::randn_like(tensor);
  for (const auto& [name, tensor] : plain.state)
    if (tensor.is_floating_point()) call.grad_out["state." + name] = at::randn_like(tensor);
}

void expect_same(const TensorMap& got, const TensorMap& want, double tolerance,
                 const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (const auto& [name, tensor] : want) {
    ASSERT_TRUE(got.contains(name)) << what << " " << name;
    ASSERT_EQ(got.at(name).sizes(), tensor.sizes()) << what << " " << name;
    EXPECT_LE(largest(got.at(name) - tensor), tolerance) << what << " " << name;
  }
}

std::vector<OpShape> shapes() {
  std::vector<OpShape> all = attention_operator().law_shapes();
  for (const std::int64_t window : {0, 1, 7, 64, 300})
    for (const std::int64_t tokens : {0, 1, 63, 64, 65, 130}) {  // around the rows of a block
      OpShape shape{.tokens = tokens, .heads = 4, .kv_heads = 2, .key_dim = 8, .value_dim = 6};
      shape.initial_state = window == 7 || tokens == 65;
      shape.params["window"] = window;
      all.push_back(shape);
    }
  return all;
}

TEST(Softmax, EveryFormAgreesWithTheReferenceInValuesStatesAndGradients) {
  for (const OpShape& shape : shapes()) {
    OpCall call = attention_operator().sample(shape);
    want_gradients(call);
    const OpResult want = run("reference", call);
    for (const char* form : {"reference_recurrent", "reference_online", "naive", "composite"}) {
      const OpResult got = run(form, call);
      const std::string what = cat(form, " T=", shape.tokens, " ", shape.params.dump());
      expect_same(got.out, want.out, kFp64, what);
      expect_same(got.state, want.state, 0, what);
      expect_same(got.grad, want.grad, 10 * kFp64, what);
    }
  }
}

TEST(Softmax, TilesOfKeysMergeExactly) {
  // 1300 past keys: three tiles of 512, the window's lower edge inside one of them or on its
  // border.
  at::manual_seed(1);
  for (const std::int64_t window : {0, 512, 700, 5000})
    for (const std::int64_t tokens : {1, 70, 129}) {
      const auto q = at::randn({2, tokens, 4, 8}, at::kDouble),
                 k = at::randn({2, 1300 + tokens, 2, 8}, at::kDouble),
                 v = at::randn({2, 1300 + tokens, 2, 5}, at::kDouble);
      const Options options{.window = window,
                            .scale = 1.0};  // sharp rows: the running maximum changes between tiles
      EXPECT_LE(largest(attention(q, k, v, options) - naive(q, k, v, options)), kFp64)
          << window << " " << tokens;
    }
}

TEST(Softmax, LowPrecisionIsAsGoodAsTheNaiveForm) {
  for (const auto dtype : {at::kFloat, at::kBFloat16})
    for (const OpShape& shape : attention_operator().law_shapes()) {
      OpCall call = attention_operator().sample(shape);
      want_gradients(call);
      const auto to = [](TensorMap map, at::ScalarType type) {
        for (auto& [name, tensor] : map)
          if (tensor.is_floating_point()) tensor = tensor.to(type);
        return map;
      };
      OpCall low = call;
      low.inputs = to(call.inputs, dtype), low.state = to(call.state, dtype),
      low.grad_out = to(call.grad_out, dtype);
      OpCall rounded = low;
      rounded.inputs = to(low.inputs, at::kDouble), rounded.state = to(low.state, at::kDouble);
      rounded.grad_out = to(low.grad_out, at::kDouble);
      const OpResult exact = run("reference", rounded), plain = run("naive", low);
      const double atol = tolerance::floor_of(dtype);
      for (const char* form : {"composite", "cpu"}) {
        const OpResult got = run(form, low);
        for (const auto& [name, want] : exact.out)
          EXPECT_LE(largest(got.out.at(name) - want), 2 * largest(plain.out.at(name) - want) + atol)
              << form;
        for (const auto& [name, want] : exact.grad)
          EXPECT_LE(largest(got.grad.at(name) - want),
                    2 * largest(plain.grad.at(name) - want) + atol * (1 + largest(want)))
              << form << " " << name;
      }
    }
}

TEST(Softmax, TokensBeforeTheFirstKeyGiveZero) {
  at::manual_seed(2);
  const auto q = at::randn({1, 70, 2, 4}, at::kDouble).requires_grad_(true),
             k = at::randn({1, 3, 2, 4}, at::kDouble), v = at::randn({1, 3, 2, 4}, at::kDouble);
  const at::Tensor out = attention(q, k, v, {});
  EXPECT_LE(largest(out - naive(q, k, v, {})), kFp64);
  EXPECT_EQ(largest(out.narrow(1, 0, 67)), 0);
  out.sum().backward();
  EXPECT_TRUE(at::isfinite(q.grad()).all().item<bool>());
  EXPECT_EQ(largest(attention(q, k.narrow(1, 0, 0), v.narrow(1, 0, 0), {})), 0);
}

TEST(Softmax, FeedingInPiecesEqualsFeedingAtOnce) {
  for (const std::int64_t window : {0, 1, 7, 64})
    for (const std::int64_t cut : {0, 1, 40, 64, 99, 100}) {
      OpShape shape{.batch = 2, .tokens = 100, .heads = 4, .kv_heads = 2, .initial_state = true};
      shape.params["window"] = window;
      OpCall whole = attention_operator().sample(shape);
      want_gradients(whole);
      const OpResult want = run("composite", whole);
      const auto piece = [&](std::int64_t begin, std::int64_t end) {
        OpCall call = whole;
        call.grad_out.clear();
        for (auto& [name, x] : call.inputs) x = x.narrow(1, begin, end - begin);
        call.grad_out["o"] = whole.grad_out.at("o").narrow(1, begin, end - begin);
        return call;
      };
      OpCall first = piece(0, cut), second = piece(cut, 100);
      second.state = run("composite", piece(0, cut)).state;
      for (const char* name : {"state.k", "state.v"})
        second.grad_out[name] = whole.grad_out.at(name);
      const OpResult tail = run("composite", second);
      for (const char* name : {"state.k", "state.v"}) first.grad_out[name] = tail.grad.at(name);
      const OpResult head = run("composite", first);
      EXPECT_LE(largest(at::cat({head.out.at("o"), tail.out.at("o")}, 1) - want.out.at("o")),
                kFp64);
      expect_same(tail.state, want.state, 0, "state");
      for (const char* name : {"q", "k", "v"})
        EXPECT_LE(
            largest(at::cat({head.grad.at(name), tail.grad.at(name)}, 1) - want.grad.at(name)),
            10 * kFp64)
            << name << " window " << window << " cut " << cut;
      for (const char* name : {"state.k", "state.v"})
        EXPECT_LE(largest(head.grad.at(name) - want.grad.at(name)), 10 * kFp64) << name;
    }
}

TEST(Softmax, NeitherPaddingNorANeighbourIsRead) {
  OpShape shape{.tokens = 90,
                .heads = 4,
                .kv_heads = 2,
                .cu_seqlens = {0, 31, 50, 90},
                .initial_state = true};
  OpCall call = attention_operator().sample(shape);
  want_gradients(call);
  const OpResult want = run("composite", call);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  OpCall poisoned = call;
  const at::Tensor rows = at::arange(call.state.at("k").size(1));
  const at::Tensor padding =
      (rows >= call.state.at("length").unsqueeze(1)).unsqueeze(-1).unsqueeze(-1);
  for (const char* name : {"k", "v"})
    poisoned.state[name] = call.state.at(name).masked_fill(padding, nan);
  for (const char* name : {"q", "k", "v"}) {  // the middle sequence is broken
    poisoned.inputs[name] = call.inputs.at(name).clone();
    poisoned.inputs[name].narrow(1, 31, 19).fill_(nan);
  }
  const OpResult got = run("composite", poisoned);
  const auto outside = at::cat({at::arange(31), at::arange(50, 90)});
  EXPECT_TRUE(at::equal(got.out.at("o").index_select(1, outside),
                        want.out.at("o").index_select(1, outside)));
  for (const char* name : {"q", "k", "v"})
    EXPECT_TRUE(at::equal(got.grad.at(name).index_select(1, outside),
                          want.grad.at(name).index_select(1, outside)));
}

TEST(Softmax, TheFutureDoesNotChangeThePast) {
  const OpCall call = attention_operator().sample({.tokens = 150, .heads = 4, .kv_heads = 2});
  const at::Tensor want = run("composite", call).out.at("o");
  for (const std::int64_t changed : {1, 63, 64, 149}) {
    OpCall other = call;
    for (auto& [name, x] : other.inputs) {
      x = x.clone();
      x.narrow(1, changed, 150 - changed).mul_(-3);
    }
    const at::Tensor got = run("composite", other).out.at("o");
    EXPECT_TRUE(at::equal(got.narrow(1, 0, changed), want.narrow(1, 0, changed)));
    EXPECT_FALSE(at::equal(got, want));
  }
}

TEST(Softmax, StridedViewsAndRepeatedRunsGiveTheSameBits) {
  at::manual_seed(3);
  const auto wide = at::randn({2, 4, 2 * 90, 3 * 8}, at::kFloat);
  const auto q = wide.transpose(1, 2).slice(1, 0, 180, 2).narrow(3, 0, 8),
             k = wide.narrow(1, 0, 2).transpose(1, 2).slice(1, 1, 180, 2).narrow(3, 8, 8),
             v = wide.narrow(1, 2, 2).transpose(1, 2).slice(1, 0, 180, 2).narrow(3, 16, 8);
  const Options options{.window = 33, .scale = 0.5};
  const at::Tensor dense = attention(q.contiguous(), k.contiguous(), v.contiguous(), options);
  EXPECT_LE(largest(attention(q, k, v, options) - dense),
            1e-6);  // other strides may choose another product kernel
  EXPECT_TRUE(at::equal(attention(q, k, v, options), attention(q, k, v, options)));
}

TEST(Softmax, TheCpuKernelRunsWhereItCan) {
  const auto taken = [](at::ScalarType dtype, std::int64_t dim, Path path) {
    const at::Tensor x = at::zeros({1, 3, 2, dim}, dtype);
    return std::string(path_taken(x, x, x, {.path = path}));
  };
  EXPECT_EQ(taken(at::kFloat, 64, Path::kAuto), "cpu");
  EXPECT_EQ(taken(at::kBFloat16, 256, Path::kAuto), "cpu");
  EXPECT_EQ(taken(at::kFloat, 64, Path::kComposite), "composite");
  EXPECT_EQ(taken(at::kDouble, 64, Path::kAuto), "composite");
  EXPECT_EQ(taken(at::kFloat, 257, Path::kAuto), "composite");
  EXPECT_ANY_THROW(taken(at::kDouble, 64, Path::kCpu));
  // And what is taken is what runs: the two forms round differently.
  at::manual_seed(4);
  const auto x = at::randn({1, 150, 2, 32}, at::kFloat);
  const at::Tensor kernel = attention(x, x, x, {.path = Path::kCpu});
  EXPECT_TRUE(at::equal(attention(x, x, x, {}), kernel));
  EXPECT_FALSE(at::equal(attention(x, x, x, {.path = Path::kComposite}), kernel));
}

TEST(Softmax, PackedSequencesEqualSeparateOnesOnAnyNumberOfThreads) {
  at::manual_seed(5);
  const std::vector<std::int64_t> offsets = {0, 100, 100, 101, 260};
  const auto leaf = [](std::int64_t heads) {
    return at::randn({1, 260, heads, 24}, at::kFloat).requires_grad_(true);
  };
  const auto q = leaf(4), k = leaf(2), v = leaf(2);
  const Options options{.window = 50};
  const auto gradients = [&](const at::Tensor& out) {
    for (const auto& x : {q, k, v}) x.mutable_grad() = at::Tensor();
    out.square().sum().backward();
    return std::vector<at::Tensor>{out.detach(), q.grad(), k.grad(), v.grad()};
  };
  std::vector<at::Tensor> parts;
  for (std::size_t n = 0; n + 1 < offsets.size(); ++n) {
    const auto part = [&](const at::Tensor& x) {
      return x.narrow(1, offsets[n], offsets[n + 1] - offsets[n]);
    };
    parts.push_back(attention(part(q), part(k), part(v), options));
  }
  const auto want = gradients(at::cat(parts, 1));
  const int threads = at::get_num_threads();
  std::vector<std::vector<at::Tensor>> got;
  for (const int count : {1, 2, 3}) {
    at::set_num_threads(count);
    got.push_back(gradients(attention_packed(q, k, v, offsets, options)));
  }
  at::set_num_threads(threads);
  for (std::size_t i = 0; i < want.size(); ++i) {
    EXPECT_LE(largest(got[0][i] - want[i]), 1e-5 * (1 + largest(want[i]))) << i;
    EXPECT_TRUE(at::equal(got[0][i], got[1][i]) && at::equal(got[0][i], got[2][i])) << i;
  }
}

TEST(Softmax, TheKernelKeepsABrokenTokenFromThoseThatDoNotSeeIt) {
  OpShape shape{.tokens = 100, .heads = 4, .kv_heads = 2, .key_dim = 16, .value_dim = 8};
  shape.params["window"] = 9;
  OpCall call = attention_operator().sample(shape);
  want_gradients(call);
  for (auto* map : {&call.inputs, &call.grad_out})
    for (auto& [name, x] : *map) x = x.to(at::kFloat);
  const OpResult want = run("cpu", call);
  for (auto& [name, x] : call.inputs) {
    x = x.clone();
    x.select(1, 60).fill_(std::numeric_limits<double>::quiet_NaN());
  }
  const OpResult got = run("cpu", call);
  const auto same = [](const at::Tensor& a, const at::Tensor& b, std::int64_t from,
                       std::int64_t to) {
    return at::allclose(a.slice(1, from, to), b.slice(1, from, to), 1e-5, 1e-6);
  };
  // Tokens 60 to 68 see token 60; the keys that these see are 52 to 68.
  for (const auto& [a, b] : {std::pair(got.out.at("o"), want.out.at("o")),
                             std::pair(got.grad.at("q"), want.grad.at("q"))})
    EXPECT_TRUE(same(a, b, 0, 60) && same(a, b, 69, 100));
  for (const char* name : {"k", "v"})
    EXPECT_TRUE(same(got.grad.at(name), want.grad.at(name), 0, 52) &&
                same(got.grad.at(name), want.grad.at(name), 69, 100))
        << name;
  EXPECT_TRUE(got.out.at("o").slice(1, 60, 69).isnan().all().item<bool>());
}

TEST(Softmax, RefusesEveryListedCallInEveryForm) {
  const auto refusals = attention_operator().refusals();
  EXPECT_GE(refusals.size(), 20U);
  for (const auto& [name, call] : refusals)
    for (const OpForm& form : attention_operator().forms()) {
      const auto result = attention_operator().run(form.name, call);
      EXPECT_FALSE(result.ok()) << name << " in " << form.name;
      EXPECT_TRUE(result.ok() || result.status().message().starts_with("softmax: "))
          << result.status().message();
    }
  EXPECT_FALSE(attention_operator().run("cuda", attention_operator().sample({})).ok());
}

}  // namespace
}  // namespace everlong::softmax
