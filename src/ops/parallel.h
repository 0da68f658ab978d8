// torch's own thread pool as the executor of kernels, so that a process has one pool.
#pragma once
#include "core/parallel.h"

namespace everlong {

// Thread safe. Inside a parallel region of torch's the tasks run one after the other.
const Executor& torch_executor();

}  // namespace everlong
