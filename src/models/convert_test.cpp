#include "models/convert.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <fstream>

#include "models/weight_reader.h"
#include "support/published_folders.h"

namespace everlong {
namespace {

using nlohmann::json;
using test::config_of;
using test::made;
using test::publish;
using test::published_configs;
using test::same_bits;
using test::small_model;
using test::TemporaryFolder;

void expect_same_weights(const fs::path& folder, const Decoder& model, at::ScalarType dtype) {
  const auto loaded = load_model(folder, at::kCPU, dtype);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  const TensorMap expected = parameters_of(model), actual = parameters_of(**loaded);
  ASSERT_EQ(actual.size(), expected.size());
  for (const auto& [name, tensor] : expected)
    EXPECT_TRUE(same_bits(actual.at(name), tensor.to(dtype))) << name;
}

json read_json(const fs::path& path) {
  const auto text = read_file(path);
  EXPECT_TRUE(text.ok()) << text.status().message();
  return json::parse(*text, nullptr, false);
}

void convert(const fs::path& from, const fs::path& to, const ConvertOptions& options) {
  const auto report = convert_model(from, to, options);
  ASSERT_TRUE(report.ok()) << report.status().message();
}

TEST(Convert, ThereAndBackIsTheSameModelBitForBit) {
  for (const json& config : published_configs()) {
    const TemporaryFolder folder("convert_round");
    const auto model = publish(made(folder, "in"), config);
    convert(folder / "in", made(folder, "ours"), {});
    convert(folder / "ours", made(folder, "theirs"), {.to = "hf"});
    convert(folder / "theirs", made(folder, "again"), {});
    for (const char* name : {"in", "ours", "theirs", "again"})
      expect_same_weights(folder / name, *model, at::kFloat);
    EXPECT_EQ(read_json(folder / "again/config.json"), read_json(folder / "ours/config.json"));
    EXPECT_EQ(read_json(folder / "ours/config.json")["model_type"], "everlong");
    const json theirs = read_json(folder / "theirs/config.json");
    EXPECT_EQ(theirs["model_type"], config["model_type"]);
    EXPECT_EQ(theirs["torch_dtype"], "float32");
    // Token ids of the publisher, through our own folder; what none names stays unset.
    EXPECT_EQ(theirs["eos_token_id"], config.value("eos_token_id", json()));
    EXPECT_TRUE(theirs.contains("pad_token_id") && theirs["pad_token_id"].is_null());
    EXPECT_TRUE(read_generation_config(folder / "theirs").ok());
  }
}

TEST(Convert, PublishedFoldersLoadAsTheyAreAndComputeTheSame) {
  for (const json& config : published_configs()) {
    const TemporaryFolder folder("convert_direct");
    const auto model = publish(folder.path(), config);
    at::manual_seed(5);
    const auto loaded = load_model(folder.path(), at::kCPU, at::kFloat);
    ASSERT_TRUE(loaded.ok()) << loaded.status().message();
    const at::NoGradGuard off;
    const at::Tensor tokens = at::randint(0, 19, {1, 9}, at::kLong);
    EXPECT_TRUE(same_bits((*loaded)->logits((*loaded)->hidden(tokens, {}, nullptr)),
                          model->logits(model->hidden(tokens, {}, nullptr))));
  }
}

TEST(Convert, HfToHfKeepsWhatOtherProgramsLookAt) {
  const TemporaryFolder folder("convert_keeps");
  publish(made(folder, "in"), published_configs()[0]);
  ASSERT_TRUE(write_file(folder / "in/generation_config.json",
                         R"({"max_new_tokens": 9, "do_sample": true, "eos_token_id": 2})")
                  .ok());
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "tokenization_x.py",
                           "LICENSE.txt", "modeling_x.py", "training_args.bin"})
    ASSERT_TRUE(write_file(folder / "in" / name, name).ok());
  const auto report = convert_model(folder / "in", made(folder, "out"), {.to = "hf"});
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_EQ(report->dialect, "llama");
  EXPECT_EQ(report->copied, (std::vector<std::string>{"LICENSE.txt", "tokenization_x.py",
                                                      "tokenizer.json", "tokenizer_config.json"}));
  EXPECT_EQ(*read_file(folder / "out/tokenizer.json"), "tokenizer.json");
  EXPECT_FALSE(fs::exists(folder / "out/modeling_x.py"));
  EXPECT_EQ(read_json(folder / "out/config.json")["max_position_embeddings"], 77);
  EXPECT_EQ(read_json(folder / "out/generation_config.json"),
            (json{{"max_new_tokens", 9}, {"do_sample", true}, {"eos_token_id", 2}}));
  // The publisher's defaults for what the file leaves out, and no fault in keys of others.
  const auto sampling = read_generation_config(folder / "out");
  ASSERT_TRUE(sampling.ok()) << sampling.status().message();
  EXPECT_EQ(sampling->top_k, 50);
  EXPECT_EQ(sampling->temperature, 1);
  ASSERT_TRUE(write_file(folder / "out/generation_config.json", R"({"max_length": 9})").ok());
  EXPECT_EQ(read_generation_config(folder / "out")->temperature, 0);
}

TEST(Convert, OurOwnModelsSayWhatTheirBytesMean) {
  const TemporaryFolder folder("convert_bytes");
  ModelConfig config = config_of(published_configs()[0]);
  config.tokenizer = "bytes";
  config.vocab_size = 259;
  ASSERT_TRUE(
      save_model(made(folder, "in"), *small_model(config, at::kFloat), {{"steps", "7"}}).ok());
  convert(folder / "in", made(folder, "out"), {.to = "hf"});
  const json written = read_json(folder / "out/config.json");
  EXPECT_EQ(written["bos_token_id"], 257);
  EXPECT_EQ(written["eos_token_id"], 256);
  EXPECT_EQ(written["pad_token_id"], 258);
  const json generation = read_json(folder / "out/generation_config.json");
  EXPECT_EQ(generation["eos_token_id"], 256);
  EXPECT_EQ(generation["do_sample"], true);
  EXPECT_EQ(generation["top_k"], 0);
  EXPECT_FALSE(generation.contains("penalty_window"));
  EXPECT_EQ(load_tensors(folder / "out/model.safetensors")->metadata,
            (std::map<std::string, std::string>{{"format", "pt"}, {"steps", "7"}}));
}

TEST(Convert, DtypeAndShardsAreTheOnesAskedFor) {
  const TemporaryFolder folder("convert_dtype");
  const auto model = publish(made(folder, "in"), published_configs()[0]);
  for (const auto& [type, name] :
       {std::pair{at::kBFloat16, "bfloat16"}, std::pair{at::kHalf, "float16"}}) {
    const fs::path out = made(folder, name);
    std::vector<std::int64_t> seen;
    const auto report = convert_model(folder / "in", out,
                                      {.to = "llama",
                                       .dtype = type,
                                       .max_shard_bytes = 2000,
                                       .progress = [&](std::int64_t done, std::int64_t total) {
                                         seen.push_back(done);
                                         EXPECT_LE(done, total);
                                         return Status();
                                       }});
    ASSERT_TRUE(report.ok()) << report.status().message();
    EXPECT_GT(report->files, 2);
    EXPECT_EQ(report->bytes, 2 * report->parameters);
    EXPECT_EQ(seen.back(), report->bytes);
    EXPECT_TRUE(std::ranges::is_sorted(seen));
    EXPECT_EQ(read_json(out / "config.json")["torch_dtype"], name);
    const auto written = SafetensorsFolder::open(out);
    ASSERT_TRUE(written.ok()) << written.status().message();
    for (const auto& [tensor, entry] : written->tensors())
      EXPECT_EQ(to_scalar_type(entry.dtype), type) << tensor;
    expect_same_weights(out, *model, type);
  }
  const auto report = convert_model(folder / "in", made(folder, "stopped"),
                                    {.progress = [](std::int64_t, std::int64_t) -> Status {
                                      return {StatusCode::kInterrupted, "stop"};
                                    }});
  EXPECT_EQ(report.status().code(), StatusCode::kInterrupted);
}

TEST(Convert, WhatADialectCannotSayIsRefused) {
  const TemporaryFolder folder("convert_refused");
  publish(made(folder, "in"), published_configs()[0]);
  const auto to = [&](const std::string& dialect) {
    return convert_model(folder / "in", made(folder, "out"), {.to = dialect}).status().message();
  };
  EXPECT_NE(to("transnormer").find("cannot say"), std::string::npos) << to("transnormer");
  EXPECT_NE(to("lama").find("Did you mean \"llama\""), std::string::npos) << to("lama");
}

// Experts of one layer in one tensor, as newer transformers hold them, and what it adds to files.
TEST(Convert, PackedExpertsAndDerivedTensorsAreUnderstood) {
  const json config = published_configs()[1];
  const TemporaryFolder folder("convert_packed");
  const auto model = publish(folder.path(), config);
  const fs::path path = folder / "model.safetensors";
  TensorMap tensors = load_tensors(path)->tensors;
  for (int layer = 0; layer < 2; ++layer) {
    const std::string block = cat("model.layers.", layer, ".");
    const auto take = [&](const std::string& name) {
      const at::Tensor tensor = tensors.at(name);
      tensors.erase(name);
      return tensor;
    };
    std::vector<at::Tensor> gate_up, down;
    for (int e = 0; e < 3; ++e) {
      const std::string expert = cat(block, "block_sparse_moe.experts.", e, ".");
      gate_up.push_back(at::cat({take(expert + "w1.weight"), take(expert + "w3.weight")}));
      down.push_back(take(expert + "w2.weight"));
    }
    tensors[block + "mlp.experts.gate_up_proj"] = at::stack(gate_up);
    tensors[block + "mlp.experts.down_proj"] = at::stack(down);
    tensors[block + "mlp.gate.weight"] = take(block + "block_sparse_moe.gate.weight");
  }
  tensors["model.layers.0.self_attn.slope_rate"] = at::ones({2, 1, 1});
  ASSERT_TRUE(save_tensors(path, tensors, {}).ok());
  expect_same_weights(folder.path(), *model, at::kFloat);

  const auto refused = [&](TensorMap changed, const std::string& part) {
    ASSERT_TRUE(save_tensors(path, changed, {}).ok());
    const auto loaded = load_model(folder.path(), at::kCPU, at::kFloat);
    ASSERT_FALSE(loaded.ok()) << part;
    EXPECT_NE(loaded.status().message().find(part), std::string::npos) << loaded.status().message();
  };
  TensorMap changed = tensors;
  changed["stranger"] = at::ones({1});
  refused(changed, "\"stranger\" is no parameter");
  changed = tensors;
  auto& packed = changed["model.layers.1.mlp.experts.down_proj"];
  packed = packed.transpose(1, 2);
  refused(changed, "[3,24,16]; config.json asks for [3,16,24]");
}

// A header of another writer may have any length: then no tensor lies where its elements need it.
TEST(Convert, TensorsThatStartAtOddBytesAreReadToo) {
  const TemporaryFolder folder("convert_odd");
  const auto model = publish(folder.path(), published_configs()[0]);
  const fs::path path = folder / "model.safetensors";
  std::string text = *read_file(path);
  text.insert(text.find("}}") + 2, " ");
  ++text[0];  // header length, little endian
  ASSERT_TRUE(write_file(path, text).ok());
  const auto opened = SafetensorsFolder::open(folder.path());
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  const auto* data = opened->tensors().begin()->second.bytes.data();
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 2, 1U);
  expect_same_weights(folder.path(), *model, at::kFloat);
  expect_same_weights(folder.path(), *model, at::kBFloat16);
}

// The most memory this process had since reset_peak(), in bytes.
void reset_peak() { std::ofstream("/proc/self/clear_refs") << "5"; }
std::int64_t status_bytes(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (word == key) {
      std::int64_t kib = 0;
      status >> kib;
      return kib * 1024;
    }
  return -1;
}

TEST(Convert, LoadingAndConvertingNeedMemoryForFewTensors) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer keeps freed memory";
#endif
  json config = published_configs()[0];
  config.update({{"hidden_size", 256}, {"intermediate_size", 8192}, {"num_hidden_layers", 5}});
  constexpr std::int64_t kTensor = 256 * 8192 * 4, kModel = 15 * kTensor;
  const TemporaryFolder folder("convert_memory");
  publish(made(folder, "in"), config);
  const auto growth = [&](const auto& work) {
    ::malloc_trim(0);
    reset_peak();
    const std::int64_t before = status_bytes("VmRSS:");
    EXPECT_LT(status_bytes("VmHWM:") - before, kTensor) << "the peak cannot be reset here";
    work();
    return status_bytes("VmHWM:") - before;
  };
  const auto load = [&] {
    const auto model = load_model(folder / "in", at::kCPU, at::kBFloat16);
    ASSERT_TRUE(model.ok()) << model.status().message();
  };
  const ConvertOptions options{.dtype = at::kHalf, .max_shard_bytes = kModel / 5};
  load();  // code of the libraries that is read for the first time counts as memory, too
  convert(folder / "in", made(folder, "first"), options);
  const std::int64_t loading = growth(load);
  EXPECT_GT(loading, kModel / 2) << "this test looks at the wrong figure";
  EXPECT_LT(loading, kModel / 2 + 6 * kTensor);
  RecordProperty("loading", std::to_string(loading));
  const fs::path out = made(folder, "out");
  const std::int64_t converting = growth([&] { convert(folder / "in", out, options); });
  EXPECT_GT(converting, kTensor) << "this test looks at the wrong figure";
  EXPECT_LT(converting, 6 * kTensor);
  RecordProperty("converting", std::to_string(converting));
}

}  // namespace
}  // namespace everlong
