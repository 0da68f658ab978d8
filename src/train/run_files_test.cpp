// Every file that training writes, cut and changed at random: refused with a message, or harmless
// by the rules of docs/formats.md. Never a crash, never something else than what was written.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "core/crc32c.h"
#include "core/random.h"
#include "support/small_run.h"
#include "train/checkpoint_store.h"
#include "train/event_file.h"
#include "train/loop.h"
#include "train/run_log.h"

namespace everlong {
namespace {

constexpr int kDamages = 1000;

// Every third time cut, else one byte is another one.
std::string damaged(std::string text, Random& random, int i) {
  const auto at = static_cast<std::size_t>(random.below(static_cast<std::int64_t>(text.size())));
  if (i % 3 == 0) {
    text.resize(at);
  } else {
    text[at] = static_cast<char>(text[at] ^ static_cast<char>(random.between(1, 255)));
  }
  return text;
}

class RunFilesTest : public test::TrainingTest {
 protected:
  void SetUp() override {
    TrainingTest::SetUp();
    run_ = run_file({"train.steps=6", "train.save_every=2", "train.eval_every=2",
                     "train.carry=detached", "train.eval_tokens=300", "data.rows=2"});
    std::int64_t done = 0;
    const auto stopped =
        train(run_, {.interrupted = [&] { return done == 5; },
                     .after_step = [&](const StepReport& report) { done = report.step; }});
    ASSERT_EQ(stopped.status().code(), StatusCode::kInterrupted) << stopped.status().message();
  }
  fs::path newest_checkpoint() const {
    return CheckpointStore(out() / "checkpoints", 1).files().front();
  }
  static void put(const fs::path& path, const std::string& text) {  // unsynced: there are thousands
    std::FILE* const file = std::fopen(path.c_str(), "wb");
    ASSERT_NE(file, nullptr);
    ASSERT_EQ(std::fwrite(text.data(), 1, text.size(), file), text.size());
    std::fclose(file);
  }

  RunFile run_;
  Random random_{11};
};

TEST_F(RunFilesTest, DamagedCheckpointIsRefusedWhereverTheDamageIs) {
  const std::string good = *read_file(newest_checkpoint());
  const fs::path path = folder_.path() / "damaged.safetensors";
  put(path, good);
  ASSERT_TRUE(read_checkpoint(path).ok());
  std::uint64_t header = 0;
  std::memcpy(&header, good.data(), sizeof header);
  for (int i = 0; i < kDamages; ++i) {
    std::string text = damaged(good, random_, i);
    // Half of the changes in the header, which is a small part of the file.
    if (i % 6 == 1) {
      text = good;
      const auto at =
          static_cast<std::size_t>(random_.below(static_cast<std::int64_t>(header) + 8));
      text[at] = static_cast<char>(text[at] ^ static_cast<char>(random_.between(1, 255)));
    }
    put(path, text);
    const auto read = read_checkpoint(path);
    ASSERT_FALSE(read.ok()) << "damage " << i;
    ASSERT_EQ(read.status().code(), StatusCode::kCorrupt) << read.status().message();
    ASSERT_NE(read.status().message().find(path.string()), std::string::npos);
  }
}

TEST_F(RunFilesTest, DamagedLogNeverShowsAFigureThatWasNotWritten) {
  const fs::path path = out() / "log.jsonl";
  const std::string good = *read_file(path);
  const auto written = parse_json_lines(good).lines;
  ASSERT_EQ(written.size(), 5U);
  for (int i = 0; i < kDamages; ++i) {
    put(path, damaged(good, random_, i));
    {
      const auto log = RunLog::resume(path, written.back(), 5, {});
      ASSERT_TRUE(log.ok()) << log.status().message();
    }
    const auto read = parse_json_lines(*read_file(path));
    ASSERT_EQ(read.passed_over, 0);
    ASSERT_FALSE(read.lines.empty());
    ASSERT_EQ(read.lines.back(), written.back());
    for (const auto& line : read.lines)
      ASSERT_NE(std::ranges::find(written, line), written.end()) << line.dump();
  }
}

// A run file belongs to the user, who may change any setting: so what can be read counts, and every
// setting that is not the checkpoint's is said, or refused.
TEST_F(RunFilesTest, DamagedRunFileIsRefusedOrItsEverySettingThatChangedIsKnown) {
  const std::string good = *read_file(out() / "run.toml");
  int refused = 0, changed = 0, same = 0;
  for (int i = 0; i < kDamages; ++i) {
    const auto run = RunFile::parse(damaged(good, random_, i), "run.toml", {});
    if (!run.ok()) {
      ASSERT_FALSE(run.status().message().empty());
      ++refused;
    } else if (!changes(run_, *run).empty()) {
      ++changed;
    } else {
      RunFile settled = *run;  // spaces, a default that is not written any more, out.folder
      settled.out.folder = run_.out.folder;
      ASSERT_EQ(settled.to_toml(), run_.to_toml());
      ++same;
    }
  }
  EXPECT_GT(refused, kDamages / 4);
  EXPECT_GT(changed, kDamages / 100);
  EXPECT_LT(same, kDamages / 2);
}

// As TensorBoard reads: a record that does not fit its checksums ends the file.
std::vector<std::string> records_of(std::string_view bytes) {
  std::vector<std::string> records;
  const auto word = [](std::string_view at) {
    std::uint32_t value = 0;
    std::memcpy(&value, at.data(), sizeof value);
    return value;
  };
  const auto masked = [](std::string_view data) {
    const std::uint32_t crc = crc32c(data);
    return ((crc >> 15) | (crc << 17)) + 0xa282ead8U;
  };
  while (bytes.size() >= 16) {
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof length);
    if (word(bytes.substr(8)) != masked(bytes.substr(0, 8)) || length > bytes.size() - 16) break;
    if (word(bytes.substr(12 + length)) != masked(bytes.substr(12, length))) break;
    records.emplace_back(bytes.substr(12, length));
    bytes.remove_prefix(16 + length);
  }
  return records;
}

TEST_F(RunFilesTest, DamagedEventsShowNothingThatWasNotWritten) {
  fs::path path;
  for (const auto& entry : fs::directory_iterator(out()))
    if (entry.path().filename().string().starts_with("events.out.tfevents.")) path = entry.path();
  const std::string good = *read_file(path);
  const auto written = records_of(good);
  ASSERT_EQ(written.size(), 6U);  // the version, and five steps
  EXPECT_NE(written[0].find("brain.Event:2"), std::string::npos);
  for (const char* tag : {"train/loss", "train/grad_norm", "valid/loss", "valid/bpb"})
    EXPECT_NE(written[2].find(tag), std::string::npos) << tag;
  for (int i = 0; i < kDamages; ++i) {
    const auto read = records_of(damaged(good, random_, i));
    ASSERT_LT(read.size(), written.size());
    for (std::size_t j = 0; j < read.size(); ++j) ASSERT_EQ(read[j], written[j]);
  }
}

// The bytes by hand, after event.proto and summary.proto.
TEST(EventFile, MessagesAreThoseOfTheSchema) {
  using namespace std::string_literals;
  EXPECT_EQ(scalars_event(1.5, 300, {{"a", 2}}),
            "\x09\0\0\0\0\0\0\xf8\x3f"  // wall_time 1.5
            "\x10\xac\x02"              // step 300
            "\x2a\x0a\x0a\x08\x0a\x01"
            "a"                  // summary { value { tag "a"
            "\x15\0\0\0\x40"s);  // simple_value 2 } }
  EXPECT_EQ(session_start_event(0, 7), "\x09\0\0\0\0\0\0\0\0\x10\x07\x3a\x02\x08\x01"s);
  // The masked checksums of TFRecord for eight zero bytes of length and no data.
  const std::string record = event_record("");
  EXPECT_EQ(record.size(), 16U);
  EXPECT_EQ(records_of(record).size(), 1U);
}

}  // namespace
}  // namespace everlong
