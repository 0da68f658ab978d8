#include <algorithm>
#include <array>

#include "mechanisms/mechanism.h"

#define EVERLONG_MECHANISM(room) \
  namespace everlong::room {     \
  const Mechanism& mechanism();  \
  }
#include "mechanisms/mechanisms.inc"
#undef EVERLONG_MECHANISM

namespace everlong {

bool Mechanism::has(std::string_view feature) const {
  return std::ranges::none_of(lacks, [&](const Lack& lack) { return lack.what == feature; });
}

std::span<const Mechanism* const> mechanisms() {
  static const std::array kRooms = {
#define EVERLONG_MECHANISM(room) &everlong::room::mechanism(),
#include "mechanisms/mechanisms.inc"
#undef EVERLONG_MECHANISM
  };
  return kRooms;
}

void register_torch_operators() {
  [[maybe_unused]] static const bool kOnce = [] {
    for (const Mechanism* room : mechanisms())
      if (room->register_schemas != nullptr) room->register_schemas();
    return true;
  }();
}

Result<const Mechanism*> find_mechanism(std::string_view name) {
  std::vector<std::string> names;
  for (const Mechanism* room : mechanisms()) {
    if (room->name == name) return room;
    names.push_back(room->name);
  }
  const std::string near = nearest(name, names);
  return invalid_argument("\"", name, "\" is not a mechanism; known: ", join(names, ", "),
                          near.empty() ? "" : cat(". Did you mean \"", near, "\"?"));
}

}  // namespace everlong
