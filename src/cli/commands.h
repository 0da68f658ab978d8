// The subcommands, one file each.
#pragma once
#include "cli/command.h"

namespace everlong::cli {

void add_data(Command& program);          // data fetch, data prepare, data info, and:
void add_synthetic(Command& data);        // data synthetic
void add_tokenize(Command& data);         // data tokenize
void add_train_tokenizer(Command& data);  // data train-tokenizer
void add_train(Command& program);
void add_generate(Command& program);
void add_eval(Command& program);    // eval perplexity, eval baselines, and:
void add_retrieval(Command& eval);  // eval passkey, eval needle, eval recall
void add_stream(Command& program);
void add_bench(Command& program);      // bench op, bench model
void add_info(Command& program);       // info, and:
void add_info_longnet(Command& info);  // info longnet
void add_info_infini(Command& info);   // info infini
void add_report(Command& program);
void add_convert(Command& program);

}  // namespace everlong::cli
