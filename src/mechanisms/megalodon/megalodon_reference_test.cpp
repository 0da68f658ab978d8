// The float64 oracle: its forms agree, its gradients agree with differences.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

#include "mechanisms/megalodon/params.h"
#include "mechanisms/megalodon/reference.h"
#include "support/tolerance.h"

namespace everlong::megalodon::reference {
namespace {

Doubles draw(std::int64_t size, std::uint64_t seed, double scale = 1, double mean = 0) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(mean, scale);
  Doubles out(static_cast<std::size_t>(size));
  for (double& x : out) x = normal(random);
  return out;
}

void expect_close(const Doubles& a, const Doubles& b, double allowed, const char* what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  double largest = 1;
  for (const double x : b) largest = std::max(largest, std::abs(x));
  for (std::size_t i = 0; i < a.size(); ++i)
    ASSERT_NEAR(a[i], b[i], allowed * largest) << what << " " << i;
}

double dot(const Doubles& a, const Doubles& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// The derivative of `loss` along a random direction of `x` against <gradient, direction>.
void expect_derivative(Doubles& x, const Doubles& gradient, const std::function<double()>& loss,
                       const char* what) {
  ASSERT_EQ(x.size(), gradient.size()) << what;
  const Doubles direction = draw(static_cast<std::int64_t>(x.size()), 77), start = x;
  constexpr double kStep = 1e-4;
  const auto at = [&](double step) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = start[i] + step * direction[i];
    return loss();
  };
  // Of fourth order: phases make the third derivative large.
  const double numeric =
      (8 * (at(kStep) - at(-kStep)) - (at(2 * kStep) - at(-2 * kStep))) / (12 * kStep);
  x = start;
  const double exact = dot(gradient, direction);
  EXPECT_NEAR(numeric, exact, tolerance::kFiniteDifference * (1 + std::abs(exact))) << what;
}

struct NormCase {
  Doubles x, weight, bias, mean, var;
  Norm norm;
  NormCase(std::int64_t tokens, std::int64_t count, double offset = 0)
      : x(draw(tokens * 6, 1, 1, offset)),
        weight(draw(6, 2, 0.3)),
        bias(draw(6, 3)),
        mean(draw(2, 4, 1, offset)),
        var{1.3, 0.4},
        norm{tokens, 6, 2, 1e-5, {}, {}, {}, count, {}, {}} {
    view();
  }
  void view() {
    norm.x = x;
    norm.weight = weight;
    norm.bias = bias;
    norm.mean = mean;
    norm.var = var;
  }
};

TEST(MegalodonReference, PooledStatisticsAreTheRecurrence) {
  for (const std::int64_t tokens : {0, 1, 2, 63})
    for (const std::int64_t count : {std::int64_t{0}, std::int64_t{5}, std::int64_t{1} << 31}) {
      const NormCase c(tokens, count);
      const NormResult a = timestep_norm(c.norm), b = timestep_norm_pooled(c.norm);
      expect_close(a.y, b.y, 1e-12, "y");
      expect_close(a.mean, b.mean, 1e-12, "mean");
      expect_close(a.var, b.var, 1e-12, "var");
      EXPECT_EQ(a.count, count + tokens);
    }
}

TEST(MegalodonReference, AFreshFirstTokenIsPlainGroupNorm) {
  const NormCase c(1, 0);
  const NormResult out = timestep_norm(c.norm);
  for (std::int64_t g = 0; g < 2; ++g) {
    double mean = 0, square = 0;
    for (std::int64_t i = 0; i < 3; ++i) {
      const double plain = (out.y[g * 3 + i] - c.bias[g * 3 + i]) / (1 + c.weight[g * 3 + i]);
      mean += plain / 3;
      square += plain * plain / 3;
    }
    EXPECT_NEAR(mean, 0, 1e-12);
    EXPECT_NEAR(square, 1, 1e-3);  // eps takes a little
  }
}

TEST(MegalodonReference, LargeMeansKeepTheirVariance) {
  const NormCase c(200, 0, 1e6);
  const NormResult a = timestep_norm(c.norm), b = timestep_norm_pooled(c.norm);
  expect_close(a.var, b.var, 1e-7, "var");
  EXPECT_NEAR(a.var[0], 1, 0.2);
}

TEST(MegalodonReference, NormGradientsAreDerivatives) {
  for (const std::int64_t count : {0, 3}) {
    NormCase c(9, count);
    const Doubles gy = draw(54, 5), gm = draw(2, 6), gv = draw(2, 7);
    const NormGradients d = timestep_norm_gradients(c.norm, gy, gm, gv);
    const auto loss = [&] {
      c.view();
      const NormResult out = timestep_norm(c.norm);
      return dot(out.y, gy) + dot(out.mean, gm) + dot(out.var, gv);
    };
    expect_derivative(c.x, d.x, loss, "x");
    expect_derivative(c.weight, d.weight, loss, "weight");
    expect_derivative(c.bias, d.bias, loss, "bias");
    expect_derivative(c.mean, d.mean, loss, "mean");
    expect_derivative(c.var, d.var, loss, "var");
  }
}

struct EmaCase {
  Doubles x, alpha, delta, theta, gamma, omega, h;
  Ema ema;
  EmaCase(std::int64_t tokens, std::int64_t modes, bool state, double slow = 0)
      : x(draw(tokens * 3, 1)),
        alpha(draw(3 * modes, 2)),
        delta(draw(3 * modes, 3, 1, slow)),
        theta(draw(3, 4)),
        gamma(draw(6 * modes, 5)),
        omega(draw(3, 6)),
        h(state ? draw(6 * modes, 7) : Doubles()),
        ema{tokens, 3, modes, {}, {}, {}, {}, {}, {}, {}} {
    view();
  }
  void view() {
    ema.x = x;
    ema.alpha = alpha;
    ema.delta = delta;
    ema.theta = theta;
    ema.gamma = gamma;
    ema.omega = omega;
    ema.h = h;
  }
};

TEST(MegalodonReference, TheThreeFormsOfTheMovingAverageAgree) {
  for (const std::int64_t modes : {1, 8, 16})
    for (const std::int64_t tokens : {0, 1, 31, 32, 33, 200})
      for (const bool state : {false, true})
        for (const double slow : {0.0, -12.0}) {  // -12: |q| within 1e-5 of 1
          const EmaCase c(tokens, modes, state, slow);
          const EmaResult a = ema(c.ema), b = ema_chunked(c.ema, 32), f = ema_fft(c.ema);
          expect_close(b.y, a.y, 1e-12, "chunked y");
          expect_close(b.h, a.h, 1e-12, "chunked h");
          expect_close(f.y, a.y, 1e-12, "fft y");
          expect_close(f.h, a.h, 1e-12, "fft h");
        }
}

TEST(MegalodonReference, MovingAverageGradientsAreDerivatives) {
  for (const bool state : {false, true}) {
    EmaCase c(13, 5, state);
    const Doubles gy = draw(39, 8), gh = draw(30, 9);
    const EmaGradients d = ema_gradients(c.ema, gy, gh);
    const auto loss = [&] {
      c.view();
      const EmaResult out = ema(c.ema);
      return dot(out.y, gy) + dot(out.h, gh);
    };
    expect_derivative(c.x, d.x, loss, "x");
    expect_derivative(c.alpha, d.alpha, loss, "alpha");
    expect_derivative(c.delta, d.delta, loss, "delta");
    expect_derivative(c.theta, d.theta, loss, "theta");
    expect_derivative(c.gamma, d.gamma, loss, "gamma");
    expect_derivative(c.omega, d.omega, loss, "omega");
    if (state) expect_derivative(c.h, d.h, loss, "h");
  }
}

struct AttentionCase {
  Doubles z, v, gamma, beta, cache_k, cache_v;
  Attention attention;
  AttentionCase(std::int64_t tokens, std::int64_t past, std::int64_t chunk)
      : z(draw(tokens * 8, 1)),
        v(draw(tokens * 6, 2)),
        gamma(draw(16, 3)),
        beta(draw(16, 4)),
        cache_k(draw(past * 8, 5)),
        cache_v(draw(past * 6, 6)) {
    attention.tokens = tokens;
    attention.past = past;
    attention.heads = 2;
    attention.key_dim = 4;
    attention.value_dim = 3;
    attention.chunk = chunk;
    view();
  }
  void view() {
    attention.z = z;
    attention.v = v;
    attention.gamma = gamma;
    attention.beta = beta;
    attention.cache_k = cache_k;
    attention.cache_v = cache_v;
  }
};

TEST(MegalodonReference, ACacheDroppedAtEachChunksEndIsTheWholePass) {
  for (const std::int64_t tokens : {0, 1, 7, 8, 30})
    for (const std::int64_t past : {0, 3, 7}) {
      const AttentionCase c(tokens, past, 8);
      const AttentionResult a = chunk_attention(c.attention),
                            b = chunk_attention_recurrent(c.attention);
      expect_close(b.o, a.o, 1e-12, "o");
      expect_close(b.cache_k, a.cache_k, 1e-12, "cache_k");
      expect_close(b.cache_v, a.cache_v, 1e-12, "cache_v");
      EXPECT_EQ(a.count, b.count);
      EXPECT_EQ(a.count, (past + tokens) % 8);
    }
}

TEST(MegalodonReference, AttentionGradientsAreDerivatives) {
  AttentionCase c(11, 3, 8);  // the rest of a chunk, a whole one less two, so a cache of 6 rows
  const Doubles go = draw(66, 8), gk = draw(6 * 8, 9), gv = draw(6 * 6, 10);
  const AttentionGradients d = chunk_attention_gradients(c.attention, go, gk, gv);
  const auto loss = [&] {
    c.view();
    const AttentionResult out = chunk_attention(c.attention);
    return dot(out.o, go) + dot(out.cache_k, gk) + dot(out.cache_v, gv);
  };
  expect_derivative(c.z, d.z, loss, "z");
  expect_derivative(c.v, d.v, loss, "v");
  expect_derivative(c.gamma, d.gamma, loss, "gamma");
  expect_derivative(c.beta, d.beta, loss, "beta");
  expect_derivative(c.cache_k, d.cache_k, loss, "cache_k");
  expect_derivative(c.cache_v, d.cache_v, loss, "cache_v");
}

TEST(MegalodonParams, PiecesCoverTheTokensAndRespectTheBorders) {
  for (std::int64_t past = 0; past < 8; ++past)
    for (std::int64_t tokens = 0; tokens < 40; ++tokens) {
      std::int64_t covered = 0;
      for (const Piece& piece : pieces_of(past, tokens, 8)) {
        EXPECT_EQ(piece.begin, covered);
        EXPECT_GT(piece.length, 0);
        EXPECT_EQ(piece.past, (past + piece.begin) % 8);
        EXPECT_LE(piece.past + piece.length, 8);
        EXPECT_TRUE(piece.chunks == 1 || piece.length == 8);
        covered += piece.chunks * piece.length;
      }
      EXPECT_EQ(covered, tokens);
    }
  EXPECT_EQ(pairs_in_chunks(3, 2, 8), 4 + 5);
  EXPECT_EQ(pairs_in_chunks(0, 17, 8), 36 + 36 + 1);
}

TEST(MegalodonParams, ImpossibleSizesAreRefusedWithTheNumber) {
  EXPECT_NE(check_norm(10, 3, 1e-5).message().find("3 norm groups"), std::string::npos);
  EXPECT_FALSE(check_norm(10, 0, 1e-5).ok());
  EXPECT_FALSE(check_norm(10, 5, -1).ok());
  EXPECT_FALSE(check_ema(10, 0).ok());
  EXPECT_FALSE(check_attention(1, 3, 4, 8, 1e4, 1e-5).ok());  // an odd key dim
  EXPECT_FALSE(check_attention(1, 4, 4, 0, 1e4, 1e-5).ok());
  EXPECT_FALSE(check_attention(1, 4, 4, 8, NAN, 1e-5).ok());
  EXPECT_TRUE(check_attention(1, 4, 2048, 8, 1e4, 1e-5).ok());
}

}  // namespace
}  // namespace everlong::megalodon::reference
