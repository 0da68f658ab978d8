#include "train/run_file.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <sstream>

#include "core/text.h"
#include "train/toml_document.h"

namespace everlong {
namespace {

using nlohmann::json;

constexpr std::int64_t kMaxCount = std::int64_t{1} << 40;

// The one list of keys outside [model]: it reads them, refuses others and writes them back.
template <class Run, class Visitor>
void visit(Run& run, Visitor& v) {
  v.section("data");
  v.text("path", run.data.path);
  v.choice("packing", run.data.packing, {"packed", "shuffled", "documents"});
  v.integer("row_tokens", run.data.row_tokens, 1, kMaxCount);
  v.integer("rows", run.data.rows, 1, 1 << 20);
  v.section("train");
  v.text("from_model", run.train.from_model);
  v.integer("steps", run.train.steps, 1, kMaxCount);
  v.number("learning_rate", run.train.learning_rate, 0, 10);
  v.number("gate_learning_rate", run.train.gate_learning_rate, 0, 10);
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
  v.number("save_seconds", run.train.save_seconds, 0, 1e9);
  v.integer("keep_checkpoints", run.train.keep_checkpoints, 0, 1 << 20);
  v.boolean("keep_best", run.train.keep_best);
  v.integer("log_every", run.train.log_every, 1, kMaxCount);
  v.boolean("tensorboard", run.train.tensorboard);
  v.section("out");
  v.text("folder", run.out.folder);
}

const std::vector<std::string> kSections = {"model", "data", "train", "out"};

std::string hint(const std::string& near) {
  return near.empty() ? "" : cat(". Did you mean \"", near, "\"?");
}

// Fills the settings and remembers the first thing wrong.
class Reader {
 public:
  explicit Reader(const TomlDocument& document) : document_(document) {}

  void section(const std::string& name) { section_ = name; }
  void text(const std::string& key, std::string& value) {
    const json* given = find(key);
    if (given == nullptr) return;
    if (!given->is_string()) return fail(key, *given, "a text is needed");
    value = *given;
  }
  void boolean(const std::string& key, bool& value) {
    const json* given = find(key);
    if (given == nullptr) return;
    if (!given->is_boolean()) return fail(key, *given, "true or false is needed");
    value = *given;
  }
  void choice(const std::string& key, std::string& value, const std::vector<std::string>& allowed) {
    const json* given = find(key);
    if (given == nullptr) return;
    const std::string name = given->is_string() ? given->get<std::string>() : "";
    if (std::ranges::find(allowed, name) == allowed.end())
      return fail(key, *given, cat("one of: ", join(allowed, ", "), hint(nearest(name, allowed))));
    value = name;
  }
  void integer(const std::string& key, std::int64_t& value, std::int64_t min, std::int64_t max) {
    const json* given = find(key);
    if (given == nullptr) return;
    std::optional<std::int64_t> number;
    if (given->is_number_integer()) number = given->get<std::int64_t>();
    if (given->is_string()) number = parse_count(given->get<std::string>());
    if (!number || *number < min || *number > max)
      return fail(key, *given, cat("a whole number from ", min, " to ", max, " is needed"));
    value = *number;
  }
  void number(const std::string& key, double& value, double min, double max) {
    const json* given = find(key);
    if (given == nullptr) return;
    const double number = given->is_number() ? given->get<double>() : std::nan("");
    if (!(number >= min && number <= max))
      return fail(key, *given, cat("a number from ", min, " to ", max, " is needed"));
    value = number;
  }

  // The first error, or the first key that nobody asked for.
  Status finish() const {
    if (!first_error_.ok()) return first_error_;
    for (const auto& [section, values] : document_.root().items()) {
      if (std::ranges::find(kSections, section) == kSections.end())
        return invalid_argument(document_.place(section), ": ", section,
                                " is not a section; known: ", join(kSections, ", "),
                                hint(nearest(section, kSections)));
      if (!values.is_object())
        return invalid_argument(document_.place(section), ": ", section, " = ", values.dump(),
                                " is not allowed; [", section, "] opens a section of settings");
      if (section == "model") continue;  // its reader knows its keys
      const auto& known = known_.at(section);
      for (const auto& [key, value] : values.items()) {
        if (std::ranges::find(known, key) != known.end()) continue;
        const std::string path = cat(section, ".", key);
        return invalid_argument(document_.place(path), ": ", path,
                                " is not a setting; known: ", join(known, ", "),
                                hint(nearest(key, known)));
      }
    }
    return {};
  }

 private:
  const json* find(const std::string& key) {
    known_[section_].push_back(key);
    const auto section = document_.root().find(section_);
    if (section == document_.root().end() || !section->is_object()) return nullptr;
    const auto found = section->find(key);
    return found == section->end() ? nullptr : &*found;
  }
  void fail(const std::string& key, const json& given, const std::string& allowed) {
    if (!first_error_.ok()) return;
    const std::string path = cat(section_, ".", key);
    first_error_ =
        invalid_argument(document_.place(path), ": ", path, " = ",
                         // JSON has no word for nan and inf, which TOML can say
                         given.is_number_float() ? cat(given.get<double>()) : given.dump(),
                         " is not allowed; ", allowed);
  }

  const TomlDocument& document_;
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
  void line(const std::string& key, const json& value) {
    out_ += cat(key, " = ", value.dump(), "\n");
  }
  void table(const std::string& name, const json& object) {
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
Status settle_layers(json& model) {
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

Result<ModelConfig> read_model(const TomlDocument& document) {
  json model = document.root().at("model");
  // The reader of config.json opens a message with the key, and only this file knows the key's
  // line.
  const auto with_line = [&](const Status& status) {
    std::string key;  // the longest that fits
    for (const auto& [name, value] : document.root().at("model").items())
      if (status.message().starts_with(name) && name.size() > key.size()) key = name;
    return status.at(cat(document.place(key.empty() ? "model" : "model." + key), ": [model]"));
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
  if (!segments && train.carry == "detached" && run.data.packing != "packed")
    return bad("train.carry = \"detached\" has nothing to carry: ", run.data.packing,
               " rows do not continue; set "
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
  EVERLONG_ASSIGN(const auto document, TomlDocument::parse(toml, name, overrides));
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
    return invalid_argument(document.place("model"),
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

std::vector<SettingChange> changes(const RunFile& before, const RunFile& after) {
  static constexpr std::string_view kFixed[] = {
      "model.",     "data.packing", "data.row_tokens",  "data.rows",
      "train.seed", "train.dtype",  "train.from_model",
  };
  const auto flat = [](const RunFile& run) {
    std::map<std::string, std::string> settings;
    const auto document = TomlDocument::parse(run.to_toml(), run.name, {});
    if (!document.ok()) return settings;  // cannot be: to_toml() writes what parse() reads
    const json leaves = document->root().flatten();
    for (const auto& [pointer, value] : leaves.items()) {
      std::string key = pointer.substr(1);
      std::ranges::replace(key, '/', '.');
      if (key != "out.folder") settings[key] = value.dump();
    }
    return settings;
  };
  const auto was = flat(before), is = flat(after);
  std::map<std::string, SettingChange> differing;
  for (const auto& [key, value] : was) differing[key] = {key, value, ""};
  for (const auto& [key, value] : is) {
    auto& change = differing[key];
    change.key = key;
    change.after = value;
  }
  std::vector<SettingChange> result;
  for (auto& [key, change] : differing) {
    if (change.before == change.after) continue;
    change.allowed = std::ranges::none_of(
        kFixed, [&](std::string_view fixed) { return change.key.starts_with(fixed); });
    result.push_back(std::move(change));
  }
  return result;
}

std::string RunFile::to_toml() const {
  Writer writer;
  if (train.from_model.empty()) writer.table("model", model.to_json());
  visit(*this, writer);
  return writer.take();
}

}  // namespace everlong
