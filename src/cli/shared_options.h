// Options that several subcommands share: where to compute, which model, which text.
#pragma once
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "cli/command.h"
#include "data/tokenizer.h"
#include "eval/token_source.h"
#include "models/checkpoint.h"

namespace everlong::cli {

struct Place {
  at::Device device = at::kCPU;
  at::ScalarType dtype = at::kFloat;
};

struct PlaceOptions {
  std::string device = "auto", dtype = "auto";
  std::int64_t threads = 0;

  void add(Command& command);
  // Sets the threads and opens the device: before any tensor is made.
  Result<Place> resolve() const;
};

struct LoadedModel {
  std::shared_ptr<Decoder> model;
  std::unique_ptr<Tokenizer> tokenizer;
  Place place;
  fs::path folder;
};

struct ModelOptions {
  std::string folder;
  std::vector<std::string> settings;  // "landmark.top_k=4": laid over config.json
  PlaceOptions place;

  void add(Command& command);
  Result<LoadedModel> load() const;  // in evaluation mode
};
// A model folder, or the model folder inside a run folder.
fs::path model_folder(const fs::path& given);

struct TextOptions {
  std::string data, split = "valid", text;

  void add(Command& command);
  Result<TokenSource> open(const LoadedModel& loaded) const;
};

// Where a measurement goes besides the screen.
struct OutputOptions {
  bool json = false;
  std::string save;

  void add(Command& command);
  // Prints the object (--json) or else the text, and writes the object to the file of --save.
  Status give(const nlohmann::ordered_json& object, std::string_view text) const;
};

// device, dtype, threads, machine, commit: what a measurement is worth nothing without.
nlohmann::ordered_json describe(const Place& place);

}  // namespace everlong::cli
