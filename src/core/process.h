// Running another program as a child process, without a shell in between.
#pragma once
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/files.h"

namespace everlong {

struct Process {
  std::vector<std::string> command;  // command[0] is looked up on PATH; no quoting, no globbing
  fs::path folder = {};              // its working folder; empty: the caller's
  std::vector<std::pair<std::string, std::string>> environment =
      {};                       // added to the caller's, or replacing
  std::string_view input = {};  // what it reads on stdin; empty: nothing (/dev/null)
  // Takes each piece of stdout as it comes; a failure stops the program. Empty: ProcessResult keeps
  // it all.
  std::function<Status(std::string_view)> output = {};
};

struct ProcessResult {
  int exit_code = 0;   // 128 + n when signal n ended it
  std::string output;  // stdout, unless Process::output took it
  std::string errors;  // the last 16 KiB of stderr
};

// Runs to the end. A program that ran and failed is a result, not an error: look at exit_code.
// kNotFound when there is no such program, kInterrupted when SIGINT ended it. Thread safe.
Result<ProcessResult> run_process(const Process& process);

}  // namespace everlong
