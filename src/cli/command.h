// A subcommand of the program: its options, its help, what it does. The parser behind it (CLI11)
// stays in command.cpp.
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace everlong::cli {

// Options are written "--name", "-n,--name" or "--name PLACEHOLDER"; the value given is the default
// and is shown in the help. Every option can also be set by the environment variable
// EVERLONG_<NAME> (--top-k: EVERLONG_TOP_K); the command line wins. Variables must outlive the
// parse. Counts take K, M, G (powers of 1024).
class Command {
 public:
  Command subcommand(std::string_view name, std::string_view summary,
                     std::string_view description = "");

  void option(std::string_view names, std::string& value, std::string_view help);
  void option(std::string_view names, std::int64_t& value, std::string_view help);
  void option(std::string_view names, double& value, std::string_view help);
  void option(std::string_view names, std::optional<std::int64_t>& value, std::string_view help);
  void option(std::string_view names, std::optional<double>& value, std::string_view help);
  void option(std::string_view names, std::vector<std::int64_t>& value,
              std::string_view help);  // 1K,4K,16K
  void option(std::string_view names, std::vector<std::string>& value,
              std::string_view help);  // repeatable
  void flag(std::string_view names, bool& value, std::string_view help);
  void required_option(std::string_view names, std::string& value, std::string_view help);
  void choice(std::string_view names, std::string& value, const std::vector<std::string>& allowed,
              std::string_view help);
  void positional(std::string_view name, std::string& value, bool required, std::string_view help);
  void positional(std::string_view name, std::vector<std::string>& value, bool required,
                  std::string_view help);

  void describe(std::string_view
                    description);  // paragraphs above the usage; lines that start with a space stay
  void note(std::string_view text);  // paragraphs below the examples
  void example(std::string_view command, std::string_view explanation = "");
  // A failure becomes a message on stderr and the exit code 1 (130 or 143 for kInterrupted).
  void run(std::function<Status()> body);
  void run_if(std::function<bool()> wanted,
              std::function<Status()> body);  // else a subcommand is missing
  void before(std::function<void()> hook);    // of the program: runs once the options are read

  struct Node;  // of the parser
  explicit Command(Node* node) : node_(node) {}

 private:
  Node* node_;
};

// Parses, runs what was asked for and returns the exit code: 0 done, 1 failed, 2 wrong usage, 130
// and 143 interrupted.
int run_program(int argc, char** argv, const std::function<void(Command&)>& build);

}  // namespace everlong::cli
