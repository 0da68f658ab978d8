// golden_check DIR...: runs every everlong-golden-1 case below the folders through every form of
// the operator, or the layer or model, that it belongs to, in float64, and compares outputs, states
// and gradients. docs/formats.md describes the files.
//
// Exit code: 0 nothing failed, 1 a case failed or a file could not be read, 2 wrong usage.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "golden_case.h"

namespace {

constexpr const char* kHelp =
    R"(Compares this build with golden cases: what the authors' own code computed.

Usage: golden_check DIR...

Every *.safetensors file below the folders whose metadata say format = everlong-golden-1 is a case; files without
golden metadata (a model folder's weights) are not. Each case runs in float64: an operator through every form that it
has (reference, composite, ...; one that takes no float64 in fp32), a layer or a model in one pass and in pieces, and
in fp32 too. The last line reads "N passed, M failed, K not applicable".

Example:
  golden_check tests/golden

Exit code: 0 nothing failed, 1 a case failed or a file could not be read, 2 wrong usage.
)";

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  for (const auto& argument : arguments) {
    if (argument == "-h" || argument == "--help") {
      std::fputs(kHelp, stdout);
      return 0;
    }
    if (argument.starts_with("-")) {
      std::fprintf(stderr,
                   "golden_check: %s is not an option; golden_check --help shows the usage\n",
                   argument.c_str());
      return 2;
    }
  }
  if (arguments.empty()) {
    std::fputs("golden_check: no folder was given. Usage: golden_check DIR...\n", stderr);
    return 2;
  }
  everlong::golden::Tally tally;
  for (const auto& argument : arguments) {
    const auto files = everlong::golden::find_files(argument);
    if (!files.ok()) {
      std::fprintf(stderr, "golden_check: %s\n", files.status().message().c_str());
      return 2;
    }
    for (const auto& file : *files) {
      everlong::golden::Verdict verdict;
      try {
        verdict = everlong::golden::check(file);
      } catch (const std::exception& error) {  // torch's own checks; the first line is the message
        const std::string what = error.what();
        verdict = {everlong::golden::Outcome::kFailed, what.substr(0, what.find('\n'))};
      }
      using everlong::golden::Outcome;
      if (verdict.outcome == Outcome::kNotGolden) continue;
      const bool passed = verdict.outcome == Outcome::kPassed,
                 failed = verdict.outcome == Outcome::kFailed;
      ++(passed ? tally.passed : failed ? tally.failed : tally.not_applicable);
      std::printf("%s  %s: %s\n",
                  passed   ? "PASS"
                  : failed ? "FAIL"
                           : "n/a ",
                  file.string().c_str(), verdict.detail.c_str());
      std::fflush(stdout);
    }
  }
  std::printf("%lld passed, %lld failed, %lld not applicable\n",
              static_cast<long long>(tally.passed), static_cast<long long>(tally.failed),
              static_cast<long long>(tally.not_applicable));
  return tally.failed > 0 ? 1 : 0;
}
