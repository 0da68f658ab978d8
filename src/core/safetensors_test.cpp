#include "core/safetensors.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace everlong {
namespace {

using Tensors = std::map<std::string, TensorEntry>;

fs::path temporary(const std::string& name) {
  return fs::temp_directory_path() / cat("everlong_safetensors_", ::getpid(), "_", name);
}

// A file in memory: header text (padded by the caller if it cares) and data.
std::vector<std::byte> file_of(std::string_view header, std::string_view data) {
  std::vector<std::byte> bytes(8 + header.size() + data.size());
  const std::uint64_t length = header.size();
  std::memcpy(bytes.data(), &length, 8);
  std::memcpy(bytes.data() + 8, header.data(), header.size());
  if (!data.empty()) std::memcpy(bytes.data() + 8 + header.size(), data.data(), data.size());
  return bytes;
}

// Fails unless the file is refused with a message that holds `part`.
void expect_refused(std::string_view header, std::string_view data, std::string_view part) {
  const auto bytes = file_of(header, data);
  const auto content = parse_safetensors(bytes);
  ASSERT_FALSE(content.ok()) << header;
  EXPECT_EQ(content.status().code(), StatusCode::kCorrupt);
  EXPECT_NE(content.status().message().find(part), std::string::npos)
      << "message: " << content.status().message() << "\nexpected part: " << part;
}

struct Sample {
  std::vector<double> wide = {1.5, -2.25};
  std::vector<float> single = {1, 2, 3, 4, 5, 6};
  std::vector<std::uint8_t> bytes = {7, 8, 9};
  Tensors tensors() const {
    return {{"a.bytes", {DType::kUint8, {3}, std::as_bytes(std::span(bytes))}},
            {"b.single", {DType::kFloat32, {2, 3}, std::as_bytes(std::span(single))}},
            {"c.scalar", {DType::kFloat64, {}, std::as_bytes(std::span(wide).first(1))}},
            {"d.empty", {DType::kBFloat16, {0, 5}, {}}},
            {"e.wide", {DType::kFloat64, {2}, std::as_bytes(std::span(wide))}}};
  }
};

std::string written_bytes(const Sample& sample) {
  const fs::path path = temporary("written");
  EXPECT_TRUE(write_safetensors(path, sample.tensors(), {{"format", "test"}}).ok());
  auto text = read_file(path);
  fs::remove(path);
  return *std::move(text);
}

TEST(Safetensors, RoundTripKeepsNamesShapesBytesAndMetadata) {
  const Sample sample;
  const fs::path path = temporary("round");
  const std::map<std::string, std::string> metadata = {{"format", "test"},
                                                       {"quote\"", "line\nbreak, \xC3\xA9"}};
  ASSERT_TRUE(write_safetensors(path, sample.tensors(), metadata).ok());
  const auto file = SafetensorsFile::open(path);
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->metadata(), metadata);
  ASSERT_EQ(file->tensors().size(), sample.tensors().size());
  for (const auto& [name, expected] : sample.tensors()) {
    const TensorEntry& read = file->tensors().at(name);
    EXPECT_EQ(read.dtype, expected.dtype) << name;
    EXPECT_EQ(read.shape, expected.shape) << name;
    ASSERT_EQ(read.bytes.size(), expected.bytes.size()) << name;
    EXPECT_TRUE(std::ranges::equal(read.bytes, expected.bytes)) << name;
  }
  fs::remove(path);
}

TEST(Safetensors, WrittenTensorsStartAtMultiplesOfTheirElement) {
  const Sample sample;
  const std::string text = written_bytes(sample);
  const auto bytes = std::as_bytes(std::span(text));
  const auto content = parse_safetensors(bytes);
  ASSERT_TRUE(content.ok());
  for (const auto& [name, entry] : content->tensors) {
    if (entry.bytes.empty()) continue;
    EXPECT_EQ(
        (entry.bytes.data() - bytes.data()) % static_cast<std::ptrdiff_t>(info(entry.dtype).bytes),
        0)
        << name;
  }
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), 8);
  EXPECT_EQ(header_bytes % 8, 0U);
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string text = written_bytes(Sample{});
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, text.data(), 8);
  for (std::size_t size = 0; size < text.size(); ++size) {
    const std::vector<char> cut(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(size));
    const auto content = parse_safetensors(std::as_bytes(std::span(cut)));
    ASSERT_FALSE(content.ok()) << size << " bytes were accepted";
    // A cut inside the header is seen before the header is read.
    if (size >= 8 && size < 8 + header_bytes) {
      EXPECT_NE(content.status().message().find("runs past the end"), std::string::npos) << size;
    }
  }
  const std::string longer = text + "x";
  EXPECT_FALSE(parse_safetensors(std::as_bytes(std::span(longer))).ok())
      << "a byte too many was accepted";
}

// A changed byte may still make a legal file (another name, I32 for F32): then it must describe the
// same bytes.
TEST(Safetensors, EveryChangedHeaderByteIsRefusedOrStillCoversTheData) {
  std::string text = written_bytes(Sample{});
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, text.data(), 8);
  const std::size_t data_begin = 8 + header_bytes;
  int accepted = 0, refused = 0;
  for (std::size_t at = 0; at < data_begin; ++at) {
    const char original = text[at];
    for (int value = 0; value < 256; ++value) {
      if (static_cast<char>(value) == original) continue;
      text[at] = static_cast<char>(value);
      const auto content = parse_safetensors(std::as_bytes(std::span(text)));
      if (!content.ok()) {
        ++refused;
        continue;
      }
      ++accepted;
      std::size_t total = 0;
      for (const auto& [name, entry] : content->tensors) {
        const auto* begin = reinterpret_cast<const char*>(entry.bytes.data());
        if (!entry.bytes.empty()) {
          ASSERT_GE(begin, text.data() + data_begin) << "byte " << at << " = " << value;
          ASSERT_LE(begin + entry.bytes.size(), text.data() + text.size())
              << "byte " << at << " = " << value;
        }
        total += entry.bytes.size();
      }
      ASSERT_EQ(total, text.size() - data_begin) << "byte " << at << " = " << value;
    }
    text[at] = original;
  }
  EXPECT_GT(refused, accepted);  // names and metadata are the only free text
}

TEST(Safetensors, OverlapsAndHolesAreRefused) {
  const std::string data(8, 'x');
  expect_refused(
      R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
      data, "tensors overlap");
  expect_refused(
      R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
      data.substr(4), "tensors overlap");
  expect_refused(
      R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
      data, "there is a hole");
  expect_refused(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", data,
                 "there is a hole");
  expect_refused(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", data,
                 "belongs to none");
  expect_refused("{}", data, "belongs to none");
}

TEST(Safetensors, OffsetsAndShapesThatDisagreeAreRefused) {
  const std::string data(8, 'x');
  expect_refused(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", data, "needs 12");
  expect_refused(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", data,
                 "do not lie in order");
  expect_refused(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", data,
                 "within the 8 bytes");
  expect_refused(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}})", data, "not a pair");
  expect_refused(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[-1,7]}})", data, "not a pair");
  expect_refused(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", data,
                 "shape is not a list");
  expect_refused(R"({"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})", data,
                 "shape is not a list");
  expect_refused(R"({"a":{"dtype":"F32","shape":2,"data_offsets":[0,8]}})", data,
                 "shape is not a list");
}

TEST(Safetensors, ShapesWhoseProductOverflowsAreRefused) {
  const std::string data(8, 'x');
  // 2^62 * 4 elements of 4 bytes wrap to 0 bytes, 2^62 + 2 of them to the 8 that are there.
  expect_refused(R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})",
                 "", "64-bit");
  expect_refused(R"({"a":{"dtype":"F32","shape":[4611686018427387906],"data_offsets":[0,8]}})",
                 data, "64-bit");
  expect_refused(R"({"a":{"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,8]}})", data,
                 "shape is not a list");
}

TEST(Safetensors, BrokenHeadersAreRefused) {
  expect_refused("", "", "does not start with");
  expect_refused("[]", "", "does not start with");
  expect_refused(" {}", "", "does not start with");
  expect_refused("{", "", "not a valid JSON object");
  expect_refused("{} x", "", "not a valid JSON object");
  expect_refused(std::string("{}\0", 3), "", "not a valid JSON object");
  expect_refused("{\"\xFF\":1}", "", "not a valid JSON object");
  expect_refused(R"({"a":1})", "", "an object is needed");
  expect_refused(R"({"a":{"dtype":"F32","shape":[0]}})", "", "\"data_offsets\" is missing");
  expect_refused(R"({"a":{"dtype":"F33","shape":[0],"data_offsets":[0,0]}})", "",
                 "dtype \"F33\" is not known");
  expect_refused(R"({"a":{"dtype":7,"shape":[0],"data_offsets":[0,0]}})", "",
                 "dtype 7 is not known");
  expect_refused(R"({"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":1}})", "",
                 "\"x\" is not known");
  expect_refused(R"({"__metadata__":{"a":1}})", "", "__metadata__.a is number");
  expect_refused(R"({"__metadata__":[]})", "", "an object of strings");
  auto bytes = file_of("{}", "");
  const std::uint64_t huge = 1ULL << 60;
  std::memcpy(bytes.data(), &huge, 8);
  EXPECT_NE(parse_safetensors(bytes).status().message().find("exceeds"), std::string::npos);
}

TEST(Safetensors, NamesGivenTwiceAreRefused) {
  expect_refused(
      R"({"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}})",
      "", "\"a\" twice");
  expect_refused(R"({"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}})", "",
                 "\"dtype\" twice");
  expect_refused(R"({"__metadata__":{"k":"1","k":"2"}})", "", "\"k\" twice");
}

TEST(Safetensors, WriterRefusesWhatItCouldNotReadBack) {
  const fs::path path = temporary("refused");
  const std::vector<float> values = {1, 2, 3};
  const auto bytes = std::as_bytes(std::span(values));
  EXPECT_FALSE(write_safetensors(path, {{"a", {DType::kFloat32, {4}, bytes}}}, {}).ok());
  EXPECT_FALSE(write_safetensors(path, {{"a", {DType::kFloat32, {-3}, bytes}}}, {}).ok());
  EXPECT_FALSE(write_safetensors(path, {{"__metadata__", {DType::kFloat32, {3}, bytes}}}, {}).ok());
  EXPECT_FALSE(write_safetensors(path, {{"\xFF", {DType::kFloat32, {3}, bytes}}}, {}).ok());
  EXPECT_FALSE(write_safetensors(path, {}, {{"k", "\xFF"}}).ok());
  EXPECT_FALSE(write_safetensors(path, {}, {{"everlong_checksums", "{}"}}).ok());
  EXPECT_FALSE(fs::exists(path)) << "a refused write left a file";
}

TEST(Safetensors, AnyChangedByteOfTheDataFailsTheChecksumOfItsTensorAlone) {
  const Sample sample;
  const fs::path path = temporary("checksums");
  const std::string whole = written_bytes(sample);
  std::uint64_t header = 0;
  std::memcpy(&header, whole.data(), 8);
  for (std::size_t at = 8 + header; at < whole.size(); ++at) {
    std::string bytes = whole;
    bytes[at] = static_cast<char>(bytes[at] ^ 1);
    ASSERT_TRUE(write_file(path, bytes).ok());
    const auto file = SafetensorsFile::open(path);
    ASSERT_TRUE(file.ok()) << file.status().message();
    EXPECT_TRUE(file->has_checksums());
    int refused = 0;
    for (const auto& [name, entry] : file->tensors()) {
      const Status status = file->verify(name);
      if (status.ok()) continue;
      ++refused;
      EXPECT_EQ(status.code(), StatusCode::kCorrupt);
      EXPECT_NE(status.message().find(cat(path.string(), ": tensor \"", name, "\" is damaged")),
                std::string::npos)
          << status.message();
    }
    EXPECT_EQ(refused, 1) << "byte " << at;
  }
  fs::remove(path);
}

TEST(Safetensors, ChecksumsAreXxh3OfNameDtypeShapeAndData) {
  // XXH3-64 of "a\0F32\0[3]\0" and the twelve bytes, by the xxhash package of Python: a formula
  // that changes would refuse every file written before.
  const std::vector<float> values = {1, 2, 3};
  const TensorEntry entry{DType::kFloat32, {3}, std::as_bytes(std::span(values))};
  EXPECT_EQ(tensor_checksum("a", entry), 0xeb673984391f0083u);
  EXPECT_NE(tensor_checksum("b", entry), tensor_checksum("a", entry));
  EXPECT_NE(tensor_checksum("a", {DType::kInt32, {3}, entry.bytes}), tensor_checksum("a", entry));
  EXPECT_NE(tensor_checksum("a", {DType::kFloat32, {1, 3}, entry.bytes}),
            tensor_checksum("a", entry));
}

TEST(Safetensors, FilesWithoutChecksumsAreReadAndSayNothingOfTheirData) {
  const fs::path path = temporary("published");
  const auto bytes = file_of(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "abcd");
  ASSERT_TRUE(write_file(path, {reinterpret_cast<const char*>(bytes.data()), bytes.size()}).ok());
  const auto file = SafetensorsFile::open(path);
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_FALSE(file->has_checksums());
  EXPECT_TRUE(file->verify("a").ok());
  fs::remove(path);
}

TEST(Safetensors, ChecksumsThatDoNotFitTheTensorsAreRefused) {
  const auto header = [](std::string_view checksums) {
    return cat(R"({"__metadata__":{"everlong_checksums":")", checksums,
               R"("},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})");
  };
  const std::string digits = "0123456789abcdef";
  EXPECT_TRUE(parse_safetensors(file_of(header(cat(R"({\"a\":\")", digits, R"(\"})")), "x")).ok());
  expect_refused(header("{}"), "x", "tensor \"a\" has no checksum");
  expect_refused(header("nonsense"), "x", "everlong_checksums");
  expect_refused(header(R"({\"a\":7})"), "x", "16 hexadecimal digits are needed");
  expect_refused(header(R"({\"a\":\"0123456789ABCDEF\"})"), "x",
                 "16 hexadecimal digits are needed");
  expect_refused(header(cat(R"({\"a\":\")", digits, R"(\",\"b\":\")", digits, R"(\"})")), "x",
                 "\"b\", which is no tensor");
}

TEST(Safetensors, AFailedWriteLeavesTheOldFile) {
  const fs::path path = temporary("kept");
  const Sample sample;
  ASSERT_TRUE(write_safetensors(path, sample.tensors(), {}).ok());
  EXPECT_FALSE(write_safetensors(path, {{"a", {DType::kFloat32, {4}, {}}}}, {}).ok());
  EXPECT_TRUE(SafetensorsFile::open(path).ok());
  fs::remove(path);
}

TEST(Safetensors, OpenNamesTheFile) {
  const fs::path path = temporary("named");
  ASSERT_TRUE(write_file(path, "short").ok());
  const auto file = SafetensorsFile::open(path);
  ASSERT_FALSE(file.ok());
  EXPECT_NE(file.status().message().find(path.string()), std::string::npos);
  fs::remove(path);
}

}  // namespace
}  // namespace everlong
