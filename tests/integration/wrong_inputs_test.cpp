// What the program says to wrong input: one message, on stderr, that names what was given, what is
// allowed or what to do, and the exit code that belongs to it. The table is the specification.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "core/process.h"
#include "core/safetensors.h"
#include "core/text.h"

namespace everlong {
namespace {

struct WrongInput {
  const char* name;
  std::string command;             // after "everlong"; words parted by spaces, in the folder below
  int code;                        // 1: failed, 2: wrong usage
  std::vector<std::string> parts;  // of the message, in any order
  const char* shell = "";          // where the shell has to set the scene: $E is the program
};

void PrintTo(const WrongInput& wrong, std::ostream* out) { *out << wrong.name; }

// Made once in a folder of its own: text/ (8 files), tokens/ (a dataset), run.toml, run/ (a run),
// nan/ (its model with weights that are no numbers), cut/ (weights cut short), bad/ (a config with
// a stray key), no_tokens/ (a dataset whose shard is cut), book.state and cut.state.
const std::vector<WrongInput> kTable = {
    // The command line.
    {"unknown_command", "frobnicate", 2, {"frobnicate was not expected", "commands: data, train"}},
    {"no_command", "", 2, {"a command is missing", "everlong --help"}},
    {"misspelled_command", "trian", 2, {"trian was not expected", "Did you mean train?"}},
    {"misspelled_option", "generate --modle run", 2, {"--modle is not an option", "mean --model?"}},
    {"missing_option", "generate --prompt a", 2, {"--model is required", "generate --help"}},
    {"word_for_a_count", "generate -m run -n many", 2, {"--max-tokens: \"many\"", "1000 and 4K"}},
    {"negative_count", "generate -m run -n -3", 1, {"--max-tokens -3 is negative"}},
    {"unknown_choice",
     "generate -m run --dtype int8",
     2,
     {"--dtype: \"int8\"", "auto, fp32, bf16"}},
    {"two_prompts",
     "generate -m run -p a text/0.txt",
     1,
     {"more than one prompt", "--prompt-file"}},
    {"two_texts",
     "eval perplexity -m run --data tokens --text text/0.txt",
     1,
     {"--data and --text"}},
    {"no_text", "eval perplexity -m run", 1, {"nothing to read", "--data DIR", "--text FILE"}},
    {"fraction_above_one", "data prepare text -o x --valid-fraction 2", 1, {"= 2", "0 <= f < 1"}},
    {"bad_lengths",
     "data synthetic passkey --lengths x -n 1K -o x",
     1,
     {"lengths \"x\"", "52-121"}},
    // Sampling.
    {"negative_temperature",
     "generate -m run -p a --temperature -1",
     1,
     {"temperature = -1", "from 0 (greedy)"}},
    {"top_p_above_one", "generate -m run -p a --top-p 1.5", 1, {"top_p = 1.5", "up to 1"}},
    // Run files and settings.
    {"no_run_file", "train nofile.toml", 1, {"nofile.toml", "No such file"}},
    {"broken_toml", "train broken.toml", 1, {"broken.toml:2"}},
    {"unknown_setting",
     "train run.toml --set train.stepz=4",
     1,
     {"--set train.stepz=4", "known: ", "Did you mean \"steps\"?"}},
    {"setting_of_another_type",
     "train run.toml --set train.steps=many",
     1,
     {"train.steps = \"many\"", "whole number from 1"}},
    {"setting_that_is_no_number",
     "train run.toml --set train.learning_rate=nan",
     1,
     {"learning_rate = nan", "from 0 to 10"}},
    {"unknown_mechanism",
     "train run.toml --set model.layer_types=lightening",
     1,
     {"\"lightening\" is not a mechanism", "Did you mean \"lightning\"?"}},
    {"vocabulary_too_small",
     "train run.toml --set model.vocab_size=100",
     1,
     {"vocabulary 259", "(100)", "set model.tokenizer and model.vocab_size"}},
    {"no_dataset",
     "train run.toml --set data.path=nowhere",
     1,
     {"nowhere: no dataset here", "everlong data prepare"}},
    // Models: folders, configs, shapes.
    {"no_model", "generate -m nowhere", 1, {"nowhere: no model here", "config.json", "train"}},
    {"stray_config_key", "info -m bad", 1, {"bad/config.json", "colour is not a"}},
    {"wrong_shape",
     "generate -m run -p a --set lightning.head_dim=8",
     1,
     {"token_mixer", "model.safetensors"}},
    {"cut_weights", "generate -m cut -p a", 1, {"cut/model.safetensors", "bytes"}},
    {"unknown_preset", "info --preset llama-9b", 1, {"\"llama-9b\"", "Did you mean \"llama-7b\"?"}},
    {"convert_onto_itself", "convert run run", 1, {"run is there already", "give another OUT"}},
    {"convert_to_unknown", "convert run x --to gguf", 2, {"--to: \"gguf\"", "everlong, hf, llama"}},
    // Devices.
    {"no_gpu", "generate -m run -p a --device cuda", 1, {"device cuda", "use --device cpu"}},
    {"unknown_device", "generate -m run -p a --device tpu", 1, {"\"tpu\"", "auto, cpu, cuda"}},
    {"too_many_threads", "generate -m run --threads 5000", 1, {"threads = 5000", "1 to 1024"}},
    // Files.
    {"no_prompt_file",
     "generate -m run --prompt-file none",
     1,
     {"none: the prompt", "No such file"}},
    {"state_that_is_none",
     "generate -m run --load-state text/0.txt",
     1,
     {"not a safetensors file"}},
    {"cut_state", "generate -m run --load-state cut.state", 1, {"cut.state", "Nothing was loaded"}},
    {"cut_dataset", "data info no_tokens", 1, {"no_tokens/train-00000.tokens", "bytes"}},
    {"folder_of_others", "data prepare text -o text", 1, {"holds other things", "--force"}},
    {"unknown_tokenizer",
     "data prepare text -o x --tokenizer nope",
     1,
     {"\"nope\"", "known: bytes, words"}},
    {"no_run_folder", "report text", 1, {"text: no training log", "everlong train"}},
    {"text_too_short", "stream -m run --data tokens -n 1M", 1, {"1048576", "ask for 2 to"}},
    {"prompt_too_short", "eval passkey -m run --lengths 5", 1, {"5 tokens", "at least", "longer"}},
    // The machine: no room, no right, two writers, no numbers.
    {"no_folder_for_the_state",
     "generate -m run -p a -n 1 --save-state none/a.state",
     1,
     {"--save-state none/a.state", "no folder none"}},
    {"unwritable_state",
     "generate -m run -p a -n 0 --save-state /proc/a.state",
     1,
     {"/proc/a.state: cannot write"}},
    {"unwritable_run", "train run.toml -o /proc/run", 1, {"/proc/run: cannot create the folder"}},
    {"full_output", "", 1, {"standard output cannot be written"}, "$E info > /dev/full"},
    {"full_disk",
     "",
     1,
     {"book.state: cannot write", "the file is as it was", "Make room"},
     "ulimit -f 2; $E generate -m run -p a -n 0 -q --save-state book.state"},
    {"full_disk_in_training",
     "",
     1,
     {"cannot write", "Make room"},
     "ulimit -f 8; $E train run.toml -q -o full"},
    {"two_writers", "", 1, {"run: ", "another training"}, "flock run $E train run.toml -q"},
    {"weights_without_numbers", "generate -m nan -p a -n 1", 1, {"logit", "nan"}},
    {"training_without_numbers",
     "train from_nan.toml -q",
     1,
     {"step 1: loss = ", "model.embed_tokens.weight are not finite"}},
};

constexpr const char* kRun = R"([model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
layer_types = "lightning"
lightning = { num_heads = 2, head_dim = 16 }
)";
constexpr const char* kTraining = R"([data]
path = "tokens"
row_tokens = 64
rows = 2
[train]
steps = 3
warmup_steps = 1
device = "cpu"
threads = 1
eval_tokens = 1000
)";

struct Said {
  int code = -1;
  std::string out, err;
};

class WrongInputs : public testing::TestWithParam<WrongInput> {
 protected:
  static void SetUpTestSuite() {
    std::error_code ignored;
    folder = fs::temp_directory_path() / cat("everlong_wrong_", ::getpid());
    ASSERT_TRUE(make_directories(folder / "text").ok());
    for (int file = 0; file < 8; ++file) {
      std::string text;
      for (int line = 1; line < 120; ++line)
        text += cat("the stream ", (file + 3) * line * 7919 % 1000, " goes on and never ends\n");
      ASSERT_TRUE(write_file(folder / "text" / cat(file, ".txt"), text).ok());
    }
    write("run.toml", cat(kRun, kTraining, "[out]\nfolder = \"run\"\n"));
    write("broken.toml", "[train]\nsteps = = 3\n");
    ASSERT_EQ(run("data prepare text -o tokens -q").code, 0);
    const Said trained = run("train run.toml -q");
    ASSERT_EQ(trained.code, 0) << trained.err;
    ASSERT_EQ(run("generate -m run -p a -n 1 -q --save-state book.state").code, 0);
    cut_short("book.state", "cut.state");

    for (const char* const copy : {"nan", "cut", "bad"})
      fs::copy(folder / "run/model", folder / copy, fs::copy_options::recursive, ignored);
    cut_short("run/model/model.safetensors", "cut/model.safetensors");
    auto config = nlohmann::json::parse(*read_file(folder / "run/model/config.json"));
    config["colour"] = "blue";
    write("bad/config.json", config.dump());
    spoil_numbers(folder / "nan/model.safetensors");
    write("from_nan.toml", cat(kTraining, "from_model = \"nan\"\n[out]\nfolder = \"from_nan\"\n"));
    fs::copy(folder / "tokens", folder / "no_tokens", fs::copy_options::recursive, ignored);
    cut_short("tokens/train-00000.tokens", "no_tokens/train-00000.tokens");
  }
  static void TearDownTestSuite() {
    std::error_code ignored;
    fs::remove_all(folder, ignored);
  }

  static void write(const std::string& name, const std::string& text) {
    ASSERT_TRUE(write_file(folder / name, text).ok()) << name;
  }
  static void cut_short(const std::string& from, const std::string& to) {
    const auto whole = read_file(folder / from);
    ASSERT_TRUE(whole.ok()) << from;
    write(to, whole->substr(0, whole->size() - whole->size() / 3));
  }
  // Every number of the embedding becomes NaN, in a file without checksums, as others write them.
  static void spoil_numbers(const fs::path& path) {
    std::string bytes = *read_file(path);
    {
      const auto file = parse_safetensors(std::as_bytes(std::span(bytes)));
      ASSERT_TRUE(file.ok());
      const auto& entry = file->tensors.at("model.embed_tokens.weight");
      ASSERT_EQ(entry.dtype, DType::kFloat32);
      const float nan = std::nanf("");
      auto* const at = const_cast<std::byte*>(entry.bytes.data());
      for (std::size_t i = 0; i < entry.bytes.size(); i += sizeof nan)
        std::memcpy(at + i, &nan, sizeof nan);
    }
    const std::string stated = "everlong_checksums", other = "somebody_elses_key";
    const std::size_t at = bytes.find(stated);
    ASSERT_NE(at, std::string::npos);
    ASSERT_EQ(stated.size(), other.size());
    bytes.replace(at, stated.size(), other);
    ASSERT_TRUE(write_file(path, bytes).ok());
  }

  static Said run(const std::string& command, const std::string& shell = "") {
    const std::string line = cat("E=", EVERLONG_BINARY, "; cd ", folder.string(), "; ",
                                 shell.empty() ? cat("$E ", command) : shell);
    const auto result =
        run_process({.command = {"sh", "-c", line},
                     .environment = {{"OMP_WAIT_POLICY", "passive"}, {"OMP_NUM_THREADS", "1"}}});
    if (!result.ok()) return {-1, "", result.status().message()};
    return {result->exit_code, result->output, result->errors};
  }

  static inline fs::path folder;
};

TEST_P(WrongInputs, GetOneMessageThatHelps) {
  const WrongInput& wrong = GetParam();
  const bool gpu = fs::exists("/dev/nvidiactl");
  if (std::string_view(wrong.name) == "no_gpu" && gpu) GTEST_SKIP() << "there is a GPU here";
  const Said said = run(wrong.command, wrong.shell);
  EXPECT_EQ(said.code, wrong.code) << said.err;
  EXPECT_EQ(said.out, "");
  for (const auto& part : wrong.parts)
    EXPECT_NE(said.err.find(part), std::string::npos) << "no \"" << part << "\" in: " << said.err;

  // The message is the last thing said: one line, opened by the command, and one more line where
  // the usage was wrong. No stack, no C++.
  std::vector<std::string> lines;
  std::istringstream stream(said.err);
  for (std::string line; std::getline(stream, line);)
    if (!line.empty()) lines.push_back(line);
  const std::size_t most = wrong.code == 2 ? 2 : 1;
  ASSERT_GE(lines.size(), most);
  EXPECT_TRUE(lines[lines.size() - most].starts_with("everlong")) << said.err;
  EXPECT_EQ(wrong.code == 2, lines.back().ends_with("--help")) << said.err;
  for (const char* const inner : {"terminate", "c10::", "std::", ".cpp:", "Exception", "0x"})
    EXPECT_EQ(said.err.find(inner), std::string::npos) << said.err;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    EXPECT_EQ(entry.path().string().find(".tmp."), std::string::npos) << "left behind: " << entry;
}

INSTANTIATE_TEST_SUITE_P(Table, WrongInputs, testing::ValuesIn(kTable),
                         [](const auto& tested) { return std::string(tested.param.name); });

TEST(WrongInputTable, HasFortyRowsOrMoreAndNoNameTwice) {
  std::set<std::string> names;
  for (const auto& wrong : kTable) names.insert(wrong.name);
  EXPECT_EQ(names.size(), kTable.size());
  EXPECT_GE(kTable.size(), 40U);
}

}  // namespace
}  // namespace everlong
