// Opens a model, feeds it a text of any length at constant memory, forks the stream to continue it
// twice, and saves the state: the next run goes on from there without reading the text again.
//
//   stream MODEL_FOLDER TEXT_FILE STATE_FILE
#include <everlong/stream.h>

#include <filesystem>
#include <fstream>
#include <iostream>

namespace {

void read(everlong::Stream& stream, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  std::string piece(1 << 16, '\0');
  while (file.read(piece.data(), static_cast<std::streamsize>(piece.size())), file.gcount() > 0)
    stream.feed(stream.model().encode({piece.data(), static_cast<std::size_t>(file.gcount())}))
        .check();
}

void write(everlong::Stream stream, std::uint64_t seed) {
  auto sampler = everlong::Sampler::create({.temperature = 0.8, .seed = seed}).value();
  std::cout << "seed " << seed << ": ";
  for (int i = 0; i < 80; ++i) {
    const std::int32_t token = stream.generate(sampler).value();
    std::cout << stream.model().decode({&token, 1});
  }
  std::cout << "\n";
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 4) throw std::runtime_error("usage: stream MODEL_FOLDER TEXT_FILE STATE_FILE");
  const auto model = everlong::Model::open(argv[1]).value();
  auto stream = everlong::Stream::create(model).value();
  if (std::filesystem::exists(argv[3]))
    stream.load(argv[3]).check();
  else
    read(stream, argv[2]);
  std::cout << stream.position() << " tokens read, " << stream.state_bytes()
            << " bytes remember them\n";
  write(stream.fork().value(), 1);  // two futures of one past; neither touches the stream
  write(stream.fork().value(), 2);
  stream.save(argv[3]).check();
} catch (const std::exception& error) {
  std::cerr << "stream: " << error.what() << "\n";
  return 1;
}
