// The complex moving average in ATen.
#include <ATen/ATen.h>

#include <numbers>

#include "mechanisms/megalodon/op.h"
#include "mechanisms/megalodon/op_rows.h"

namespace everlong::megalodon {
namespace {

// Tokens of a block: M is [64, 64] a channel, as much work as 16 modes in and out.
constexpr std::int64_t kBlock = 64;

// a, c = gamma / sqrt(M) as [D, M], and what powers of q are made of, fp64: the logarithm of |q|
// and the angle in turns, where reducing is exact.
struct Modes {
  at::Tensor a, c_re, c_im;   // working dtype
  at::Tensor log_rho, turns;  // fp64

  Modes(const EmaWeights& w, at::ScalarType dtype) {
    const std::int64_t M = w.modes();
    const at::Tensor share = at::sigmoid(w.alpha_DM1.squeeze(-1).to(at::kDouble));
    const at::Tensor loss = share * at::sigmoid(w.delta_DM1.squeeze(-1).to(at::kDouble));
    // Saturated sigmoids give q = 0, whose logarithm would spoil q^0; e^-700 is 0 in any sum.
    log_rho = at::log1p(-loss).clamp_min(-700);
    const at::Tensor index = at::arange(1, M + 1, share.options());
    turns = at::sigmoid(w.theta_D11.squeeze(-1).to(at::kDouble)) * index / static_cast<double>(M);
    a = share.to(dtype);
    const at::Tensor c = w.gamma_DM2.to(dtype) / std::sqrt(static_cast<double>(M));
    c_re = c.select(-1, 0);
    c_im = c.select(-1, 1);
  }

  // q^j for j = 0..most: real and imaginary parts, [D, M, most + 1].
  std::pair<at::Tensor, at::Tensor> powers(std::int64_t most) const {
    const auto dtype = a.scalar_type();
    const at::Tensor j = at::arange(0, most + 1, turns.options());
    const at::Tensor whole = turns.unsqueeze(-1) * j;
    const at::Tensor angle = ((whole - whole.floor().detach()) * (2 * std::numbers::pi)).to(dtype);
    const at::Tensor size = (log_rho.unsqueeze(-1) * j).to(dtype).exp();
    return {size * angle.cos(), size * angle.sin()};
  }
};

// Block matrices of one block length C: y = M u + Re(Q h), h' = q^C h + P u.
struct Blocks {
  at::Tensor within;  // M [D, C, C], lower Toeplitz of K_j = sum_n Re(c a q^j)
  at::Tensor read;    // [D, C, 2 M]: rows Re(c q^(i+1) h) for h as (all re, all im)
  at::Tensor write;   // [D, 2 M, C]: a q^(C-1-k)
  at::Tensor re, im;  // q^j, j = 0..C

  Blocks(const Modes& m, std::int64_t C) {
    std::tie(re, im) = m.powers(C);
    const at::Tensor c_re = m.c_re.unsqueeze(-1), c_im = m.c_im.unsqueeze(-1);
    const at::Tensor out_re = c_re * re - c_im * im, out_im = c_re * im + c_im * re;
    const at::Tensor kernel = (m.a.unsqueeze(-1) * out_re.narrow(2, 0, C)).sum(1);  // [D, C]
    // Row i of the windows over (zeros, K) is K_{i-C+1}, .., K_i: backwards it is row i of M.
    within = at::constant_pad_nd(kernel, {C - 1, 0}).unfold(1, C, 1).flip(-1);
    read = at::cat({out_re.narrow(2, 1, C), -out_im.narrow(2, 1, C)}, 1).transpose(1, 2);
    write = (at::cat({re, im}, 1).narrow(2, 0, C) * at::cat({m.a, m.a}, 1).unsqueeze(-1)).flip(-1);
  }
};

at::Tensor halves(const at::Tensor& h) {  // complex [D, M, ..] -> [D, 2 M, ..]
  return at::cat({at::real(h), at::imag(h)}, 1);
}

// `chunks` runs of `length` tokens for each of B rows; h complex [D, M, B] moves on.
at::Tensor run_blocks(const at::Tensor& x_BTD, std::int64_t chunks, std::int64_t length,
                      const Modes& modes, const Blocks& blocks, at::Tensor& h) {
  const std::int64_t B = x_BTD.size(0), D = x_BTD.size(2), M = modes.a.size(1);
  const std::int64_t C = blocks.within.size(1);
  const at::Tensor within = blocks.within.narrow(1, 0, length).narrow(2, 0, length);
  const at::Tensor read = blocks.read.narrow(1, 0, length);
  const at::Tensor write = blocks.write.narrow(2, C - length, length);
  const at::Tensor power =
      at::complex(blocks.re.select(2, length), blocks.im.select(2, length)).unsqueeze(-1);
  const at::Tensor u =  // [D, length, chunks * B]
      x_BTD.reshape({B, chunks, length, D}).permute({3, 2, 1, 0}).reshape({D, length, chunks * B});
  const at::Tensor added = at::bmm(write, u).view({D, 2, M, chunks, B});
  const auto steps = at::complex(added.select(1, 0), added.select(1, 1)).unbind(2);
  std::vector<at::Tensor> starts;
  for (const at::Tensor& step : steps) {
    starts.push_back(h);
    h = at::addcmul(step, power, h);
  }
  const at::Tensor before = halves(at::stack(starts, 2)).flatten(2);  // [D, 2 M, chunks * B]
  const at::Tensor y = at::baddbmm(at::bmm(read, before), within, u);
  return y.view({D, length, chunks, B}).permute({3, 2, 1, 0}).reshape({B, chunks * length, D});
}

at::Tensor complex_state(const at::Tensor& x_BTD, const EmaWeights& w, const at::Tensor& h_BDM2,
                         at::ScalarType dtype) {
  const std::int64_t B = x_BTD.size(0), D = w.width(), M = w.modes();
  return h_BDM2.defined() ? at::view_as_complex(h_BDM2.to(dtype).contiguous())
                          : at::zeros({B, D, M}, x_BTD.options().dtype(at::toComplexType(dtype)));
}

}  // namespace

at::Tensor ema_planes(const EmaWeights& w) {
  // q is rounded once: its error grows with every token that passes through it.
  const Modes modes(w, at::kDouble);
  const auto [re, im] = modes.powers(1);
  return at::stack({re.select(2, 1), im.select(2, 1), modes.a, modes.c_re, modes.c_im})
      .transpose(1, 2)
      .to(at::kFloat, /*non_blocking=*/false, /*copy=*/false, at::MemoryFormat::Contiguous);
}

Averaged composite_cema(const at::Tensor& x_BTD, const EmaWeights& w, const at::Tensor& h_BDM2) {
  const std::int64_t T = x_BTD.size(1);
  const auto dtype = working_dtype(x_BTD);
  const at::Tensor start = complex_state(x_BTD, w, h_BDM2, dtype);
  if (T == 0) return {x_BTD.clone(), at::view_as_real(start).clone()};
  const at::Tensor x = x_BTD.to(dtype);
  const std::int64_t C = std::min(T, kBlock), whole = T / C, rest = T % C;
  const Modes modes(w, dtype);
  const Blocks blocks(modes, C);
  at::Tensor h = start.permute({1, 2, 0});
  std::vector<at::Tensor> ys = {run_blocks(x.narrow(1, 0, whole * C), whole, C, modes, blocks, h)};
  if (rest > 0) ys.push_back(run_blocks(x.narrow(1, whole * C, rest), 1, rest, modes, blocks, h));
  const at::Tensor y = ys.size() == 1 ? ys.front() : at::cat(ys, 1);
  const at::Tensor omega = w.omega_D1.squeeze(-1).to(dtype);
  return {at::addcmul(y, x, omega).to(x_BTD.scalar_type()),
          at::view_as_real(h.permute({2, 0, 1}).contiguous())};
}

Averaged naive_cema(const at::Tensor& x_BTD, const EmaWeights& w, const at::Tensor& h_BDM2) {
  const auto dtype = working_dtype(x_BTD);
  at::Tensor h = complex_state(x_BTD, w, h_BDM2, dtype);
  if (x_BTD.size(1) == 0) return {x_BTD.clone(), at::view_as_real(h).clone()};
  const at::Tensor x = x_BTD.to(dtype);
  const Modes modes(w, dtype);
  // Every token uses q: in fp64, where so many slopes of one tensor add up without loss.
  const auto [re, im] = Modes(w, at::kDouble).powers(1);
  const at::Tensor q = at::complex(re.select(2, 1), im.select(2, 1));
  std::vector<at::Tensor> ys;
  for (const at::Tensor& u : x.unbind(1)) {  // [B, D]
    h = q.to(h.scalar_type()) * h + modes.a * u.unsqueeze(-1);
    ys.push_back((modes.c_re * at::real(h) - modes.c_im * at::imag(h)).sum(-1));
  }
  const at::Tensor omega = w.omega_D1.squeeze(-1).to(dtype);
  return {at::addcmul(at::stack(ys, 1), x, omega).to(x_BTD.scalar_type()), at::view_as_real(h)};
}

}  // namespace everlong::megalodon
