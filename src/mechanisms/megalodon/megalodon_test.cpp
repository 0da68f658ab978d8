// What no law sees: masks and document starts, long texts, ragged phases, the state's numbers.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <random>

#include "mechanisms/megalodon/layer.h"
#include "mechanisms/megalodon/op.h"
#include "support/compare.h"

namespace everlong::megalodon {
namespace {

using test::relative_error;

std::vector<const Operator*> all_operators() {
  return {&timestep_norm_operator(), &cema_operator(), &norm_cema_operator(),
          &chunk_attention_operator()};
}

OpCall with_gradients(const Operator& op, std::string_view form, OpCall call) {
  const auto plain = op.run(form, call);
  EXPECT_TRUE(plain.ok()) << plain.status().message();
  at::manual_seed(5);
  for (const auto& [name, x] : plain->out) call.grad_out[name] = at::randn_like(x);
  for (const auto& [name, x] : plain->state)
    if (x.is_floating_point()) call.grad_out["state." + name] = at::randn_like(x);
  return call;
}

TEST(Megalodon, AMaskedTokenIsAsIfItWereNotThere) {
  for (const Operator* op : all_operators())
    for (const std::string form : {"reference", "naive", "composite"}) {
      SCOPED_TRACE(cat(op->kind(), " ", form));
      // Rows of 9 tokens of which 6 and 9 are there; what is masked is not a number.
      const OpShape shape{.batch = 2, .tokens = 9, .initial_state = true, .seed = 3};
      OpCall call = op->sample(shape);
      const at::Tensor mask = at::zeros({2, 9}, at::kByte);
      const std::vector<std::int64_t> there = {1, 2, 4, 5, 6, 8};
      for (const std::int64_t t : {0, 3, 7}) {
        mask[0][t] = 1;
        for (const auto& name : op->token_inputs()) call.inputs[name][0][t].fill_(std::nan(""));
      }
      OpCall kept = call;
      call.inputs["padding_mask"] = mask;
      const at::Tensor index = at::tensor(there, at::kLong);
      for (const auto& name : op->token_inputs())
        kept.inputs[name] = call.inputs[name].narrow(0, 0, 1).index_select(1, index);
      for (auto& [name, x] : kept.state) x = x.narrow(0, 0, 1);
      const auto masked = op->run(form, with_gradients(*op, form, call));
      const auto alone = op->run(form, kept);
      ASSERT_TRUE(masked.ok() && alone.ok())
          << masked.status().message() << alone.status().message();
      for (const auto& [name, y] : alone->out) {
        const at::Tensor row = masked->out.at(name).narrow(0, 0, 1);
        EXPECT_LT(relative_error(row.index_select(1, index), y), 1e-12) << name;
        EXPECT_EQ(row.index_select(1, at::tensor({0, 3, 7}, at::kLong)).abs().sum().item<double>(),
                  0);
      }
      for (const auto& [name, x] : alone->state) {
        const at::Tensor row = masked->state.at(name).narrow(0, 0, 1);
        EXPECT_LT(relative_error(row.narrow(1 % row.dim(), 0, x.size(1 % x.dim())), x), 1e-12)
            << name;
      }
      for (const auto& [name, gradient] : masked->grad)
        EXPECT_TRUE(at::isfinite(gradient).all().item<bool>()) << name;
    }
}

TEST(Megalodon, AResetIsolatesDocumentsExactly) {
  for (const Operator* op : all_operators())
    for (const std::string form : {"reference", "naive", "composite"}) {
      SCOPED_TRACE(cat(op->kind(), " ", form));
      const OpShape shape{.batch = 1, .tokens = 70, .initial_state = true, .seed = 4};
      OpCall call = op->sample(shape);
      const at::Tensor reset = at::zeros({1, 70}, at::kByte);
      reset[0][20] = 1;
      reset[0][21] = 1;
      call.inputs["reset"] = reset;
      call = with_gradients(*op, form, call);
      const auto together = op->run(form, call);
      ASSERT_TRUE(together.ok()) << together.status().message();
      // Nothing of the last document reaches back over its start.
      for (const auto& [name, x] : together->grad)
        EXPECT_TRUE(at::isfinite(x).all().item<bool>()) << name;
      // The last document by itself, from nothing.
      OpCall last = op->sample(shape);
      last.state.clear();
      for (const auto& name : op->token_inputs())
        last.inputs[name] = last.inputs[name].narrow(1, 21, 49);
      const auto alone = op->run(form, last);
      ASSERT_TRUE(alone.ok());
      for (const auto& [name, y] : alone->out)
        EXPECT_LT(relative_error(together->out.at(name).narrow(1, 21, 49), y), 1e-12) << name;
      for (const auto& [name, x] : alone->state)
        EXPECT_LT(relative_error(together->state.at(name), x), 1e-12) << name;
      // Whatever came before changes no bit of it.
      call.grad_out.clear();
      for (const auto& name : op->token_inputs())
        call.inputs[name].narrow(1, 0, 21).fill_(std::nan(""));
      const auto spoiled = op->run(form, call);
      for (const auto& [name, y] : together->out)
        EXPECT_TRUE(test::same_bits(spoiled->out.at(name).narrow(1, 21, 49), y.narrow(1, 21, 49)));
    }
}

// 10^6 tokens in pieces of all sizes, single ones among them, with a drifting mean.
TEST(Megalodon, AMillionTokensKeepTheirStatistics) {
  constexpr std::int64_t kTokens = 1000000, kWidth = 32;
  const at::NoGradGuard off;
  at::manual_seed(1);
  const MovingAverage average(kWidth, 16);
  const EmaWeights weights = average.weights();
  const at::Tensor zero = at::zeros({kWidth});
  NormState state = fresh_norm_state(1, 2, at::kCPU);
  at::Tensor h, exact_h;
  at::Tensor sum = at::zeros({1, 2}, at::kDouble), u_tail;
  std::mt19937_64 random(2);
  EmaWeights wide = weights;
  wide.planes_5MD = at::Tensor();
  for (at::Tensor* w :
       {&wide.alpha_DM1, &wide.delta_DM1, &wide.theta_D11, &wide.gamma_DM2, &wide.omega_D1})
    *w = w->to(at::kDouble);
  for (std::int64_t done = 0; done < kTokens;) {
    const std::int64_t length =
        std::min<std::int64_t>(kTokens - done, random() % 4 == 0 ? 1 : 1 + random() % 8000);
    const at::Tensor x = at::randn({1, length, kWidth}) + 5 * static_cast<double>(done) / kTokens;
    const NormAveraged out = norm_cema(x, zero, zero, kNormEps, weights, {}, state, h, Path::kCpu);
    sum += x.to(at::kDouble).view({1, length, 2, 16}).mean(-1).sum(1);
    exact_h = cema(out.u_BTD.to(at::kDouble), wide, {}, exact_h).h_NDM2;
    state = out.norm;
    h = out.h_NDM2;
    done += length;
  }
  EXPECT_EQ(state.counts[0], kTokens);
  EXPECT_LT((state.mean_NG - sum / kTokens).abs().max().item<double>(), 1e-9);
  EXPECT_LT((h.to(at::kDouble) - exact_h).abs().max().item<double>(), 1e-5);
}

// The kernel goes token by token with its state in fp32, so a cut changes no bit.
TEST(Megalodon, NormAndAverageKeepTheirBitsUnderAnyCut) {
  const at::NoGradGuard off;
  at::manual_seed(10);
  const MovingAverage average(48, 6);
  const at::Tensor weight = at::randn({48}) * 0.2, bias = at::randn({48});
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = at::randn({2, 300, 48}).to(dtype);
    const NormState start = fresh_norm_state(2, 3, at::kCPU);
    const NormAveraged whole = norm_cema(x, weight, bias, kNormEps, average.weights(), {}, start,
                                         at::Tensor(), Path::kCpu);
    NormState norm = start;
    at::Tensor h;
    std::int64_t begin = 0;
    for (const std::int64_t length : {1, 63, 64, 7, 0, 165}) {
      const NormAveraged part = norm_cema(x.narrow(1, begin, length), weight, bias, kNormEps,
                                          average.weights(), {}, norm, h, Path::kCpu);
      EXPECT_TRUE(test::same_bits(part.u_BTD, whole.u_BTD.narrow(1, begin, length)));
      EXPECT_TRUE(test::same_bits(part.e_BTD, whole.e_BTD.narrow(1, begin, length)));
      norm = part.norm;
      h = part.h_NDM2;
      begin += length;
    }
    EXPECT_TRUE(test::same_bits(h, whole.h_NDM2));
    EXPECT_TRUE(test::same_bits(norm.var_NG, whole.norm.var_NG));
  }
}

TEST(Megalodon, TheKernelRunsWhereItCan) {
  EXPECT_EQ(path_taken(at::empty({1, 2, 4})), "cpu");
  EXPECT_EQ(path_taken(at::empty({1, 2, 4}, at::kBFloat16)), "cpu");
  EXPECT_EQ(path_taken(at::empty({1, 2, 4}, at::kDouble)), "composite");
  EXPECT_EQ(path_taken(at::empty({1, 2, 4}), Path::kComposite), "composite");
  EXPECT_ANY_THROW((void)path_taken(at::empty({1, 2, 4}, at::kDouble), Path::kCpu));
}

// Values wider than the softmax block takes, and keys in a buffer with strides of its own.
TEST(Megalodon, WideValuesAreAttendedSliceBySlice) {
  at::manual_seed(3);
  const at::Tensor gamma = at::randn({2, 32}) * 0.3, beta = at::randn({2, 32}) * 0.3;
  const AttentionShape shape{.chunk = 100};
  std::vector<at::Tensor> grads[2];
  at::Tensor outputs[2];
  const at::Tensor z0 = at::randn({2, 250, 2, 16}), v0 = at::randn({2, 250, 2, 600}),
                   go = at::randn({2, 250, 2, 600});
  for (const Path path : {Path::kComposite, Path::kCpu}) {
    const at::Tensor z = z0.clone().set_requires_grad(true), v = v0.clone().set_requires_grad(true);
    const Attended out = chunk_attention(z, v, gamma, beta, shape, {}, empty_cache(2, z, v), path);
    (out.o_BTHV * go).sum().backward();
    const auto i = static_cast<std::size_t>(path == Path::kCpu);
    outputs[i] = out.o_BTHV.detach();
    grads[i] = {z.grad(), v.grad()};
  }
  EXPECT_LT(relative_error(outputs[1], outputs[0]), 1e-5);
  EXPECT_LT(relative_error(grads[1][0], grads[0][0]), 3e-5);
  EXPECT_LT(relative_error(grads[1][1], grads[0][1]), 1e-5);
}

LayerSettings small_layer() {
  LayerSettings s;
  s.hidden_size = 24;
  s.num_heads = 2;
  s.z_dim = 16;
  s.value_dim = 32;
  s.cema_ndim = 4;
  s.norm_num_groups = 3;
  s.chunk_size = 16;
  return s;
}

// Every stream of a batch at a place of its own in its chunk, fed by random lengths across borders,
// with a graph and without one.
TEST(Megalodon, RaggedStreamsOfAnyPhaseAreEachByThemselves) {
  at::manual_seed(4);
  GatedAttention layer(small_layer());
  layer.to(at::kDouble);
  for (const bool graph : {false, true}) {
    const at::AutoGradMode mode(graph);
    std::mt19937_64 random(5);
    constexpr std::int64_t kStreams = 5, kTokens = 90;
    const at::Tensor texts = at::randn({kStreams, kTokens, 24}, at::kDouble);
    const at::Tensor whole = layer.forward(texts, {}, nullptr);
    auto state = layer.make_state(kStreams);
    std::vector<std::int64_t> at_token(kStreams, 0);
    for (int feed = 0; feed < 12; ++feed) {
      Sequences sequences{{0}};
      std::vector<at::Tensor> parts, wanted;
      for (std::int64_t n = 0; n < kStreams; ++n) {
        const std::int64_t left = kTokens - at_token[n],
                           length = std::min<std::int64_t>(
                               left, static_cast<std::int64_t>(random() % 40));
        parts.push_back(texts[n].narrow(0, at_token[n], length));
        wanted.push_back(whole[n].narrow(0, at_token[n], length));
        at_token[n] += length;
        sequences.offsets.push_back(sequences.offsets.back() + length);
      }
      const at::Tensor y = layer.forward(at::cat(parts).unsqueeze(0), sequences, state.get());
      EXPECT_LT(relative_error(y[0], at::cat(wanted)), 1e-11) << "feed " << feed;
    }
    EXPECT_EQ(state->positions(), at_token);
  }
}

// Rows of one batch in different phases without packing.
TEST(Megalodon, RowsOfABatchNeedNotBeInPhase) {
  at::manual_seed(6);
  GatedAttention layer(small_layer());
  layer.to(at::kDouble);
  const at::NoGradGuard off;
  const at::Tensor texts = at::randn({3, 60, 24}, at::kDouble);
  const at::Tensor whole = layer.forward(texts, {}, nullptr);
  auto state = layer.make_state(3);
  (void)layer.forward(at::cat({texts[0].narrow(0, 0, 5), texts[2].narrow(0, 0, 20)}).unsqueeze(0),
                      {{0, 5, 5, 25}}, state.get());
  const std::int64_t starts[] = {5, 0, 20};
  for (int step = 0; step < 2; ++step) {  // 13 tokens across borders, then one
    const std::int64_t length = step == 0 ? 13 : 1, begin = step == 0 ? 0 : 13;
    std::vector<at::Tensor> rows, wanted;
    for (std::int64_t n = 0; n < 3; ++n) {
      rows.push_back(texts[n].narrow(0, starts[n] + begin, length));
      wanted.push_back(whole[n].narrow(0, starts[n] + begin, length));
    }
    EXPECT_LT(relative_error(layer.forward(at::stack(rows), {}, state.get()), at::stack(wanted)),
              1e-11);
  }
}

TEST(Megalodon, HandlesToAStateStayTrueWhileItGoesOn) {
  at::manual_seed(7);
  GatedAttention layer(small_layer());
  const at::NoGradGuard off;
  auto state = layer.make_state(1);
  (void)layer.forward(at::randn({1, 10, 24}), {}, state.get());
  const TensorMap held = state->tensors();
  const at::Tensor rows = held.at("attn.cache_k").narrow(1, 0, 10).clone(),
                   h = held.at("cema.h").clone();
  (void)layer.forward(at::randn({1, 40, 24}), {}, state.get());  // over two chunk borders
  EXPECT_TRUE(at::equal(held.at("attn.cache_k").narrow(1, 0, 10), rows));
  EXPECT_TRUE(at::equal(held.at("cema.h"), h));
}

TEST(Megalodon, CoefficientsFollowTheWeights) {
  at::manual_seed(8);
  MovingAverage average(4, 2);
  const at::NoGradGuard off;
  const at::Tensor before = average.weights().planes_5MD;
  EXPECT_TRUE(average.weights().planes_5MD.is_same(before));
  average.named_parameters()["alpha"].add_(1);
  EXPECT_FALSE(at::equal(average.weights().planes_5MD, before));
  average.named_parameters()["theta"].set_data(at::ones({4, 1, 1}));
  EXPECT_TRUE(at::equal(
      average.weights().planes_5MD,
      ema_planes({average.named_parameters()["alpha"], average.named_parameters()["delta"],
                  average.named_parameters()["theta"], average.named_parameters()["gamma"],
                  average.named_parameters()["omega"]})));
}

TEST(Megalodon, IsInitialisedAsPublished) {
  at::manual_seed(9);
  const MovingAverage average(512, 16);
  const EmaWeights w = average.weights();
  EXPECT_NEAR(w.alpha_DM1.std().item<double>(), 0.2, 0.01);
  EXPECT_LE(w.omega_D1.abs().max().item<double>(), 1);
  EXPECT_NEAR(w.omega_D1.std().item<double>(), 0.25, 0.03);
  EXPECT_EQ(w.gamma_DM2.select(2, 1).abs().sum().item<double>(), 0);
  // Log-uniform between 1/D and 1.
  const at::Tensor f = std::get<0>(at::sigmoid(w.theta_D11).view({-1}).sort());
  EXPECT_NEAR(f[0].item<double>(), 1.0 / 512, 1e-5);
  EXPECT_NEAR(f[256].item<double>(), 1 / std::sqrt(512.0), 1e-3);
  // |q| lies between 0.57 and 0.88, 0.75 in the middle.
  const at::Tensor planes = ema_planes(w);
  const at::Tensor size = (planes[0].square() + planes[1].square()).sqrt();
  EXPECT_NEAR(size.mean().item<double>(), 0.75, 0.01);
  const Projection projection(300, 400, true);
  EXPECT_NEAR(projection.weight().std().item<double>(), 1 / std::sqrt(900.0), 1e-3);
}

}  // namespace
}  // namespace everlong::megalodon
