// How an OpCall of this room runs: reading it, and giving each sequence its past.
#pragma once
#include "mechanisms/longnet/op.h"
#include "mechanisms/longnet/reference.h"
#include "ops/operator.h"

namespace everlong::longnet {

// What a call of "dilated_decode" says beside.
struct DecodeParams {
  std::int64_t prefill = 0;
  std::vector<std::vector<std::int64_t>> state_rows;  // empty: not told
};

// Refuses names, shapes, dtypes, devices, offsets, positions and parameters that no form can run.
// `decode`: non-null reads its parameters too.
Result<Params> read_call(const OpCall& call, DecodeParams* decode = nullptr);

// A form made of ATen operations: attention or naive of op.h. Differentiable; any device.
using Attend = at::Tensor (*)(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const Options& options, const Past& past);
OpResult run_sequences(Attend attend, const TensorMap& inputs, const TensorMap& state,
                       const Params& params);

// A form of reference.h, with the gradients by hand. fp64 on the CPU.
using Reference = std::vector<double> (*)(const reference::Problem& problem);
OpResult run_reference(Reference form, const OpCall& call, const Params& params);

}  // namespace everlong::longnet
