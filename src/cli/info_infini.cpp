#include <ATen/ATen.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/shared_options.h"
#include "cli/terminal.h"
#include "core/progress.h"
#include "core/text.h"
#include "mechanisms/infini/layer.h"
#include "mechanisms/infini/layer_mass.h"
#include "session/stream.h"

namespace everlong::cli {
namespace {

constexpr std::int64_t kPiece = 8192;  // tokens fed at a time

struct InfiniCommand {
  ModelOptions model;
  TextOptions text;
  OutputOptions output;
  std::string state_file;
  std::int64_t tokens = 0;

  Status run() const;

 private:
  using Layers = std::map<std::int64_t, at::Tensor>;  // z [G, K] by layer
  // Both return the tokens read as well.
  Result<std::pair<Layers, std::int64_t>> from_text(const LoadedModel& loaded) const;
  Result<std::pair<Layers, std::int64_t>> from_state(const LoadedModel& loaded) const;
};

const infini::InfiniAttention* infini_layer(const Decoder& model, std::int64_t index) {
  return dynamic_cast<const infini::InfiniAttention*>(&model.mixer(index));
}

Result<std::pair<InfiniCommand::Layers, std::int64_t>> InfiniCommand::from_text(
    const LoadedModel& loaded) const {
  Decoder& decoder = *loaded.model;
  if (decoder.config().landmark_id >= 0)
    return unsupported(
        "this model's text has landmarks, which only streams place; read it with "
        "`everlong generate --save-state`, and give that file as --load-state");
  EVERLONG_ASSIGN(const TokenSource source, text.open(loaded));
  const std::int64_t most = tokens > 0 ? std::min(tokens, source.tokens()) : source.tokens();
  const at::NoGradGuard no_grad;
  ModelState state = decoder.make_state(1);
  catch_signals();
  Progress progress("read", most, "tokens");
  std::vector<std::int32_t> piece;
  for (std::int64_t at = 0; at < most; at += std::ssize(piece)) {
    if (caught_signal() != 0) return Status{StatusCode::kInterrupted, "stopped while reading"};
    piece.resize(static_cast<std::size_t>(std::min(kPiece, most - at)));
    EVERLONG_RETURN_IF_ERROR(source.read(at, piece));
    const at::Tensor ids = at::tensor(piece, at::kInt).to(decoder.device(), at::kLong);
    (void)decoder.hidden(ids.unsqueeze(0), {}, &state);
    progress.update(at + std::ssize(piece));
  }
  progress.finish();
  Layers layers;
  for (std::int64_t i = 0; i < decoder.config().num_layers(); ++i)
    if (infini_layer(decoder, i) != nullptr)
      layers[i] = state.layer(static_cast<std::size_t>(i)).tensors().at("z")[0];
  return std::pair(layers, most);
}

Result<std::pair<InfiniCommand::Layers, std::int64_t>> InfiniCommand::from_state(
    const LoadedModel& loaded) const {
  if (!text.data.empty() || !text.text.empty() || tokens > 0)
    return invalid_argument(
        "--load-state has read its text already; give it alone, without --data, "
        "--text and --tokens");
  Stream stream(loaded.model);
  EVERLONG_RETURN_IF_ERROR(stream.load(state_file));  // checks that it is this model's
  EVERLONG_ASSIGN(const auto file, SafetensorsFile::open(state_file));
  Layers layers;
  for (std::int64_t i = 0; i < loaded.model->config().num_layers(); ++i) {
    if (infini_layer(*loaded.model, i) == nullptr) continue;
    const std::string name = cat("layers.", i, ".z");
    const auto found = file.tensors().find(name);
    if (found == file.tensors().end() || found->second.shape.size() != 3 ||
        (found->second.dtype != DType::kFloat32 && found->second.dtype != DType::kFloat64))
      return corrupt(state_file, ": has no ", name, " [1, heads, slots] in F32 or F64");
    const auto& entry = found->second;
    const auto dtype = entry.dtype == DType::kFloat64 ? at::kDouble : at::kFloat;
    at::Tensor z = at::empty(entry.shape, dtype);
    std::copy(entry.bytes.begin(), entry.bytes.end(), static_cast<std::byte*>(z.data_ptr()));
    layers[i] = z[0];
  }
  return std::pair(layers, stream.position());
}

Status InfiniCommand::run() const {
  EVERLONG_ASSIGN(const auto loaded, model.load());
  const Decoder& decoder = *loaded.model;
  bool any = false;
  for (std::int64_t i = 0; i < decoder.config().num_layers(); ++i)
    any = any || infini_layer(decoder, i) != nullptr;
  if (!any)
    return invalid_argument(loaded.folder.string(), " has no layer of infini; its layers are: ",
                            join(decoder.config().layer_types, ", "));
  EVERLONG_ASSIGN(const auto read, state_file.empty() ? from_text(loaded) : from_state(loaded));
  const auto& [layers, position] = read;
  nlohmann::ordered_json object = {{"model", loaded.folder.string()},
                                   {"tokens", position},
                                   {"layers", nlohmann::ordered_json::array()}};
  Table table({"layer", "head", "tokens written", "mass a slot", "quietest", "loudest", "contrast",
               "best share", "gates"});
  const auto number = [](double x) {
    std::ostringstream out;
    out.precision(3);
    out << x;
    return out.str();
  };
  for (const auto& [index, z] : layers) {
    const auto& layer = *infini_layer(decoder, index);
    const std::int64_t written = position - position % layer.settings().options.segment;
    const at::Tensor gates = layer.gate_values().to(at::kCPU, at::kFloat);
    const std::string between =
        cat(number(gates.min().item<float>()), " to ", number(gates.max().item<float>()));
    nlohmann::ordered_json entry = {{"layer", index},
                                    {"written", written},
                                    {"smallest_gate", gates.min().item<float>()},
                                    {"largest_gate", gates.max().item<float>()},
                                    {"heads", nlohmann::ordered_json::array()}};
    const auto masses = infini::slot_masses(z);
    for (std::size_t head = 0; head < masses.size(); ++head) {
      const auto& mass = masses[head];
      entry["heads"].push_back({{"mean", mass.mean},
                                {"quietest", mass.smallest},
                                {"loudest", mass.largest},
                                {"contrast", mass.contrast()},
                                {"best_share", mass.best_share()}});
      table.add({cat(index), cat(head), with_commas(written), number(mass.mean),
                 number(mass.smallest), number(mass.largest), number(mass.contrast()),
                 number(mass.best_share()), head == 0 ? between : ""});
    }
    object["layers"].push_back(std::move(entry));
  }
  object.update(describe(loaded.place));
  return output.give(object, cat(table.text(), "after ", with_commas(position),
                                 " tokens; those of an open segment are not written yet\n"));
}

}  // namespace

void add_info_infini(Command& info) {
  static InfiniCommand command;
  Command infini = info.subcommand(
      "infini", "What the memories of Infini-attention hold after a text",
      "Reads a text (or takes a saved stream) and shows the mass of every memory: each token adds "
      "sigma(k) to the slots of its head, and a read returns the slots' mean values, so what "
      "everything else left in a slot drowns what one token left there. A head can give a "
      "token back after a long text only where some slot stayed quiet. contrast is the loudest "
      "slot over the quietest one; best share is the weight of one token with sigma(k) = 1 in the "
      "quietest slot.");
  command.model.add(infini);
  command.text.add(infini);
  infini.option("-n,--tokens N", command.tokens, "read so many; 0: all of the text");
  infini.option("--load-state FILE", command.state_file, "a saved stream of this model instead");
  command.output.add(infini);
  infini.example("everlong info infini --model runs/infini_passkey --data data/infini_passkey");
  infini.example("everlong info infini --model runs/first --load-state book.state");
  infini.run([] { return command.run(); });
}

}  // namespace everlong::cli
