// Kind "chunk_attention".
#include "mechanisms/megalodon/op_cpu_attention.h"
#include "mechanisms/megalodon/op_operator.h"
#include "mechanisms/megalodon/reference.h"

namespace everlong::megalodon {
namespace {

constexpr std::int64_t kSampleChunk = 48;

const CallNames& attention_names() {
  static const CallNames kNames = {.tokens = {"z", "v"},
                                   .weights = {"w.gamma", "w.beta"},
                                   .optional_weights = {},
                                   .token_outputs = {"o"},
                                   .state = {"cache_k", "cache_v", "count"}};
  return kNames;
}

struct AttentionCall {
  std::int64_t heads = 1, key_dim = 2, value_dim = 1, sequences = 1;
  AttentionShape shape;
  std::vector<std::int64_t> counts;
  // The published state has one count for a batch in one phase. What comes in so goes out so, and
  // rows without a past are in one phase.
  bool one_count = false;
};

Result<AttentionCall> read_attention(const OpCall& call) {
  EVERLONG_RETURN_IF_ERROR(check_names(call, attention_names(), 4));
  const at::Tensor &z = call.inputs.at("z"), &v = call.inputs.at("v");
  AttentionCall out;
  out.heads = z.size(2);
  out.key_dim = z.size(3);
  EVERLONG_RETURN_IF_ERROR(check_shape("v", v, {z.size(0), z.size(1), out.heads, -1}));
  out.value_dim = v.size(3);
  Settings s(call.params, "megalodon: chunk_attention: params");
  constexpr std::int64_t kMost = std::int64_t{1} << 40;
  const std::int64_t heads = s.integer("num_heads", out.heads, 1, kMost),
                     key_dim = s.integer("z_head_dim", out.key_dim, 1, kMost),
                     value_dim = s.integer("v_head_dim", out.value_dim, 1, kMost);
  if (!s.has("chunk_size"))
    s.fail(invalid_argument("chunk_size is missing; the tokens of a chunk are needed"));
  out.shape.chunk = s.integer("chunk_size", 1, 1, kMost);
  if (!s.raw("rope_base").is_null())
    out.shape.rope_base = s.number("rope_base", kRopeBase, 1, 1e30);
  out.shape.eps = s.number("norm_eps", kNormEps, 0, 1);
  s.raw("pieces");
  EVERLONG_RETURN_IF_ERROR(s.finish());
  if (heads != out.heads || key_dim != out.key_dim || value_dim != out.value_dim)
    return invalid_argument("megalodon: params name ", heads, " heads of ", key_dim, " and ",
                            value_dim, "; the tensors have ", out.heads, " of ", out.key_dim,
                            " and ", out.value_dim);
  EVERLONG_RETURN_IF_ERROR(check_attention(out.heads, out.key_dim, out.value_dim, out.shape.chunk,
                                           out.shape.rope_base, out.shape.eps));
  for (const char* name : {"w.gamma", "w.beta"})
    EVERLONG_RETURN_IF_ERROR(check_shape(name, call.inputs.at(name), {2, out.heads * out.key_dim}));
  out.sequences = sequences_of(call, "z");
  out.counts.resize(static_cast<std::size_t>(out.sequences), 0);
  out.one_count = call.state.empty() && call.cu_seqlens.empty() && !call.inputs.contains("reset") &&
                  !call.inputs.contains("padding_mask");
  if (call.state.empty()) return out;
  const std::int64_t N = out.sequences;
  const auto dtype = z.scalar_type();
  EVERLONG_RETURN_IF_ERROR(check_state(call, "cache_k", {N, -1, out.heads, out.key_dim}, dtype));
  EVERLONG_RETURN_IF_ERROR(check_state(
      call, "cache_v", {N, call.state.at("cache_k").size(1), out.heads, out.value_dim}, dtype));
  EVERLONG_ASSIGN(out.counts, read_counts(call.state.at("count"), N));
  const std::int64_t rows = call.state.at("cache_k").size(1);
  for (const std::int64_t count : out.counts)
    if (count > rows || count >= out.shape.chunk)
      return invalid_argument("megalodon: state count ", count, " with caches of ", rows,
                              " rows and chunks of ", out.shape.chunk,
                              "; an unfinished chunk has fewer rows than both allow");
  out.one_count = N > 1 && call.state.at("count").size(0) == 1 && call.cu_seqlens.empty();
  return out;
}

ChunkCache cache_of(const TensorMap& inputs, const TensorMap& state, const AttentionCall& p) {
  if (state.empty()) return empty_cache(p.sequences, inputs.at("z"), inputs.at("v"));
  return {p.counts, state.at("cache_k"), state.at("cache_v")};
}

// Gradients of the final caches, up to as many rows as the longest has.
void pad_cache_gradients(OpCall& call, const AttentionCall& p) {
  std::int64_t rows = 0;
  for (std::int64_t n = 0; n < p.sequences; ++n) {
    const auto at = static_cast<std::size_t>(n);
    const std::int64_t length = call.cu_seqlens.empty()
                                    ? call.inputs.at("z").size(1)
                                    : call.cu_seqlens[at + 1] - call.cu_seqlens[at];
    rows = std::max(rows, (p.counts[at] + length) % p.shape.chunk);
  }
  for (const char* name : {"state.cache_k", "state.cache_v"})
    if (const auto grad = call.grad_out.find(name);
        grad != call.grad_out.end() && grad->second.dim() == 4 && grad->second.size(1) < rows)
      grad->second =
          at::constant_pad_nd(grad->second, {0, 0, 0, 0, 0, rows - grad->second.size(1)});
}

Result<OpResult> run_reference(const OpCall& call, const AttentionCall& p, bool recurrent) {
  const at::Tensor &z = call.inputs.at("z"), &v = call.inputs.at("v");
  const std::int64_t N = p.sequences, H = p.heads, K = p.key_dim, V = p.value_dim;
  const auto gamma = to_doubles(call.inputs.at("w.gamma")),
             beta = to_doubles(call.inputs.at("w.beta"));
  const bool wanted = !call.grad_out.empty();
  const auto incoming = [&](const std::string& name) {
    const auto found = call.grad_out.find(name);
    return found == call.grad_out.end() ? at::Tensor() : found->second;
  };
  OpResult out;
  out.out["o"] = at::zeros_like(v, at::MemoryFormat::Contiguous);
  if (wanted) {
    for (const auto& [name, x] : call.inputs)
      out.grad[name] = at::zeros_like(x, at::MemoryFormat::Contiguous);
    for (const char* name : {"cache_k", "cache_v"})
      if (!call.state.empty())
        out.grad[cat("state.", name)] =
            at::zeros_like(call.state.at(name), at::MemoryFormat::Contiguous);
  }
  std::vector<ChunkCache> caches;
  for (std::int64_t n = 0; n < N; ++n) {
    const std::int64_t past = p.counts[static_cast<std::size_t>(n)];
    // The first `count` rows of sequence n of a cache.
    const auto rows = [&](const at::Tensor& x, std::int64_t count) {
      return x.defined() ? to_doubles(x.select(0, n).narrow(0, 0, count)) : std::vector<double>();
    };
    const auto state = [&](const char* name) {
      return call.state.empty() ? std::vector<double>() : rows(call.state.at(name), past);
    };
    const auto zs = sequence_doubles(z, call, n), vs = sequence_doubles(v, call, n);
    const auto cache_k = state("cache_k"), cache_v = state("cache_v");
    const auto length = static_cast<std::int64_t>(zs.size()) / (H * K);
    const reference::Attention problem{
        length,      past, H,  K,     V,    p.shape.chunk, p.shape.rope_base,
        p.shape.eps, zs,   vs, gamma, beta, cache_k,       cache_v};
    const auto result = recurrent ? reference::chunk_attention_recurrent(problem)
                                  : reference::chunk_attention(problem);
    sequence_view(out.out["o"], call, n).copy_(from_doubles(result.o, {length, H, V}));
    caches.push_back({{result.count},
                      from_doubles(result.cache_k, {1, result.count, H, K}),
                      from_doubles(result.cache_v, {1, result.count, H, V})});
    if (!wanted) continue;
    const auto d =
        reference::chunk_attention_gradients(problem, sequence_doubles(incoming("o"), call, n),
                                             rows(incoming("state.cache_k"), result.count),
                                             rows(incoming("state.cache_v"), result.count));
    sequence_view(out.grad["z"], call, n).copy_(from_doubles(d.z, {length, H, K}));
    sequence_view(out.grad["v"], call, n).copy_(from_doubles(d.v, {length, H, V}));
    out.grad["w.gamma"] += from_doubles(d.gamma, {2, H * K});
    out.grad["w.beta"] += from_doubles(d.beta, {2, H * K});
    if (call.state.empty()) continue;
    out.grad["state.cache_k"]
        .select(0, n)
        .narrow(0, 0, past)
        .copy_(from_doubles(d.cache_k, {past, H, K}));
    out.grad["state.cache_v"]
        .select(0, n)
        .narrow(0, 0, past)
        .copy_(from_doubles(d.cache_v, {past, H, V}));
  }
  const ChunkCache cache = caches.empty() ? empty_cache(0, z, v) : joined(caches);
  out.state = {{"cache_k", cache.k_NPHK},
               {"cache_v", cache.v_NPHV},
               {"count", counts_tensor(cache.counts, z.device())}};
  return out;
}

class ChunkAttention final : public Operator {
 public:
  std::string_view kind() const override { return "chunk_attention"; }

  std::vector<OpForm> forms() const override {
    return {{.name = "reference"},
            {.name = "reference_recurrent"},
            {.name = "naive", .cuda = true, .low_precision = true},
            {.name = "composite", .cuda = true, .low_precision = true},
            {.name = "cpu", .low_precision = true, .float64 = false}};
  }

  Result<OpResult> run(std::string_view form, const OpCall& given) const override {
    EVERLONG_ASSIGN(const AttentionCall p, read_attention(given));
    const bool known = std::ranges::any_of(forms(), [&](auto& f) { return f.name == form; });
    if (!known) return unknown_form(form, forms());
    if (form.starts_with("reference"))
      EVERLONG_RETURN_IF_ERROR(require_reference_input(given.inputs.at("z"), "megalodon", form));
    if (form == "cpu") EVERLONG_RETURN_IF_ERROR(check_attention_kernel(given.inputs.at("z")));
    OpCall call = given;
    if (!call.state.empty())
      call.state["count"] = counts_tensor(p.counts, given.state.at("count").device());
    EVERLONG_ASSIGN(OpResult result,
                    run_documents(call, attention_names(), [&](OpCall line) -> Result<OpResult> {
                      EVERLONG_ASSIGN(const AttentionCall q, read_attention(line));
                      pad_cache_gradients(line, q);
                      if (form.starts_with("reference"))
                        return run_reference(line, q, form == "reference_recurrent");
                      return run_by_autograd(line,
                                             [&](const TensorMap& inputs, const TensorMap& state) {
                                               return run_tensors(form, line, q, inputs, state);
                                             });
                    }));
    // Documents that are over may have had longer caches.
    const std::int64_t rows =
        result.state["count"].numel() > 0 ? result.state["count"].max().item<std::int64_t>() : 0;
    for (const char* name : {"cache_k", "cache_v"})
      if (result.state[name].size(1) > rows)
        result.state[name] = result.state[name].narrow(1, 0, rows).clone();
    if (p.one_count) result.state["count"] = result.state["count"].narrow(0, 0, 1).clone();
    return result;
  }

  OpCall sample(const OpShape& shape) const override {
    OpCall call;
    const std::int64_t H = shape.heads, K = shape.key_dim, V = shape.value_dim;
    Draw draw(shape.seed);
    call.inputs["z"] = draw({shape.batch, shape.tokens, H, K});
    call.inputs["v"] = draw({shape.batch, shape.tokens, H, V});
    call.inputs["w.gamma"] = draw({2, H * K});
    call.inputs["w.beta"] = draw({2, H * K}, 0.3);
    call.cu_seqlens = shape.cu_seqlens;
    call.params = shape.params;
    if (!call.params.contains("chunk_size")) call.params["chunk_size"] = kSampleChunk;
    if (!shape.initial_state) return call;
    const auto chunk = call.params.at("chunk_size").get<std::int64_t>();
    const std::int64_t N = everlong::sequences_of(shape);
    std::vector<std::int64_t> counts;
    std::int64_t rows = 0;
    for (std::int64_t n = 0; n < N; ++n) {  // phases of their own, one of them at a chunk's start
      counts.push_back(n == 1 ? 0 : (11 + 7 * n) % chunk);
      rows = std::max(rows, counts.back());
    }
    const at::Tensor count = at::tensor(counts, at::kLong);
    const at::Tensor behind = (at::arange(rows) >= count.unsqueeze(1)).view({N, rows, 1, 1});
    call.state["cache_k"] = draw({N, rows, H, K}).masked_fill(behind, 0);
    call.state["cache_v"] = draw({N, rows, H, V}).masked_fill(behind, 0);
    call.state["count"] = count;
    return call;
  }

  // A cache keeps what it was given.
  at::ScalarType state_dtype(at::ScalarType dtype) const override { return dtype; }
  std::vector<std::string> token_inputs() const override { return {"z", "v"}; }

  std::vector<OpShape> law_shapes() const override {
    const auto chunk = [](std::int64_t size) { return nlohmann::json{{"chunk_size", size}}; };
    return {{.heads = 1, .key_dim = 8, .value_dim = 40, .params = chunk(16)},
            {.heads = 3, .key_dim = 4, .value_dim = 6, .params = chunk(7)},
            {.params = chunk(1)},
            {.params = {{"chunk_size", 512}, {"rope_base", 100000}}},
            {.tokens = 90,
             .cu_seqlens = {0, 31, 31, 32, 90},
             .initial_state = true,
             .params = chunk(16)}};
  }

  std::vector<std::pair<std::string, OpCall>> refusals() const override {
    std::vector<std::pair<std::string, OpCall>> list;
    const auto add = [&](const char* name, const OpShape& shape, auto&& change) {
      OpCall call = sample(shape);
      change(call);
      list.emplace_back(name, std::move(call));
    };
    const OpShape plain{.tokens = 6}, packed{.tokens = 6, .cu_seqlens = {0, 2, 6}},
        carried{.tokens = 6, .initial_state = true};
    add("chunk_missing", plain, [](OpCall& c) { c.params.erase("chunk_size"); });
    add("chunk_zero", plain, [](OpCall& c) { c.params["chunk_size"] = 0; });
    add("key_dim_odd", plain, [](OpCall& c) {
      c.inputs["z"] = c.inputs["z"].narrow(3, 0, 15);
      for (const char* name : {"w.gamma", "w.beta"})
        c.inputs[name] = c.inputs[name].narrow(1, 0, 30);
    });
    add("heads_differ", plain, [](OpCall& c) { c.inputs["v"] = c.inputs["v"].narrow(2, 0, 1); });
    add("tokens_differ", plain, [](OpCall& c) { c.inputs["v"] = c.inputs["v"].narrow(1, 0, 5); });
    add("gain_short", plain,
        [](OpCall& c) { c.inputs["w.gamma"] = c.inputs["w.gamma"].narrow(1, 0, 3); });
    add("other_heads", plain, [](OpCall& c) { c.params["num_heads"] = 3; });
    add("param_unknown", plain, [](OpCall& c) { c.params["chunk"] = 3; });
    add("mixed_dtypes", plain, [](OpCall& c) { c.inputs["v"] = c.inputs["v"].to(at::kFloat); });
    add("offsets_fall", packed, [](OpCall& c) { c.cu_seqlens = {0, 4, 2, 6}; });
    add("count_of_a_full_chunk", carried, [](OpCall& c) { c.params["chunk_size"] = 11; });
    add("count_past_its_rows", carried, [](OpCall& c) { c.state["count"] = c.state["count"] + 1; });
    add("count_of_floats", carried,
        [](OpCall& c) { c.state["count"] = c.state["count"].to(at::kDouble); });
    add("state_of_another_width", carried,
        [](OpCall& c) { c.state["cache_k"] = c.state["cache_k"].narrow(3, 0, 8); });
    add("state_incomplete", carried, [](OpCall& c) { c.state.erase("cache_v"); });
    return list;
  }

  OpCost cost(const OpShape& shape, std::string_view pass,
              std::size_t element_bytes) const override {
    const std::int64_t chunk = shape.params.value("chunk_size", kSampleChunk);
    const bool step = pass == "step", train = pass == "train";
    const auto B = static_cast<double>(shape.batch), H = static_cast<double>(shape.heads),
               K = static_cast<double>(shape.key_dim), V = static_cast<double>(shape.value_dim);
    const std::int64_t past = shape.tokens % chunk;
    const double pairs =
        B * H * (step ? pairs_in_chunks(past, 1, chunk) : pairs_in_chunks(0, shape.tokens, chunk));
    const double rows = B * H * static_cast<double>(step ? past + 1 : shape.tokens);
    return {.flops = 2 * pairs * (K + V) * (train ? 3 : 1),
            .bytes = rows * (K + 2 * V) * static_cast<double>(element_bytes) * (train ? 3 : 1)};
  }

 private:
  OpResult run_tensors(std::string_view form, const OpCall& call, const AttentionCall& p,
                       const TensorMap& inputs, const TensorMap& state) const {
    const at::Tensor &z = inputs.at("z"), &v = inputs.at("v"), &gamma = inputs.at("w.gamma"),
                     &beta = inputs.at("w.beta");
    const ChunkCache before = cache_of(inputs, state, p);
    Attended out;
    if (form != "naive") {
      out = chunk_attention(z, v, gamma, beta, p.shape, call.cu_seqlens, before,
                            form == "cpu" ? Path::kCpu : Path::kComposite);
    } else if (call.cu_seqlens.empty()) {
      out = naive_chunk_attention(z, v, gamma, beta, p.shape, before);
    } else {
      std::vector<at::Tensor> outputs;
      std::vector<ChunkCache> caches;
      for (std::int64_t n = 0; n < p.sequences; ++n) {
        Attended one = naive_chunk_attention(sequence_view(z, call, n).unsqueeze(0),
                                             sequence_view(v, call, n).unsqueeze(0), gamma, beta,
                                             p.shape, rows_of(before, n, 1));
        outputs.push_back(one.o_BTHV);
        caches.push_back(std::move(one.cache));
      }
      out = {at::cat(outputs, 1), joined(caches)};
    }
    OpResult result;
    result.out["o"] = out.o_BTHV;
    result.state = {{"cache_k", out.cache.k_NPHK},
                    {"cache_v", out.cache.v_NPHV},
                    {"count", counts_tensor(out.cache.counts, z.device())}};
    return result;
  }
};

}  // namespace

const Operator& chunk_attention_operator() {
  static const ChunkAttention kOperator;
  return kOperator;
}

}  // namespace everlong::megalodon
