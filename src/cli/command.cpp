#include "cli/command.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <deque>
#include <exception>
#include <optional>
#include <sstream>

#include "cli/terminal.h"
#include "core/text.h"

namespace everlong::cli {

struct Command::Node {
  CLI::App* app = nullptr;
  std::string summary, description, note;
  std::vector<std::pair<std::string, std::string>> examples;
  std::function<Status()> body;
  std::function<bool()> wanted;
  std::function<void()> before;
  std::deque<Node> children;
};

namespace {

constexpr std::size_t kHelpWidth = 96;

std::string full_name(const CLI::App* app) {
  return app->get_parent() == nullptr ? app->get_name()
                                      : cat(full_name(app->get_parent()), " ", app->get_name());
}

// Words of `text` broken into lines; every line but the first starts with `indent` spaces.
std::string wrapped(std::string_view text, std::size_t indent) {
  std::string out, line;
  const auto flush = [&] {
    out += cat(out.empty() ? "" : cat("\n", std::string(indent, ' ')), line);
    line.clear();
  };
  std::istringstream words{std::string(text)};
  for (std::string word; words >> word;) {
    if (!line.empty() && indent + line.size() + 1 + word.size() > kHelpWidth) flush();
    line += cat(line.empty() ? "" : " ", word);
  }
  flush();
  return out;
}

std::string two_columns(const std::vector<std::pair<std::string, std::string>>& rows) {
  std::size_t width = 0;
  for (const auto& [name, text] : rows)
    width = std::max(width, std::min<std::size_t>(name.size(), 28));
  std::string out;
  for (const auto& [name, text] : rows) {
    const std::string gap = name.size() > width ? cat("\n", std::string(width + 4, ' '))
                                                : std::string(width + 2 - name.size(), ' ');
    out += cat("  ", name, gap, wrapped(text, width + 4), "\n");
  }
  return out;
}

// Paragraphs are parted by empty lines and broken anew; lines that start with a space stay as they
// are.
std::string paragraphs(std::string_view text) {
  std::string out, paragraph;
  const auto flush = [&] {
    if (!paragraph.empty()) out += wrapped(paragraph, 0) + "\n";
    paragraph.clear();
  };
  std::istringstream lines{std::string(text)};
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line.front() == ' ') {
      const bool ended = !paragraph.empty();
      flush();
      if (!line.empty() || ended || !out.empty()) out += line + "\n";
    } else {
      paragraph += line + " ";
    }
  }
  flush();
  return out;
}

std::string help_text(const Command::Node& node) {
  const CLI::App& app = *node.app;
  std::string usage = full_name(&app);
  std::vector<std::pair<std::string, std::string>> arguments, options, commands;
  for (const CLI::Option* option : app.get_options()) {
    const bool positional = option->get_positional();
    std::string name = positional ? option->get_name(true) : option->get_name(false, true);
    if (positional && !option->get_required()) name = cat("[", name, "]");
    for (std::size_t comma = name.find(','); comma != std::string::npos;
         comma = name.find(',', comma + 2))
      name.insert(comma + 1, " ");
    if (!positional && !option->get_option_text().empty())
      name += cat(" ", option->get_option_text());
    std::string text = option->get_description();
    if (!positional && option->get_required()) text += " (required)";
    if (const std::string shown = option->get_default_str(); !shown.empty() && shown != "\"\"")
      text += cat(" [", shown, "]");
    (positional ? arguments : options).emplace_back(name, text);
  }
  if (!options.empty()) usage += " [OPTIONS]";
  for (const auto& [name, text] : arguments) usage += " " + name;
  for (const auto& child : node.children)
    commands.emplace_back(child.app->get_name(), child.summary);
  if (!commands.empty()) usage += " COMMAND ...";

  std::string out =
      cat(paragraphs(node.description.empty() ? node.summary + "." : node.description), "\n",
          bold("Usage:"), " ", usage, "\n");
  if (!commands.empty()) out += cat("\n", bold("Commands:"), "\n", two_columns(commands));
  if (!arguments.empty()) out += cat("\n", bold("Arguments:"), "\n", two_columns(arguments));
  if (!options.empty()) out += cat("\n", bold("Options:"), "\n", two_columns(options));
  if (!node.examples.empty()) out += cat("\n", bold("Examples:"), "\n");
  for (const auto& [line, explanation] : node.examples)
    out += cat("  ", line, "\n",
               explanation.empty() ? "" : cat("      ", wrapped(explanation, 6), "\n"));
  if (!node.note.empty()) out += cat("\n", paragraphs(node.note));
  return out;
}

Command::Node* asked_for(Command::Node& node) {
  for (auto& child : node.children)
    if (child.app->parsed()) return asked_for(child);
  return &node;
}

std::string environment_name(const CLI::Option& option) {
  std::string name = "EVERLONG_" + option.get_single_name();
  for (char& c : name)
    c = c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return name;
}

CLI::Option* dress(CLI::Option* option, std::string_view placeholder, std::string_view shown) {
  option->envname(environment_name(*option));
  option->option_text(std::string(placeholder));
  if (!shown.empty()) option->default_str(std::string(shown));
  return option;
}

// "--name PLACEHOLDER" -> both halves.
std::pair<std::string, std::string> split_names(std::string_view names, std::string_view fallback) {
  const auto space = names.find(' ');
  if (space == std::string_view::npos) return {std::string(names), std::string(fallback)};
  return {std::string(names.substr(0, space)), std::string(names.substr(space + 1))};
}

std::string count_text(std::int64_t value) {
  if (value != 0 && value % (1 << 20) == 0) return cat(value >> 20, "M");
  if (value != 0 && value % (1 << 10) == 0) return cat(value >> 10, "K");
  return cat(value);
}

std::int64_t count_or_throw(const std::string& text) {
  const auto value = parse_count(text);
  if (!value)
    throw CLI::ValidationError(cat("\"", text, "\" is not a whole number; 1000 and 4K are"));
  return *value;
}

double number_or_throw(const std::string& text) {
  const auto value = parse_number(text);
  if (!value) throw CLI::ValidationError(cat("\"", text, "\" is not a number"));
  return *value;
}

// An option whose text `take` reads; it throws CLI::ValidationError on what it does not accept.
void parsed_option(CLI::App& app, std::string_view names, std::string_view placeholder,
                   std::string_view help, std::string_view shown,
                   std::function<void(const std::string&)> take) {
  const auto [flags, text] = split_names(names, placeholder);
  const std::string name = flags.substr(flags.find("--"));
  const auto named = [name, take = std::move(take)](const std::string& given) {
    try {
      take(given);
    } catch (const CLI::ValidationError& error) {
      throw CLI::ValidationError(cat(name, ": ", error.what()));
    }
  };
  dress(app.add_option_function<std::string>(flags, named, std::string(help)), text, shown);
}

// What the parser complains of, as a sentence with a way out.
std::string usage_message(const CLI::ParseError& error, const CLI::App& app,
                          const std::vector<std::string>& left) {
  // A misspelled --model is also a missing one: the misspelling is what helps.
  const bool misspelled = dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr ||
                          dynamic_cast<const CLI::RequiredError*>(&error) != nullptr;
  if (!misspelled || left.empty()) return error.what();
  const std::string& given = left.front();
  const bool option = given.size() > 1 && given.front() == '-';
  std::vector<std::string> known;
  for (const CLI::App* at = &app; at != nullptr; at = at->get_parent())
    for (const CLI::Option* candidate : at->get_options())
      if (!candidate->get_positional() && option)
        known.push_back("--" + candidate->get_single_name());
  for (const CLI::App* sub : app.get_subcommands([](const CLI::App*) { return true; }))
    if (!option) known.push_back(sub->get_name());
  const std::string near = nearest(given.substr(0, given.find('=')), known);
  return cat(
      given, option ? " is not an option here" : " was not expected here",
      near.empty() ? "" : cat(". Did you mean ", near, "?"),
      near.empty() && !option && !known.empty() ? cat("; commands: ", join(known, ", ")) : "");
}

int exit_code(const Status& status) {
  if (status.ok()) return 0;
  if (status.code() == StatusCode::kInterrupted)
    return 128 + (caught_signal() != 0 ? caught_signal() : SIGINT);
  return 1;
}

}  // namespace

Command Command::subcommand(std::string_view name, std::string_view summary,
                            std::string_view description) {
  Node& child = node_->children.emplace_back();
  child.app = node_->app->add_subcommand(std::string(name), std::string(summary));
  child.app->fallthrough();
  child.summary = summary;
  child.description = description;
  return Command(&child);
}

void Command::option(std::string_view names, std::string& value, std::string_view help) {
  const auto [flags, placeholder] = split_names(names, "TEXT");
  dress(node_->app->add_option(flags, value, std::string(help)), placeholder, value);
}

void Command::required_option(std::string_view names, std::string& value, std::string_view help) {
  const auto [flags, placeholder] = split_names(names, "TEXT");
  dress(node_->app->add_option(flags, value, std::string(help)), placeholder, "")->required();
}

void Command::option(std::string_view names, std::int64_t& value, std::string_view help) {
  parsed_option(*node_->app, names, "N", help, count_text(value),
                [&value](const std::string& text) { value = count_or_throw(text); });
}

void Command::option(std::string_view names, std::optional<std::int64_t>& value,
                     std::string_view help) {
  parsed_option(*node_->app, names, "N", help, "",
                [&value](const std::string& text) { value = count_or_throw(text); });
}

void Command::option(std::string_view names, double& value, std::string_view help) {
  parsed_option(*node_->app, names, "X", help, cat(value),
                [&value](const std::string& text) { value = number_or_throw(text); });
}

void Command::option(std::string_view names, std::optional<double>& value, std::string_view help) {
  parsed_option(*node_->app, names, "X", help, "",
                [&value](const std::string& text) { value = number_or_throw(text); });
}

void Command::option(std::string_view names, std::vector<std::int64_t>& value,
                     std::string_view help) {
  std::string shown;
  for (const auto count : value) shown += cat(shown.empty() ? "" : ",", count_text(count));
  parsed_option(*node_->app, names, "N,N,...", help, shown, [&value](const std::string& text) {
    value.clear();
    std::istringstream parts(text);
    for (std::string part; std::getline(parts, part, ',');) value.push_back(count_or_throw(part));
    if (value.empty()) throw CLI::ValidationError("an empty list was given; 1K,4K is one");
  });
}

void Command::option(std::string_view names, std::vector<std::string>& value,
                     std::string_view help) {
  const auto [flags, placeholder] = split_names(names, "TEXT");
  dress(node_->app->add_option(flags, value, std::string(help))->allow_extra_args(false),
        placeholder, "");
}

void Command::flag(std::string_view names, bool& value, std::string_view help) {
  auto* const option = node_->app->add_flag(std::string(names), value, std::string(help));
  // A version in the environment is nobody's wish to see ours.
  if (option->get_single_name() != "version") option->envname(environment_name(*option));
}

void Command::choice(std::string_view names, std::string& value,
                     const std::vector<std::string>& allowed, std::string_view help) {
  parsed_option(
      *node_->app, names, join(allowed, "|"), help, value,
      [&value, allowed](const std::string& text) {
        if (std::ranges::find(allowed, text) == allowed.end())
          throw CLI::ValidationError(cat("\"", text, "\" is not one of ", join(allowed, ", ")));
        value = text;
      });
}

void Command::positional(std::string_view name, std::string& value, bool required,
                         std::string_view help) {
  node_->app->add_option(std::string(name), value, std::string(help))->required(required);
}

void Command::positional(std::string_view name, std::vector<std::string>& value, bool required,
                         std::string_view help) {
  node_->app->add_option(std::string(name), value, std::string(help))->required(required);
}

void Command::example(std::string_view command, std::string_view explanation) {
  node_->examples.emplace_back(command, explanation);
}

void Command::describe(std::string_view description) { node_->description = description; }

void Command::note(std::string_view text) { node_->note = text; }

void Command::run(std::function<Status()> body) { node_->body = std::move(body); }

void Command::run_if(std::function<bool()> wanted, std::function<Status()> body) {
  node_->wanted = std::move(wanted);
  node_->body = std::move(body);
}

void Command::before(std::function<void()> hook) { node_->before = std::move(hook); }

int run_program(int argc, char** argv, const std::function<void(Command&)>& build) {
  // A write past a file size limit (ulimit -f) is then a failed write, not the end of the program.
  std::signal(SIGXFSZ, SIG_IGN);
  CLI::App app;
  app.name("everlong");
  app.require_subcommand(0, 1);
  Command::Node root;
  root.app = &app;
  Command command(&root);
  app.set_help_flag();
  build(command);

  bool help = false;
  const std::function<void(Command::Node&)> add_help = [&](Command::Node& node) {
    node.app->set_help_flag();
    node.app->add_flag("-h,--help", help, "This text");
    for (auto& child : node.children) add_help(child);
  };
  add_help(root);

  std::optional<std::string> wrong;
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const auto* const node = asked_for(root);
    wrong = usage_message(error, *node->app, app.remaining(true));
  }
  Command::Node& node = *asked_for(root);
  const std::string name = full_name(node.app);
  if (root.before) root.before();
  if (help) {
    print(help_text(node));
    return flush_output().ok() ? 0 : 1;
  }
  const bool runs = node.body && (!node.wanted || node.wanted());
  if (!wrong && !runs) wrong = "a command is missing";
  if (wrong) {
    print_error(name, cat(*wrong, "\nSee ", name, " --help"));
    return 2;
  }
  Status status;
  try {
    status = node.body();
  } catch (const std::exception&
               error) {  // torch's checks; the first line is the message, the rest a stack
    const std::string what = error.what();
    status = invalid_argument(what.substr(0, what.find('\n')));
  }
  if (status.ok()) status = flush_output();
  if (!status.ok()) print_error(name, status.message());
  return exit_code(status);
}

}  // namespace everlong::cli
