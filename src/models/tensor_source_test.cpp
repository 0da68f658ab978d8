// Pickles: weights as torch.save writes them, and pickles that are more than weights.
#include "models/tensor_source.h"

#include <gtest/gtest.h>

#include "core/process.h"
#include "models/convert.h"
#include "support/published_folders.h"

namespace everlong {
namespace {

using nlohmann::json;
using test::made;
using test::publish;
using test::published_configs;
using test::same_bits;
using test::TemporaryFolder;

// What tests/support/make_pickles.py makes of a published folder.
class Pickles : public testing::Test {
 protected:
  Pickles() : folder_("convert_pickles") {
    model_ = publish(made(folder_, "safe"), published_configs()[0], at::kBFloat16);
    expected_ = *load_tensors(folder_ / "safe/model.safetensors");
  }
  void pickle(std::vector<std::string> variants) {
    fs::remove_all(in());
    fs::copy(folder_ / "safe", in());
    std::vector<std::string> command = {"python3", EVERLONG_TEST_DATA "/support/make_pickles.py",
                                        in().string()};
    command.insert(command.end(), variants.begin(), variants.end());
    const auto ran = run_process({.command = command});
    ASSERT_TRUE(ran.ok()) << ran.status().message();
    ASSERT_EQ(ran->exit_code, 0) << ran->errors;
  }
  void expect_refused(const std::string& part) {
    const auto report = convert_model(in(), made(folder_, "out"), {});
    ASSERT_FALSE(report.ok()) << part;
    EXPECT_NE(report.status().message().find(part), std::string::npos)
        << "message: " << report.status().message() << "\nexpected part: " << part;
    EXPECT_NE(report.status().message().find("pytorch_model"), std::string::npos)
        << report.status().message();
  }
  fs::path in() const { return folder_ / "in"; }

  TemporaryFolder folder_;
  std::shared_ptr<Decoder> model_;
  TensorFile expected_;
};

TEST_F(Pickles, HoldTheSameWeightsInEveryForm) {
  for (const std::vector<std::string>& variants : std::vector<std::vector<std::string>>{
           {}, {"shards"}, {"strided"}, {"shared"}, {"shards", "strided", "shared"}}) {
    pickle(variants);
    const fs::path out = made(folder_, cat("out_", join(variants, "_")));
    const auto report = convert_model(in(), out, {});
    ASSERT_TRUE(report.ok()) << report.status().message();
    const auto written = load_tensors(out / "model.safetensors");
    ASSERT_TRUE(written.ok()) << written.status().message();
    ASSERT_EQ(written->tensors.size(), expected_.tensors.size());
    for (const auto& [name, tensor] : expected_.tensors)
      EXPECT_TRUE(same_bits(written->tensors.at(name), tensor)) << name << join(variants, ",");
  }
}

TEST_F(Pickles, ThatNameMoreThanWeightsNeedDoNotRun) {
  pickle({"evil"});
  expect_refused("system, which no weights need");
  EXPECT_FALSE(fs::exists(in() / "was_run"));
}

TEST_F(Pickles, ThatAreNoPlainDictionaryOfTensorsAreRefused) {
  for (const auto& [variant, part] :
       std::map<std::string, std::string>{{"nested", "entry 'model' is no tensor"},
                                          {"compressed", "is compressed"},
                                          {"past_end", "reaches past the end of its storage"},
                                          {"big_endian", "not little endian"},
                                          {"legacy", "is not a zip archive"}}) {
    pickle({variant});
    expect_refused(part);
  }
}

TEST_F(Pickles, BrokenAndIncompleteFoldersAreRefused) {
  pickle({"shards"});
  const fs::path second = in() / "pytorch_model-00002-of-00002.bin";
  fs::copy_file(second, folder_ / "kept");
  fs::remove(second);
  expect_refused("is missing");
  fs::copy_file(in() / "pytorch_model-00001-of-00002.bin", second);
  expect_refused("is in two files");
  fs::copy_file(folder_ / "kept", second, fs::copy_options::overwrite_existing);
  json index = json::parse(*read_file(in() / "pytorch_model.bin.index.json"));
  index["weight_map"]["ghost"] = second.filename().string();
  ASSERT_TRUE(write_file(in() / "pytorch_model.bin.index.json", index.dump()).ok());
  expect_refused("does not hold tensor 'ghost'");
  pickle({});
  const fs::path single = in() / "pytorch_model.bin";
  for (const std::uintmax_t left : {fs::file_size(single) - 1, fs::file_size(single) / 2}) {
    fs::resize_file(single, left);
    expect_refused("pytorch_model.bin: is not");
  }
}

TEST_F(Pickles, AreNotLoadedButTheMessageSaysWhatToDo) {
  pickle({});
  const auto model = load_model(in(), at::kCPU, at::kFloat);
  ASSERT_FALSE(model.ok());
  EXPECT_NE(model.status().message().find("everlong convert"), std::string::npos)
      << model.status().message();
}

}  // namespace
}  // namespace everlong
