#include "eval/heat_map.h"

#include <algorithm>

#include "core/text.h"
#include "eval/plot.h"

namespace everlong {
namespace {

constexpr double kMapWidth = 700, kMapRow = 34, kMapTop = 40, kMapLeft = 86, kMapRight = 10,
                 kMapBottom = 48;

std::string map_text(double x, double y, std::string_view style, std::string_view content,
                     std::string_view anchor = "middle") {
  return cat("<text x=\"", fixed(x, 1), "\" y=\"", fixed(y, 1), "\" text-anchor=\"", anchor,
             "\" class=\"", style, "\">", html_escape(content), "</text>");
}

}  // namespace

std::string svg(const HeatMap& map) {
  const double columns = std::max<double>(1, static_cast<double>(map.columns.size()));
  const double rows = std::max<double>(1, static_cast<double>(map.rows.size()));
  const double step = (kMapWidth - kMapLeft - kMapRight) / columns,
               bottom = kMapTop + kMapRow * rows;
  std::string out = cat("<svg viewBox=\"0 0 ", kMapWidth, " ", bottom + kMapBottom,
                        "\" role=\"img\" aria-label=\"", html_escape(map.title), "\">",
                        map_text(kMapLeft, 20, "title", map.title, "start"));
  for (std::size_t r = 0; r < map.rows.size(); ++r) {
    const double y = kMapTop + kMapRow * static_cast<double>(r);
    out += map_text(kMapLeft - 8, y + kMapRow / 2 + 4, "tick", map.rows[r], "end");
    for (std::size_t c = 0; c < map.columns.size(); ++c) {
      const double x = kMapLeft + step * static_cast<double>(c);
      const bool there = r < map.cells.size() && c < map.cells[r].size() && map.cells[r][c];
      const std::string box =
          cat("x=\"", fixed(x + 1, 1), "\" y=\"", fixed(y + 1, 1), "\" width=\"",
              fixed(step - 2, 1), "\" height=\"", fixed(kMapRow - 2, 1), "\" rx=\"3\"");
      if (!there) {
        out += cat("<rect ", box, " class=\"empty\"/>");
        continue;
      }
      const HeatMap::Cell& cell = *map.cells[r][c];
      out += cat("<g>", cell.tip.empty() ? "" : cat("<title>", html_escape(cell.tip), "</title>"),
                 "<rect ", box, " class=\"empty\"/><rect ", box, " class=\"f0\" fill-opacity=\"",
                 fixed(0.75 * std::clamp(cell.share, 0.0, 1.0), 3), "\"/>",
                 map_text(x + step / 2, y + kMapRow / 2 + 4, "cell", cell.text), "</g>");
    }
  }
  for (std::size_t c = 0; c < map.columns.size(); ++c)
    out += map_text(kMapLeft + step * (static_cast<double>(c) + 0.5), bottom + 18, "tick",
                    map.columns[c]);
  out += map_text((kMapLeft + kMapWidth - kMapRight) / 2, bottom + 38, "note", map.x_label);
  const double middle = (kMapTop + bottom) / 2;
  out += cat("<text transform=\"translate(16 ", fixed(middle, 1),
             ") rotate(-90)\" text-anchor=\"middle\" class=\"note\">", html_escape(map.y_label),
             "</text>");
  return out + "</svg>";
}

}  // namespace everlong
