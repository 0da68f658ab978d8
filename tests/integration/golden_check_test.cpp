// golden_check as a process: what passes, what fails, what is not applicable, and the exit code of
// each.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>

#include "core/process.h"
#include "core/safetensors.h"
#include "core/text.h"

namespace everlong {
namespace {

struct Ran {
  int code = -1;
  std::string out, last_line;
};

class GoldenCheck : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / cat("everlong_golden_", ::getpid());
    fs::remove_all(folder_);
    ASSERT_TRUE(make_directories(folder_ / "deeper").ok());
    const fs::path source = fs::path(EVERLONG_TEST_DATA) / "golden" / "lightning";
    for (const auto& entry : fs::directory_iterator(source))
      if (entry.path().filename().string().find("state_t33") != std::string::npos)
        sound_ = entry.path();
    ASSERT_FALSE(sound_.empty()) << "no case with a state below " << source;
  }
  void TearDown() override { fs::remove_all(folder_); }

  static fs::path golden() { return fs::path(EVERLONG_TEST_DATA) / "golden"; }

  static Ran check(const std::vector<std::string>& arguments) {
    std::vector<std::string> command = {
        (fs::path(EVERLONG_BINARY).parent_path() / "golden_check").string()};
    command.insert(command.end(), arguments.begin(), arguments.end());
    const auto result = run_process({.command = command});
    if (!result.ok()) return {-1, result.status().message(), ""};
    const std::string& out = result->output;
    const auto end = out.find_last_not_of('\n');
    const auto begin = end == std::string::npos ? 0 : out.rfind('\n', end) + 1;
    return {result->exit_code, out + result->errors,
            end == std::string::npos ? "" : out.substr(begin, end + 1 - begin)};
  }
  Ran check() const { return check({folder_.string()}); }

  // A copy of a case (the sound one) with other metadata, or one number of a tensor changed by
  // `change`.
  void write_case(const std::string& name, const std::map<std::string, std::string>& metadata,
                  const std::string& tensor = "", double change = 0,
                  const std::string& source = "") const {
    const auto file = SafetensorsFile::open(source.empty() ? sound_ : golden() / source);
    ASSERT_TRUE(file.ok());
    auto all = file->metadata();
    for (const auto& [key, value] : metadata) all[key] = value;
    auto tensors = file->tensors();
    std::vector<std::byte> bytes;
    if (!tensor.empty()) {
      ASSERT_TRUE(tensors.contains(tensor));
      bytes.assign(tensors[tensor].bytes.begin(), tensors[tensor].bytes.end());
      const auto add = [&](auto first) {
        std::memcpy(&first, bytes.data(), sizeof first);
        first += static_cast<decltype(first)>(change);
        std::memcpy(bytes.data(), &first, sizeof first);
      };
      const DType dtype = tensors[tensor].dtype;
      if (dtype == DType::kFloat64) add(0.0);
      if (dtype == DType::kFloat32) add(0.0F);
      if (dtype == DType::kInt64) add(std::int64_t{0});
      tensors[tensor].bytes = bytes;
    }
    ASSERT_TRUE(write_safetensors(folder_ / "deeper" / name, tensors, all).ok());
  }

  fs::path folder_, sound_;
};

TEST_F(GoldenCheck, SoundCasePassesBelowASubfolder) {
  write_case("a.safetensors", {});
  const Ran ran = check();
  EXPECT_EQ(ran.code, 0) << ran.out;
  EXPECT_EQ(ran.last_line, "1 passed, 0 failed, 0 not applicable");
}

TEST_F(GoldenCheck, WrongNumberInAnyTensorFailsAndIsNamed) {
  for (const char* const tensor : {"out.o", "state_out.S", "grad.q", "grad.k", "grad.v", "grad.S",
                                   "state_in.S", "grad_out.S"}) {
    write_case("a.safetensors", {}, tensor, 1e-6);
    const Ran ran = check();
    EXPECT_EQ(ran.code, 1) << tensor;
    EXPECT_EQ(ran.last_line, "0 passed, 1 failed, 0 not applicable") << tensor;
    const std::string name = tensor;
    if (name.ends_with("_in.S") || name.starts_with("grad_out"))
      continue;  // shows in what follows from it
    EXPECT_NE(ran.out.find(name == "grad.S" ? "grad.state.S" : name), std::string::npos) << ran.out;
  }
}

TEST_F(GoldenCheck, NotANumberNeverPasses) {
  write_case("a.safetensors", {{"rtol", "1e9"}, {"atol", "1e9"}}, "out.o",
             std::numeric_limits<double>::quiet_NaN());
  EXPECT_EQ(check().code, 1);
}

TEST_F(GoldenCheck, UnreadableFileFails) {
  ASSERT_TRUE(write_file(folder_ / "broken.safetensors", "not a safetensors file").ok());
  write_case("a.safetensors", {});
  const Ran ran = check();
  EXPECT_EQ(ran.code, 1);
  EXPECT_EQ(ran.last_line, "1 passed, 1 failed, 0 not applicable");
}

TEST_F(GoldenCheck, BadMetadataFail) {
  const std::vector<std::map<std::string, std::string>> bad = {{{"format", "everlong-golden-9"}},
                                                               {{"rtol", "loose"}},
                                                               {{"rtol", "-1"}},
                                                               {{"params", "[]"}},
                                                               {{"kind", ""}}};
  for (const auto& metadata : bad) {
    write_case("a.safetensors", metadata);
    EXPECT_EQ(check().code, 1) << metadata.begin()->first << " = " << metadata.begin()->second;
  }
}

TEST_F(GoldenCheck, WhatNobodyOffersIsNotApplicable) {
  write_case("a.safetensors", {{"kind", "something_else"}});
  write_case("b.safetensors", {{"mechanism", "unheard_of"}});
  write_case("c.safetensors", {{"level", "layer"}});
  const Ran ran = check();
  EXPECT_EQ(ran.code, 0) << ran.out;
  EXPECT_EQ(ran.last_line, "0 passed, 0 failed, 3 not applicable");
}

TEST_F(GoldenCheck, LayersAreRunAndTheirWrongNumbersFail) {
  const std::string source = "lightning/minimax_lightning_layer__h4_t42.safetensors";
  write_case("a.safetensors", {}, "", 0, source);
  EXPECT_EQ(check().last_line, "1 passed, 0 failed, 0 not applicable");
  for (const char* const tensor : {"out.y", "state_out.S", "grad.x", "grad.w.norm.weight", "in.x",
                                   "w.qkv_proj.weight", "grad_out.S"}) {
    write_case("a.safetensors", {}, tensor, 1e-4, source);
    EXPECT_EQ(check().last_line, "0 passed, 1 failed, 0 not applicable") << tensor;
  }
  write_case("a.safetensors", {{"kind", "some_layer"}}, "", 0, source);
  EXPECT_EQ(check().last_line, "0 passed, 0 failed, 1 not applicable");
}

TEST_F(GoldenCheck, ModelsAreRunAndTheirWrongNumbersFail) {
  const std::pair<std::string, std::string> sources[] = {
      {"lightning/minimax_model__minimax_tiny.safetensors", "lightning/minimax_tiny"},
      {"lightning/tnl_model__tnl_tiny.safetensors", "lightning/tnl_tiny"},
      {"softmax/llama_model__tied.safetensors", "softmax/llama_tiny/tied"}};
  for (const auto& [source, weights] : sources) {
    fs::remove_all(folder_);
    const fs::path beside =
        folder_ / "deeper" /
        fs::path(weights).lexically_relative(fs::path(weights).begin()->string());
    fs::create_directories(beside.parent_path());
    fs::copy(golden() / weights, beside);
    write_case("a.safetensors", {}, "", 0, source);
    EXPECT_EQ(check().last_line, "1 passed, 0 failed, 0 not applicable") << source;
    write_case("a.safetensors", {}, "out.logits", 0.1, source);
    EXPECT_EQ(check().code, 1) << source;
    write_case("a.safetensors", {}, "in.input_ids", 1, source);
    EXPECT_EQ(check().code, 1) << source;
    if (source.find("tnl") == std::string::npos) {
      write_case("a.safetensors", {}, "out.greedy", 1, source);
      EXPECT_EQ(check().code, 1) << source;
    }
    write_case("a.safetensors", {{"params", "{\"model_dir\": \"nowhere\"}"}}, "", 0, source);
    EXPECT_EQ(check().code, 1) << source;
  }
}

TEST_F(GoldenCheck, FilesWithoutGoldenMetadataAreNotCases) {
  ASSERT_TRUE(write_safetensors(folder_ / "model.safetensors", {}, {{"format", "pt"}}).ok());
  ASSERT_TRUE(write_safetensors(folder_ / "bare.safetensors", {}, {}).ok());
  EXPECT_EQ(check().last_line, "0 passed, 0 failed, 0 not applicable");
}

TEST_F(GoldenCheck, WrongUsageExitsWithTwo) {
  EXPECT_EQ(check({}).code, 2);
  EXPECT_EQ(check({"--nonsense"}).code, 2);
  EXPECT_EQ(check({(folder_ / "nowhere").string()}).code, 2);
  EXPECT_EQ(check({"--help"}).code, 0);
}

}  // namespace
}  // namespace everlong
