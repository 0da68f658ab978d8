#include "ops/parallel.h"

#include <ATen/Parallel.h>

namespace everlong {
namespace {

class TorchExecutor final : public Executor {
 public:
  int threads() const override { return at::get_num_threads(); }
  void run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& task) const override {
    // One chunk a task: torch hands each thread one range, and so tasks are spread evenly only
    // where their costs are.
    at::parallel_for(0, tasks, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t index = begin; index < end; ++index) task(index, at::get_thread_num());
    });
  }
};

}  // namespace

const Executor& torch_executor() {
  static const TorchExecutor executor;
  return executor;
}

}  // namespace everlong
