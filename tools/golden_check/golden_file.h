// What an everlong-golden-1 file says, and the comparison with what was computed.
#pragma once
#include <map>
#include <optional>
#include <string>

#include "core/safetensors.h"
#include "ops/operator.h"

namespace everlong::golden {

struct Case {
  OpCall call;  // weights are inputs under their whole name: "w.out_proj.weight"
  TensorMap out, state,
      grad;  // what the reference computed; gradients named as OpResult names them
  double rtol = 0, atol = 0;
};

// Floating point as float64.
Result<Case> read_case(const SafetensorsFile& file);

// By the names of tensors: "out.o", "state_out.S", "grad.q".
using Shares = std::map<std::string, double>;

// The first difference as a sentence, or nothing; `worst` collects the largest relative error.
// |a - b| <= atol + (rtol + more[name]) max|b| everywhere; whole numbers are equal. Non-finite
// values never pass.
std::optional<std::string> difference(const Case& wanted, const OpResult& given, double& worst,
                                      const Shares& more = {});

// The same share for every tensor of the case.
Shares everywhere(const Case& wanted, double share);

// What a layer or a model in fp32, the dtype that people run on a CPU and that fused kernels take,
// may be off by: 1000 ulps, for norms that divide by small numbers and sums of all lengths.
inline constexpr double kLayerFloat32 = 1e-4;

// Floating tensors in fp32.
OpCall in_float32(const OpCall& call);

// max|a - b| / max|b| of every tensor that both have with one shape.
Shares relative_errors(const Case& wanted, const OpResult& given);

}  // namespace everlong::golden
