// The CPU kernel against the float64 reference: values and gradients, every combination of norm and
// average, lengths around tiles and segments, odd widths, packed sequences, one thread and several.
#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <cstdlib>
#include <numbers>
#include <random>
#include <thread>

#include "mechanisms/megalodon/kernel.h"
#include "mechanisms/megalodon/reference.h"

namespace everlong::megalodon {
namespace {

// fp32 sums of some hundred terms, divided by small numbers in the norm.
constexpr double kFloat32 = 3e-5;

struct Case {
  std::int64_t width = 48, groups = 3, modes = 4;
  std::vector<std::int64_t> lengths = {65};
  std::uint64_t seed = 1;
};

std::vector<double> draw(std::int64_t size, std::mt19937_64& random, double mean = 0) {
  std::normal_distribution<double> normal(mean, 1);
  std::vector<double> out(static_cast<std::size_t>(size));
  for (double& x : out) x = static_cast<double>(static_cast<float>(normal(random)));
  return out;
}
std::vector<float> narrow(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}

ConstTensorView view(const std::vector<float>& x, std::int64_t rows, std::int64_t width) {
  return {x.data(), DType::kFloat32, {1, 1, rows, width}, {0, rows * width, width, 1}};
}
TensorView view(std::vector<float>& x, std::int64_t rows, std::int64_t width) {
  return {x.data(), DType::kFloat32, {1, 1, rows, width}, {0, rows * width, width, 1}};
}

class Threads final : public Executor {  // tasks in turn on as many threads
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

struct Memory {
  explicit Memory(std::int64_t bytes) : size((bytes + 63) / 64 * 64) {
    data = std::aligned_alloc(64, static_cast<std::size_t>(size > 0 ? size : 64));
    std::fill_n(static_cast<float*>(data), size / 4, NAN);  // poison
  }
  ~Memory() { std::free(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::span<std::byte> bytes() const {
    return {static_cast<std::byte*>(data), static_cast<std::size_t>(size)};
  }
  std::int64_t size;
  void* data;
};

struct Inputs {
  std::vector<std::int64_t> offsets = {0}, counts;
  std::int64_t tokens = 0, N = 0;
  std::vector<double> x, weight, bias, mean, var, alpha, delta, theta, gamma, omega, h;
  std::vector<double> gu, ge, gm, gv, gh;

  explicit Inputs(const Case& c) {
    std::mt19937_64 random(c.seed);
    for (const auto length : c.lengths) {
      offsets.push_back(offsets.back() + length);
      counts.push_back(N++ == 1 ? 0 : 4);
    }
    tokens = offsets.back();
    const std::int64_t D = c.width, G = c.groups, M = c.modes;
    x = draw(tokens * D, random, 0.5);
    weight = draw(D, random);
    bias = draw(D, random);
    mean = draw(N * G, random);
    var = draw(N * G, random);
    for (double& v : var) v = std::abs(v) + 0.5;
    alpha = draw(D * M, random);
    delta = draw(D * M, random);
    theta = draw(D, random, -1);
    gamma = draw(2 * D * M, random);
    omega = draw(D, random);
    h = draw(2 * N * D * M, random);
    gu = draw(tokens * D, random);
    ge = draw(tokens * D, random);
    gm = draw(N * G, random);
    gv = draw(N * G, random);
    gh = draw(2 * N * D * M, random);
  }
};

// q, a, c from the stored parameters, [5, M, D], and the chain back to them.
std::vector<double> coefficients(const Inputs& in, const Case& c) {
  std::vector<double> out(static_cast<std::size_t>(5 * c.modes * c.width));
  const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
  for (std::int64_t j = 0; j < c.width; ++j)
    for (std::int64_t n = 0; n < c.modes; ++n) {
      const std::int64_t at = j * c.modes + n;
      const double a = sigmoid(in.alpha[at]), M = static_cast<double>(c.modes);
      const double phi =
          static_cast<double>(n + 1) * sigmoid(in.theta[j]) * 2 * std::numbers::pi / M;
      const auto q = std::polar(1 - a * sigmoid(in.delta[at]), phi);
      const double values[] = {q.real(), q.imag(), a, in.gamma[2 * at] / std::sqrt(M),
                               in.gamma[2 * at + 1] / std::sqrt(M)};
      for (std::int64_t p = 0; p < 5; ++p) out[(p * c.modes + n) * c.width + j] = values[p];
    }
  return out;
}

struct Outputs {
  std::vector<float> u, e, h, dx, dgain, dbias, dcoefficients, domega, dh;
  std::vector<double> mean, var, dmean, dvar;
};

Outputs run_kernel(const Case& c, const Inputs& in, const Executor& executor) {
  const std::int64_t D = c.width, G = c.groups, M = c.modes, T = in.tokens;
  const auto sized = [](std::int64_t count) {
    return std::vector<float>(static_cast<std::size_t>(count), NAN);
  };
  const auto wide = [](std::int64_t count) {
    return std::vector<double>(static_cast<std::size_t>(count), NAN);
  };
  Outputs out{sized(T * D),     sized(T * D),   sized(2 * in.N * D * M),
              sized(T * D),     sized(D),       sized(D),
              sized(5 * M * D), sized(D),       sized(2 * in.N * D * M),
              wide(in.N * G),   wide(in.N * G), wide(in.N * G),
              wide(in.N * G)};
  const auto x = narrow(in.x), bias = narrow(in.bias), planes = narrow(coefficients(in, c)),
             omega = narrow(in.omega), h = narrow(in.h), gu = narrow(in.gu), ge = narrow(in.ge),
             gh = narrow(in.gh);
  std::vector<float> gain;
  for (const double w : in.weight) gain.push_back(static_cast<float>(1 + w));
  NormEmaCall call;
  call.x = view(x, T, D);
  call.offsets = in.offsets;
  if (G > 0) {
    call.groups = G;
    call.eps = 1e-5;
    call.gain = gain.data();
    call.bias = bias.data();
    call.counts = in.counts;
    call.mean = in.mean.data();
    call.var = in.var.data();
  }
  if (M > 0) {
    call.modes = M;
    call.coefficients = planes.data();
    call.omega = omega.data();
    call.h = h.data();
  }
  NormEmaResult result;
  auto means = wide(T * G), scales = wide(T * G);
  auto checkpoints = sized(call.segments() * 2 * M * D);
  if (G > 0) {
    result.u = view(out.u, T, D);
    result.mean = out.mean.data();
    result.var = out.var.data();
    result.means = means.data();
    result.scales = scales.data();
  }
  if (M > 0) {
    result.e = view(out.e, T, D);
    result.h = out.h.data();
    result.checkpoints = checkpoints.data();
  }
  const int threads = executor.threads();
  const Memory first(forward_workspace_bytes(call, threads));
  EXPECT_TRUE(forward(call, result, first.bytes(), executor).ok());
  NormEmaGrads grads;
  if (G > 0) {
    grads.grad_u = view(gu, T, D);
    grads.grad_mean = in.gm.data();
    grads.grad_var = in.gv.data();
    grads.means = means.data();
    grads.scales = scales.data();
    grads.grad_gain = out.dgain.data();
    grads.grad_bias = out.dbias.data();
    grads.grad_mean_in = out.dmean.data();
    grads.grad_var_in = out.dvar.data();
  }
  if (M > 0) {
    grads.grad_e = view(ge, T, D);
    grads.grad_h = gh.data();
    grads.checkpoints = checkpoints.data();
    grads.grad_coefficients = out.dcoefficients.data();
    grads.grad_omega = out.domega.data();
    grads.grad_h_in = out.dh.data();
  }
  grads.grad_x = view(out.dx, T, D);
  const Memory second(backward_workspace_bytes(call, threads));
  EXPECT_TRUE(backward(call, grads, second.bytes(), executor).ok());
  return out;
}

template <class A>
void expect_close(const std::vector<A>& actual, const std::vector<double>& wanted,
                  const char* what) {
  ASSERT_EQ(actual.size(), wanted.size()) << what;
  double largest = 1;
  for (const double x : wanted) largest = std::max(largest, std::abs(x));
  for (std::size_t i = 0; i < wanted.size(); ++i)
    ASSERT_NEAR(static_cast<double>(actual[i]), wanted[i], kFloat32 * largest) << what << " " << i;
}

// The reference, one sequence after another. The gradients of the coefficients are chained to alpha
// and the others by hand there; here the kernel's are, by the same formulas.
void expect_reference(const Case& c, const Inputs& in, const Outputs& out) {
  const std::int64_t D = c.width, G = c.groups, M = c.modes;
  std::vector<double> u, e, h, mean, var, dx, dh, dmean, dvar;
  std::vector<double> dweight(D), dbias(D), domega(D), dalpha(D * M), ddelta(D * M), dtheta(D),
      dgamma(2 * D * M);
  const auto append = [](std::vector<double>& to, const std::vector<double>& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  const auto add = [](std::vector<double>& to, const std::vector<double>& from) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  };
  for (std::int64_t n = 0; n < in.N; ++n) {
    const auto part = [](const std::vector<double>& v, std::int64_t begin, std::int64_t count) {
      return std::span(v).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count));
    };
    const std::int64_t begin = in.offsets[n] * D, T = in.offsets[n + 1] - in.offsets[n];
    const auto x = part(in.x, begin, T * D);
    const reference::Norm norm{T,
                               D,
                               std::max<std::int64_t>(G, 1),
                               1e-5,
                               x,
                               in.weight,
                               in.bias,
                               in.counts[n],
                               part(in.mean, n * G, G),
                               part(in.var, n * G, G)};
    std::vector<double> mine(x.begin(), x.end());
    if (G > 0) {
      const auto result = reference::timestep_norm(norm);
      mine = result.y;
      append(u, result.y);
      append(mean, result.mean);
      append(var, result.var);
    }
    std::vector<double> du(mine.size());
    if (G > 0) du.assign(in.gu.begin() + begin, in.gu.begin() + begin + T * D);
    if (M > 0) {
      const reference::Ema ema{
          T,        D,        M,        mine,     in.alpha,
          in.delta, in.theta, in.gamma, in.omega, part(in.h, n * 2 * D * M, 2 * D * M)};
      const auto result = reference::ema(ema);
      append(e, result.y);
      append(h, result.h);
      const auto d = reference::ema_gradients(ema, part(in.ge, begin, T * D),
                                              part(in.gh, n * 2 * D * M, 2 * D * M));
      add(du, d.x);
      add(domega, d.omega);
      add(dalpha, d.alpha);
      add(ddelta, d.delta);
      add(dtheta, d.theta);
      add(dgamma, d.gamma);
      append(dh, d.h);
    }
    if (G == 0) {
      append(dx, du);
      continue;
    }
    const auto d =
        reference::timestep_norm_gradients(norm, du, part(in.gm, n * G, G), part(in.gv, n * G, G));
    append(dx, d.x);
    add(dweight, d.weight);
    add(dbias, d.bias);
    append(dmean, d.mean);
    append(dvar, d.var);
  }
  expect_close(out.dx, dx, "dx");
  if (G > 0) {
    expect_close(out.u, u, "u");
    expect_close(out.mean, mean, "mean");
    expect_close(out.var, var, "var");
    expect_close(out.dgain, dweight, "dweight");
    expect_close(out.dbias, dbias, "dbias");
    expect_close(out.dmean, dmean, "dmean");
    expect_close(out.dvar, dvar, "dvar");
  }
  if (M == 0) return;
  expect_close(out.e, e, "e");
  expect_close(out.h, h, "h");
  expect_close(out.domega, domega, "domega");
  expect_close(out.dh, dh, "dh");
  const auto planes = coefficients(in, c);
  const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
  std::vector<double> alpha(D * M), delta(D * M), theta(D), gamma(2 * D * M);
  for (std::int64_t j = 0; j < D; ++j)
    for (std::int64_t n = 0; n < M; ++n) {
      const auto plane = [&](const auto& all, std::int64_t p) {
        return static_cast<double>(all[(p * M + n) * D + j]);
      };
      const std::int64_t at = j * M + n;
      const double a = sigmoid(in.alpha[at]), damping = sigmoid(in.delta[at]),
                   share = sigmoid(in.theta[j]), root = std::sqrt(static_cast<double>(M));
      const std::complex<double> q(plane(planes, 0), plane(planes, 1)),
          dq(plane(out.dcoefficients, 0), plane(out.dcoefficients, 1));
      const double drho = (dq * std::conj(q)).real() / std::abs(q),
                   dphi = (dq * std::conj(q)).imag();
      alpha[at] = a * (1 - a) * (plane(out.dcoefficients, 2) - damping * drho);
      delta[at] = damping * (1 - damping) * -a * drho;
      theta[j] += share * (1 - share) * 2 * std::numbers::pi / static_cast<double>(M) *
                  static_cast<double>(n + 1) * dphi;
      gamma[2 * at] = plane(out.dcoefficients, 3) / root;
      gamma[2 * at + 1] = plane(out.dcoefficients, 4) / root;
    }
  expect_close(alpha, dalpha, "dalpha");
  expect_close(delta, ddelta, "ddelta");
  expect_close(theta, dtheta, "dtheta");
  expect_close(gamma, dgamma, "dgamma");
}

TEST(MegalodonKernel, IsTheReferenceForEveryPart) {
  const SerialExecutor serial;
  std::uint64_t seed = 0;
  for (const auto& [width, groups, modes] :
       {std::tuple<std::int64_t, std::int64_t, std::int64_t>{48, 3, 16},
        {40, 5, 5},
        {7, 1, 1},
        {96, 2, 8},
        {20, 4, 0},
        {37, 0, 3}})
    for (const std::vector<std::int64_t>& lengths :
         {std::vector<std::int64_t>{1}, {63}, {65}, {256}, {600}, {5, 0, 1, 300}}) {
      const Case c{width, groups, modes, lengths, ++seed};
      SCOPED_TRACE(cat("width ", width, " groups ", groups, " modes ", modes, " first length ",
                       lengths.front()));
      const Inputs in(c);
      expect_reference(c, in, run_kernel(c, in, serial));
    }
}

TEST(MegalodonKernel, ThreadsDoNotChangeABit) {
  const Case c{.width = 96, .groups = 6, .modes = 16, .lengths = {70, 3, 290}};
  const Inputs in(c);
  const Outputs one = run_kernel(c, in, SerialExecutor()), four = run_kernel(c, in, Threads(4));
  EXPECT_EQ(one.e, four.e);
  EXPECT_EQ(one.dx, four.dx);
  EXPECT_EQ(one.dcoefficients, four.dcoefficients);
  EXPECT_EQ(one.dmean, four.dmean);
}

TEST(MegalodonKernel, RefusesWhatItCannotRun) {
  NormEmaCall call;
  call.x = {nullptr, DType::kFloat64, {1, 1, 2, 8}, {0, 16, 8, 1}};
  call.modes = 1;
  EXPECT_NE(check_kernel_call(call).message().find("fp32 or bf16"), std::string::npos);
  call.x.dtype = DType::kFloat32;
  EXPECT_TRUE(check_kernel_call(call).ok());
  call.x.strides[3] = 2;
  EXPECT_FALSE(check_kernel_call(call).ok());
  call.x.strides[3] = 1;
  call.modes = 0;
  EXPECT_FALSE(check_kernel_call(call).ok());
}

}  // namespace
}  // namespace everlong::megalodon
