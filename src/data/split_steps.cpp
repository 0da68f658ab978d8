#include "data/split_steps.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/settings.h"

namespace everlong {
namespace {

using nlohmann::json;

// GPT-2, encoder.py: what ByteLevel cuts by.
constexpr std::string_view kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

std::string literally(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x80 && std::isalnum(static_cast<unsigned char>(c)) == 0)
      out += '\\';
    out += c;
  }
  return out;
}

Result<SplitBehavior> behavior_of(const std::string& name) {
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  return invalid_argument("pre_tokenizer: behavior \"", name, "\" is not known");
}

struct Part {
  std::string_view text;
  bool matched = false;
};

std::string_view joined(std::string_view a, std::string_view b) {
  return {a.data(), static_cast<std::size_t>(b.data() + b.size() - a.data())};
}

// Neighbours i - 1 and i become one where `join(previous, part)`.
template <class Join>
void join_neighbours(std::vector<Part>& parts, Join join) {
  std::vector<Part> out;
  for (const Part& part : parts) {
    if (!out.empty() && join(out.back(), part)) {
      out.back() = {joined(out.back().text, part.text), part.matched};
    } else {
      out.push_back(part);
    }
  }
  parts = std::move(out);
}

void apply(const SplitStep& step, std::string_view text, std::vector<std::string_view>& pieces) {
  std::vector<Part> parts;
  step.pattern.split(text, [&](std::string_view piece, bool matched) {
    parts.push_back({piece, matched != step.invert});
  });
  switch (step.behavior) {
    case SplitBehavior::kIsolated:
      break;
    case SplitBehavior::kRemoved:
      std::erase_if(parts, [](const Part& part) { return part.matched; });
      break;
    case SplitBehavior::kContiguous:
      join_neighbours(parts, [](const Part& a, const Part& b) { return a.matched == b.matched; });
      break;
    case SplitBehavior::kMergedWithPrevious:
      join_neighbours(parts, [](const Part& a, const Part& b) { return b.matched && !a.matched; });
      break;
    case SplitBehavior::kMergedWithNext:
      join_neighbours(parts, [](const Part& a, const Part& b) { return a.matched && !b.matched; });
      break;
  }
  for (const Part& part : parts) pieces.push_back(part.text);
}

void apply_all(const std::vector<SplitStep>& steps, std::vector<std::string_view>& pieces) {
  for (const SplitStep& step : steps) {
    std::vector<std::string_view> finer;
    finer.reserve(2 * pieces.size());
    for (const std::string_view piece : pieces) apply(step, piece, finer);
    pieces = std::move(finer);
  }
}

}  // namespace

Status SplitSteps::add(const json& step) {
  const std::string type = step.is_object() && step.contains("type") && step["type"].is_string()
                               ? step["type"]
                               : json("");
  if (byte_level_)
    return unsupported("pre_tokenizer: ", type, " after ByteLevel, which has to be the last step");
  Settings s(step, cat("pre_tokenizer: ", type));
  s.text("type", "");
  if (type == "Sequence") {
    const json steps = s.raw("pretokenizers");
    if (!steps.is_array()) return invalid_argument("pre_tokenizer: Sequence without pretokenizers");
    EVERLONG_RETURN_IF_ERROR(s.finish());
    for (const json& inner : steps) EVERLONG_RETURN_IF_ERROR(add(inner));
    return {};
  }
  if (type == "ByteLevel") {
    byte_level_ = true;
    space_in_front_ = s.boolean("add_prefix_space", true);
    s.boolean("trim_offsets", true);  // says where tokens lie in the text, not which they are
    if (s.boolean("use_regex", true)) {
      EVERLONG_ASSIGN(Pattern pattern, Pattern::compile(kGpt2));
      last_.push_back({std::move(pattern)});
    }
    return s.finish();
  }
  if (type == "Digits") {
    const bool each = s.boolean("individual_digits", false);
    EVERLONG_RETURN_IF_ERROR(s.finish());
    EVERLONG_ASSIGN(Pattern pattern, Pattern::compile("\\p{N}"));
    steps_.push_back(
        {std::move(pattern), each ? SplitBehavior::kIsolated : SplitBehavior::kContiguous});
    return {};
  }
  if (type == "Split") {
    const json pattern = s.raw("pattern");
    const std::string behavior_name = s.text("behavior", "");
    const bool invert = s.boolean("invert", false);
    EVERLONG_RETURN_IF_ERROR(s.finish());
    EVERLONG_ASSIGN(const SplitBehavior behavior, behavior_of(behavior_name));
    const bool regex = pattern.is_object() && pattern.contains("Regex"),
               plain = pattern.is_object() && pattern.contains("String");
    if (pattern.size() != 1 || regex == plain || !pattern.front().is_string())
      return invalid_argument("pre_tokenizer: the pattern of Split is ", pattern.dump(),
                              "; {\"Regex\": text} or {\"String\": text} is needed");
    const auto& text = pattern.front().get_ref<const std::string&>();
    EVERLONG_ASSIGN(Pattern compiled, Pattern::compile(regex ? text : literally(text)));
    steps_.push_back({std::move(compiled), behavior, invert});
    return {};
  }
  return unsupported("pre_tokenizer \"", type,
                     "\" is not supported; ByteLevel, Split, Digits and Sequence are");
}

Result<SplitSteps> SplitSteps::read(const json& pre_tokenizer) {
  SplitSteps out;
  if (pre_tokenizer.is_null())
    return unsupported("pre_tokenizer is missing; byte-level vocabularies need ByteLevel");
  EVERLONG_RETURN_IF_ERROR(out.add(pre_tokenizer));
  if (!out.byte_level_)
    return unsupported(
        "pre_tokenizer has no ByteLevel step; only byte-level vocabularies are read");
  return out;
}

void SplitSteps::cut(std::string_view text, std::vector<std::string>& storage,
                     std::vector<std::string_view>& pieces) const {
  pieces = {text};
  apply_all(steps_, pieces);
  if (space_in_front_) {
    storage.reserve(pieces.size());  // views into it must not move
    for (std::string_view& piece : pieces)
      if (!piece.starts_with(' ')) piece = storage.emplace_back(cat(" ", piece));
  }
  apply_all(last_, pieces);
}

}  // namespace everlong
