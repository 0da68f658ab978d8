// Attention by ATen's kernels on CUDA against the definition in float64. Skipped where there is no
// GPU that they run on.
#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "kernels/cuda/device.h"
#include "mechanisms/mechanism.h"
#include "mechanisms/softmax/layer_cache.h"
#include "mechanisms/softmax/op.h"
#include "mechanisms/softmax/op_cuda.h"
#include "ops/cuda_device.h"
#include "ops/runtime.h"
#include "support/compare.h"

namespace everlong::softmax {
const Mechanism& mechanism();
namespace {

// Before any other call of torch, which would remember that there is no CUDA.
const bool gpu = load_cuda_backend().ok() && at::hasCUDA();

class SoftmaxCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!gpu || compute_capability(at::Device(at::kCUDA, 0)) < 80)
      GTEST_SKIP() << "no GPU of sm_80 or newer here";
  }
};

using Tensors = std::vector<at::Tensor>;
using Attend = std::function<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&)>;

Attend by(Path path, const Options& given = {}) {
  return [=](const auto& q, const auto& k, const auto& v) {
    return attention(q, k, v, {given.window, given.scale, path});
  };
}
Attend by_definition(const Options& given = {}) {
  return [=](const auto& q, const auto& k, const auto& v) { return naive(q, k, v, given); };
}

// o, dq, dk, dv of q, k, v and the gradient of o.
Tensors run(const Attend& attend, const Tensors& in) {
  Tensors leaves;
  for (std::size_t i = 0; i < 3; ++i) leaves.push_back(in[i].detach().requires_grad_(true));
  const at::Tensor out = attend(leaves[0], leaves[1], leaves[2]);
  out.backward(in[3]);
  return {out.detach(), leaves[0].grad(), leaves[1].grad(), leaves[2].grad()};
}

Tensors converted(const Tensors& in, at::Device device, at::ScalarType dtype) {
  Tensors out;
  for (const auto& x : in) out.push_back(x.to(device, dtype));
  return out;
}

struct Case {
  std::int64_t batch = 2, tokens = 130, keys = 130, heads = 4, kv_heads = 2, dim = 64;
  std::int64_t window = 0;
  at::ScalarType dtype = at::kBFloat16;

  Tensors inputs() const {
    const auto draw = [&](std::int64_t rows, std::int64_t count) {
      return at::randn({batch, rows, count, dim}, at::device(at::kCUDA).dtype(dtype));
    };
    at::manual_seed(static_cast<std::uint64_t>(tokens + 1000 * keys + dim));
    return {draw(tokens, heads), draw(keys, kv_heads), draw(keys, kv_heads), draw(tokens, heads)};
  }
};

// The ledger's rule of law 1; it has no line of its own for fp16, which has three bits more than
// bf16.
double floor_of(at::ScalarType dtype) {
  return tolerance::floor_of(at::kBFloat16) / (dtype == at::kHalf ? 8 : 1);
}

void expect_right(const Attend& attend, const Attend& definition, const Tensors& in,
                  const std::string& what) {
  const Tensors exact = run(definition, converted(in, at::kCPU, at::kDouble)),
                plain = run(definition, in), got = run(attend, in);
  const char* const names[] = {"o", "dq", "dk", "dv"};
  for (std::size_t i = 0; i < exact.size(); ++i) {
    EXPECT_TRUE(got[i].scalar_type() == in[0].scalar_type()) << what << " " << names[i];
    EXPECT_LE(test::relative_error(got[i], exact[i]),
              2 * test::relative_error(plain[i], exact[i]) + floor_of(in[0].scalar_type()))
        << what << " " << names[i];
  }
}

void expect_right(const Case& c) {
  const Options options{.window = c.window};
  expect_right(by(Path::kCuda, options), by_definition(options), c.inputs(),
               cat(c.dtype, " T", c.tokens, " S", c.keys, " H", c.heads, "/", c.kv_heads, " d",
                   c.dim, " window ", c.window));
}

TEST_F(SoftmaxCuda, IsTheDefinitionForAllHeadDims) {
  for (const auto dtype : {at::kBFloat16, at::kHalf})
    for (const int dim : {8, 40, 64, 80, 96, 128, 160, 192, 224, 256})
      for (const int window : {0, 50}) expect_right({.dim = dim, .window = window, .dtype = dtype});
}

TEST_F(SoftmaxCuda, IsTheDefinitionForAllLengthsHeadsAndWindows) {
  const std::pair<int, int> lengths[] = {{1, 1},     {1, 2},     {1, 300},   {2, 300},  {64, 65},
                                         {127, 127}, {128, 128}, {129, 129}, {70, 600}, {300, 300}};
  const std::pair<int, int> heads[] = {{4, 4}, {4, 1}, {6, 2}};
  for (const auto& [tokens, keys] : lengths)
    for (const auto& [all, shared] : heads)
      for (const int window : {0, 1, 33, 128, 5000})
        expect_right(
            {.tokens = tokens, .keys = keys, .heads = all, .kv_heads = shared, .window = window});
}

TEST_F(SoftmaxCuda, PackedSequencesAreTheDefinitionOneByOne) {
  const std::vector<std::vector<std::int64_t>> packings = {
      {0, 0, 5, 6, 70, 70, 199, 199},  // empty ones and single tokens between others
      {0, 64, 128, 192},               // of one length: rows
      {0, 1, 1, 2, 3, 4},              // single tokens alone
      {0, 199},
      {0, 1, 199}};
  for (const auto dtype : {at::kBFloat16, at::kHalf})
    for (const auto& offsets : packings)
      for (const std::int64_t window : {0, 1, 33}) {
        const Options options{.window = window, .scale = 0.2, .path = Path::kCuda};
        const Case c{.batch = 1, .tokens = offsets.back(), .keys = offsets.back(), .dtype = dtype};
        const Attend packed = [&](const auto& q, const auto& k, const auto& v) {
          return attention_packed(q, k, v, offsets, options);
        };
        const Attend alone = [&](const auto& q, const auto& k, const auto& v) {
          Tensors parts;
          for (std::size_t n = 1; n < offsets.size(); ++n) {
            const auto own = [&](const auto& x) { return x.slice(1, offsets[n - 1], offsets[n]); };
            if (offsets[n] > offsets[n - 1])
              parts.push_back(naive(own(q), own(k), own(v), options));
          }
          return at::cat(parts, 1);
        };
        expect_right(packed, alone, c.inputs(),
                     cat(dtype, " ", offsets.size() - 1, " packed, window ", window));
      }
}

TEST_F(SoftmaxCuda, ABrokenSequenceStaysAlone) {
  const std::vector<std::int64_t> offsets = {0, 31, 50, 200};
  const Attend packed = [&](const auto& q, const auto& k, const auto& v) {
    return attention_packed(q, k, v, offsets, {.path = Path::kCuda});
  };
  const Tensors in = Case{.batch = 1, .tokens = 200, .keys = 200}.inputs();
  const Tensors want = run(packed, in);
  Tensors broken = in;
  for (auto& x : broken) {
    x = x.clone();
    x.slice(1, 31, 50).fill_(std::numeric_limits<double>::quiet_NaN());
  }
  const Tensors got = run(packed, broken);
  for (std::size_t i = 0; i < want.size(); ++i) {
    EXPECT_TRUE(test::same_bits(got[i].slice(1, 0, 31), want[i].slice(1, 0, 31))) << i;
    EXPECT_TRUE(test::same_bits(got[i].slice(1, 50), want[i].slice(1, 50))) << i;
  }
}

// Enough keys and rows that atomics would fall in another order each time.
TEST_F(SoftmaxCuda, SameInputSameBits) {
  for (const int window : {0, 700})
    for (const bool packed : {false, true}) {
      const Tensors in =
          Case{.batch = 1, .tokens = 4096, .keys = 4096, .heads = 8, .dim = 128}.inputs();
      const Options options{.window = window, .path = Path::kCuda};
      const Attend attend = [&](const auto& q, const auto& k, const auto& v) {
        return packed ? attention_packed(q, k, v, std::vector<std::int64_t>{0, 1000, 4096}, options)
                      : attention(q, k, v, options);
      };
      const Tensors first = run(attend, in);
      for (int again = 0; again < 10; ++again) {
        const Tensors got = run(attend, in);
        for (std::size_t i = 0; i < first.size(); ++i)
          EXPECT_TRUE(test::same_bits(got[i], first[i])) << i << " window " << window;
      }
    }
}

TEST_F(SoftmaxCuda, LeavesTheSwitchesOfAtenAsTheyWere) {
  at::Context& context = at::globalContext();
  const auto switches = [&] {
    return std::tuple(context.deterministicAlgorithms(), context.deterministicAlgorithmsWarnOnly(),
                      context.deterministicFillUninitializedMemory());
  };
  const auto before = switches();
  for (const auto& [on, only_warns] : {std::pair(false, false), {true, true}, {true, false}}) {
    context.setDeterministicAlgorithms(on, only_warns);
    const auto want = switches();
    run(by(Path::kCuda), Case{}.inputs());
    EXPECT_EQ(switches(), want);
  }
  context.setDeterministicAlgorithms(std::get<0>(before), std::get<1>(before));
}

TEST_F(SoftmaxCuda, TakesAnyStridesAndGivesDenseRows) {
  const Case c{.tokens = 90, .keys = 90};
  const Tensors dense = c.inputs();
  const Tensors want = run(by(Path::kCuda), dense);
  Tensors odd, heads_first, fused;
  for (const auto& x : dense) {
    // Rows that begin between the borders that wide loads need.
    odd.push_back(at::constant_pad_nd(x, {1, 2}).narrow(3, 1, c.dim));
    heads_first.push_back(x.transpose(1, 2).contiguous().transpose(1, 2));
    fused.push_back(at::constant_pad_nd(x, {0, 0, 1, 3}).narrow(2, 1, x.size(2)));
  }
  for (const Tensors& in : {odd, heads_first, fused}) {
    const Tensors got = run(by(Path::kCuda), in);
    EXPECT_TRUE(got[0].is_contiguous());
    for (std::size_t i = 0; i < want.size(); ++i)
      EXPECT_TRUE(test::same_bits(got[i], want[i])) << i;
  }
}

TEST_F(SoftmaxCuda, WhatItCannotRunFallsBack) {
  struct Shape {
    at::ScalarType dtype = at::kBFloat16;
    std::int64_t tokens = 5, keys = 5, key_dim = 64, value_dim = 64;
  };
  const auto taken = [](const Shape& s, Path path) {
    const auto options = at::device(at::kCUDA).dtype(s.dtype);
    return path_taken(at::zeros({1, s.tokens, 2, s.key_dim}, options),
                      at::zeros({1, s.keys, 2, s.key_dim}, options),
                      at::zeros({1, s.keys, 2, s.value_dim}, options), {.path = path});
  };
  for (const Shape& s : {Shape{}, Shape{.dtype = at::kHalf}, Shape{.tokens = 1},
                         Shape{.key_dim = 8, .value_dim = 8}}) {
    EXPECT_EQ(taken(s, Path::kAuto), "cuda flash");
    EXPECT_EQ(taken(s, Path::kComposite), "composite");
  }
  for (const Shape& s :
       {Shape{.dtype = at::kFloat}, Shape{.dtype = at::kDouble},
        Shape{.key_dim = 12, .value_dim = 12}, Shape{.key_dim = 264, .value_dim = 264},
        Shape{.value_dim = 32}, Shape{.tokens = 6}, Shape{.tokens = 0}}) {
    EXPECT_EQ(taken(s, Path::kAuto), "composite");
    EXPECT_ANY_THROW(taken(s, Path::kCuda));
  }
  // And the composite form is right there: tokens before the first key give 0.
  const Case c{.tokens = 90, .keys = 20};
  expect_right(by(Path::kAuto), by_definition(), c.inputs(), "fewer keys than tokens");
}

// Prefill, single tokens and pieces over a cache; sequences of their own lengths in between.
TEST_F(SoftmaxCuda, StreamsReadTheirCacheByIt) {
  at::NoGradGuard no_grad;
  const std::vector<std::vector<std::int64_t>> calls = {
      // new tokens of each sequence
      {100, 100, 100}, {1, 1, 1}, {1, 1, 1}, {30, 1, 2}, {1, 2, 60}, {1, 1, 1}, {50, 50, 50}};
  for (const std::int64_t window : {0, 40}) {
    const Tensors in = Case{.batch = 3, .tokens = 260, .keys = 260}.inputs();
    const Options options{.window = window, .path = Path::kCuda};
    const Tensors wide = converted(in, at::kCPU, at::kDouble);
    const at::Tensor exact = naive(wide[0], wide[1], wide[2], options);
    KvState state(3, {2, 64, 64, window}, in[1].options());
    std::vector<std::int64_t> done(3, 0);
    for (const auto& lengths : calls) {
      const bool rows = lengths[0] == lengths[1] && lengths[0] == lengths[2];
      const auto of_call = [&](const at::Tensor& x) {
        Tensors parts;
        for (std::size_t n = 0; n < 3; ++n)
          parts.push_back(
              x.narrow(0, static_cast<std::int64_t>(n), 1).narrow(1, done[n], lengths[n]));
        return at::cat(parts, rows ? 0 : 1);
      };
      Sequences sequences;
      if (!rows) sequences.offsets = {0, lengths[0], lengths[0] + lengths[1]};
      if (!rows) sequences.offsets.push_back(sequences.offsets.back() + lengths[2]);
      const at::Tensor got =
          state.attend(of_call(in[0]), of_call(in[1]), of_call(in[2]), sequences, options);
      EXPECT_LE(test::relative_error(got, of_call(exact)), tolerance::split_of(at::kBFloat16))
          << "window " << window << " after " << done[0] << " tokens";
      for (std::size_t n = 0; n < 3; ++n) done[n] += lengths[n];
    }
  }
}

TEST_F(SoftmaxCuda, LayersSayWhatRunsAndWhyNothingFasterDoes) {
  const auto path = [](std::int64_t head_dim, at::ScalarType dtype) {
    auto made = mechanism().make_layer({.hidden_size = 64,
                                        .num_layers = 1,
                                        .settings = {{"num_heads", 2}, {"head_dim", head_dim}}});
    EXPECT_TRUE(made.ok()) << made.status().message();
    (*made)->to(at::kCUDA, dtype);
    return (*made)->path(at::Device(at::kCUDA, 0));
  };
  EXPECT_EQ(path(64, at::kBFloat16), "FlashAttention 2 (ATen)");
  EXPECT_EQ(path(64, at::kFloat),
            "composite (ATen); not FlashAttention: it takes bf16 and fp16 only");
  EXPECT_EQ(path(20, at::kBFloat16),
            "composite (ATen); not FlashAttention: head dims must be multiples of 8 up to 256");
}

TEST_F(SoftmaxCuda, WaitsForNothing) {
  const c10::impl::VirtualGuardImpl device(at::kCUDA);
  const at::Tensor x = at::ones({8192, 8192}, at::device(at::kCUDA).dtype(at::kBFloat16));
  at::Tensor product = at::matmul(x, x);
  const Tensors in = Case{.batch = 1}.inputs();
  const Attend packed = [](const auto& q, const auto& k, const auto& v) {
    return attention_packed(q, k, v, std::vector<std::int64_t>{0, 30, 130}, {.path = Path::kCuda});
  };
  for (const Attend& attend : {by(Path::kCuda), packed}) {
    const Tensors first = run(attend, in);
    run(attend, in);  // modules are loaded, and the allocator has memory for one more
    synchronize(x.device());
    for (int i = 0; i < 200; ++i) at::matmul_out(product, x, x);  // 0.2 s and more
    const Tensors second = run(attend, in);
    EXPECT_FALSE(device.queryStream(device.getStream(x.device())));
    synchronize(x.device());
    EXPECT_TRUE(test::same_bits(first[1], second[1]));
  }
}

// A tensor of more than 2^31 elements, dq's fp32 sums among them: in one row, and in rows that only
// their number makes too long.
TEST_F(SoftmaxCuda, LongRowsOfManyHeadsAreRightAtTheirEnd) {
  if (cuda::device_info(0)->memory_bytes < std::int64_t{90} << 30) GTEST_SKIP() << "needs 90 GiB";
  for (const auto& [batch, heads] : {std::pair(1, 132), {2, 66}}) {
    const Case c{.batch = batch,
                 .tokens = 131072,
                 .keys = 131072,
                 .heads = heads,
                 .kv_heads = 6,
                 .dim = 128};
    const Attend attend = by(Path::kCuda, {.window = 256});
    Tensors tail, ends;
    {
      const Tensors in = c.inputs();
      for (const auto& x : in) tail.push_back(x.slice(1, -1024).clone());
      for (const auto& x : run(attend, in)) ends.push_back(x.slice(1, -512).clone());
    }
    const Tensors want = run(attend, tail);
    for (std::size_t i = 0; i < want.size(); ++i)
      EXPECT_LE(test::relative_error(ends[i], want[i].slice(1, -512)),
                tolerance::split_of(at::kBFloat16))
          << i << " of " << batch << " rows";
  }
}

TEST(SoftmaxCudaRefuses, TensorsThatAreOnNoGpu) {
  const at::Tensor x = at::zeros({1, 3, 2, 64}, at::kBFloat16);
  EXPECT_EQ(why_not_flash(at::kCPU, at::kBFloat16, 64, 64), "not on a GPU");
  EXPECT_FALSE(check_flash(x, x, x, {}).ok());
  EXPECT_ANY_THROW(attention(x, x, x, {.path = Path::kCuda}));
  EXPECT_EQ(path_taken(x, x, x, {}), "cpu");
}

}  // namespace
}  // namespace everlong::softmax
