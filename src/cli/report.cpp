#include "eval/report.h"

#include "cli/commands.h"
#include "cli/terminal.h"
#include "core/text.h"

namespace everlong::cli {
namespace {

struct ReportCommand {
  std::string folder, out;

  Status run() const {
    EVERLONG_ASSIGN(const auto html, render_report(folder));
    const fs::path target = out.empty() ? fs::path(folder) / "report.html" : fs::path(out);
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
      "report", "Make one HTML page of a run",
      "Makes one self-contained HTML page of a run folder: loss, bits per byte, speed and memory "
      "by position, as far as "
      "they were measured; the page says which command measures what is missing.");
  report.positional("RUN", command.folder, true, "run folder of `everlong train`");
  report.option("-o,--out FILE", command.out,
                "page to write; default: report.html in the run folder; - is stdout");
  report.example("everlong report runs/demo --out demo.html");
  report.run([] { return command.run(); });
}

}  // namespace everlong::cli
