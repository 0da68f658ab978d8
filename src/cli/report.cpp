#include "eval/report.h"

#include "cli/commands.h"
#include "cli/terminal.h"
#include "core/text.h"

namespace everlong::cli {
namespace {

struct ReportCommand {
  std::vector<std::string> folders;
  std::string out;

  Status run() const {
    const bool one = folders.size() == 1;
    if (!one && out.empty())
      return invalid_argument(folders.size(),
                              " runs are given and no page; say with --out FILE where their "
                              "comparison goes (- is stdout)");
    EVERLONG_ASSIGN(const auto html, one ? render_report(folders.front())
                                         : render_comparison({folders.begin(), folders.end()}));
    const fs::path target = out.empty() ? fs::path(folders.front()) / "report.html" : fs::path(out);
    if (target == "-") {
      print(html);
      return {};
    }
    EVERLONG_RETURN_IF_ERROR(write_file(target, html));
    print(cat(target.string(), "\n"));
    return {};
  }
};

}  // namespace

void add_report(Command& program) {
  static ReportCommand command;
  Command report = program.subcommand(
      "report", "Make one HTML page of one or several runs",
      "Makes one self-contained HTML page of a run folder: loss, bits per byte, speed and memory "
      "by position, as far as they were measured; the page says which command measures what is "
      "missing. Of several run folders: their figures, curves and the settings that differ, side "
      "by side. Runs may still be in training.");
  report.positional("RUN", command.folders, true, "run folders of `everlong train`");
  report.option("-o,--out FILE", command.out,
                "page to write; default for one run: report.html in its folder; - is stdout");
  report.example("everlong report runs/demo --out demo.html");
  report.example("everlong report runs/a runs/b runs/c --out comparison.html", "side by side");
  report.run([] { return command.run(); });
}

}  // namespace everlong::cli
