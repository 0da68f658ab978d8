// The subcommands, one file each.
#pragma once
#include "cli/command.h"

namespace everlong::cli {

void add_data(Command& program);  // data fetch, data prepare, data info
void add_train(Command& program);
void add_generate(Command& program);
void add_eval(Command& program);  // eval perplexity, eval baselines
void add_stream(Command& program);
void add_bench(Command& program);  // bench op, bench model
void add_info(Command& program);
void add_report(Command& program);
void add_convert(Command& program);

}  // namespace everlong::cli
