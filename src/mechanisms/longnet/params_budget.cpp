#include "mechanisms/longnet/params_budget.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace everlong::longnet {
namespace {

constexpr std::int64_t kMostHeads = 65536, kMostDim = 65536;
constexpr double kWidth = 700, kLeft = 60, kRight = 12, kTop = 34, kBottom = 40, kRowHeight = 16;
constexpr int kColumns = 160;
constexpr const char* kColours[] = {"#4269d0", "#efb118", "#ff725c",
                                    "#3ca951", "#a463f2", "#6cc5b0"};

// The least common multiple, or 0 beyond 2^60.
std::int64_t common_multiple(const std::vector<Pattern>& patterns) {
  double size = 1;
  std::int64_t multiple = 1;
  for (const Pattern& p : patterns) {
    const std::int64_t factor = p.segment / std::gcd(multiple, p.segment);
    size *= static_cast<double>(factor);
    if (size > 0x1p60) return 0;
    multiple *= factor;
  }
  return multiple;
}

Status check(const BudgetShape& s) {
  EVERLONG_RETURN_IF_ERROR(validate(s.geometry));
  if (s.tokens < 1) return invalid_argument("longnet: length = ", s.tokens, "; at least 1 token");
  if (s.heads < 1 || s.heads > kMostHeads || s.kv_heads < 1 || s.heads % s.kv_heads != 0)
    return invalid_argument("longnet: ", s.heads, " heads and ", s.kv_heads,
                            " key/value heads; 1 to ", kMostHeads,
                            " heads, a multiple of the key/value heads");
  if (s.head_dim < 1 || s.head_dim > kMostDim)
    return invalid_argument("longnet: head dim ", s.head_dim, "; 1 to ", kMostDim);
  return {};
}

}  // namespace

Result<Budget> budget_of(const BudgetShape& s) {
  EVERLONG_RETURN_IF_ERROR(check(s));
  Budget b;
  const std::int64_t sharing = s.heads / s.kv_heads;
  const auto group = static_cast<double>(sharing), tokens = static_cast<double>(s.tokens),
             heads = static_cast<double>(s.heads);
  std::int64_t held = 0;
  for (std::size_t i = 0; i < s.geometry.patterns.size(); ++i) {
    const Pattern& pattern = s.geometry.patterns[i];
    PatternBudget p{pattern, 0, 0, 0};
    double queries = 0;
    for (const HeadClass& c : head_classes(s.geometry.offset_rule, s.kv_heads, pattern.ratio)) {
      for (const LatticeRun& run : make_runs(s.geometry, i, c.offset, 0, s.tokens)) {
        const auto count = static_cast<double>(run.queries), keys = static_cast<double>(run.keys);
        const double seen =
            s.geometry.causal ? count * keys - count * (count - 1) / 2 : count * keys;
        const auto times = static_cast<double>(run.segments * c.count);
        p.pairs += seen * times * group;
        queries += count * times * group;
      }
    }
    p.rows = (std::min(pattern.segment, s.tokens) + pattern.ratio - 1) / pattern.ratio;
    p.covered = queries / (tokens * heads);
    held += p.rows;
    b.pairs += p.pairs;
    b.patterns.push_back(p);
  }
  const double dim = static_cast<double>(s.head_dim), bytes = static_cast<double>(s.element_bytes);
  b.forward_flops = 4 * dim * b.pairs;
  b.dense_flops =
      4 * dim * heads * (s.geometry.causal ? tokens * (tokens + 1) / 2 : tokens * tokens);
  b.state_rows = held;
  b.state_bytes = held * s.kv_heads * 2 * s.head_dim * s.element_bytes;
  b.dense_state_bytes = tokens * static_cast<double>(s.kv_heads) * 2 * dim * bytes;
  b.forgets_every = common_multiple(s.geometry.patterns);
  return b;
}

std::vector<Sightline> sightlines(const BudgetShape& s, std::int64_t kv_head,
                                  std::int64_t position) {
  std::vector<Sightline> lines;
  for (std::size_t i = 0; i < s.geometry.patterns.size(); ++i) {
    const auto [w, r] = s.geometry.patterns[i];
    const std::int64_t offset = offset_of(s.geometry.offset_rule, kv_head, s.kv_heads, r);
    if (position % w % r != offset || position < s.geometry.active_from(i)) continue;
    const std::int64_t start = position / w * w;
    const std::int64_t end = s.geometry.causal ? position + 1 : std::min(start + w, s.tokens);
    lines.push_back({i, start + offset, r, lattice_rows(end - start, offset, r)});
  }
  return lines;
}

std::string lattice_svg(const BudgetShape& s, std::int64_t position) {
  const std::int64_t length = s.geometry.causal ? position + 1 : s.tokens;
  const double height = kTop + kBottom + kRowHeight * static_cast<double>(s.kv_heads);
  const double plot = kWidth - kLeft - kRight;
  const int columns = static_cast<int>(std::min<std::int64_t>(length, kColumns));
  const auto edge = [&](int column) {  // first position of a column
    return static_cast<std::int64_t>(static_cast<double>(length) * column / columns);
  };
  std::string out =
      cat("<svg viewBox=\"0 0 ", kWidth, " ", height,
          "\" xmlns=\"http://www.w3.org/2000/svg\" font-family=\"system-ui, sans-serif\" "
          "font-size=\"11\" role=\"img\"><title>Keys that the query at position ",
          position,
          " sees, by head</title><style>text{fill:#333}.back{fill:#8883}"
          "@media(prefers-color-scheme:dark){text{fill:#ccc}}</style>\n");
  double x = kLeft;
  for (std::size_t i = 0; i < s.geometry.patterns.size(); ++i) {
    const Pattern& p = s.geometry.patterns[i];
    const std::string name = cat(p.segment, " / ", p.ratio);
    out += cat("<rect x=\"", x, "\" y=\"10\" width=\"10\" height=\"10\" fill=\"",
               kColours[i % std::size(kColours)], "\"/><text x=\"", x + 14, "\" y=\"19\">", name,
               "</text>\n");
    x += 30 + 6.5 * static_cast<double>(name.size());
  }
  for (std::int64_t head = 0; head < s.kv_heads; ++head) {
    const double y = kTop + kRowHeight * static_cast<double>(head);
    out += cat("<text x=\"", kLeft - 6, "\" y=\"", y + 11, "\" text-anchor=\"end\">head ", head,
               "</text><rect class=\"back\" x=\"", kLeft, "\" y=\"", y + 2, "\" width=\"", plot,
               "\" height=\"", kRowHeight - 4, "\"/>\n");
    const auto lines = sightlines(s, head, position);
    for (int column = 0; column < columns; ++column) {
      const std::int64_t from = edge(column), to = edge(column + 1);
      const Sightline* finest = nullptr;
      for (const Sightline& line : lines) {
        // Rows l with from <= first + l ratio < to.
        const auto rows_before = [&](std::int64_t p) {
          return p <= line.first
                     ? 0
                     : std::min(line.rows, (p - line.first + line.ratio - 1) / line.ratio);
        };
        if (rows_before(to) > rows_before(from) &&
            (finest == nullptr || line.ratio < finest->ratio))
          finest = &line;
      }
      if (finest == nullptr) continue;
      const double dense = 1 / (1 + std::log2(static_cast<double>(finest->ratio)) / 4);
      out += cat("<rect x=\"", fixed(kLeft + plot * column / columns, 1), "\" y=\"", y + 2,
                 "\" width=\"", fixed(plot / columns + 0.3, 1), "\" height=\"", kRowHeight - 4,
                 "\" fill=\"", kColours[finest->pattern % std::size(kColours)], "\" opacity=\"",
                 fixed(std::max(dense, 0.25), 2), "\"/>\n");
    }
  }
  const double below = height - kBottom + 16;
  out += cat("<text x=\"", kLeft, "\" y=\"", below, "\">0</text><text x=\"", kWidth - kRight,
             "\" y=\"", below, "\" text-anchor=\"end\">", with_commas(length - 1),
             "</text><text x=\"", kLeft + plot / 2, "\" y=\"", below + 14,
             "\" text-anchor=\"middle\">position of the key; the query stands at ",
             with_commas(position), "</text></svg>\n");
  return out;
}

}  // namespace everlong::longnet
