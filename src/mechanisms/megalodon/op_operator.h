// Between the operators of this room: reading weights and states of a call, and drawing random
// ones.
#pragma once
#include <ATen/ATen.h>

#include "core/settings.h"
#include "mechanisms/megalodon/op.h"
#include "mechanisms/megalodon/op_call.h"
#include "mechanisms/megalodon/op_cpu.h"
#include "mechanisms/megalodon/op_rows.h"
#include "ops/reference_call.h"

namespace everlong::megalodon {

// The EmaWeights of inputs w.alpha, .., or of `prefix` in the place of "w.".
EmaWeights ema_weights(const TensorMap& inputs, const std::string& prefix = "w.");
Status check_ema_weights(const OpCall& call, std::int64_t width);

// One random draw after another from a generator of its own.
class Draw {
 public:
  explicit Draw(std::uint64_t seed);
  at::Tensor operator()(at::IntArrayRef sizes, double scale = 1, double mean = 0);

 private:
  at::Generator generator_;
};
void draw_ema_weights(Draw& draw, OpCall& call, std::int64_t width, std::int64_t modes);
void draw_norm_state(Draw& draw, OpCall& call, std::int64_t sequences, std::int64_t groups);

std::span<const double> numbers(const std::vector<double>& values);
// Rows [begin, begin + length) of the tokens of sequence n, as doubles.
std::vector<double> sequence_doubles(const at::Tensor& x, const OpCall& call, std::int64_t n);
// The place of sequence n in a tensor of tokens, to write to.
at::Tensor sequence_view(const at::Tensor& x, const OpCall& call, std::int64_t n);

Status unknown_form(std::string_view form, const std::vector<OpForm>& forms);

}  // namespace everlong::megalodon
