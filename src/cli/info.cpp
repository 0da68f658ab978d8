#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/shared_options.h"
#include "cli/terminal.h"
#include "core/text.h"
#include "mechanisms/infini/layer.h"
#include "mechanisms/mechanism.h"
#include "models/presets.h"

namespace everlong::cli {
namespace {

constexpr std::int64_t kNear = 1 << 10, kFar = 1 << 20;  // tokens at which the bound is shown

struct InfoCommand {
  std::string model, preset_name;
  PlaceOptions place;
  bool why = false, json = false;

  Status run() const {
    if (!preset_name.empty()) return describe_preset();
    return model.empty() ? list_mechanisms() : describe_model();
  }

 private:
  Status list_mechanisms() const;
  Status describe_model() const;
  Status describe_preset() const;
  Status describe(const Decoder& decoder, const std::string& title, const Place& where,
                  nlohmann::ordered_json& object) const;
};

// What Infini-attention layers hold, as their paper counts it, and what it leaves out; "" without
// such layers.
std::string infini_memory(const Decoder& decoder, nlohmann::ordered_json& object) {
  std::int64_t layers = 0;
  infini::MemoryTable sum;
  for (std::int64_t i = 0; i < decoder.config().num_layers(); ++i) {
    const auto* layer = dynamic_cast<const infini::InfiniAttention*>(&decoder.mixer(i));
    if (layer == nullptr) continue;
    const auto& s = layer->settings();
    const auto one = infini::memory_table(1, s.num_kv_heads, s.head_dim, s.options.segment);
    ++layers;
    sum.infini += one.infini;
    sum.local += one.local;
  }
  if (layers == 0) return "";
  object["infini_memory"] = {
      {"layers", layers}, {"memory_elements", sum.infini}, {"open_segment_elements", sum.local}};
  const auto count = [](double elements) {
    return with_commas(static_cast<std::int64_t>(elements));
  };
  return cat("\nInfini-attention in ", layers, " layers: ", count(sum.infini),
             " elements of memory a sequence, and up to ", count(sum.local),
             " of keys and values of the open segment, which published ratios (114x) leave out.\n");
}

Status InfoCommand::list_mechanisms() const {
  auto all = nlohmann::ordered_json::array();
  std::string lacking;
  Table table({"mechanism", "what it is", "carries", "source"}, {0, 1, 2, 3});
  for (const Mechanism* room : mechanisms()) {
    nlohmann::ordered_json entry = {{"name", room->name},
                                    {"title", room->title},
                                    {"source", room->source},
                                    {"carries", room->carries},
                                    {"lacks", nlohmann::ordered_json::array()},
                                    {"operators", nlohmann::ordered_json::array()}};
    for (const Lack& lack : room->lacks) {
      entry["lacks"].push_back({{"what", lack.what}, {"why", lack.why}});
      lacking += cat("  ", room->name, " lacks ", lack.what, ": ", lack.why, "\n");
    }
    for (const Operator* op : room->operators) {
      auto forms = nlohmann::ordered_json::array();
      std::vector<std::string> names;
      for (const OpForm& form : op->forms()) {
        forms.push_back({{"name", form.name},
                         {"cpu", form.cpu},
                         {"cuda", form.cuda},
                         {"low_precision", form.low_precision}});
        names.push_back(form.name);
      }
      entry["operators"].push_back({{"kind", std::string(op->kind())}, {"forms", forms}});
    }
    all.push_back(std::move(entry));
    table.add({room->name, room->title, room->carries, room->source});
  }
  if (json) {
    print_json(all);
    return {};
  }
  print(table.text());
  if (!lacking.empty()) print(cat("\nDeclared as lacking:\n", lacking));
  return {};
}

Status InfoCommand::describe_model() const {
  EVERLONG_ASSIGN(const Place where, place.resolve());
  const fs::path folder = model_folder(model);
  EVERLONG_ASSIGN(const auto decoder, load_model(folder, where.device, where.dtype));
  EVERLONG_ASSIGN(const auto files, SafetensorsFolder::open(folder));
  nlohmann::ordered_json object = {{"model", folder.string()},
                                   {"fingerprint", fingerprint(*decoder)},
                                   {"weights_have_checksums", files.has_checksums()}};
  EVERLONG_RETURN_IF_ERROR(describe(*decoder, folder.string(), where, object));
  if (!json)
    print(files.has_checksums()
              ? "\nThe weights carry checksums, and every one of them is right.\n"
              : "\nThe weights carry no checksum: a changed byte would not be noticed. `everlong "
                "convert` writes them with checksums.\n");
  return {};
}

Status InfoCommand::describe_preset() const {
  if (!model.empty())
    return invalid_argument("--model ", model, " and --preset ", preset_name,
                            " are two models; name one");
  EVERLONG_ASSIGN(const Place where, place.resolve());
  EVERLONG_ASSIGN(const ModelConfig config, preset(preset_name));
  EVERLONG_ASSIGN(const auto decoder, Decoder::make(config, WeightInit::kMeta));
  decoder->to(where.dtype);
  nlohmann::ordered_json object = {{"preset", preset_name}};
  return describe(*decoder, preset_name, where, object);
}

// Adds what every model has to `object`, and prints it or the table.
Status InfoCommand::describe(const Decoder& decoder, const std::string& title, const Place& where,
                             nlohmann::ordered_json& object) const {
  const ModelConfig& config = decoder.config();
  const ModelState state = decoder.make_state(1);
  object.update({{"parameters", decoder.parameter_count()},
                 {"config", nlohmann::ordered_json::parse(config.to_json().dump())},
                 {"state_bytes", state.bytes()},
                 {"state_bytes_bound_1k", state.bytes_bound(kNear)},
                 {"state_bytes_bound_1m", state.bytes_bound(kFar)},
                 {"layers", nlohmann::ordered_json::array()}});
  std::vector<std::string> head = {"layer", "mechanism", "state at 1K", "at 1M tokens"};
  if (why) head.emplace_back("path");
  Table table(std::move(head), {0, 1, 4});
  const auto size = [](std::int64_t bytes) { return human_bytes(static_cast<double>(bytes)); };
  for (std::int64_t i = 0; i < config.num_layers(); ++i) {
    const auto index = static_cast<std::size_t>(i);
    const std::string path = decoder.mixer(i).path(where.device);
    const std::int64_t near = state.layer(index).bytes_bound(kNear),
                       far = state.layer(index).bytes_bound(kFar);
    object["layers"].push_back({{"mechanism", config.layer_types[index]},
                                {"path", path},
                                {"state_bytes_bound_1k", near},
                                {"state_bytes_bound_1m", far}});
    std::vector<std::string> row = {cat(i), config.layer_types[index], size(near), size(far)};
    if (why) row.push_back(path);
    table.add(std::move(row));
  }
  object.update(cli::describe(where));
  const std::string memory = infini_memory(decoder, object);
  if (json) {
    print_json(object);
    return {};
  }
  table.add({"all", "", size(state.bytes_bound(kNear)), size(state.bytes_bound(kFar))});
  const std::string experts = config.num_experts == 0 ? ""
                                                      : cat(", ", config.experts_per_token, " of ",
                                                            config.num_experts, " experts a token");
  print(cat(title, ": ", with_commas(decoder.parameter_count()), " parameters, ", config.block,
            " blocks of width ", config.hidden_size, experts, ", vocabulary ", config.vocab_size,
            " (", config.tokenizer, "), on ", where.device.str(), "\n\n", table.text(), memory));
  return {};
}

}  // namespace

void add_info(Command& program) {
  static InfoCommand command;
  Command info = program.subcommand(
      "info", "The mechanisms, or what a model is made of",
      "Without a model: the mechanisms of this program and what each declares to lack. With one: "
      "its layers, the bytes "
      "of state each may hold, and with --why the code that runs it on this machine. A preset is "
      "the shape of a published model, whose weights are not needed: ones of any size.");
  info.option("-m,--model DIR", command.model, "model folder, or a run folder that holds one");
  std::vector<std::string> names;
  for (const Preset& known : presets()) names.emplace_back(known.name);
  info.option("-p,--preset NAME", command.preset_name, cat("published model: ", join(names, ", ")));
  command.place.add(info);
  info.flag("--why", command.why, "which path runs in each layer");
  info.flag("--json", command.json, "print JSON");
  info.example("everlong info");
  info.example("everlong info --model runs/demo --why");
  info.example("everlong info --preset minimax-text-01");
  info.run([] { return command.run(); });
  add_info_longnet(info);
  add_info_infini(info);
}

}  // namespace everlong::cli
