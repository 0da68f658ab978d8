// How an OpCall of this room runs: reading it, and giving each sequence its past.
#pragma once
#include "mechanisms/infini/op.h"
#include "mechanisms/infini/reference.h"

namespace everlong::infini {

// Refuses names, shapes, dtypes, devices, offsets, positions and settings that no form can run.
// memory_only: kind infini_memory.
Result<Params> read_call(const OpCall& call, bool memory_only);

// A form made of ATen operations. Differentiable; any device.
using Form = Mixed (*)(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& beta, const at::Tensor& weight, const Carried& before,
                       const Options& options);
OpResult run_sequences(Form form, const TensorMap& inputs, const TensorMap& state,
                       const Params& params);

// A form of reference.h, with the gradients by hand. fp64 on the CPU.
using Reference = reference::Answer (*)(const reference::Problem& problem);
Result<OpResult> run_reference(Reference form, const OpCall& call, const Params& params);

}  // namespace everlong::infini
