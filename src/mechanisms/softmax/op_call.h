// How an OpCall of this room runs: reading it, and giving each sequence its keys, past and new.
#pragma once
#include "mechanisms/softmax/op.h"
#include "mechanisms/softmax/params.h"
#include "mechanisms/softmax/reference.h"
#include "ops/operator.h"

namespace everlong::softmax {

// Refuses names, shapes, dtypes, devices, offsets, lengths and settings that no form can run.
Result<Params> read_call(const OpCall& call);

// A form made of ATen operations: attention or naive of op.h. Differentiable; any device.
using Attend = at::Tensor (*)(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const Options& options);
OpResult run_sequences(Attend attend, const TensorMap& inputs, const TensorMap& state,
                       const Params& params);

// A form of reference.h, with the gradients by hand. fp64 on the CPU.
using Reference = std::vector<double> (*)(const reference::Problem& problem);
OpResult run_reference(Reference form, const OpCall& call, const Params& params);

}  // namespace everlong::softmax
