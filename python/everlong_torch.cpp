// libeverlong_torch.so: torch.ops.load_library() of it puts the operators of all rooms into
// torch.ops.everlong.
#include "mechanisms/mechanism.h"

namespace {

[[maybe_unused]] const bool kRegistered = (everlong::register_torch_operators(), true);

}  // namespace
