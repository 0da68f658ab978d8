#include <everlong_build_info.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <span>
#include <string_view>

#include "cli/commands.h"
#include "cli/terminal.h"
#include "core/text.h"
#include "ops/runtime.h"

namespace everlong::cli {
namespace {

constexpr const char* kDescription =
    R"(Trains and streams language models whose context has no bound: what a
model remembers of the past has a fixed size, whether it has read a thousand tokens or a billion.

A first tour: fetch a text, prepare it, train a model on it, let it write.)";

Status print_version() {
  const RuntimeInfo about = runtime_info();
  print(cat("everlong ", build_info::kVersion, " (commit ", build_info::kCommit, ", ",
            build_info::kBuildType, ", ", build_info::kCompiler, ")\n"));
  print(cat("torch ", about.torch, "; CPU kernels ", about.simd, ", ", about.threads,
            " threads on ", about.processor, "\n"));
  const std::string built = *build_info::kCuda != '\0' ? cat("built with CUDA ", build_info::kCuda)
                                                       : "built without CUDA kernels";
  const std::string found = about.gpus.empty()
                                ? (about.cuda_trouble.empty() ? "no GPU found" : about.cuda_trouble)
                                : join(about.gpus, ", ");
  print(cat("CUDA: ", built, "; ", found, "\n"));
  return {};
}

// Options may come before the command. A value that looks like a command does no harm here.
bool is_command(std::span<char* const> arguments, std::span<const std::string_view> commands) {
  return std::ranges::any_of(arguments, [&](std::string_view given) {
    return std::ranges::find(commands, given) != commands.end();
  });
}

// By default threads that wait for each other at the end of a parallel loop spin. On a machine that
// has other work that made training six times slower (docs/benchmarks.md); sleeping costs little.
// The OpenMP runtime reads its settings before main does anything: so a program that is about to
// compute starts itself once more, unless the user has chosen.
void wait_asleep(int argc, char** argv) {
  constexpr std::array<std::string_view, 6> kComputing = {"train",  "generate", "eval",
                                                          "stream", "bench",    "convert"};
  if (!is_command({argv, static_cast<std::size_t>(argc)}, kComputing) ||
      std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr)
    return;
  ::setenv("OMP_WAIT_POLICY", "passive", 1);
  ::execv("/proc/self/exe", argv);  // comes back only when it fails; then the threads spin
}

// The system hands out memory by pages of 4 KB, and blocks above 32 MiB anew at every call: a third
// of a pass over 64K tokens (docs/benchmarks.md). Torch asks for pages of 2 MB if told to, and what
// is freed stays here. Not where memory is watched: a stream's few tensors would be rounded up.
bool uses_large_blocks(int argc, char** argv) {
  constexpr std::array<std::string_view, 2> kLarge = {"train", "bench"};
  return is_command({argv, static_cast<std::size_t>(argc)}, kLarge);
}

struct Globals {
  bool quiet = false, version = false;
  std::string color = "auto";
};

void build(Command& program, Globals& globals) {
  program.describe(kDescription);
  add_data(program);
  add_train(program);
  add_generate(program);
  add_eval(program);
  add_stream(program);
  add_bench(program);
  add_info(program);
  add_report(program);
  add_convert(program);
  program.flag("--version", globals.version,
               "Versions of program, torch and CUDA, and the instruction set in use");
  program.flag("-q,--quiet", globals.quiet, "No progress and no notes; data and errors stay");
  program.choice("--color WHEN", globals.color, {"auto", "always", "never"},
                 "NO_COLOR in the environment means never");
  program.note(
      "Every option can also be set in the environment: --top-k is EVERLONG_TOP_K. The command "
      "line wins. Counts "
      "may end in K, M or G, powers of 1024.\n\nExit codes: 0 done, 1 failed, 2 wrong usage, 130 "
      "and 143 interrupted.");
  program.example("everlong data fetch python-doc", "download a text: the manuals of Python");
  program.example("everlong data prepare data/python-doc --out data/python-doc.tokens");
  program.example("everlong train recipes/lightning_demo.toml --out runs/first");
  program.example("everlong generate --model runs/first --prompt 'The list'");
  program.before([&globals] {
    set_color(globals.color);
    set_quiet(globals.quiet);
  });
  program.run_if([&globals] { return globals.version; }, print_version);
}

}  // namespace
}  // namespace everlong::cli

int main(int argc, char** argv) {
  const bool large = everlong::cli::uses_large_blocks(argc, argv);
  if (large) ::setenv("THP_MEM_ALLOC_ENABLE", "1", 0);
  everlong::cli::wait_asleep(argc, argv);
  everlong::keep_freed_memory(large ? everlong::FreedBlocks::kAnySize
                                    : everlong::FreedBlocks::kUsual);
  everlong::cli::Globals globals;
  return everlong::cli::run_program(
      argc, argv, [&](everlong::cli::Command& program) { everlong::cli::build(program, globals); });
}
