#include "eval/page.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "core/text.h"
#include "eval/plot.h"

namespace everlong {

std::string_view page_style() {
  return R"(
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 760px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, figcaption { color: var(--soft); }
figure { margin: 1.6rem 0; }
figcaption { font-size: 13px; margin-top: .2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--rule); text-align: right; }
th { color: var(--soft); font-weight: 500; }
.facts td { text-align: left; }
.facts td:first-child { color: var(--soft); }
pre { border: 1px solid var(--rule); border-radius: 6px; padding: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .35rem .8rem;
  align-items: center; }
.track i { display: block; height: 12px; border-radius: 3px; background: var(--axis); }
.track i.ours { background: var(--c0); }
)";
}

std::string table_row(std::initializer_list<std::string> cells, const char* tag) {
  std::string out = "<tr>";
  for (const auto& cell : cells) out += cat("<", tag, ">", html_escape(cell), "</", tag, ">");
  return out + "</tr>\n";
}

double number(const nlohmann::ordered_json& object, const char* key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  return found != object.end() && found->is_number() ? found->get<double>() : std::nan("");
}

}  // namespace everlong
