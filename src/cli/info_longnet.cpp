#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/terminal.h"
#include "core/files.h"
#include "core/text.h"
#include "mechanisms/longnet/params_budget.h"

namespace everlong::cli {
namespace {

using longnet::Budget;
using longnet::BudgetShape;

struct LongnetCommand {
  std::int64_t length = 32768, heads = 12, head_dim = 64;
  std::optional<std::int64_t> kv_heads, at;
  std::vector<std::string> patterns;
  std::string offset_rule = "mod", beyond = "fixed", dtype = "bf16", svg;
  bool bidirectional = false, json = false;

  Status run() const;

 private:
  Result<BudgetShape> shape() const;
};

// "2048:1", "32K:12".
Result<longnet::Pattern> read_pattern(const std::string& text) {
  const std::size_t colon = text.find(':');
  const auto segment = parse_count(text.substr(0, colon));
  const auto ratio =
      colon == std::string::npos ? std::nullopt : parse_count(text.substr(colon + 1));
  if (segment && ratio) return longnet::Pattern{*segment, *ratio};
  return invalid_argument("--patterns ", text,
                          " is not a pattern; SEGMENT:RATIO is needed, for example 2048:1,4096:2");
}

Result<BudgetShape> LongnetCommand::shape() const {
  BudgetShape s;
  s.tokens = length;
  s.heads = heads;
  s.kv_heads = kv_heads.value_or(heads);
  s.head_dim = head_dim;
  s.element_bytes = dtype == "fp32" ? 4 : 2;
  s.geometry.causal = !bidirectional;
  EVERLONG_ASSIGN(s.geometry.offset_rule, longnet::offset_rule_of(offset_rule));
  EVERLONG_ASSIGN(s.geometry.beyond, longnet::beyond_of(beyond));
  for (const std::string& list : patterns) {
    std::string_view rest = list;
    while (!rest.empty()) {
      const std::size_t comma = rest.find(',');
      EVERLONG_ASSIGN(const auto pattern, read_pattern(std::string(rest.substr(0, comma))));
      s.geometry.patterns.push_back(pattern);
      rest = comma == std::string_view::npos ? "" : rest.substr(comma + 1);
    }
  }
  if (patterns.empty())  // the paper's
    s.geometry.patterns = {{2048, 1}, {4096, 2}, {8192, 4}, {16384, 6}, {32768, 12}};
  return s;
}

Status LongnetCommand::run() const {
  EVERLONG_ASSIGN(const BudgetShape s, shape());
  EVERLONG_ASSIGN(const Budget b, longnet::budget_of(s));
  const std::int64_t position = at.value_or(length - 1);
  if (position < 0 || position >= length)
    return invalid_argument("--at ", position, "; a position of the text, 0 to ", length - 1);
  if (!svg.empty()) {
    EVERLONG_RETURN_IF_ERROR(write_file(svg, longnet::lattice_svg(s, position)));
    note(cat("wrote ", svg));
  }
  const auto tokens = static_cast<double>(length);
  nlohmann::ordered_json object = {{"length", length},
                                   {"forward_flops", b.forward_flops},
                                   {"forward_flops_per_token", b.forward_flops / tokens},
                                   {"dense_forward_flops", b.dense_flops},
                                   {"state_rows_per_head", b.state_rows},
                                   {"state_bytes", b.state_bytes},
                                   {"dense_state_bytes", b.dense_state_bytes},
                                   {"forgets_every", b.forgets_every},
                                   {"patterns", nlohmann::ordered_json::array()},
                                   {"query", position},
                                   {"heads", nlohmann::ordered_json::array()}};
  Table table({"segment", "ratio", "rows a head", "share of queries", "share of the work"});
  for (const auto& p : b.patterns) {
    object["patterns"].push_back({{"segment", p.pattern.segment},
                                  {"ratio", p.pattern.ratio},
                                  {"rows", p.rows},
                                  {"covered", p.covered},
                                  {"pairs", p.pairs}});
    table.add({with_commas(p.pattern.segment), cat(p.pattern.ratio), with_commas(p.rows),
               cat(fixed(100 * p.covered, 1), " %"), cat(fixed(100 * p.pairs / b.pairs, 1), " %")});
  }
  Table reach({"key/value head", "keys seen", "farthest", "through patterns"}, {0, 3});
  for (std::int64_t head = 0; head < s.kv_heads; ++head) {
    std::int64_t keys = 0, farthest = 0;
    std::vector<std::string> through;
    for (const auto& line : longnet::sightlines(s, head, position)) {
      const auto& p = s.geometry.patterns[line.pattern];
      keys += line.rows;
      farthest = std::max(
          {farthest, position - line.first, line.first + (line.rows - 1) * line.ratio - position});
      through.push_back(cat(p.segment, ":", p.ratio));
    }
    object["heads"].push_back(
        {{"head", head}, {"keys", keys}, {"farthest", farthest}, {"patterns", through}});
    reach.add({cat(head), with_commas(keys), with_commas(farthest), join(through, " ")});
  }
  if (json) {
    print_json(object);
    return {};
  }
  print(table.text());
  const auto cost = [](double flops) { return cat(fixed(flops / 1e9, 2), " GFLOP"); };
  print(cat("\nforward, one layer, ", with_commas(length), " tokens, ", heads, " heads of ",
            head_dim, ": ", cost(b.forward_flops), " (", fixed(b.forward_flops / tokens / 1e6, 3),
            " MFLOP a token); dense attention ", cost(b.dense_flops), "\n"));
  if (s.geometry.causal) {
    print(cat("state of a sequence, ", dtype, ": ", with_commas(b.state_rows), " rows a head, ",
              human_bytes(static_cast<double>(b.state_bytes)), "; a KV cache of the text ",
              human_bytes(b.dense_state_bytes), "\n"));
    if (b.forgets_every > 0)
      print(cat("every ", with_commas(b.forgets_every),
                " tokens all segments end together: the token there sees itself alone\n"));
  }
  print(cat("\nthe query at ", with_commas(position), ":\n", reach.text()));
  return {};
}

}  // namespace

void add_info_longnet(Command& info) {
  static LongnetCommand command;
  Command longnet = info.subcommand(
      "longnet", "What patterns of dilated attention cost and reach",
      "For patterns of LongNet: the work, the bytes of state, and which keys a query sees through "
      "which head, before anything is trained. The picture shows a row a head and the text from "
      "left to right.");
  longnet.option("-n,--length N", command.length, "tokens of the text");
  longnet.option("--patterns LIST", command.patterns,
                 "SEGMENT:RATIO, several behind commas (default: the paper's five)");
  longnet.option("--heads N", command.heads, "query heads");
  longnet.option("--kv-heads N", command.kv_heads, "key/value heads (default: as many)");
  longnet.option("--head-dim N", command.head_dim, "width of a head");
  longnet.choice("--offset-rule RULE", command.offset_rule, {"mod", "block"},
                 "which lattice a head has: the paper's rule or torchscale's");
  longnet.choice("--beyond RULE", command.beyond, {"fixed", "grow"},
                 "every pattern always, or one after the other as the text grows");
  longnet.choice("--dtype NAME", command.dtype, {"bf16", "fp16", "fp32"}, "of the state");
  longnet.flag("--bidirectional", command.bidirectional, "an encoder: every query sees both sides");
  longnet.option("--at POSITION", command.at, "the query that is shown (default: the last)");
  longnet.option("--svg FILE", command.svg, "write the picture");
  longnet.flag("--json", command.json, "print JSON");
  longnet.example("everlong info longnet --length 32K");
  longnet.example(
      "everlong info longnet --length 1M --patterns 2048:1,16K:8,128K:64,1M:512 "
      "--svg lattice.svg");
  longnet.run([] { return command.run(); });
}

}  // namespace everlong::cli
