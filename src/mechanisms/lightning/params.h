// Decayed linear attention: the decay rules of the published models, and the shapes every form of
// this room accepts.
//
//   S_t = exp(-s_h) S_{t-1} + k_t v_t^T,   o_t = scale * S_t^T q_t        (Lightning Attention-2,
//   2401.04658, section 3)
//
// Torch-free. Legend: B batch, T tokens, H heads, K key dim, V value dim, N sequences.
#pragma once
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace everlong::lightning {

// How head h of layer l of L gets its slope s >= 0, the decay in nats per token. No two of them are
// interchangeable: a checkpoint was trained with one. `base` is ALiBi (2108.12409): 2^(-8(h+1)/H)
// for H a power of two, otherwise the slopes of the power of two below H followed by every other
// slope of the power of two above it (not sorted).
enum class SlopeRule {
  kAlibi,       // base, whatever the layer
  kAlibiLayer,  // base (1 - l/(L-1) + 1e-5): TransNormerLLM, MiniMax-01's own code
  kMinimaxHf,   // (2^(-8/H))^(h+1) (1 - l/(L-1+1e-5) + 1e-5), for every H: transformers `minimax`
  kLing,  // base (1 - (l-1)/(L-1) + 1e-5): Ling/Ring-linear as published; layer 0 decays more than
          // base
  kLingClamped,  // the same with max(l-1, 0): mlx-lm
  kPaper,        // (8h/H)(1 - l/L), h from 0: 2405.17381 eq. 10. No released checkpoint uses it
};

struct SlopeRuleName {
  SlopeRule rule;
  std::string_view name;  // as settings and golden files write it
};
inline constexpr SlopeRuleName kSlopeRules[] = {
    {SlopeRule::kAlibi, "alibi"},
    {SlopeRule::kAlibiLayer, "alibi_layer"},
    {SlopeRule::kMinimaxHf, "minimax_hf"},
    {SlopeRule::kLing, "ling"},
    {SlopeRule::kLingClamped, "ling_clamped"},
    {SlopeRule::kPaper, "paper"},
};

Result<SlopeRule> parse_slope_rule(std::string_view name);
std::vector<std::string> slope_rule_names();

// The H slopes of one layer, in float64. `layer` counts every layer of the model, other mechanisms'
// too: 0 <= layer < num_layers. A model of one layer has the layer factor 1 + 1e-5, where the
// formulas would divide by zero.
Result<std::vector<double>> slopes(SlopeRule rule, std::int64_t heads, std::int64_t layer,
                                   std::int64_t num_layers);

// What every form accepts; a kernel may accept less and says so itself.
inline constexpr std::int64_t kMaxHeads = 65536;
inline constexpr std::int64_t kMaxHeadDim = 16384;  // of keys and of values

struct Shape {
  std::int64_t batch = 1, tokens = 0, heads = 1, key_dim = 1, value_dim = 1;
  // N+1 offsets of the sequences packed into batch = 1; empty: N = B sequences of T tokens.
  std::span<const std::int64_t> cu_seqlens = {};

  std::int64_t sequences() const {
    return cu_seqlens.empty() ? batch : static_cast<std::int64_t>(cu_seqlens.size()) - 1;
  }
};

// Cheap; every form calls it before any work. slope: H finite values >= 0. scale: finite.
Status validate(const Shape& shape, std::span<const double> slope, double scale);

}  // namespace everlong::lightning
