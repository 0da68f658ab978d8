#include "mechanisms/megalodon/op_call.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "core/offsets.h"

namespace everlong::megalodon {
namespace {

constexpr const char *kMask = "padding_mask", *kReset = "reset";

std::string all_of(const std::set<std::string>& names) {
  return join(std::vector<std::string>(names.begin(), names.end()), ", ");
}

Status check_flags(const char* name, const at::Tensor& flags, const at::Tensor& leading) {
  if (at::isFloatingType(flags.scalar_type()) || flags.dim() != 2 ||
      flags.size(0) != leading.size(0) || flags.size(1) != leading.size(1))
    return invalid_argument("megalodon: ", name, " is ", flags.scalar_type(), " ", flags.sizes(),
                            "; 0 or 1 for each of [", leading.size(0), ", ", leading.size(1),
                            "] tokens is needed, in whole numbers");
  return {};
}

std::vector<bool> flags_of(const OpCall& call, const char* name, std::int64_t count) {
  std::vector<bool> out(static_cast<std::size_t>(count), false);
  const auto found = call.inputs.find(name);
  if (found == call.inputs.end()) return out;
  const at::Tensor host = found->second.to(at::kCPU).ne(0).contiguous();
  const bool* data = host.const_data_ptr<bool>();
  out.assign(data, data + count);
  return out;
}

// The tokens that are there, in order, and where their documents lie.
struct Documents {
  std::vector<std::int64_t> tokens;       // row-major numbers
  std::vector<std::int64_t> offsets;      // of the packed line
  std::vector<std::int64_t> source;       // the row whose state a document continues, or -1
  std::vector<std::int64_t> first, last;  // documents of each row
};

Documents read_documents(const OpCall& call, std::int64_t rows, std::int64_t tokens) {
  const auto masked = flags_of(call, kMask, rows * tokens),
             starts = flags_of(call, kReset, rows * tokens);
  Documents d;
  d.offsets = {0};
  const auto close = [&] { d.offsets.push_back(static_cast<std::int64_t>(d.tokens.size())); };
  for (std::int64_t row = 0; row < rows; ++row) {
    d.first.push_back(static_cast<std::int64_t>(d.source.size()));
    d.source.push_back(row);
    for (std::int64_t t = 0; t < tokens; ++t) {
      const auto at = static_cast<std::size_t>(row * tokens + t);
      if (starts[at]) {  // also on a masked token: what follows is another document
        close();
        d.source.push_back(-1);
      }
      if (!masked[at]) d.tokens.push_back(row * tokens + t);
    }
    close();
    d.last.push_back(static_cast<std::int64_t>(d.source.size()) - 1);
  }
  return d;
}

at::Tensor indices(const std::vector<std::int64_t>& values, const at::Tensor& like) {
  return at::tensor(values, at::kLong).to(like.device());
}

// Rows `values` of x, zeros where -1. Filled, not multiplied: a NaN stays where it is.
at::Tensor pick(const at::Tensor& x, std::vector<std::int64_t> values) {
  std::vector<std::int64_t> fresh;
  for (auto& value : values) {
    fresh.push_back(value < 0 ? 1 : 0);
    value = std::max<std::int64_t>(value, 0);
  }
  std::vector<std::int64_t> shape(static_cast<std::size_t>(x.dim()), 1);
  shape[0] = static_cast<std::int64_t>(fresh.size());
  return x.index_select(0, indices(values, x))
      .masked_fill(indices(fresh, x).to(at::kBool).view(shape), 0);
}

at::Tensor place(const at::Tensor& x, const std::vector<std::int64_t>& where, std::int64_t rows) {
  auto sizes = x.sizes().vec();
  sizes[0] = rows;
  return at::zeros(sizes, x.options()).index_copy(0, indices(where, x), x);
}

}  // namespace

Status check_names(const OpCall& call, const CallNames& names, std::int64_t dims) {
  std::set<std::string> needed(names.tokens.begin(), names.tokens.end());
  needed.insert(names.weights.begin(), names.weights.end());
  std::set<std::string> known = needed;
  known.insert(names.optional_weights.begin(), names.optional_weights.end());
  known.insert({kMask, kReset});
  for (const auto& [name, tensor] : call.inputs)
    if (!known.contains(name))
      return invalid_argument("megalodon: input \"", name,
                              "\" is not known; known: ", all_of(known));
  for (const auto& name : needed)
    if (!call.inputs.contains(name))
      return invalid_argument("megalodon: input \"", name,
                              "\" is missing; needed: ", all_of(needed));
  const std::set<std::string> states(names.state.begin(), names.state.end());
  for (const auto& [name, tensor] : call.state)
    if (!states.contains(name))
      return invalid_argument("megalodon: state \"", name,
                              "\" is not known; known: ", all_of(states));
  if (!call.state.empty() && call.state.size() != states.size())
    return invalid_argument("megalodon: a state has all of ", all_of(states), "; ",
                            call.state.size(), " were given");

  const at::Tensor& leading = call.inputs.at(names.tokens.front());
  if (leading.dim() != dims || !leading.is_floating_point() || leading.size(0) < 1)
    return invalid_argument("megalodon: input ", names.tokens.front(), " is ",
                            leading.scalar_type(), " ", leading.sizes(), "; floating point of ",
                            dims, " dimensions with at least one row is needed");
  for (const auto& [name, x] : call.inputs) {
    if (name == kMask || name == kReset) {
      EVERLONG_RETURN_IF_ERROR(check_flags(name.c_str(), x, leading));
    } else if (x.scalar_type() != leading.scalar_type() || x.device() != leading.device()) {
      return invalid_argument("megalodon: input ", name, " is ", x.scalar_type(), " on ",
                              x.device().str(), " and ", names.tokens.front(), " ",
                              leading.scalar_type(), " on ", leading.device().str(),
                              "; one dtype and one device are needed");
    }
  }
  if (!call.cu_seqlens.empty() && (call.inputs.contains(kMask) || call.inputs.contains(kReset)))
    return invalid_argument(
        "megalodon: padding_mask and reset go with rows of one length; a packed line says the same "
        "with its cu_seqlens");
  return check_offsets(call.cu_seqlens, leading.size(0), leading.size(1)).at("megalodon");
}

Status check_shape(const char* name, const at::Tensor& x, at::IntArrayRef wanted) {
  bool fits = x.dim() == static_cast<std::int64_t>(wanted.size());
  for (std::size_t i = 0; fits && i < wanted.size(); ++i)
    fits = wanted[i] < 0 || x.size(static_cast<std::int64_t>(i)) == wanted[i];
  if (fits) return {};
  std::vector<std::string> sizes;
  for (const auto size : wanted) sizes.push_back(size < 0 ? "any" : cat(size));
  return invalid_argument("megalodon: ", name, " has shape ", x.sizes(), "; [", join(sizes, ", "),
                          "] is needed");
}

Status check_state(const OpCall& call, const char* name, at::IntArrayRef wanted,
                   at::ScalarType dtype) {
  const at::Tensor& x = call.state.at(name);
  if (x.scalar_type() != dtype)
    return invalid_argument("megalodon: state ", name, " is ", x.scalar_type(), "; ", dtype,
                            " is needed");
  return check_shape(name, x, wanted);
}

std::int64_t sequences_of(const OpCall& call, const std::string& leading_input) {
  return call.cu_seqlens.empty() ? call.inputs.at(leading_input).size(0)
                                 : static_cast<std::int64_t>(call.cu_seqlens.size()) - 1;
}

Result<std::vector<std::int64_t>> read_counts(const at::Tensor& count, std::int64_t sequences) {
  if (count.scalar_type() != at::kLong || count.dim() != 1 ||
      (count.size(0) != sequences && count.size(0) != 1))
    return invalid_argument("megalodon: state count is ", count.scalar_type(), " ", count.sizes(),
                            "; int64 [", sequences, "] (or [1] for all) is needed");
  const at::Tensor host = count.to(at::kCPU).contiguous();
  const std::int64_t* data = host.const_data_ptr<std::int64_t>();
  std::vector<std::int64_t> counts(data, data + host.numel());
  counts.resize(static_cast<std::size_t>(sequences), counts.empty() ? 0 : counts.front());
  for (const std::int64_t value : counts)
    if (value < 0 || value > (std::int64_t{1} << 60))
      return invalid_argument("megalodon: state count ", value, "; 0 to 2^60 tokens are allowed");
  return counts;
}

at::Tensor counts_tensor(const std::vector<std::int64_t>& counts, at::Device device) {
  return at::tensor(counts, at::kLong).to(device);
}

Result<OpResult> run_documents(const OpCall& call, const CallNames& names, const RunCall& run) {
  if (!call.inputs.contains(kMask) && !call.inputs.contains(kReset)) return run(call);
  const at::Tensor& leading = call.inputs.at(names.tokens.front());
  const std::int64_t rows = leading.size(0), tokens = leading.size(1);
  const Documents d = read_documents(call, rows, tokens);
  const auto documents = static_cast<std::int64_t>(d.source.size());
  const auto packed = [&](const at::Tensor& x) {
    return x.flatten(0, 1).index_select(0, indices(d.tokens, x)).unsqueeze(0);
  };
  const auto unpacked = [&](const at::Tensor& x) {
    return place(x.squeeze(0), d.tokens, rows * tokens).unflatten(0, {rows, tokens});
  };

  OpCall line = call;
  line.inputs.erase(kMask);
  line.inputs.erase(kReset);
  line.cu_seqlens = d.offsets;
  for (const auto& name : names.tokens) line.inputs[name] = packed(call.inputs.at(name));
  for (auto& [name, x] : line.state) x = pick(x, d.source);
  for (auto& [name, x] : line.grad_out)
    x = name.starts_with("state.") ? place(x, d.last, documents) : packed(x);
  EVERLONG_ASSIGN(OpResult result, run(line));
  for (const auto& name : names.token_outputs) result.out.at(name) = unpacked(result.out.at(name));
  for (auto& [name, x] : result.state) x = x.index_select(0, indices(d.last, x));
  for (auto& [name, x] : result.grad) {
    if (name.starts_with("state."))
      x = x.index_select(0, indices(d.first, x));
    else if (std::ranges::find(names.tokens, name) != names.tokens.end())
      x = unpacked(x);
  }
  return result;
}

}  // namespace everlong::megalodon
