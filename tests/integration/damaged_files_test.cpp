// Every kind of file that is read, cut off anywhere and with any byte changed: refused with a
// message that names the file, or loaded as docs/formats.md ("Damage") says it may be. Never a
// crash, never an exception, never silently something else.
//
// EVERLONG_DAMAGES: how many damages of each kind (default 60).
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <random>

#include "core/process.h"
#include "data/prepare.h"
#include "data/tokenizer_json.h"
#include "mechanisms/landmark/kernel_pages_file.h"
#include "models/checkpoint.h"
#include "models/convert.h"
#include "session/stream.h"
#include "support/small_models.h"
#include "train/checkpoint_file.h"
#include "train/run_file.h"

namespace everlong::test {
namespace {

enum class Rule {
  kExact,    // a checksum: what is loaded is what was written
  kNumbers,  // no checksum, or none that this reader looks at: names, shapes, dtypes as they were
  kText,     // text that people edit: whatever reads as valid counts
};

struct Kind {
  const char* name;
  std::string file;  // in the folder below
  Rule rule;
  // What was loaded, as text. For kNumbers without the numbers.
  std::function<Result<std::string>(const fs::path& folder)> load;
};

std::string text_of(const at::Tensor& tensor) {
  const at::Tensor plain = tensor.cpu().contiguous();
  return {static_cast<const char*>(plain.const_data_ptr()), plain.nbytes()};
}

Result<std::string> load_weights(const fs::path& folder) {
  EVERLONG_ASSIGN(const auto model, load_model(folder, at::kCPU, at::kFloat));
  std::string text;
  for (const auto& entry : model->named_parameters())
    text += cat(entry.key(), entry.value().sizes(), entry.value().scalar_type(),
                text_of(entry.value()), "\n");
  return text;
}

// As `convert` reads them: by Python's own library, without checksums of tensors.
Result<std::string> load_pickles(const fs::path& folder) {
  const TemporaryFolder out("damaged_pickles");
  EVERLONG_ASSIGN(const auto report, convert_model(folder, out.path(), {}));
  return cat(report.parameters, " parameters in ", report.tensors, " tensors");
}

landmark::PageShape page_shape() { return {.block = 8, .key_dim = 5, .value_dim = 3}; }

Result<std::string> load_pages(const fs::path& file,
                               const std::vector<landmark::PageFile::Place>& places) {
  EVERLONG_ASSIGN(auto pages, landmark::PageFile::open(file, page_shape()));
  std::string text;
  std::vector<std::byte> page(static_cast<std::size_t>(page_shape().page_bytes()));
  for (const auto& place : places) {
    EVERLONG_RETURN_IF_ERROR(pages.read(place, page));
    text.append(reinterpret_cast<const char*>(page.data()), page.size());
  }
  return text;
}

Result<std::string> load_stream(const std::shared_ptr<Decoder>& model, const fs::path& file) {
  Stream stream(model);
  std::map<std::string, std::string> notes;
  EVERLONG_RETURN_IF_ERROR(stream.load(file, &notes));
  std::string text = cat(stream.position(), " ", notes["who"], " ");
  const auto before = stream.logits();
  text.append(reinterpret_cast<const char*>(before.data()), before.size_bytes());
  const std::int32_t token = 3;  // the carried state shows in what comes next
  EVERLONG_RETURN_IF_ERROR(stream.feed({&token, 1}));
  const auto after = stream.logits();
  return text.append(reinterpret_cast<const char*>(after.data()), after.size_bytes());
}

Result<std::string> load_checkpoint(const fs::path& file) {
  EVERLONG_ASSIGN(const auto content, read_checkpoint(file));
  std::string text;
  for (const auto& [key, value] : content.metadata) text += cat(key, "=", value, "\n");
  for (const auto& [name, tensor] : content.tensors)
    text += cat(name, tensor.sizes(), tensor.scalar_type(), text_of(tensor));
  return text;
}

Result<std::string> load_shard(const fs::path& file) {
  EVERLONG_ASSIGN(const auto shard, Shard::open(file));
  EVERLONG_RETURN_IF_ERROR(shard.verify());
  const auto tokens = std::as_bytes(shard.tokens());
  return std::string(reinterpret_cast<const char*>(tokens.data()), tokens.size());
}

// Opened and read to its end, as a training does, but not verified.
Result<std::string> load_dataset(const fs::path& folder) {
  EVERLONG_ASSIGN(const auto dataset, TokenDataset::open(folder));
  for (const auto& [name, info] : dataset.info().splits) {
    EVERLONG_ASSIGN(const auto split, dataset.split(name));
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(split.tokens()));
    EVERLONG_RETURN_IF_ERROR(split.read(0, tokens));
  }
  return dataset.info().tokenizer;
}

// As `data info --verify` reads them, or as a training does.
Result<std::string> load_targets(const fs::path& file, bool verify) {
  EVERLONG_ASSIGN(const auto targets, TargetsFile::open(file, 50));
  if (verify) EVERLONG_RETURN_IF_ERROR(targets.verify());
  std::vector<std::int32_t> ids(50);
  std::vector<float> weights(50);
  EVERLONG_RETURN_IF_ERROR(targets.read(0, 19, ids, weights));
  std::string text = "targets and weights";
  if (verify)
    for (std::size_t i = 0; i < 50; ++i) text += cat(" ", ids[i], " ", weights[i]);
  return text;
}

Result<std::string> load_tokenizer(std::string_view name, const fs::path& folder) {
  EVERLONG_ASSIGN(const auto tokenizer, make_tokenizer(name, folder));
  std::string text;
  for (const auto id : tokenizer->encode("The 12 streams, naïve\n\n  end.")) text += cat(id, " ");
  return text;
}

class DamagedFiles : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    const fs::path root = scratch.path();
    model = small_model(small_config("llama", {"lightning", "softmax"}), at::kFloat);
    ASSERT_TRUE(save_model(root / "whole", *model, {}).ok());
    ASSERT_TRUE(save_model(root / "shards", *model, {}, /*max_shard_bytes=*/6000).ok());
    for (const auto& entry : fs::directory_iterator(root / "shards"))
      if (entry.path().filename().string().starts_with("model-00001-of-"))
        first_shard = cat("shards/", entry.path().filename().string());
    ASSERT_FALSE(first_shard.empty());
    Stream stream(model);
    const std::vector<std::int32_t> tokens = {1, 2, 3, 4, 5};
    ASSERT_TRUE(stream.feed(tokens).ok());
    ASSERT_TRUE(stream.save(root / "book.state", {{"who", "a reader"}}).ok());
    ASSERT_TRUE(write_checkpoint(root / "step.checkpoint",
                                 {{{"a", at::arange(40)}, {"b", at::rand({3, 5})}},
                                  {{"step", "12"}, {"note", "as it was"}}})
                    .ok());
    fs::create_directories(root / "pickles");
    for (const char* name : {"config.json", "model.safetensors"})
      fs::copy_file(root / "whole" / name, root / "pickles" / name);
    const auto pickled =
        run_process({.command = {"python3", EVERLONG_TEST_DATA "/support/make_pickles.py",
                                 (root / "pickles").string()}});
    ASSERT_TRUE(pickled.ok() && pickled->exit_code == 0) << pickled->errors;
    auto paged = landmark::PageFile::open(root / "store.pages", page_shape());
    ASSERT_TRUE(paged.ok()) << paged.status().message();
    for (int block = 0; block < 4; ++block) {
      const std::vector<std::byte> page(static_cast<std::size_t>(page_shape().page_bytes()),
                                        static_cast<std::byte>(block + 1));
      pages.push_back(*paged->append(block, 0, page));
    }
    ASSERT_TRUE(make_directories(root / "text").ok());
    for (int i = 0; i < 6; ++i)
      ASSERT_TRUE(write_file(root / "text" / cat(i, ".txt"), cat("stream ", i * 7919, "\n")).ok());
    ASSERT_TRUE(prepare({root / "text"}, root / "tokens", {}).ok());
    std::vector<std::int32_t> ids(50, 7);
    ASSERT_TRUE(
        write_targets(root / "targets.safetensors", ids, std::vector<float>(50, 0.5f)).ok());
    ASSERT_TRUE(make_directories(root / "tokenizer").ok());
    fs::copy(fs::path(EVERLONG_TEST_DATA) / "golden/tokenizers/gpt2.json",
             root / "tokenizer/tokenizer.json");
    ASSERT_TRUE(make_directories(root / "pieces").ok());
    fs::copy(fs::path(EVERLONG_TEST_DATA) / "golden/tokenizers/llama2.model",
             root / "pieces/tokenizer.model");
    pieces_name = (*make_tokenizer("published", root / "pieces"))->name();
    RunFile run;
    run.model = model->config();
    run.data.path = "tokens";
    tokenizer_name = (*read_tokenizer_json(root / "tokenizer"))->name();
    ASSERT_TRUE(write_file(root / "run.toml", run.to_toml()).ok());
  }
  static void TearDownTestSuite() { model.reset(); }

  static std::vector<Kind> kinds() {
    const auto in = [](const char* part, auto load) {
      return [part, load](const fs::path& folder) { return load(folder / part); };
    };
    return {
        {"weights", "whole/model.safetensors", Rule::kExact, in("whole", load_weights)},
        {"weights_in_shards", first_shard, Rule::kExact, in("shards", load_weights)},
        {"weights_in_pickles", "pickles/pytorch_model.bin", Rule::kNumbers,
         in("pickles", load_pickles)},
        {"index_of_shards", "shards/model.safetensors.index.json", Rule::kText,
         in("shards", load_weights)},
        {"config", "whole/config.json", Rule::kText, in("whole", load_weights)},
        {"generation_config", "whole/generation_config.json", Rule::kText,
         in("whole",
            [](const fs::path& folder) -> Result<std::string> {
              EVERLONG_ASSIGN(const auto params, read_generation_config(folder));
              return cat(params.temperature);
            })},
        {"stream", "book.state", Rule::kExact,
         in("book.state", [](const fs::path& file) { return load_stream(model, file); })},
        {"checkpoint", "step.checkpoint", Rule::kExact, in("step.checkpoint", load_checkpoint)},
        {"shard", "tokens/train-00000.tokens", Rule::kExact,
         in("tokens/train-00000.tokens", load_shard)},
        {"shard_unverified", "tokens/train-00000.tokens", Rule::kNumbers,
         in("tokens", load_dataset)},
        {"dataset", "tokens/dataset.json", Rule::kText, in("tokens", load_dataset)},
        {"targets", "targets.safetensors", Rule::kExact,
         in("targets.safetensors", [](const fs::path& file) { return load_targets(file, true); })},
        {"targets_unverified", "targets.safetensors", Rule::kNumbers,
         in("targets.safetensors", [](const fs::path& file) { return load_targets(file, false); })},
        {"pages", "store.pages", Rule::kExact,
         in("store.pages", [](const fs::path& file) { return load_pages(file, pages); })},
        {"tokenizer", "tokenizer/tokenizer.json", Rule::kExact,
         in("tokenizer",
            [](const fs::path& folder) { return load_tokenizer(tokenizer_name, folder); })},
        {"tokenizer_unnamed", "tokenizer/tokenizer.json", Rule::kText,
         in("tokenizer",
            [](const fs::path& folder) { return load_tokenizer("published", folder); })},
        {"pieces", "pieces/tokenizer.model", Rule::kExact,
         in("pieces", [](const fs::path& folder) { return load_tokenizer(pieces_name, folder); })},
        {"pieces_unnamed", "pieces/tokenizer.model", Rule::kText,
         in("pieces", [](const fs::path& folder) { return load_tokenizer("published", folder); })},
        {"run_file", "run.toml", Rule::kText,
         in("run.toml",
            [](const fs::path& file) -> Result<std::string> {
              EVERLONG_ASSIGN(const auto run, RunFile::read(file, {}));
              return run.to_toml();
            })},
    };
  }

  static inline const TemporaryFolder scratch{"damaged_files"};
  static inline std::shared_ptr<Decoder> model;
  static inline std::string tokenizer_name, pieces_name, first_shard;
  static inline std::vector<landmark::PageFile::Place> pages;
};

int damages() {
  const char* const wish = std::getenv("EVERLONG_DAMAGES");
  return wish == nullptr ? 60 : std::max(1, std::atoi(wish));
}

TEST_F(DamagedFiles, AreRefusedOrLoadAsTheRulesSay) {
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    const fs::path path = scratch / kind.file;
    const auto whole = read_file(path);
    ASSERT_TRUE(whole.ok()) << whole.status().message();
    const auto original = kind.load(scratch.path());
    ASSERT_TRUE(original.ok()) << original.status().message();

    std::mt19937_64 random(20261123);
    int refused = 0, same = 0, other = 0;
    for (int i = 0; i < damages(); ++i) {
      std::string bytes = *whole;
      const std::size_t at = random() % bytes.size();
      const bool cut = i % 2 == 0;
      if (cut)
        bytes.resize(at);
      else if (i % 4 == 1)
        bytes[at] = static_cast<char>(bytes[at] ^ static_cast<char>(1 + random() % 255));
      else  // a byte that is at home in such a file: in text, what may well be valid
        while (bytes[at] == (*whole)[at]) bytes[at] = (*whole)[random() % bytes.size()];
      const std::string what =
          cut ? cat("cut to ", at, " of ", whole->size(), " bytes") : cat("byte ", at, " changed");
      ASSERT_TRUE(write_file(path, bytes).ok());
      try {
        const auto loaded = kind.load(scratch.path());
        if (!loaded.ok()) {
          ++refused;
          const std::string message = loaded.status().message();
          EXPECT_TRUE(message.find(path.filename().string()) != std::string::npos ||
                      message.find(scratch.path().string()) != std::string::npos)
              << what << ": " << message;
        } else if (*loaded == *original) {
          ++same;
          EXPECT_FALSE(cut && kind.rule != Rule::kText) << what << " was not noticed";
        } else {
          ++other;
          EXPECT_EQ(kind.rule, Rule::kText) << what << " was loaded as something else";
        }
      } catch (const std::exception& error) {
        ADD_FAILURE() << what << ": thrown: " << error.what();
      }
    }
    ASSERT_TRUE(write_file(path, *whole).ok());
    std::printf("%-19s %5d damages: %5d refused, %5d as before, %5d other text\n", kind.name,
                damages(), refused, same, other);
    EXPECT_GT(refused, 0);
    EXPECT_EQ(kind.load(scratch.path()).ok(), true) << "the original is not read any more";
  }
}

}  // namespace
}  // namespace everlong::test
