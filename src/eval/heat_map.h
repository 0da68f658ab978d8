// A table of shares as coloured cells, as SVG text beside the plots of eval/plot.h.
#pragma once
#include <optional>
#include <string>
#include <vector>

namespace everlong {

struct HeatMap {
  struct Cell {
    double share = 0;      // 0 to 1: how strong the colour is
    std::string text;      // written on it
    std::string tip = {};  // shown under the pointer
  };
  std::string title = {}, x_label = {}, y_label = {};
  std::vector<std::string> columns = {}, rows = {};          // names along the axes
  std::vector<std::vector<std::optional<Cell>>> cells = {};  // [row][column]; none: not measured
};

// One <svg>, 700 wide, scaling with its container; colours come from plot_style(). Missing rows and
// columns of `cells` count as not measured.
std::string svg(const HeatMap& map);

}  // namespace everlong
