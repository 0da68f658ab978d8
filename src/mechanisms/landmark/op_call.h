// How an OpCall of landmark_attention runs: reading it, and giving each sequence its keys, past and
// new.
#pragma once
#include <set>

#include "core/settings.h"
#include "mechanisms/landmark/op.h"
#include "mechanisms/landmark/params.h"
#include "mechanisms/landmark/reference.h"
#include "ops/operator.h"

namespace everlong::landmark {

// Refuses names outside `known` and the lack of any of `needed`.
Status check_names(const TensorMap& given, const std::set<std::string>& needed,
                   const std::set<std::string>& optional, const char* what);
// One floating-point dtype and one device for all that is named.
Status check_numbers(const std::vector<std::pair<std::string, at::Tensor>>& tensors);
// bool or uint8 of this shape.
Status check_marks(const std::string& name, const at::Tensor& marks, at::IntArrayRef shape);
// "empty_block": "keep" or "drop".
bool read_drop_empty(Settings& settings);

struct AttentionCall {
  Params params;
  std::int64_t block = 0, phase = 0;  // 0: the input is_landmark says
};

// Refuses names, shapes, dtypes, devices, offsets, lengths and settings that no form can run.
Result<AttentionCall> read_call(const OpCall& call);

// A form made of ATen operations. Differentiable; any device.
using Attend = at::Tensor (*)(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& marks, const Options& options);
OpResult run_sequences(Attend attend, const TensorMap& inputs, const TensorMap& state,
                       const AttentionCall& call);

// A form of reference.h, with the gradients by hand. fp64 on the CPU.
using Reference = std::vector<double> (*)(const reference::Problem& problem);
OpResult run_reference(Reference form, const OpCall& call, const AttentionCall& about);

}  // namespace everlong::landmark
