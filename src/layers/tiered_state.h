// A state that does not lie in tensors alone: part of it is in files.
#pragma once
#include <map>
#include <string>

#include "layers/state.h"

namespace everlong {

// tensors() of such a state are made when asked for, as large as everything that is carried; what
// it holds at the moment is asked here. State::bytes() and bytes_bound() are of memory. Constant
// time, whatever was fed, but for the bounds' own arithmetic.
class TieredState : public State {
 public:
  using State::State;

  virtual std::int64_t memory_bytes() const = 0;  // what State::bytes() answers
  // Of its files, and the most they may hold when every sequence has seen at most `tokens` tokens.
  virtual std::int64_t file_bytes() const = 0;
  virtual std::int64_t file_bytes_bound(std::int64_t tokens) const = 0;
  // What it counted since it was made, for people: the same names for states of one kind, and sums
  // of several states mean something.
  virtual std::map<std::string, double> counts() const = 0;
};

}  // namespace everlong
