#include "core/safetensors_folder.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

namespace everlong {
namespace {

using nlohmann::json;

constexpr const char* kIndex = "model.safetensors.index.json";
constexpr std::int64_t kMiB = 1 << 20;

class Folder {
 public:
  explicit Folder(const std::string& name)
      : path_(fs::temp_directory_path() / cat("everlong_shards_", ::getpid(), "_", name)) {
    fs::remove_all(path_);
    fs::create_directories(path_);
  }
  ~Folder() { fs::remove_all(path_); }
  fs::path operator/(const std::string& name) const { return path_ / name; }
  const fs::path& path() const { return path_; }
  std::set<std::string> files() const {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(path_))
      names.insert(entry.path().filename().string());
    return names;
  }
  json index() const { return json::parse(*read_file(path_ / kIndex)); }
  void write_index(const json& weight_map) const {
    ASSERT_TRUE(write_file(path_ / kIndex, json{{"weight_map", weight_map}}.dump()).ok());
  }

 private:
  fs::path path_;
};

// Four tensors of 8, 4, 12 and 4 bytes; `first` makes two sets of weights differ.
struct Weights {
  std::map<std::string, std::vector<float>> values;
  explicit Weights(float first = 1) {
    for (const auto& [name, count] :
         std::vector<std::pair<std::string, int>>{{"z", 2}, {"a", 1}, {"m", 3}, {"b", 1}})
      for (int i = 0; i < count; ++i) values[name].push_back(first++);
  }
  std::vector<TensorPlan> plan() const {
    return {{"z", DType::kFloat32, {2}},
            {"a", DType::kFloat32, {1}},
            {"m", DType::kFloat32, {3, 1}},
            {"b", DType::kFloat32, {}}};
  }
  TensorBytes bytes() const {
    return [this](const std::string& name) -> Result<std::span<const std::byte>> {
      return std::as_bytes(std::span(values.at(name)));
    };
  }
  Status write(const fs::path& folder, std::int64_t max_shard_bytes) const {
    return write_safetensors_folder(folder, plan(), {{"format", "pt"}}, max_shard_bytes, bytes());
  }
  void expect_in(const fs::path& folder) const {
    const auto opened = SafetensorsFolder::open(folder);
    ASSERT_TRUE(opened.ok()) << opened.status().message();
    EXPECT_EQ(opened->metadata().at("format"), "pt");
    ASSERT_EQ(opened->tensors().size(), values.size());
    for (const auto& tensor : plan()) {
      const TensorEntry& entry = opened->tensors().at(tensor.name);
      EXPECT_EQ(entry.shape, tensor.shape) << tensor.name;
      EXPECT_TRUE(std::ranges::equal(entry.bytes, std::as_bytes(std::span(values.at(tensor.name)))))
          << tensor.name;
    }
  }
};

void expect_refused(const fs::path& folder, const std::vector<std::string>& parts) {
  const auto opened = SafetensorsFolder::open(folder);
  ASSERT_FALSE(opened.ok());
  for (const auto& part : parts)
    EXPECT_NE(opened.status().message().find(part), std::string::npos)
        << "message: " << opened.status().message() << "\nexpected part: " << part;
}

TEST(SafetensorsFolder, OneFileOrShardsAreReadAlike) {
  const Folder folder("alike");
  const Weights weights;
  for (const std::int64_t max_bytes : {28, 27, 12, 5, 1}) {
    ASSERT_TRUE(weights.write(folder.path(), max_bytes).ok());
    EXPECT_EQ(fs::exists(folder / kIndex), max_bytes < 28) << max_bytes;
    weights.expect_in(folder.path());
  }
}

TEST(SafetensorsFolder, ShardsKeepTheOrderGivenAndTheirLimit) {
  const Folder folder("limit");
  ASSERT_TRUE(Weights().write(folder.path(), 12).ok());
  const json index = folder.index();
  EXPECT_EQ(index["metadata"]["total_size"], 28);
  EXPECT_EQ(index["weight_map"], (json{{"z", "model-00001-of-00003.safetensors"},
                                       {"a", "model-00001-of-00003.safetensors"},
                                       {"m", "model-00002-of-00003.safetensors"},
                                       {"b", "model-00003-of-00003.safetensors"}}));
}

TEST(SafetensorsFolder, NewWeightsReplaceOldOnesInEveryForm) {
  const Folder folder("replace");
  for (const std::int64_t before : {100, 12, 5}) {
    for (const std::int64_t after : {100, 12, 5}) {
      ASSERT_TRUE(Weights(1).write(folder.path(), before).ok());
      ASSERT_TRUE(Weights(100).write(folder.path(), after).ok());
      Weights(100).expect_in(folder.path());
      EXPECT_EQ(folder.files().size(), after == 100  ? 1U
                                       : after == 12 ? 4U
                                                     : 5U)
          << before << " -> " << after;
    }
  }
}

// Every prefix of the work: the writer fails at tensor n, or stops after its n-th file operation.
TEST(SafetensorsFolder, AWriteThatStopsLeavesTheOldWeights) {
  for (const std::int64_t before : {100, 12}) {
    for (const std::int64_t after : {100, 12, 5}) {
      for (int fails_at = 0; fails_at < 4; ++fails_at) {
        const Folder folder("stops");
        ASSERT_TRUE(Weights(1).write(folder.path(), before).ok());
        const auto files = folder.files();
        const Weights next(100);
        int asked = 0;
        const Status status = write_safetensors_folder(
            folder.path(), next.plan(), {}, after,
            [&](const std::string& name) -> Result<std::span<const std::byte>> {
              // What a killed program would leave is what lies there now: it must be the old model.
              Weights(1).expect_in(folder.path());
              if (asked++ == fails_at) return io_error("disk full");
              return next.bytes()(name);
            });
        EXPECT_EQ(status.message(), "disk full");
        Weights(1).expect_in(folder.path());
        EXPECT_EQ(folder.files(), files) << before << " -> " << after << " at " << fails_at;
      }
    }
  }
}

// Between the step that makes the new weights count and the removal of the old ones.
TEST(SafetensorsFolder, OldFilesThatWereNotRemovedYetDoNotCount) {
  const Folder folder("both");
  ASSERT_TRUE(Weights(1).write(folder.path(), 100).ok());
  ASSERT_TRUE(Weights(100).write(folder.path(), 12).ok());
  ASSERT_TRUE(Weights(1).write(folder / "old", 100).code() != StatusCode::kOk) << "no folder there";
  fs::create_directories(folder / "old");
  ASSERT_TRUE(Weights(1).write(folder / "old", 100).ok());
  fs::copy_file(folder / "old/model.safetensors", folder / "model.safetensors");
  Weights(100).expect_in(folder.path());  // the index came last
  const auto abandoned = folder / "model.safetensors.tmp.999999999";
  ASSERT_TRUE(write_file(abandoned, "half").ok());
  ASSERT_TRUE(write_file(folder / "model-00007-of-00009.safetensors", "orphan").ok());
  ASSERT_TRUE(write_file(folder / "model-notes.safetensors", "the user's").ok());
  ASSERT_TRUE(Weights(200).write(folder.path(), 100).ok());
  EXPECT_EQ(folder.files(),
            (std::set<std::string>{"model.safetensors", "model-notes.safetensors", "old"}));
}

TEST(SafetensorsFolder, MissingShardsAreNamed) {
  const Folder folder("missing");
  ASSERT_TRUE(Weights().write(folder.path(), 12).ok());
  fs::remove(folder / "model-00002-of-00003.safetensors");
  expect_refused(folder.path(), {"model-00002-of-00003.safetensors: is missing", "\"m\""});
  const Folder empty("empty");
  expect_refused(empty.path(), {"model.safetensors", "No such file"});
}

TEST(SafetensorsFolder, TruncatedShardsAreNamed) {
  const Folder folder("truncated");
  ASSERT_TRUE(Weights().write(folder.path(), 12).ok());
  const fs::path shard = folder / "model-00002-of-00003.safetensors";
  fs::resize_file(shard, fs::file_size(shard) - 1);
  expect_refused(folder.path(), {shard.string(), "within the 11 bytes of data"});
  fs::resize_file(shard, 20);
  expect_refused(folder.path(), {shard.string(), "runs past the end"});
}

TEST(SafetensorsFolder, ATensorInTwoShardsIsRefused) {
  const Folder folder("twice");
  const Weights weights;
  ASSERT_TRUE(weights.write(folder.path(), 12).ok());
  const TensorEntry m{DType::kFloat32, {3}, *weights.bytes()("m")};
  const TensorEntry b{DType::kFloat32, {1}, *weights.bytes()("b")};
  ASSERT_TRUE(
      write_safetensors(folder / "model-00003-of-00003.safetensors", {{"b", b}, {"m", m}}, {})
          .ok());
  expect_refused(folder.path(),
                 {"\"m\" is in two shards", "model-00002-of-00003", "model-00003-of-00003"});
}

TEST(SafetensorsFolder, AnIndexThatDisagreesWithItsShardsIsRefused) {
  const Folder folder("disagrees");
  ASSERT_TRUE(Weights().write(folder.path(), 12).ok());
  const json map = folder.index()["weight_map"];
  json more = map;
  more["ghost"] = "model-00002-of-00003.safetensors";
  folder.write_index(more);
  expect_refused(folder.path(), {"model-00002-of-00003", "does not hold tensor \"ghost\""});
  json moved = map;
  moved["a"] = "model-00002-of-00003.safetensors";
  folder.write_index(moved);
  expect_refused(folder.path(), {"model-00002-of-00003", "does not hold tensor \"a\""});
  json fewer = map;
  fewer.erase("a");
  folder.write_index(fewer);
  expect_refused(folder.path(), {"model-00001-of-00003", "tensor \"a\" is not named in"});
}

TEST(SafetensorsFolder, BrokenIndexesAreRefused) {
  const Folder folder("index");
  ASSERT_TRUE(Weights().write(folder.path(), 12).ok());
  const auto refused = [&](const std::string& text, const std::string& part) {
    ASSERT_TRUE(write_file(folder / kIndex, text).ok());
    expect_refused(folder.path(), {kIndex, part});
  };
  refused("", "not a valid JSON object");
  refused("[]", "not a valid JSON object");
  refused("{}", "has no \"weight_map\"");
  refused(R"({"weight_map": {}})", "has no \"weight_map\"");
  refused(R"({"weight_map": {"a": 1}})", "weight_map[\"a\"] = 1");
  refused(R"({"weight_map": {"a": "../model.safetensors"}})", "in the same folder");
  refused(R"({"weight_map": {"a": "/etc/x.safetensors"}})", "in the same folder");
  refused(R"({"weight_map": {"a": "pytorch_model.bin"}})", "in the same folder");
  refused(R"({"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}})", "\"a\" twice");
}

// Bytes of files that this process has in memory.
std::int64_t resident_file_bytes() {
  std::int64_t size = 0, resident = 0, of_files = -1;
  std::ifstream("/proc/self/statm") >> size >> resident >> of_files;
  return of_files * ::sysconf(_SC_PAGESIZE);
}

// Files full of holes: they take no disk, and as much address space as full ones.
TEST(SafetensorsFolder, AFolderLargerThanMemoryOpensAndStreamsItsLayers) {
  const std::int64_t memory = ::sysconf(_SC_PHYS_PAGES) * ::sysconf(_SC_PAGESIZE);
  constexpr std::int64_t kShard = std::int64_t{4} << 30, kLayer = 64 * kMiB;
  const std::int64_t shards = memory / kShard + 2;
  const Folder folder("large");
  json weight_map;
  for (std::int64_t s = 0; s < shards; ++s) {
    json header;
    for (std::int64_t at = 0; at < kShard; at += kLayer) {
      const std::string name = cat("layers.", s * (kShard / kLayer) + at / kLayer, ".weight");
      header[name] = {
          {"dtype", "BF16"}, {"shape", {kLayer / 2048, 1024}}, {"data_offsets", {at, at + kLayer}}};
      weight_map[name] = cat("s", s, ".safetensors");
    }
    const std::string text = header.dump();
    const std::uint64_t length = text.size();
    const fs::path path = folder / cat("s", s, ".safetensors");
    std::ofstream(path).write(reinterpret_cast<const char*>(&length), 8) << text;
    std::error_code error;
    fs::resize_file(path, 8 + length + static_cast<std::uint64_t>(kShard), error);
    if (error) GTEST_SKIP() << "no sparse file of 4 GiB here: " << error.message();
  }
  folder.write_index(weight_map);

  const std::int64_t before = resident_file_bytes();
  ASSERT_GE(before, 0);
  const auto opened = SafetensorsFolder::open(folder.path());
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  EXPECT_GT(shards * kShard, memory);
  EXPECT_LT(resident_file_bytes() - before, 4 * kMiB) << "opening read more than the headers";

  std::int64_t most = 0;
  unsigned sum = 0;
  for (int layer = 0; layer < 12; ++layer) {
    const std::string name = cat("layers.", layer * 37, ".weight");
    const auto bytes = opened->tensors().at(name).bytes;
    for (std::size_t i = 0; i < bytes.size(); i += 512) sum += std::to_integer<unsigned>(bytes[i]);
    most = std::max(most, resident_file_bytes() - before);
    opened->release(name, bytes);
  }
  EXPECT_EQ(sum, 0U);
  EXPECT_GE(most, kLayer) << "this test looks at the wrong figure";
  EXPECT_LT(most, kLayer + 8 * kMiB) << "layers that were released stayed in memory";
  EXPECT_LT(resident_file_bytes() - before, 8 * kMiB);
}

}  // namespace
}  // namespace everlong
