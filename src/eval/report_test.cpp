#include "eval/report.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "core/json_lines.h"
#include "core/text.h"

namespace everlong {
namespace {

using nlohmann::ordered_json;

class ReportTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / cat("everlong_report_", ::getpid());
    fs::remove_all(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  // A run of ten steps whose losses begin at `loss`.
  fs::path write_run(const std::string& name, double loss, const std::string& rate,
                     bool over = true) {
    const fs::path run = folder_ / name;
    EXPECT_TRUE(make_directories(run / "model").ok());
    std::string log;
    for (int step = 1; step <= 10; ++step) {
      ordered_json line = {{"step", step},        {"loss", loss / step},  {"lr", 0.01},
                           {"grad_norm", 1.5},    {"tokens", 100 * step}, {"tok_s", 50.0},
                           {"wall_s", 2.0 * step}};
      if (step % 5 == 0) line["valid_loss"] = loss / step + 0.25;
      log += checked_json_line(line);
    }
    EXPECT_TRUE(write_file(run / "log.jsonl", log).ok());
    EXPECT_TRUE(write_file(run / "run.toml", cat("[data]\nrows = 8\n\n[train]\nlearning_rate = ",
                                                 rate, "\n\n[out]\nfolder = \"", name, "\"\n"))
                    .ok());
    EXPECT_TRUE(write_file(run / "model" / "config.json",
                           R"({"layer_types": ["lightning", "lightning", "softmax"]})")
                    .ok());
    if (!over) return run;
    EXPECT_TRUE(write_file(run / "train.json", checked_json_line({{"parameters", 12345},
                                                                  {"steps", 10},
                                                                  {"tokens", 1000},
                                                                  {"seconds", 20.0},
                                                                  {"loss", loss / 10}}))
                    .ok());
    return run;
  }

  static void expect_parts(const std::string& html, const std::vector<std::string>& parts) {
    for (const auto& part : parts) EXPECT_NE(html.find(part), std::string::npos) << part;
    for (const char* outside : {"<script", "http://", "https://", "src=", "<link"})
      EXPECT_EQ(html.find(outside), std::string::npos) << outside;
  }

  fs::path folder_;
};

TEST_F(ReportTest, OfOneRunShowsItsCurve) {
  const auto html = render_report(write_run("a", 5, "0.01"));
  ASSERT_TRUE(html.ok()) << html.status().message();
  expect_parts(*html, {"2 × lightning, 1 × softmax", "12,345", "held out", "<svg"});
}

TEST_F(ReportTest, OfSeveralRunsShowsThemSideBySide) {
  const auto html = render_comparison({write_run("a<b", 5, "0.01"), write_run("other", 4, "0.02"),
                                       write_run("third", 3, "0.02", /*over=*/false)});
  ASSERT_TRUE(html.ok()) << html.status().message();
  expect_parts(*html, {"3 runs", "a&lt;b", "other", "third (not finished)", "<td>0.5000</td>",
                       "<td>0.4000</td>", "<td>0.3000</td>", "<td>0.7500</td>", "Held-out loss",
                       "Gradient norm", "Speed of training", "class=\"c2\""});
  // The one setting that differs, and neither one that does not nor where the runs lie.
  expect_parts(*html, {"<td>train.learning_rate</td><td>0.01</td><td>0.02</td><td>0.02</td>"});
  EXPECT_EQ(html->find("data.rows"), std::string::npos);
  EXPECT_EQ(html->find("out.folder"), std::string::npos);
}

TEST_F(ReportTest, LongNamesBecomeNumbersInTheLegends) {
  std::vector<fs::path> runs;
  for (const char* end : {"one", "two", "three"})
    runs.push_back(write_run(cat("a_rather_long_name_of_a_run_", end), 5, "0.01"));
  const auto html = render_comparison(runs);
  ASSERT_TRUE(html.ok()) << html.status().message();
  expect_parts(*html, {"<td>3</td><td>a_rather_long_name_of_a_run_three</td>", ">3</text>",
                       "All settings are the same"});
}

TEST_F(ReportTest, DamagedLinesAreLeftOutAndSaid) {
  const auto run = write_run("a", 5, "0.01");
  std::string log = *read_file(run / "log.jsonl");
  log[log.find("1.25")] = '9';  // the loss of step 4
  ASSERT_TRUE(write_file(run / "log.jsonl", log).ok());
  const auto html = render_report(run);
  ASSERT_TRUE(html.ok()) << html.status().message();
  expect_parts(*html, {"1 damaged lines are left out"});
}

TEST_F(ReportTest, DamagedResultsAndFoldersOfNoRunAreRefused) {
  const auto run = write_run("a", 5, "0.01");
  std::string results = *read_file(run / "train.json");
  results[results.find("12345")] = '2';
  ASSERT_TRUE(write_file(run / "train.json", results).ok());
  EXPECT_NE(render_report(run).status().message().find("is damaged"), std::string::npos);
  EXPECT_NE(render_comparison({run, folder_}).status().message().find("is damaged"),
            std::string::npos);
  EXPECT_NE(render_report(folder_).status().message().find("not a run folder"), std::string::npos);
}

}  // namespace
}  // namespace everlong
