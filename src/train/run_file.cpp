#include "train/run_file.h"

#define TOML_EXCEPTIONS 0
#include <toml++/toml.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <sstream>

#include "core/text.h"

namespace everlong {
namespace {

constexpr std::int64_t kMaxCount = std::int64_t{1} << 40;

// The one list of keys outside [model]: it reads them, refuses others and writes them back.
template <class Run, class Visitor>
void visit(Run& run, Visitor& v) {
  v.section("data");
  v.text("path", run.data.path);
  v.choice("packing", run.data.packing, {"packed", "shuffled"});
  v.integer("row_tokens", run.data.row_tokens, 1, kMaxCount);
  v.integer("rows", run.data.rows, 1, 1 << 20);
  v.section("train");
  v.text("from_model", run.train.from_model);
  v.integer("steps", run.train.steps, 1, kMaxCount);
  v.number("learning_rate", run.train.learning_rate, 0, 10);
  v.choice("schedule", run.train.schedule, {"cosine", "wsd", "constant"});
  v.integer("warmup_steps", run.train.warmup_steps, 0, kMaxCount);
  v.number("decay_fraction", run.train.decay_fraction, 0, 1);
  v.number("min_lr_ratio", run.train.min_lr_ratio, 0, 1);
  v.number("beta1", run.train.beta1, 0, 0.999999);
  v.number("beta2", run.train.beta2, 0, 0.999999);
  v.number("eps", run.train.eps, 1e-30, 1);
  v.number("weight_decay", run.train.weight_decay, 0, 10);
  v.number("clip", run.train.clip, 0, 1e9);
  v.integer("accumulation", run.train.accumulation, 1, 1 << 20);
  v.choice("dtype", run.train.dtype, {"auto", "fp32", "bf16"});
  v.choice("device", run.train.device, {"auto", "cpu", "cuda"});
  v.integer("seed", run.train.seed, 0, INT64_MAX);
  v.integer("threads", run.train.threads, 0, 4096);
  v.boolean("checkpointing", run.train.checkpointing);
  v.choice("carry", run.train.carry, {"none", "detached", "exact"});
  v.integer("segment_tokens", run.train.segment_tokens, 0, kMaxCount);
  v.number("max_seconds", run.train.max_seconds, 0, 1e9);
  v.integer("eval_every", run.train.eval_every, 0, kMaxCount);
  v.integer("eval_tokens", run.train.eval_tokens, 0, kMaxCount);
  v.integer("save_every", run.train.save_every, 0, kMaxCount);
  v.integer("log_every", run.train.log_every, 1, kMaxCount);
  v.section("out");
  v.text("folder", run.out.folder);
}

const std::vector<std::string> kSections = {"model", "data", "train", "out"};

std::string hint(const std::string& near) {
  return near.empty() ? "" : cat(". Did you mean \"", near, "\"?");
}

std::string shown(const toml::node& node) {
  std::ostringstream out;
  node.visit([&](const auto& value) { out << value; });
  return out.str();
}

nlohmann::json to_json(const toml::node& node) {
  if (const auto* table = node.as_table()) {
    auto object = nlohmann::json::object();
    for (const auto& [key, value] : *table) object[std::string(key.str())] = to_json(value);
    return object;
  }
  if (const auto* array = node.as_array()) {
    auto list = nlohmann::json::array();
    for (const auto& value : *array) list.push_back(to_json(value));
    return list;
  }
  if (const auto* value = node.as_string()) return value->get();
  if (const auto* value = node.as_integer()) return value->get();
  if (const auto* value = node.as_floating_point()) return value->get();
  if (const auto* value = node.as_boolean()) return value->get();
  return shown(node);  // dates: no setting is one, so the reader of the settings refuses the text
}

// A TOML document with overrides laid over it, which knows where each value came from.
class Document {
 public:
  static Result<Document> make(std::string_view text, const std::string& name,
                               const std::vector<std::string>& overrides) {
    auto parsed = toml::parse(text, name);
    if (!parsed)
      return invalid_argument(name, ":", parsed.error().source().begin.line,
                              ": is not TOML: ", parsed.error().description());
    Document document(name, std::move(parsed).table());
    for (const auto& text_of_override : overrides)
      EVERLONG_RETURN_IF_ERROR(document.lay_over(text_of_override));
    return document;
  }

  const toml::table& root() const { return root_; }
  const toml::node* find(const std::string& section, const std::string& key) const {
    const auto* table = root_.get_as<toml::table>(section);
    return table != nullptr ? table->get(key) : nullptr;
  }
  // "run.toml:12" or "--set train.steps=x".
  std::string place(const std::string& path, const toml::node& node) const {
    for (const auto& [overridden, text] : overrides_)
      if (overridden == path || overridden.starts_with(path + ".")) return cat("--set ", text);
    const auto line = node.source().begin.line;
    return line == 0 ? name_ : cat(name_, ":", line);
  }

 private:
  Document(std::string name, toml::table root) : name_(std::move(name)), root_(std::move(root)) {}

  Status lay_over(const std::string& text) {
    const auto equals = text.find('=');
    const std::string path = text.substr(0, equals);
    if (equals == std::string::npos || path.find('.') == std::string::npos)
      return invalid_argument("--set ", text,
                              ": section.key=value is needed, as in train.steps=500");
    toml::table* table = &root_;
    std::size_t from = 0;
    for (auto dot = path.find('.'); dot != std::string::npos; dot = path.find('.', from)) {
      const std::string part = path.substr(from, dot - from);
      auto* inner = table->insert(part, toml::table{}).first->second.as_table();
      if (inner == nullptr)
        return invalid_argument("--set ", text, ": ", part, " is a value, not a section");
      table = inner;
      from = dot + 1;
    }
    const std::string value = text.substr(equals + 1), key = path.substr(from);
    if (auto parsed = toml::parse(cat("value = ", value, "\n"));
        parsed && parsed.table().size() == 1) {
      table->insert_or_assign(key, std::move(*parsed.table().get("value")));
    } else {
      table->insert_or_assign(key, value);
    }
    overrides_[path] = text;
    return {};
  }

  std::string name_;
  toml::table root_;
  std::map<std::string, std::string> overrides_;  // path -> as given
};

// Fills the settings and remembers the first thing wrong.
class Reader {
 public:
  explicit Reader(const Document& document) : document_(document) {}

  void section(const std::string& name) { section_ = name; }
  void text(const std::string& key, std::string& value) {
    if (const auto* node = find(key))
      read(key, *node, node->as_string(), value, "a text is needed");
  }
  void boolean(const std::string& key, bool& value) {
    if (const auto* node = find(key))
      read(key, *node, node->as_boolean(), value, "true or false is needed");
  }
  void choice(const std::string& key, std::string& value, const std::vector<std::string>& allowed) {
    const auto* node = find(key);
    if (node == nullptr) return;
    const auto* given = node->as_string();
    if (given != nullptr && std::ranges::find(allowed, given->get()) != allowed.end()) {
      value = given->get();
      return;
    }
    fail(key, *node,
         cat("is not allowed; one of: ", join(allowed, ", "),
             given != nullptr ? hint(nearest(given->get(), allowed)) : ""));
  }
  void integer(const std::string& key, std::int64_t& value, std::int64_t min, std::int64_t max) {
    const auto* node = find(key);
    if (node == nullptr) return;
    std::optional<std::int64_t> given;
    if (const auto* number = node->as_integer()) given = number->get();
    if (const auto* count = node->as_string()) given = parse_count(count->get());
    if (given && *given >= min && *given <= max) {
      value = *given;
      return;
    }
    fail(key, *node, cat("is not allowed; a whole number from ", min, " to ", max, " is needed"));
  }
  void number(const std::string& key, double& value, double min, double max) {
    const auto* node = find(key);
    if (node == nullptr) return;
    const double given =
        node->is_number() ? node->value<double>().value_or(std::nan("")) : std::nan("");
    if (given >= min && given <= max) {
      value = given;
      return;
    }
    fail(key, *node, cat("is not allowed; a number from ", min, " to ", max, " is needed"));
  }

  // The first error, or the first key that nobody asked for.
  Status finish() const {
    if (!first_error_.ok()) return first_error_;
    for (const auto& [name, node] : document_.root()) {
      const std::string section(name.str());
      if (std::ranges::find(kSections, section) == kSections.end())
        return invalid_argument(document_.place(section, node), ": ", section,
                                " is not a section; known: ", join(kSections, ", "),
                                hint(nearest(section, kSections)));
      if (!node.is_table())
        return invalid_argument(document_.place(section, node), ": ", section, " = ", shown(node),
                                " is not allowed; [", section, "] opens a section of settings");
      if (section == "model") continue;  // its reader knows its keys
      const auto& known = known_.at(section);
      for (const auto& [key_of_node, value] : *node.as_table()) {
        const std::string key(key_of_node.str());
        if (std::ranges::find(known, key) == known.end())
          return invalid_argument(document_.place(section + "." + key, value), ": ", section, ".",
                                  key, " is not a setting; known: ", join(known, ", "),
                                  hint(nearest(key, known)));
      }
    }
    return {};
  }

 private:
  const toml::node* find(const std::string& key) {
    known_[section_].push_back(key);
    return document_.find(section_, key);
  }
  template <class Given, class T>
  void read(const std::string& key, const toml::node& node, const Given* given, T& value,
            const char* needed) {
    if (given != nullptr) {
      value = given->get();
    } else {
      fail(key, node, cat("is not allowed; ", needed));
    }
  }
  void fail(const std::string& key, const toml::node& node, const std::string& why) {
    if (!first_error_.ok()) return;
    const std::string path = section_ + "." + key;
    first_error_ =
        invalid_argument(document_.place(path, node), ": ", path, " = ", shown(node), " ", why);
  }

  const Document& document_;
  std::string section_;
  std::map<std::string, std::vector<std::string>> known_;
  Status first_error_;
};

class Writer {
 public:
  void section(const std::string& name) { out_ += cat(out_.empty() ? "" : "\n", "[", name, "]\n"); }
  void text(const std::string& key, const std::string& value) { line(key, value); }
  void choice(const std::string& key, const std::string& value, const std::vector<std::string>&) {
    line(key, value);
  }
  void boolean(const std::string& key, bool value) { line(key, value); }
  void integer(const std::string& key, std::int64_t value, std::int64_t, std::int64_t) {
    line(key, value);
  }
  void number(const std::string& key, double value, double, double) { line(key, value); }
  // JSON's scalars and arrays are TOML as they stand.
  void line(const std::string& key, const nlohmann::json& value) {
    out_ += cat(key, " = ", value.dump(), "\n");
  }
  void table(const std::string& name, const nlohmann::json& object) {
    section(name);
    for (const auto& [key, value] : object.items())
      if (!value.is_object() && !value.is_null()) line(key, value);
    for (const auto& [key, value] : object.items())
      if (value.is_object() && !value.empty()) table(name + "." + key, value);
  }
  std::string take() { return std::move(out_); }

 private:
  std::string out_;
};

// layer_types as a list, from a list or a pattern; num_hidden_layers is then settled by it.
Status settle_layers(nlohmann::json& model) {
  std::int64_t layers = 0;
  if (model.contains("num_hidden_layers")) {
    const auto& given = model["num_hidden_layers"];
    if (!given.is_number_integer() || given < 1 || given > 4096)
      return invalid_argument("num_hidden_layers = ", given.dump(),
                              " is not a whole number; allowed: 1 to 4096");
    layers = given;
  }
  if (!model.contains("layer_types"))
    return invalid_argument(
        "layer_types is missing; a list of mechanisms, or a pattern such as "
        "\"lightning*3,softmax\" with num_hidden_layers, is needed");
  auto& types = model["layer_types"];
  if (types.is_string()) {
    EVERLONG_ASSIGN(types, expand_layer_pattern(types, layers));
  } else if (layers != 0 && types.is_array() && static_cast<std::int64_t>(types.size()) != layers) {
    return invalid_argument("layer_types lists ", types.size(),
                            " layers, num_hidden_layers = ", layers, "; drop one of the two");
  }
  model.erase("num_hidden_layers");
  return {};
}

Result<ModelConfig> read_model(const Document& document) {
  const auto* table = document.root().get_as<toml::table>("model");
  auto model = to_json(*table);
  // The reader of config.json opens a message with the key, and only this file knows the key's
  // line.
  const auto with_line = [&](const Status& status) {
    const toml::node* best = table;
    std::string path = "model";
    for (const auto& [name, node] : *table) {
      const std::string key(name.str());
      if (!status.message().starts_with(key) || key.size() + 6 < path.size()) continue;
      best = &node;
      path = "model." + key;
    }
    return status.at(cat(document.place(path, *best), ": [model]"));
  };
  if (const Status status = settle_layers(model); !status.ok()) return with_line(status);
  const std::string marker = "model";
  auto config = ModelConfig::from_json(model, marker);
  if (config.ok()) return config;
  std::string message = config.status().message();
  if (message.starts_with(marker + ": ")) message.erase(0, marker.size() + 2);
  return with_line(Status(config.status().code(), message));
}

Status check_together(const RunFile& run) {
  const auto& train = run.train;
  const auto bad = [&](const auto&... parts) { return invalid_argument(run.name, ": ", parts...); };
  if (run.data.path.empty())
    return bad("data.path is missing; give the folder that `everlong data prepare` wrote");
  if (train.warmup_steps >= train.steps)
    return bad("train.warmup_steps = ", train.warmup_steps,
               " must be less than train.steps = ", train.steps);
  const bool segments = train.segment_tokens != 0 && train.segment_tokens < run.data.row_tokens;
  if (segments && train.carry == "none")
    return bad("train.segment_tokens = ", train.segment_tokens,
               " cuts rows of data.row_tokens = ", run.data.row_tokens,
               ", so a state must go from segment to segment: set train.carry to "
               "\"detached\" or \"exact\"");
  if (!segments && train.carry == "exact")
    return bad(
        "train.carry = \"exact\" passes gradients between the segments of a row, but a row is one "
        "segment: "
        "set train.segment_tokens below data.row_tokens = ",
        run.data.row_tokens);
  if (!segments && train.carry == "detached" && run.data.packing == "shuffled")
    return bad(
        "train.carry = \"detached\" has nothing to carry: shuffled rows do not continue; set "
        "data.packing to "
        "\"packed\" or train.segment_tokens below data.row_tokens");
  return {};
}

}  // namespace

Result<std::vector<std::string>> expand_layer_pattern(const std::string& pattern,
                                                      std::int64_t layers) {
  const auto bad = [&](const auto&... why) {
    return invalid_argument("layer_types = \"", pattern, "\": ", why...,
                            "; a pattern reads \"lightning*3,softmax\"");
  };
  std::vector<std::string> period;
  std::istringstream parts(pattern + ",");
  for (std::string part; std::getline(parts, part, ',');) {
    std::erase(part, ' ');
    std::int64_t times = 1;
    if (const auto star = part.find('*'); star != std::string::npos) {
      const auto count = parse_count(part.substr(star + 1));
      if (!count || *count < 1 || *count > 4096)
        return bad("\"", part, "\" does not say how often (1 to 4096)");
      times = *count;
      part.resize(star);
    }
    if (part.empty()) return bad("a mechanism's name is missing");
    period.insert(period.end(), static_cast<std::size_t>(times), part);
  }
  if (layers == 0) return period;
  std::vector<std::string> all;
  for (std::int64_t i = 0; i < layers; ++i)
    all.push_back(period[static_cast<std::size_t>(i) % period.size()]);
  return all;
}

Result<RunFile> RunFile::parse(std::string_view toml, const std::string& name,
                               const std::vector<std::string>& overrides) {
  EVERLONG_ASSIGN(const auto document, Document::make(toml, name, overrides));
  RunFile run;
  run.name = name;
  Reader reader(document);
  visit(run, reader);
  EVERLONG_RETURN_IF_ERROR(reader.finish());
  const bool has_model = document.root().contains("model");
  if (run.train.from_model.empty()) {
    if (!has_model)
      return invalid_argument(
          name, ": [model] is missing; describe the model, or continue one with train.from_model");
    EVERLONG_ASSIGN(run.model, read_model(document));
  } else if (has_model) {
    return invalid_argument(document.place("model", *document.root().get("model")),
                            ": [model] and train.from_model exclude each other: the folder ",
                            run.train.from_model, " has its own config.json");
  }
  EVERLONG_RETURN_IF_ERROR(check_together(run));
  return run;
}

Result<RunFile> RunFile::read(const fs::path& path, const std::vector<std::string>& overrides) {
  EVERLONG_ASSIGN(const auto text, read_file(path, std::size_t{1} << 20));
  return parse(text, path.string(), overrides);
}

std::string RunFile::to_toml() const {
  Writer writer;
  if (train.from_model.empty()) writer.table("model", model.to_json());
  visit(*this, writer);
  return writer.take();
}

}  // namespace everlong
