// The operators of a Megalodon layer in float64, written from the equations, with every gradient by
// hand: the oracle of this room. Slow and plain on purpose; one sequence a call, arrays row-major.
// Sources: arXiv 2404.08801 (sections 3.1 to 3.3) and, where the two differ, the published code
// (README.md of this room, section 7).
#pragma once
#include <cstdint>
#include <span>
#include <vector>

namespace everlong::megalodon::reference {

using Values = std::span<const double>;
using Doubles = std::vector<double>;

// --- Timestep norm. A_t, S_t: mean and population variance of the d = D / G channels of a group.
//   n += 1;  D1 = A_t - mu;  mu += D1 / n;  var += (S_t + (1 - 1/n) D1^2 - var) / n
//   y = (x - mu) (var + eps)^(-1/2) (1 + w) + b         the statistics include the token itself
struct Norm {
  std::int64_t tokens = 0, width = 1, groups = 1;
  double eps = 1e-5;
  Values x, weight, bias;  // [T, D], [D], [D]
  std::int64_t count = 0;  // tokens before these, and their statistics [G] (empty: zeros)
  Values mean, var;
};
struct NormResult {
  Doubles y, mean, var;
  std::int64_t count = 0;
};
NormResult timestep_norm(const Norm& norm);
// The same as equation 4 says it: mean and variance pooled over all scalars of the group so far.
NormResult timestep_norm_pooled(const Norm& norm);

struct NormGradients {
  Doubles x, weight, bias, mean, var;
};
// grad_mean, grad_var: of the final statistics [G]; empty: zero.
NormGradients timestep_norm_gradients(const Norm& norm, Values grad_y, Values grad_mean,
                                      Values grad_var);

// --- Complex exponential moving average; a = sig(alpha), q = (1 - a sig(delta)) e^(i phi),
//   phi = n sig(theta) 2 pi / M for n = 1..M, c = gamma / sqrt(M)
//   h_t = q h_{t-1} + a x_t        y_t = sum_n Re(c h_t) + omega x_t
struct Ema {
  std::int64_t tokens = 0, width = 1, modes = 1;
  Values x;                    // [T, D]
  Values alpha, delta, theta;  // [D, M], [D, M], [D]
  Values gamma, omega;         // [D, M, 2], [D]
  Values h;                    // [D, M, 2] (re, im); empty: zeros
};
struct EmaResult {
  Doubles y, h;
};
EmaResult ema(const Ema& ema);                              // the recurrence
EmaResult ema_chunked(const Ema& ema, std::int64_t block);  // Toeplitz within blocks
EmaResult ema_fft(const Ema& ema);                          // one convolution

struct EmaGradients {
  Doubles x, alpha, delta, theta, gamma, omega, h;
};
// grad_h: (dL/dRe, dL/dIm) of the final state; empty: zero.
EmaGradients ema_gradients(const Ema& ema, Values grad_y, Values grad_h);

// --- Attention inside fixed chunks. zn = z / sqrt(mean of its head z^2 + eps);
//   q, k = zn (1 + gamma[0|1]) / sqrt(K) + beta[0|1], turned by the position inside the chunk in
//   pairs (2i, 2i + 1);  o = softmax(q k^T, j <= i, same chunk) v
struct Attention {
  std::int64_t tokens = 0, past = 0;  // past: keys of the unfinished chunk, below `chunk`
  std::int64_t heads = 1, key_dim = 2, value_dim = 1, chunk = 1;
  double rope_base = 10000, eps = 1e-5;
  Values z, v;              // [T, H, K], [T, H, V]
  Values gamma, beta;       // [2, H K]
  Values cache_k, cache_v;  // [past, H, K] already turned, [past, H, V]
};
struct AttentionResult {
  Doubles o, cache_k, cache_v;
  std::int64_t count = 0;  // rows of the caches
};
AttentionResult chunk_attention(const Attention& attention);
// Token by token with a cache that is dropped at each chunk's end.
AttentionResult chunk_attention_recurrent(const Attention& attention);

struct AttentionGradients {
  Doubles z, v, gamma, beta, cache_k, cache_v;
};
// grad_k, grad_v: of the final caches; empty: zero.
AttentionGradients chunk_attention_gradients(const Attention& attention, Values grad_o,
                                             Values grad_k, Values grad_v);

}  // namespace everlong::megalodon::reference
