// How a kernel spreads its work over threads that it does not own.
#pragma once
#include <cstdint>
#include <functional>

namespace everlong {

// Above the kernels this is torch's pool (ops/parallel.h); in torch-free programs `SerialExecutor`
// or a pool of the caller's.
class Executor {
 public:
  virtual ~Executor() = default;
  // How many tasks may run at the same time, at least 1. Scratch memory is sized by it.
  virtual int threads() const = 0;
  // Calls task(index, thread) once for every index in [0, tasks), thread in [0, threads()); no two
  // calls with the same thread run at the same time. Returns when all are done. Tasks must not
  // throw and must not call run.
  virtual void run(std::int64_t tasks,
                   const std::function<void(std::int64_t index, int thread)>& task) const = 0;
};

class SerialExecutor final : public Executor {
 public:
  int threads() const override { return 1; }
  void run(std::int64_t tasks, const std::function<void(std::int64_t, int)>& task) const override {
    for (std::int64_t index = 0; index < tasks; ++index) task(index, 0);
  }
};

}  // namespace everlong
