#include "eval/plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "core/text.h"

namespace everlong {
namespace {

constexpr double kWidth = 700, kHeight = 300;
constexpr double kLeft = 62, kRight = 16, kBottom = 46;
constexpr double kTitleHeight = 30, kLegendHeight = 20;
constexpr double kCharacter =
    6.6;  // width of a 12 px letter: there is no text measuring without a browser
constexpr std::size_t kMostPoints = 700;  // more than one a pixel only makes the file larger
constexpr std::size_t kColors = 8;        // of plot_style(); then they come again

struct Range {
  double low = std::numeric_limits<double>::infinity(),
         high = -std::numeric_limits<double>::infinity();
  void add(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
  bool empty() const { return low > high; }
};

struct Axis {
  Range range;
  bool log = false;
  double from = 0, to = 1;  // pixels

  double at(double value) const {
    const double low = log ? std::log10(range.low) : range.low,
                 high = log ? std::log10(range.high) : range.high;
    const double here = log ? std::log10(value) : value;
    return from + (to - from) * (here - low) / (high - low);
  }
};

// Mean of runs of neighbouring points: keeps the course of a long, noisy curve.
std::vector<std::pair<double, double>> thinned(
    const std::vector<std::pair<double, double>>& points) {
  if (points.size() <= kMostPoints) return points;
  const std::size_t run = (points.size() + kMostPoints - 1) / kMostPoints;
  std::vector<std::pair<double, double>> out;
  for (std::size_t begin = 0; begin < points.size(); begin += run) {
    const std::size_t end = std::min(begin + run, points.size());
    double x = 0, y = 0;
    for (std::size_t i = begin; i < end; ++i) x += points[i].first, y += points[i].second;
    const double count = static_cast<double>(end - begin);
    out.emplace_back(x / count, y / count);
  }
  return out;
}

std::vector<double> decade_ticks(const Range& range) {
  std::vector<double> ticks;
  const double decades = std::log10(range.high / range.low);
  const auto within = [&](double value) {
    return value >= range.low * 0.999 && value <= range.high * 1.001;
  };
  for (double power = std::floor(std::log10(range.low)); power <= std::log10(range.high) + 0.001;
       ++power)
    for (const double factor : {1.0, 2.0, 5.0}) {
      if (factor != 1 && decades > 2.5) continue;
      if (const double value = factor * std::pow(10.0, power); within(value))
        ticks.push_back(value);
    }
  return ticks;
}

// Binary sizes read well in steps of a power of two.
std::vector<double> byte_ticks(const Range& range, int count) {
  const double step = std::exp2(std::ceil(std::log2((range.high - range.low) / count)));
  std::vector<double> ticks;
  for (double value = std::ceil(range.low / step) * step; value <= range.high * 1.0001;
       value += step)
    ticks.push_back(value);
  return ticks;
}

// "64 KiB": ticks are powers of two, so digits after the point are rare.
std::string byte_text(double value) {
  std::string shown = human_bytes(value);
  if (const auto zero = shown.find(".0 "); zero != std::string::npos) shown.erase(zero, 2);
  return value == 0 ? "0" : shown;
}

std::string text(double x, double y, std::string_view anchor, std::string_view style,
                 std::string_view content) {
  return cat("<text x=\"", fixed(x, 1), "\" y=\"", fixed(y, 1), "\" text-anchor=\"", anchor,
             "\" class=\"", style, "\">", html_escape(content), "</text>");
}

std::string line(double x1, double y1, double x2, double y2, std::string_view style) {
  return cat("<line x1=\"", fixed(x1, 1), "\" y1=\"", fixed(y1, 1), "\" x2=\"", fixed(x2, 1),
             "\" y2=\"", fixed(y2, 1), "\" class=\"", style, "\"/>");
}

std::string curve(const Series& series, std::size_t index, const Axis& x, const Axis& y) {
  std::string path, dots;
  bool pen_down = false;
  for (const auto& [px, py] : thinned(series.points)) {
    if (!std::isfinite(py) || (x.log && px <= 0)) {
      pen_down = false;
      continue;
    }
    path += cat(pen_down ? "L" : "M", fixed(x.at(px), 1), " ", fixed(y.at(py), 1));
    pen_down = true;
    if (series.markers)
      dots += cat("<circle cx=\"", fixed(x.at(px), 1), "\" cy=\"", fixed(y.at(py), 1),
                  "\" r=\"3.5\" class=\"f", index % kColors, "\"/>");
  }
  return cat("<path d=\"", path, "\" class=\"c", index % kColors, "\"/>", dots);
}

// Names at the right end of their lines; those that would touch are moved apart downwards.
std::string level_lines(const std::vector<Level>& levels, const Axis& x, const Axis& y) {
  std::vector<Level> sorted = levels;
  std::ranges::sort(sorted, [](const Level& a, const Level& b) { return a.y > b.y; });
  std::string out;
  double above = -1e9;
  for (const auto& level : sorted) {
    const double at = y.at(level.y);
    const double label = std::max(at - 5, above + 14);
    above = label;
    out += line(x.from, at, x.to, at, "level");
    out += text(x.to - 4, label, "end", "note", level.name);
  }
  return out;
}

std::string legend(const std::vector<Series>& series) {
  std::string out;
  double x = kLeft;
  for (std::size_t i = 0; i < series.size(); ++i) {
    const double y = kTitleHeight + 8;
    out += cat("<rect x=\"", fixed(x, 1), "\" y=\"", fixed(y - 5, 1),
               "\" width=\"14\" height=\"4\" rx=\"2\" class=\"f", i % kColors, "\"/>");
    out += text(x + 20, y + 1, "start", "note", series[i].name);
    x += 44 + kCharacter * static_cast<double>(series[i].name.size());
  }
  return out;
}

}  // namespace

std::vector<double> round_ticks(double low, double high, int count) {
  const double rough = (high - low) / count;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double factor : {1.0, 2.0, 2.5, 5.0})
    if (factor * power >= rough) {
      step = factor * power;
      break;
    }
  std::vector<double> ticks;
  for (double k = std::ceil(low / step - 1e-9); k * step <= high + step * 1e-9; ++k)
    ticks.push_back(k * step);
  return ticks;
}

std::string tick_text(double value, double step) {
  if (value == 0) return "0";
  static constexpr std::array<std::pair<double, const char*>, 4> kUnits = {
      {{1e9, "G"}, {1e6, "M"}, {1e3, "K"}, {1, ""}}};
  for (const auto& [unit, name] : kUnits) {
    if (std::abs(value) < unit * 0.9999 && unit > 1) continue;
    const double finest = step / unit;
    int digits =
        finest > 0 ? std::clamp(static_cast<int>(std::ceil(-std::log10(finest) - 1e-6)), 0, 6) : 0;
    // A step of 2.5 in a unit needs one digit more than its size tells.
    const double scaled = finest * std::pow(10.0, digits);
    if (std::abs(scaled - std::round(scaled)) > 1e-6 && digits < 6) ++digits;
    return cat(fixed(value / unit, digits), name);
  }
  return cat(value);
}

std::string html_escape(std::string_view given) {
  std::string out;
  for (const char c : given) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string svg(const Plot& plot) {
  Axis x, y;
  x.log = plot.log_x;
  for (const auto& series : plot.series)
    for (const auto& [px, py] : thinned(series.points)) {
      if (!std::isfinite(px) || !std::isfinite(py) || (plot.log_x && px <= 0)) continue;
      x.range.add(px);
      y.range.add(py);
    }
  const bool nothing = x.range.empty();
  for (const auto& level : plot.levels)
    if (!nothing) y.range.add(level.y);
  if (nothing) x.range = y.range = {1, 2};
  if (plot.from_zero) y.range.add(0);
  if (x.range.low == x.range.high) x.range.high = x.log ? 10 * x.range.low : x.range.low + 1;
  if (y.range.low == y.range.high)
    y.range.add(y.range.high + std::max(std::abs(y.range.high), 1e-9));
  const double margin = 0.06 * (y.range.high - y.range.low);
  y.range.high += margin;
  if (!plot.from_zero) y.range.low -= margin;

  const double top = kTitleHeight + (plot.series.size() > 1 ? kLegendHeight : 0) + 6;
  x.from = kLeft, x.to = kWidth - kRight;
  y.from = kHeight - kBottom, y.to = top;

  std::string out = cat("<svg viewBox=\"0 0 ", kWidth, " ", kHeight,
                        "\" role=\"img\" aria-label=\"", html_escape(plot.title), "\">");
  out += text(kLeft, 18, "start", "title", plot.title);
  if (plot.series.size() > 1) out += legend(plot.series);

  const auto y_ticks =
      plot.bytes ? byte_ticks(y.range, 5) : round_ticks(y.range.low, y.range.high, 5);
  const double y_step = y_ticks.size() > 1 ? y_ticks[1] - y_ticks[0] : y.range.high - y.range.low;
  for (const double tick : y_ticks) {
    out += line(x.from, y.at(tick), x.to, y.at(tick), "grid");
    out += text(x.from - 8, y.at(tick) + 4, "end", "tick",
                plot.bytes ? byte_text(tick) : tick_text(tick, y_step));
  }
  const auto x_ticks =
      plot.log_x ? decade_ticks(x.range) : round_ticks(x.range.low, x.range.high, 7);
  const double x_step = plot.log_x ? 0 : (x_ticks.size() > 1 ? x_ticks[1] - x_ticks[0] : 0);
  for (const double tick : x_ticks) {
    out += line(x.at(tick), y.from, x.at(tick), y.from + 4, "axis");
    out += text(x.at(tick), y.from + 18, "middle", "tick", tick_text(tick, x_step));
  }
  out += line(x.from, y.from, x.to, y.from, "axis");
  out += text((x.from + x.to) / 2, kHeight - 8, "middle", "note", plot.x_label);
  out += cat("<text transform=\"translate(14 ", fixed((y.from + y.to) / 2, 1),
             ") rotate(-90)\" text-anchor=\"middle\" class=\"note\">", html_escape(plot.y_label),
             "</text>");
  if (nothing) {
    out += text((x.from + x.to) / 2, (y.from + y.to) / 2, "middle", "note", "nothing was measured");
    return out + "</svg>";
  }
  out += level_lines(plot.levels, x, y);
  for (std::size_t i = 0; i < plot.series.size(); ++i) out += curve(plot.series[i], i, x, y);
  return out + "</svg>";
}

std::string svg_file(std::string_view svg) {
  const std::size_t name = svg.find("<svg"), end = svg.find('>', name);
  if (name == std::string_view::npos || end == std::string_view::npos) return std::string(svg);
  return cat("<svg xmlns=\"http://www.w3.org/2000/svg\" style=\"background: var(--page)\"",
             svg.substr(name + 4, end - name - 4), "><style>", plot_style(), "</style>",
             svg.substr(end + 1), "\n");
}

std::string_view plot_style() {
  return R"(
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --soft: #59636e;
  --rule: #e4e8ec; --axis: #8c959f;
  --c0: #0b62c4; --c1: #d1580b; --c2: #1a7f37; --c3: #8250df;
  --c4: #b3246f; --c5: #0f7d84; --c6: #7a5c00; --c7: #57606a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e9ec; --soft: #9aa4ae;
  --rule: #2b3138; --axis: #6b7580;
  --c0: #6cb0ff; --c1: #f5a04f; --c2: #56d072; --c3: #bc8cff;
  --c4: #ff85c0; --c5: #4fd1d9; --c6: #e3c34a; --c7: #aab4be; } }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); }
svg .title { font-size: 14px; font-weight: 600; }
svg .tick, svg .note { fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .note { paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
svg .grid { stroke: var(--rule); }
svg .axis { stroke: var(--axis); }
svg .level { stroke: var(--soft); stroke-dasharray: 5 4; }
svg path { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .c0 { stroke: var(--c0); }
svg .c1 { stroke: var(--c1); }
svg .c2 { stroke: var(--c2); }
svg .c3 { stroke: var(--c3); }
svg .c4 { stroke: var(--c4); }
svg .c5 { stroke: var(--c5); }
svg .c6 { stroke: var(--c6); }
svg .c7 { stroke: var(--c7); }
svg .f0 { fill: var(--c0); }
svg .f1 { fill: var(--c1); }
svg .f2 { fill: var(--c2); }
svg .f3 { fill: var(--c3); }
svg .f4 { fill: var(--c4); }
svg .f5 { fill: var(--c5); }
svg .f6 { fill: var(--c6); }
svg .f7 { fill: var(--c7); }
svg .empty { fill: none; stroke: var(--rule); }
svg .cell { font-variant-numeric: tabular-nums; }
)";
}

}  // namespace everlong
