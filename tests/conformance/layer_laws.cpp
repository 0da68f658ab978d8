// Laws 2, 3, 6 and 10 of whole layers with their typed state.
#include <torch/csrc/autograd/autograd.h>

#include <random>

#include "cases.h"
#include "laws.h"

namespace everlong::laws {
namespace {

constexpr std::int64_t kWidth = 32;

at::Tensor random_input(std::int64_t batch, std::int64_t tokens, at::Device device,
                        std::uint64_t seed) {
  seed_all(seed);
  return at::randn({batch, tokens, kWidth}, at::device(device).dtype(at::kDouble));
}

// A layer in float64, so that what is compared is the mathematics and not the rounding.
std::shared_ptr<Mixer> make_double(const LayerCase& layer, at::Device device) {
  auto mixer = layer.make();
  mixer->to(device, at::kDouble);
  return mixer;
}

void check(const std::string& what, const at::Tensor& actual, const at::Tensor& expected,
           double allowed, Violations& broken) {
  const double error = test::relative_error(actual, expected);
  if (!(error <= allowed))
    broken.push_back(cat(what, " is off by ", error, ", allowed ", allowed, " (",
                         test::describe(actual), " against ", test::describe(expected), ")"));
}

void check_state(const std::string& what, const State& actual, const State& expected,
                 double allowed, Violations& broken) {
  if (actual.positions() != expected.positions()) broken.push_back(what + ": positions differ");
  const TensorMap a = actual.tensors(), b = expected.tensors();
  for (const auto& [name, t] : b) {
    if (!a.contains(name)) broken.push_back(cat(what, ": no ", name));
    // A buffer may be longer in one of the two; what both must agree on is tested by the tokens
    // that follow.
    else if (a.at(name).sizes() == t.sizes())
      check(cat(what, ": ", name), a.at(name), t, allowed, broken);
  }
}

std::vector<std::int64_t> cuts_of(std::int64_t tokens, std::mt19937_64& random) {
  std::vector<std::int64_t> cuts = {0, tokens};
  for (std::uint64_t i = 0, n = 1 + random() % 4; i < n; ++i)
    cuts.push_back(static_cast<std::int64_t>(random() % (tokens + 1)));
  std::ranges::sort(cuts);
  return cuts;
}

}  // namespace

LayerCase layer_case(const Mechanism& room, at::Device) {
  LayerSpec spec;
  spec.hidden_size = kWidth;
  spec.num_layers = 4;
  spec.layer_index = 1;
  spec.settings = room.example_settings(kWidth);
  const auto make = [spec, &room] {
    seed_all(99);
    auto made = room.make_layer(spec);
    TORCH_CHECK(made.ok(), made.status().message());
    return std::move(made).value();
  };
  return {room.name, kWidth, room.has("bounded_state"), make};
}

Violations layer_split(const LayerCase& layer, at::Device device) {
  Violations broken;
  const auto mixer = make_double(layer, device);
  constexpr std::int64_t kTokens = 150;
  const auto x = random_input(2, kTokens, device, 1).set_requires_grad(true);
  const auto weights = mixer->parameters();
  std::vector<at::Tensor> sources = {x};
  sources.insert(sources.end(), weights.begin(), weights.end());
  const auto upstream = random_input(2, kTokens, device, 2);

  auto whole_state = mixer->make_state(2);
  const auto whole = mixer->forward(x, {}, whole_state.get());
  check(layer.name + " without a state against with one", mixer->forward(x, {}, nullptr), whole,
        1e-11, broken);
  const auto whole_grads =
      torch::autograd::grad({(whole * upstream).sum()}, sources, {}, std::nullopt, false, true);

  std::mt19937_64 random(7);
  for (int i = 0; i < 20; ++i) {
    auto cuts = cuts_of(kTokens, random);
    if (i == 0) {  // prefill, then one token at a time
      cuts = {0, 100};
      for (std::int64_t t = 101; t <= kTokens; ++t) cuts.push_back(t);
    }
    auto state = mixer->make_state(2);
    std::vector<at::Tensor> parts;
    const bool with_gradients = i % 4 == 0;
    {
      const at::AutoGradMode mode(with_gradients);
      for (std::size_t c = 0; c + 1 < cuts.size(); ++c)
        parts.push_back(
            mixer->forward(x.narrow(1, cuts[c], cuts[c + 1] - cuts[c]), {}, state.get()));
    }
    const auto joined = at::cat(parts, 1);
    const std::string what = cat(layer.name, " in ", cuts.size() - 1, " pieces");
    check(what, joined, whole, tolerance::split_of(at::kDouble), broken);
    check_state(what, *state, *whole_state, tolerance::split_of(at::kDouble), broken);
    if (!with_gradients) continue;
    const auto grads =
        torch::autograd::grad({(joined * upstream).sum()}, sources, {}, std::nullopt, false, true);
    for (std::size_t g = 0; g < grads.size(); ++g) {
      if (!whole_grads[g].defined()) continue;
      check(cat(what, ": gradient ", g), grads[g], whole_grads[g], tolerance::kLayerGradientFloat64,
            broken);
    }
  }
  return broken;
}

Violations layer_ragged(const LayerCase& layer, at::Device device) {
  Violations broken;
  const at::NoGradGuard no_grad;
  const auto mixer = make_double(layer, device);
  // Three feeds of four streams: each feed gives each stream a length of its own, nothing included.
  const std::vector<std::vector<std::int64_t>> feeds = {
      {5, 0, 64, 1}, {1, 70, 0, 3}, {9, 2, 33, 0}};
  constexpr std::int64_t kStreams = 4;
  std::vector<at::Tensor> texts;
  for (std::int64_t n = 0; n < kStreams; ++n) texts.push_back(random_input(1, 120, device, 30 + n));

  auto together = mixer->make_state(kStreams);
  std::vector<std::vector<at::Tensor>> packed_out(kStreams);
  std::vector<std::int64_t> at_token(kStreams, 0);
  for (const auto& lengths : feeds) {
    Sequences sequences{{0}};
    std::vector<at::Tensor> parts;
    for (std::int64_t n = 0; n < kStreams; ++n) {
      parts.push_back(texts[n].narrow(1, at_token[n], lengths[n]));
      sequences.offsets.push_back(sequences.offsets.back() + lengths[n]);
      at_token[n] += lengths[n];
    }
    const auto y = mixer->forward(at::cat(parts, 1), sequences, together.get());
    for (std::int64_t n = 0; n < kStreams; ++n)
      packed_out[n].push_back(y.narrow(1, sequences.offsets[n], lengths[n]));
  }
  if (together->positions() != at_token)
    broken.push_back(layer.name + " ragged: positions are wrong");
  for (std::int64_t n = 0; n < kStreams; ++n) {
    auto alone = mixer->make_state(1);
    const auto expected = mixer->forward(texts[n].narrow(1, 0, at_token[n]), {}, alone.get());
    check(cat(layer.name, " ragged: stream ", n), at::cat(packed_out[n], 1), expected,
          tolerance::split_of(at::kDouble), broken);
    // What follows must agree too: the carried state is right, whatever its buffers look like.
    const auto picked = together->select(std::vector<std::int64_t>{n});
    check(cat(layer.name, " ragged: stream ", n, " afterwards"),
          mixer->forward(texts[0].narrow(1, 0, 3), {}, picked.get()),
          mixer->forward(texts[0].narrow(1, 0, 3), {}, alone.get()),
          tolerance::split_of(at::kDouble), broken);
  }
  return broken;
}

Violations state_stays_in_bound(const LayerCase& layer, at::Device device) {
  Violations broken;
  const at::NoGradGuard no_grad;
  const auto mixer = make_double(layer, device);
  for (const std::int64_t feed : {1, 7, 256}) {
    auto state = mixer->make_state(2);
    std::int64_t fed = 0;
    for (int i = 0; i < 12; ++i) {
      (void)mixer->forward(random_input(2, feed, device, i), {}, state.get());
      fed += feed;
      if (state->positions() != std::vector<std::int64_t>{fed, fed})
        broken.push_back(layer.name + ": positions are wrong");
      if (state->bytes() > state->bytes_bound(fed))
        broken.push_back(cat(layer.name, ": ", state->bytes(), " state bytes after ", fed,
                             " tokens, declared at most ", state->bytes_bound(fed)));
    }
  }
  const auto state = mixer->make_state(1);
  const bool grows =
      state->bytes_bound(std::int64_t{1} << 40) != state->bytes_bound(std::int64_t{1} << 20);
  if (grows == layer.bounded_state)
    broken.push_back(
        cat(layer.name, grows ? ": the bound grows with the text, undeclared"
                              : ": declares an unbounded state, yet its bound is constant"));
  return broken;
}

Violations state_goes_on(const LayerCase& layer, at::Device device) {
  Violations broken;
  const at::NoGradGuard no_grad;
  const auto mixer = layer.make();
  mixer->to(device);
  const auto text = random_input(2, 90, device, 5).to(at::kFloat);
  auto state = mixer->make_state(2);
  (void)mixer->forward(text.narrow(1, 0, 70), {}, state.get());
  const auto fork = state->clone();
  auto loaded = mixer->make_state(2);
  TensorMap copies;
  for (const auto& [name, t] : state->tensors()) copies[name] = t.clone().cpu().to(t.device());
  if (const Status status = loaded->restore(copies); !status.ok())
    broken.push_back(cat(layer.name, ": refuses its own state: ", status.message()));
  loaded->positions() = state->positions();

  // Two feeds, so that a difference that only shows later still shows.
  for (const auto& [begin, length] : {std::pair{70, 13}, {83, 1}, {84, 6}}) {
    const auto next = text.narrow(1, begin, length);
    const auto expected = mixer->forward(next, {}, state.get());
    if (!test::same_bits(mixer->forward(next, {}, fork.get()), expected))
      broken.push_back(cat(layer.name, ": a fork goes on with other bits at token ", begin));
    if (!test::same_bits(mixer->forward(next, {}, loaded.get()), expected))
      broken.push_back(
          cat(layer.name, ": a restored state goes on with other bits at token ", begin));
  }
  // Reset one of two; the other keeps its past.
  const auto mixed = state->select(std::vector<std::int64_t>{-1, 1});
  auto fresh = mixer->make_state(2);
  const auto x = random_input(2, 4, device, 6).to(at::kFloat);
  const auto y_mixed = mixer->forward(x, {}, mixed.get());
  const auto y_fresh = mixer->forward(x, {}, fresh.get());
  const auto y_kept = mixer->forward(x, {}, state.get());
  check(layer.name + ": a reset sequence", y_mixed[0], y_fresh[0], tolerance::split_of(at::kFloat),
        broken);
  check(layer.name + ": the neighbour of a reset sequence", y_mixed[1], y_kept[1],
        tolerance::split_of(at::kFloat), broken);

  // A state of another shape, dtype or name is refused and changes nothing.
  const auto damage = [&](const std::string& what,
                          const std::function<at::Tensor(const at::Tensor&)>& change) {
    for (const auto& [name, t] : state->tensors()) {
      TensorMap wrong = state->tensors();
      wrong[name] = change(t);
      const auto before = state->tensors();
      if (state->restore(wrong).ok())
        broken.push_back(cat(layer.name, ": accepts ", name, " ", what));
      for (const auto& [other, kept] : state->tensors())
        if (!test::same_bits(kept, before.at(other)))
          broken.push_back(cat(layer.name, ": a refused restore changed ", other));
    }
  };
  damage("with one sequence more", [](const at::Tensor& t) {
    return at::cat({t, t.narrow(0, 0, 1)}, 0);
  });
  damage("as int8", [](const at::Tensor& t) { return t.to(at::kChar); });
  TensorMap missing = state->tensors();
  missing.erase(missing.begin());
  if (state->restore(missing).ok())
    broken.push_back(layer.name + ": accepts a state with a tensor missing");
  TensorMap extra = state->tensors();
  extra["stranger"] = at::zeros({2});
  if (state->restore(extra).ok())
    broken.push_back(layer.name + ": accepts a state with a tensor too many");
  return broken;
}

Violations settings_are_checked(const Mechanism& room) {
  Violations broken;
  LayerSpec spec;
  spec.hidden_size = kWidth;
  spec.num_layers = 4;
  spec.layer_index = 1;
  const auto settings = room.example_settings(kWidth);
  const auto expect_refusal = [&](const std::string& key, const nlohmann::json& value) {
    spec.settings = settings;
    spec.settings[key] = value;
    const auto made = room.make_layer(spec);
    const std::string shown = cat(room.name, ": the setting ", key, " = ", value.dump());
    if (made.ok())
      broken.push_back(shown + " is taken");
    else if (made.status().message().find(key) == std::string::npos)
      broken.push_back(shown + " is refused without its name: " + made.status().message());
  };
  expect_refusal("no_such_setting", 1);
  // No setting is a table of tables, whatever its type.
  for (const auto& [key, value] : settings.items())
    expect_refusal(key, {{"not", {{"a", "setting"}}}});
  return broken;
}

Violations layer_past_ignores_future(const LayerCase& layer, at::Device device) {
  Violations broken;
  const at::NoGradGuard no_grad;
  const auto mixer = layer.make();
  mixer->to(device);
  const auto x = random_input(2, 150, device, 8).to(at::kFloat);
  const auto y = mixer->forward(x, {}, nullptr);
  for (const std::int64_t changed : {1, 64, 100, 149}) {
    auto other = x.clone();
    other.narrow(1, changed, 150 - changed).mul_(-3).add_(1);
    const auto y_other = mixer->forward(other, {}, nullptr);
    if (!test::same_bits(y.narrow(1, 0, changed), y_other.narrow(1, 0, changed)))
      broken.push_back(
          cat(layer.name, ": changing tokens from ", changed, " changed outputs before"));
    if (test::same_bits(y, y_other))
      broken.push_back(cat(layer.name, ": changing tokens from ", changed, " changed nothing"));
  }
  auto spoiled = x.clone();
  spoiled[0].fill_(std::nan(""));
  auto state = mixer->make_state(2), clean = mixer->make_state(2);
  const auto sick = mixer->forward(spoiled, {}, state.get());
  (void)mixer->forward(x, {}, clean.get());
  if (!test::same_bits(sick[1], y[1]))
    broken.push_back(layer.name + ": NaN in one sequence changed its neighbour");
  const auto next = random_input(2, 3, device, 9).to(at::kFloat);
  if (!test::same_bits(mixer->forward(next, {}, state.get())[1],
                       mixer->forward(next, {}, clean.get())[1]))
    broken.push_back(layer.name + ": NaN in one sequence changed its neighbour's state");
  return broken;
}

}  // namespace everlong::laws
