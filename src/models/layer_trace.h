// Watching what each layer of a model puts out, to find the one where something goes wrong.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

namespace everlong {

// While it lives, every Decoder::hidden of this thread shows it the residual stream [B, T, D]: of
// the embedding (layer -1), then after each layer. Not to be nested; costs nothing where there is
// none.
class LayerTrace {
 public:
  using Watcher = std::function<void(std::int64_t layer, const at::Tensor& x_BTD)>;
  explicit LayerTrace(Watcher watcher);
  LayerTrace(const LayerTrace&) = delete;
  LayerTrace& operator=(const LayerTrace&) = delete;
  ~LayerTrace();

  static void show(std::int64_t layer, const at::Tensor& x_BTD);

 private:
  Watcher watcher_;
};

}  // namespace everlong
