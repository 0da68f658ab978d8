#include "eval/report.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/text.h"
#include "eval/page.h"
#include "eval/plot.h"
#include "eval/report_run.h"
#include "eval/retrieval_page.h"

namespace everlong {
namespace {

using nlohmann::ordered_json;

struct Bar {
  std::string name;
  double bits;
  bool ours;
};

std::vector<Bar> bars(const MeasuredRun& run) {
  std::vector<Bar> out;
  for (const auto& entry : list(run.baselines, "baselines"))
    if (const double bits = number(entry, "bits_per_byte"); std::isfinite(bits))
      out.push_back({word(entry, "name"), bits, false});
  if (const double bits = model_bits(run); std::isfinite(bits))
    out.push_back({"this model", bits, true});
  std::ranges::sort(out, [](const Bar& a, const Bar& b) { return a.bits > b.bits; });
  return out;
}

std::string bits_table(const MeasuredRun& run) {
  const auto all = bars(run);
  if (all.empty()) return "";
  std::string out = "<h2>Held-out text, bits per byte</h2>\n<div class=\"bars\">";
  for (const auto& bar : all)
    out += cat("<span>", html_escape(bar.name), "</span><span class=\"track\"><i",
               bar.ours ? " class=\"ours\"" : "",
               " style=\"width:", fixed(100 * bar.bits / all.front().bits, 1), "%\"></i></span><b>",
               fixed(bar.bits, 3), "</b>");
  return out +
         "</div>\n<p>Fewer is better; 8 would be no knowledge at all. All read the same held-out "
         "bytes.</p>\n";
}

std::string loss_figure(const MeasuredRun& run) {
  Plot plot{.title = "Loss", .x_label = "step", .y_label = "nats per token"};
  Series train{.name = "training"}, valid{.name = "held out", .markers = true};
  for (const auto& entry : run.log) {
    const double step = number(entry, "step"), loss = number(entry, "loss"),
                 held_out = number(entry, "valid_loss");
    if (std::isfinite(loss)) train.points.emplace_back(step, loss);
    if (std::isfinite(held_out)) valid.points.emplace_back(step, held_out);
  }
  plot.series.push_back(std::move(train));
  if (!valid.points.empty()) plot.series.push_back(std::move(valid));
  return figure(plot, "Mean loss of the steps, and of held-out text read as one stream.");
}

std::string position_figure(const MeasuredRun& run) {
  const bool streamed = !list(run.streaming, "buckets").empty();
  const auto& buckets = list(streamed ? run.streaming : run.perplexity, "buckets");
  if (buckets.empty()) return "";
  Plot plot{.title = "Bits per byte by position in the stream",
            .x_label = "tokens read before",
            .y_label = "bits per byte",
            .log_x = true};
  Series model{.name = "this model", .markers = true};
  for (const auto& bucket : buckets) {
    // The middle of the bucket on the logarithmic axis; the first one starts at 0.
    const double begin = std::max(number(bucket, "begin"), 64.0);
    const double end =
        std::min(number(bucket, "end"), std::max(number(run.streaming, "tokens"), begin + 1));
    if (number(bucket, "tokens") > 0)
      model.points.emplace_back(std::sqrt(begin * end), number(bucket, "bits_per_byte"));
  }
  plot.series.push_back(std::move(model));
  for (const auto& bar : bars(run))
    if (!bar.ours) plot.levels.push_back({bar.name, bar.bits});
  return figure(
      plot,
      "Means over buckets, each four times as long as the one before. A line that does not rise to "
      "the right: the stream may go on. How hard the text is differs from bucket to bucket.");
}

std::string streaming_figures(const MeasuredRun& run) {
  const auto& windows = list(run.streaming, "windows");
  if (windows.empty()) return "";
  Series observed{.name = "as it streamed"}, timed{.name = "timed at the marks", .markers = true};
  Series resident{.name = "process (resident)"}, state{.name = "state"};
  for (const auto& window : windows) {
    const double at = number(window, "end");
    observed.points.emplace_back(at, number(window, "tokens_per_second"));
    resident.points.emplace_back(at, number(window, "resident_bytes"));
    state.points.emplace_back(at, number(window, "state_bytes"));
  }
  for (const auto& mark : list(run.streaming, "marks"))
    if (std::isfinite(number(mark, "tokens_per_second")))
      timed.points.emplace_back(number(mark, "tokens"), number(mark, "tokens_per_second"));
  Plot speed{.title = "Speed by position in the stream",
             .x_label = "tokens read before",
             .y_label = "tokens per second",
             .series = {observed},
             .log_x = true,
             .from_zero = true};
  if (!timed.points.empty()) speed.series.push_back(timed);
  const Plot memory{.title = "Memory of the process by position",
                    .x_label = "tokens read before",
                    .series = {resident},
                    .log_x = true,
                    .from_zero = true,
                    .bytes = true};
  const Plot carried{.title = "State by position: all that the model remembers",
                     .x_label = "tokens read before",
                     .series = {state},
                     .log_x = true,
                     .from_zero = true,
                     .bytes = true};
  return figure(speed,
                "The line is the stream as it went, with whatever else the machine did. The dots "
                "time the same "
                "feed from copies of the stream at each mark, taking turns, median of several "
                "rounds.") +
         figure(
             memory,
             "Most resident memory in each stretch: program, libraries, weights, buffers, text.") +
         figure(carried,
                "One matrix per head and layer where the mechanism's state is bounded; softmax "
                "layers grow.");
}

std::string marks_table(const MeasuredRun& run) {
  const auto& marks = list(run.streaming, "marks");
  if (marks.empty()) return "";
  std::string out =
      "<h2>One stream</h2>\n<table>" +
      table_row({"tokens", "tokens/s", "as it streamed", "state", "resident memory"}, "th");
  for (const auto& mark : marks) {
    const double timed = number(mark, "tokens_per_second");
    out += table_row({whole(number(mark, "tokens")), std::isfinite(timed) ? whole(timed) : "",
                      whole(number(mark, "observed")), human_bytes(number(mark, "state_bytes")),
                      human_bytes(number(mark, "resident_bytes"))});
  }
  return out + "</table>\n";
}

std::string passkey_figure(const MeasuredRun& run) {
  if (!run.passkey.is_object()) return "";
  return cat(
      "<figure>", retrieval_map(run.passkey, false),
      "<figcaption>A number hidden in the prompt, asked for at its end, by length and depth: "
      "100 % is right before the question, where attention alone may read it.</figcaption>"
      "</figure>\n");
}

std::string sample_section(const MeasuredRun& run) {
  if (word(run.sample, "text").empty()) return "";
  return cat("<h2>A continuation</h2>\n<p>The model's own words at temperature ",
             fixed(number(run.sample, "temperature"), 1), "; the prompt is in bold.</p>\n<pre><b>",
             html_escape(word(run.sample, "prompt")), "</b>", html_escape(word(run.sample, "text")),
             "</pre>\n");
}

std::string facts(const MeasuredRun& run) {
  std::string out = "<h2>About this run</h2>\n<table class=\"facts\">";
  const auto add = [&](const std::string& name, const std::string& value) {
    if (!value.empty()) out += table_row({name, value});
  };
  const auto count = [&](const ordered_json& object, const char* key) {
    const double value = number(object, key);
    return std::isfinite(value) ? whole(value) : std::string();
  };
  add("layers", layers_text(run.config));
  add("width", count(run.config, "hidden_size"));
  add("parameters", count(run.train, "parameters"));
  add("steps", count(run.train, "steps"));
  add("tokens trained on", count(run.train, "tokens"));
  if (const double seconds = number(run.train, "seconds"); std::isfinite(seconds))
    add("training",
        cat(human_duration(seconds), ", ", count(run.train, "tokens_per_second"), " tokens/s"));
  const auto& where = run.streaming.is_object() ? run.streaming : run.train;
  add("device",
      cat(word(where, "device"), word(where, "dtype").empty() ? "" : ", ", word(where, "dtype")));
  add("machine", cat(word(where, "machine"), std::isfinite(number(where, "threads"))
                                                 ? cat(", ", count(where, "threads"), " threads")
                                                 : ""));
  add("commit", word(where, "commit"));
  return out + "</table>\n";
}

std::string missing(const MeasuredRun& run) {
  std::string out;
  const std::string model = (run.folder / "model").string();
  const auto hint = [&](bool there, const std::string& what, const std::string& command,
                        const char* file) {
    if (!there)
      out +=
          cat("<li>", what, ": <code>",
              html_escape(cat(command, " --save ", (run.folder / file).string())), "</code></li>");
  };
  hint(run.streaming.is_object(), "speed and memory by position",
       cat("everlong stream --model ", model, " --data DATA"), kStreamingFile);
  hint(run.baselines.is_object(), "baselines", "everlong eval baselines --data DATA",
       kBaselinesFile);
  hint(run.passkey.is_object(), "what is found again", cat("everlong eval passkey --model ", model),
       kPasskeyFile);
  hint(run.sample.is_object(), "a continuation",
       cat("everlong generate --model ", model, " --prompt TEXT"), kSampleFile);
  return out.empty() ? "" : cat("<h2>Not measured yet</h2>\n<ul>", out, "</ul>\n");
}

}  // namespace

Result<std::string> render_report(const fs::path& folder) {
  EVERLONG_ASSIGN(const auto run, read_measured_run(folder));
  const std::string title = cat("Everlong: ", fs::path(folder).lexically_normal().string());
  std::string summary = layers_text(run.config);
  if (const double bits = model_bits(run); std::isfinite(bits))
    summary += cat("; ", fixed(bits, 3), " bits per byte on held-out text");
  if (const double tokens = number(run.streaming, "tokens"); std::isfinite(tokens))
    summary += cat("; ", whole(tokens), " tokens in one stream");
  return report_page(title, cat("<p>", html_escape(summary), "</p>\n", damaged_lines_text(run),
                                bits_table(run), marks_table(run), streaming_figures(run),
                                position_figure(run), passkey_figure(run), loss_figure(run),
                                sample_section(run), facts(run), missing(run)));
}

}  // namespace everlong
