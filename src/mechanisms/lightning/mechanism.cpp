#include "mechanisms/mechanism.h"

#include "mechanisms/lightning/layer.h"
#include "mechanisms/lightning/op.h"

namespace everlong::lightning {

const Mechanism& mechanism() {
  static const Mechanism room = [] {
    Mechanism m;
    m.name = "lightning";
    m.title = "Lightning Attention-2";
    m.source = "arXiv 2401.04658";
    m.carries = "one matrix per head, decaying at a fixed rate";
    m.operators = {&attention_operator(), &slopes_operator()};
    m.running_settings = {"write_behind"};
    m.example_settings = [](std::int64_t hidden_size) -> nlohmann::json {
      return {{"num_heads", hidden_size % 2 == 0 ? 2 : 1},
              {"slope_rule", "alibi_layer"},
              {"lrpe", "all"}};
    };
    m.register_schemas = &register_schemas;
    m.make_layer = &make_layer;
    return m;
  }();
  return room;
}

}  // namespace everlong::lightning
