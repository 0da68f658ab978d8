// `everlong convert` as its users meet it: processes, exit codes, folders.
#include <gtest/gtest.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "core/files.h"
#include "core/process.h"
#include "core/safetensors_folder.h"

namespace everlong {
namespace {

using nlohmann::json;

struct Ran {
  int code = -1;
  std::string out, err;
};

Ran everlong(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), EVERLONG_BINARY);
  const auto result = run_process({.command = std::move(arguments)});
  if (!result.ok()) return {-1, "", result.status().message()};
  return {result->exit_code, result->output, result->errors};
}

// A Llama of one layer, published: numbers count up.
class ConvertCli : public testing::Test {
 protected:
  ConvertCli() : folder_(fs::temp_directory_path() / cat("everlong_convert_cli_", ::getpid())) {
    fs::remove_all(folder_);
    fs::create_directories(in());
    const json config = {{"model_type", "llama"},  {"vocab_size", 10},
                         {"hidden_size", 4},       {"intermediate_size", 6},
                         {"num_hidden_layers", 1}, {"num_attention_heads", 2},
                         {"rms_norm_eps", 1e-5}};
    EXPECT_TRUE(write_file(in() / "config.json", config.dump()).ok());
    EXPECT_TRUE(write_file(in() / "tokenizer.json", "{}").ok());
    std::vector<float> values(60);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i) / 7;
    std::map<std::string, TensorEntry> tensors;
    const auto add = [&](const std::string& name, std::vector<std::int64_t> shape) {
      std::size_t count = 1;
      for (const auto extent : shape) count *= static_cast<std::size_t>(extent);
      tensors[name] = {DType::kFloat32, std::move(shape),
                       std::as_bytes(std::span(values).first(count))};
    };
    add("model.embed_tokens.weight", {10, 4});
    add("lm_head.weight", {10, 4});
    add("model.norm.weight", {4});
    const std::string layer = "model.layers.0.";
    add(layer + "input_layernorm.weight", {4});
    add(layer + "post_attention_layernorm.weight", {4});
    for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj"})
      add(cat(layer, "self_attn.", name, ".weight"), {4, 4});
    add(layer + "mlp.gate_proj.weight", {6, 4});
    add(layer + "mlp.up_proj.weight", {6, 4});
    add(layer + "mlp.down_proj.weight", {4, 6});
    EXPECT_TRUE(write_safetensors(in() / "model.safetensors", tensors, {}).ok());
  }
  ~ConvertCli() override { fs::remove_all(folder_); }

  fs::path in() const { return folder_ / "in"; }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  std::size_t entries() const {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }
  fs::path folder_;
};

TEST_F(ConvertCli, WritesBothDialectsAndComesBack) {
  const Ran ours = everlong({"convert", path("in"), path("ours")});
  ASSERT_EQ(ours.code, 0) << ours.err;
  EXPECT_NE(ours.out.find("228 parameters"), std::string::npos) << ours.out;
  EXPECT_NE(ours.err.find("tokenizer.json"), std::string::npos) << ours.err;
  const Ran theirs = everlong({"convert", path("ours"), path("theirs"), "--to", "hf", "--dtype",
                               "bf16", "--max-shard-size", "300", "--json"});
  ASSERT_EQ(theirs.code, 0) << theirs.err;
  const json report = json::parse(theirs.out, nullptr, false);
  EXPECT_EQ(report["dialect"], "llama");
  EXPECT_EQ(report["bytes"], 456);
  EXPECT_EQ(report["files"], 2);
  EXPECT_TRUE(fs::exists(folder_ / "theirs/model.safetensors.index.json"));
  EXPECT_TRUE(fs::exists(folder_ / "theirs/tokenizer.json"));
  const Ran info = everlong({"info", "--model", path("theirs"), "--json"});
  ASSERT_EQ(info.code, 0) << info.err;
  EXPECT_EQ(json::parse(info.out)["parameters"], 228);
  EXPECT_EQ(entries(), 3U) << "something was left behind";
}

TEST_F(ConvertCli, OverwritesNothing) {
  fs::create_directories(folder_ / "empty");
  EXPECT_EQ(everlong({"convert", path("in"), path("empty/")}).code, 0);
  const Ran again = everlong({"convert", path("in"), path("empty")});
  EXPECT_EQ(again.code, 1);
  EXPECT_NE(again.err.find("nothing is overwritten"), std::string::npos) << again.err;
  EXPECT_EQ(everlong({"convert", path("in"), path("in")}).code, 1);
}

TEST_F(ConvertCli, AFailureLeavesNoFolder) {
  fs::resize_file(in() / "model.safetensors", fs::file_size(in() / "model.safetensors") - 1);
  const Ran broken = everlong({"convert", path("in"), path("out")});
  EXPECT_EQ(broken.code, 1);
  EXPECT_NE(broken.err.find("model.safetensors"), std::string::npos) << broken.err;
  EXPECT_EQ(entries(), 1U) << "a half-made folder was left";
  const Ran missing = everlong({"convert", path("nowhere"), path("out")});
  EXPECT_EQ(missing.code, 1);
  EXPECT_NE(missing.err.find("nowhere: no model here (no config.json)"), std::string::npos)
      << missing.err;
}

TEST_F(ConvertCli, WrongUsageIsNamed) {
  for (const auto& [arguments, code, part] :
       std::vector<std::tuple<std::vector<std::string>, int, std::string>>{
           {{"convert", path("in")}, 2, "OUT"},
           {{"convert", path("in"), path("out"), "--to", "gguf"}, 2, "minimax_text_01"},
           {{"convert", path("in"), path("out"), "--dtype", "int8"}, 2, "bf16"},
           {{"convert", path("in"), path("out"), "--max-shard-size", "5 elephants"}, 1, "MiB"},
           {{"convert", path("in"), path("out"), "--to", "transnormer"}, 1, "cannot say"}}) {
    const Ran ran = everlong(arguments);
    EXPECT_EQ(ran.code, code) << ran.err;
    EXPECT_NE(ran.err.find(part), std::string::npos) << ran.err;
  }
  const Ran help = everlong({"convert", "--help"});
  EXPECT_EQ(help.code, 0);
  EXPECT_NE(help.out.find("Examples:"), std::string::npos);
  EXPECT_NE(help.out.find("--max-shard-size"), std::string::npos);
}

}  // namespace
}  // namespace everlong
