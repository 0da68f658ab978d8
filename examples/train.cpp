// Trains a small model on text files and says how well it predicts the documents it never saw.
//
//   train OUT_FOLDER TEXT_FILE_OR_FOLDER...
#include <everlong/train.h>

#include <iostream>

int main(int argc, char** argv) try {
  if (argc < 3) throw std::runtime_error("usage: train OUT_FOLDER TEXT_FILE_OR_FOLDER...");
  const std::string out = argv[1];
  const auto data =
      everlong::prepare({.texts = {argv + 2, argv + argc}, .out = out + "/tokens"}).value();
  std::cout << data.documents << " documents, " << data.train_tokens << " tokens to train on\n";

  everlong::TrainOptions options;
  options.run_text = R"(
[model]
layer_types = "lightning*3,softmax"
num_hidden_layers = 4
hidden_size = 64
intermediate_size = 160
lightning = { num_heads = 4, head_dim = 16 }
softmax = { num_heads = 4, head_dim = 16, window = 256 }
[data]
row_tokens = 128
rows = 4
[train]
steps = 40
learning_rate = 3e-3
warmup_steps = 5
)";
  options.settings = {"data.path='" + out + "/tokens'"};
  options.out = out;
  options.after_step = [](const everlong::TrainStep& step) {
    if (step.step % 10 == 0) std::cout << "step " << step.step << ": loss " << step.loss << "\n";
    return true;
  };
  const auto report = everlong::train(options).value();
  std::cout << report.parameters << " parameters in " << report.model_folder;
  if (report.valid_bits_per_byte)
    std::cout << ", " << *report.valid_bits_per_byte << " bits per byte on held-out text";
  std::cout << "\n";
} catch (const std::exception& error) {
  std::cerr << "train: " << error.what() << "\n";
  return 1;
}
