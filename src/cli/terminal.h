// What the program says: data on stdout, everything else on stderr; colour only where a person
// looks.
#pragma once
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"

namespace everlong::cli {

// "auto": on a terminal, unless NO_COLOR is set; "always"; "never".
void set_color(std::string_view mode);
void set_quiet(bool quiet);  // no notes, no progress; errors and data stay

std::string bold(std::string_view text);  // for stdout
void note(std::string_view line);         // to stderr, unless quiet
void print_error(std::string_view command, std::string_view message);

void print(std::string_view text);                     // to stdout
void print_json(const nlohmann::ordered_json& value);  // one line
// Fails when stdout cannot be written: a full disk must not look like success.
Status flush_output();

// Columns as wide as their widest cell; the first is flush left, the others flush right unless
// `left` says so.
class Table {
 public:
  explicit Table(std::vector<std::string> head, std::vector<std::size_t> left = {0});
  void add(std::vector<std::string> row);
  std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
  std::vector<std::size_t> left_;
};

// SIGINT and SIGTERM from now on only set a flag, so that work ends at a safe point; a second one
// ends the program.
void catch_signals();
int caught_signal();  // 0, SIGINT or SIGTERM

}  // namespace everlong::cli
