// The operator of retrieval: a text fed in chunks, each reading blocks of its past.
#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "mechanisms/landmark/op_blocks.h"
#include "mechanisms/landmark/op_call.h"
#include "mechanisms/landmark/op_cpu.h"
#include "mechanisms/landmark/reference_retrieval.h"
#include "ops/reference_call.h"

namespace everlong::landmark {
namespace {

struct RetrievalCall {
  Params params;
  Retrieval retrieval;
  std::vector<std::int64_t> chunks;
  double rope_base = 10000;
  bool interleaved = false;
};

// The whole text at once where `chunks` is absent.
Result<std::vector<std::int64_t>> read_chunks(const nlohmann::json& list, std::int64_t tokens) {
  if (list.is_null()) return std::vector<std::int64_t>{tokens};
  const auto count = [](const nlohmann::json& item) {
    return item.is_number_integer() && item.get<std::int64_t>() >= 0;
  };
  if (!list.is_array() || !std::ranges::all_of(list, count))
    return invalid_argument("landmark: chunks = ", list.dump(),
                            "; a list of token counts is needed");
  const auto chunks = list.get<std::vector<std::int64_t>>();
  if (std::accumulate(chunks.begin(), chunks.end(), std::int64_t{0}) != tokens)
    return invalid_argument("landmark: chunks = ", list.dump(), " do not add up to ", tokens,
                            " tokens");
  return chunks;
}

Status check_regular(const at::Tensor& marks, const Retrieval& r) {
  const auto regular = landmarks_of(r, 0, marks.size(1));
  const at::Tensor wanted = at::tensor(at::ArrayRef<std::uint8_t>(regular), at::kByte);
  if (marks.to(at::kCPU, at::kByte).eq(wanted).all().item<bool>()) return {};
  if (!r.has_landmarks())
    return unsupported(
        "landmark: is_landmark marks tokens, but blocks are scored by their own keys, which is for "
        "texts without landmarks");
  return unsupported("landmark: is_landmark does not mark every position ", r.block - 1, " mod ",
                     r.block, "; retrieval needs blocks of one length");
}

Result<RetrievalCall> read_retrieval(const OpCall& call) {
  EVERLONG_RETURN_IF_ERROR(check_names(call.inputs, {"q", "k", "v"}, {"is_landmark"}, "input"));
  EVERLONG_RETURN_IF_ERROR(check_names(call.state, {}, {}, "state"));
  const at::Tensor &q = call.inputs.at("q"), &k = call.inputs.at("k"), &v = call.inputs.at("v");
  EVERLONG_RETURN_IF_ERROR(check_numbers({{"q", q}, {"k", k}, {"v", v}}));
  if (!call.cu_seqlens.empty())
    return unsupported("landmark: landmark_retrieval takes rows of one length, not offsets");
  RetrievalCall about;
  const auto shape = [](const at::Tensor& t) { return Shape(t.sizes().data(), t.sizes().size()); };
  EVERLONG_RETURN_IF_ERROR(read_shapes(shape(q), shape(k), shape(v), {}, {}, about.params));
  constexpr std::int64_t kMost = std::int64_t{1} << 40;
  Settings s(call.params, "landmark: params");
  Retrieval& r = about.retrieval;
  r.block = s.integer("block", r.block, 0, kMost);
  r.top_k = s.integer("top_k", 0, -1, kMost);
  r.window = s.integer("window", 0, 0, kMost);
  r.max_blocks = s.integer("max_blocks", 0, 0, kMost);
  r.chunked = s.choice("mode", "window", {"window", "chunk"}) == "chunk";
  s.choice("positions", "slots", {"slots"});
  if (auto granularity = parse_granularity(s.text("granularity", "token_head")); granularity.ok()) {
    r.granularity = *granularity;
  } else {
    s.fail(granularity.status());
  }
  if (auto score = parse_block_score(s.text("score", "landmark")); score.ok()) {
    r.score = *score;
  } else {
    s.fail(score.status());
  }
  about.interleaved = s.choice("rope", "half_split", {"half_split", "interleaved"}) != "half_split";
  about.rope_base = s.number("rope_base", about.rope_base, 1, 1e30);
  Params& p = about.params;
  p.scale = s.number("scale", default_scale(std::max<std::int64_t>(p.key_dim, 1)), -1e30, 1e30);
  s.raw("seed");
  if (auto chunks = read_chunks(s.raw("chunks"), p.tokens); chunks.ok()) {
    about.chunks = *std::move(chunks);
  } else {
    s.fail(chunks.status());
  }
  if (p.key_dim % 2 != 0)
    s.fail(invalid_argument("landmark: key dim ", p.key_dim, " is odd; coordinates turn in pairs"));
  EVERLONG_RETURN_IF_ERROR(s.finish());
  EVERLONG_RETURN_IF_ERROR(validate(p));
  EVERLONG_RETURN_IF_ERROR(validate(r));
  if (const auto marks = call.inputs.find("is_landmark"); marks != call.inputs.end()) {
    EVERLONG_RETURN_IF_ERROR(check_marks("is_landmark", marks->second, {p.batch, p.tokens}));
    EVERLONG_RETURN_IF_ERROR(check_regular(marks->second, r));
  }
  return about;
}

OpResult by_reference(const OpCall& call, const RetrievalCall& about) {
  const Params& p = about.params;
  OpResult result;
  std::vector<at::Tensor> outs, selected;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const auto row = [&](const char* name) {
      return to_doubles(call.inputs.at(name).narrow(0, b, 1));
    };
    const auto q = row("q"), k = row("k"), v = row("v");
    const auto read = reference::read_blocks({p.tokens, p.heads, p.kv_heads, p.key_dim, p.value_dim,
                                              p.scale, about.rope_base, about.interleaved,
                                              about.retrieval, about.chunks, q, k, v});
    outs.push_back(from_doubles(read.out, {1, p.tokens, p.heads, p.value_dim}));
    selected.push_back(
        at::tensor(read.selected, at::kLong)
            .view({1, p.tokens, p.heads, std::max<std::int64_t>(about.retrieval.top_k, 0)}));
  }
  result.out["o"] = at::cat(outs, 0);
  if (about.retrieval.top_k > 0) result.out["selected"] = at::cat(selected, 0);
  return result;
}

OpResult by_parts(const TensorMap& inputs, const RetrievalCall& about, Path path) {
  const Params& p = about.params;
  const Reader reader{about.retrieval, p.scale, rope_frequencies(about.rope_base, p.key_dim),
                      about.interleaved ? RopePairs::kInterleaved : RopePairs::kHalfSplit, path};
  const std::int64_t block = about.retrieval.block;
  const Stored stored{stored_rows(turned_in_block(inputs.at("k"), 0, reader), block),
                      stored_rows(inputs.at("v"), block), 0};
  std::vector<at::Tensor> outs, selected;
  std::int64_t start = 0;
  for (const std::int64_t count : about.chunks) {
    Read read = read_blocks(inputs.at("q").narrow(1, start, count), stored, start, reader, true);
    outs.push_back(read.out);
    if (read.selected.defined()) selected.push_back(read.selected);
    start += count;
  }
  OpResult result;
  result.out["o"] = at::cat(outs, 1);
  if (!selected.empty()) result.out["selected"] = at::cat(selected, 1);
  return result;
}

class LandmarkRetrieval final : public Operator {
 public:
  std::string_view kind() const override { return "landmark_retrieval"; }
  std::vector<OpForm> forms() const override {
    return {{.name = "reference"},
            {.name = "composite", .cuda = true, .low_precision = true},
            {.name = "cpu", .low_precision = true, .float64 = false}};
  }
  // Not a sequence operator for the laws: what carries the past is the layer's state.
  bool is_sequence() const override { return false; }

  Result<OpResult> run(std::string_view form, const OpCall& call) const override {
    EVERLONG_ASSIGN(const RetrievalCall about, read_retrieval(call));
    if (form == "reference") {
      EVERLONG_RETURN_IF_ERROR(require_reference_input(call.inputs.at("q"), "landmark", form));
      if (!call.grad_out.empty())
        return unsupported("landmark: the reference of landmark_retrieval has no gradients; form ",
                           "composite has");
      return by_reference(call, about);
    }
    if (form != "composite" && form != "cpu")
      return invalid_argument("landmark: \"", form, "\" is not a form of landmark_retrieval; ",
                              "known: composite, cpu, reference");
    if (form == "cpu")
      EVERLONG_RETURN_IF_ERROR(
          check_cpu_kernel(call.inputs.at("q"), call.inputs.at("k"), call.inputs.at("v")));
    return run_by_autograd(call, [&](const TensorMap& inputs, const TensorMap&) {
      return by_parts(inputs, about, form == "cpu" ? Path::kCpu : Path::kComposite);
    });
  }

  OpCall sample(const OpShape&) const override { return {}; }
  std::vector<std::string> token_inputs() const override { return {}; }
  std::vector<OpShape> law_shapes() const override { return {}; }
  std::vector<std::pair<std::string, OpCall>> refusals() const override { return {}; }
  OpCost cost(const OpShape&, std::string_view, std::size_t) const override { return {}; }
};

}  // namespace

const Operator& retrieval_operator() {
  static const LandmarkRetrieval kOperator;
  return kOperator;
}

}  // namespace everlong::landmark
