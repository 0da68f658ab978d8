#include "data/retrieval_task.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "data/word_tokenizer.h"

namespace everlong {
namespace {

using Ids = std::vector<std::int32_t>;

constexpr std::array<std::pair<RetrievalKind, std::string_view>, 5> kKinds = {
    {{RetrievalKind::kPasskey, "passkey"},
     {RetrievalKind::kSingle, "single"},
     {RetrievalKind::kMultiKey, "multikey"},
     {RetrievalKind::kMultiValue, "multivalue"},
     {RetrievalKind::kTracking, "tracking"}}};

constexpr std::string_view kIntro = "There is important info hidden here. Find it and memorize it.";
constexpr std::int64_t kMostDigits = 18;
constexpr int kMostDraws = 64;                 // of numbers that the filler does not hold
constexpr std::int64_t kScanTokens = 1 << 14;  // read at a time when looking for them

std::string random_digits(std::int64_t digits, Random& random) {
  std::string text;
  for (std::int64_t i = 0; i < digits; ++i) text += static_cast<char>('0' + random.below(10));
  return text;
}

// `count` different indices below `limit`, in random order.
std::vector<std::size_t> choose(std::int64_t count, std::int64_t limit, Random& random) {
  std::vector<std::size_t> all(static_cast<std::size_t>(limit));
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i)
    std::swap(
        all[i],
        all[i + static_cast<std::size_t>(random.below(limit - static_cast<std::int64_t>(i)))]);
  all.resize(static_cast<std::size_t>(count));
  return all;
}

std::int64_t occurrences(std::span<const std::int32_t> text, std::span<const std::int32_t> part) {
  std::int64_t count = 0;
  for (auto at = text.begin();; ++at, ++count) {
    at = std::search(at, text.end(), part.begin(), part.end());
    if (at == text.end()) return count;
  }
}

std::string upper(std::string_view letter) {
  return std::string(1, static_cast<char>(letter[0] - 'a' + 'A'));
}

// How many numbers, labels and variables a task draws.
std::int64_t numbers_of(const RetrievalTask& task) {
  switch (task.kind) {
    case RetrievalKind::kMultiKey:
    case RetrievalKind::kMultiValue:
      return task.needles;
    case RetrievalKind::kTracking:
      return task.chains;
    case RetrievalKind::kPasskey:
    case RetrievalKind::kSingle:
      break;
  }
  return 1;
}

}  // namespace

Result<RetrievalKind> retrieval_kind(std::string_view given) {
  for (const auto& [kind, known] : kKinds)
    if (known == given) return kind;
  return invalid_argument(
      "task \"", given,
      "\" is not known; allowed: passkey, single, multikey, multivalue, tracking");
}

std::string_view name(RetrievalKind kind) {
  return std::ranges::find(kKinds, kind, [](const auto& entry) { return entry.first; })->second;
}

Status validate(const RetrievalTask& task) {
  if (task.digits < 1 || task.digits > kMostDigits)
    return invalid_argument("digits = ", task.digits, " is out of range; allowed: 1 to ",
                            kMostDigits);
  const auto labels = std::ssize(label_words()), letters = std::ssize(letter_words());
  if (task.needles < 1 || task.needles > labels)
    return invalid_argument("needles = ", task.needles, " is out of range; allowed: 1 to ", labels);
  if (task.hops < 0 || task.chains < 1 || task.chains > letters || task.hops >= letters ||
      task.chains * (task.hops + 1) > letters)
    return invalid_argument("hops = ", task.hops, " in ", task.chains,
                            " chains need chains * (hops + 1) variables; there are ", letters);
  // Numbers are drawn until they differ: twice as many as are needed must exist.
  if (std::pow(10.0, static_cast<double>(task.digits)) <
      2.0 * static_cast<double>(numbers_of(task)))
    return invalid_argument(numbers_of(task), " different numbers of ", task.digits,
                            " digits are too many; give more digits");
  return {};
}

// What a prompt says, before it has a length.
struct RetrievalPrompts::Draft {
  // Each group's facts come in this order; those of the first are asked for.
  std::vector<std::vector<std::string>> groups = {};
  std::string question = {};
  std::vector<std::string> answer = {};   // parts, with ", " between
  std::vector<std::string> numbers = {};  // of the first group
};

RetrievalPrompts::Draft RetrievalPrompts::draft(Random& random) const {
  Draft draft;
  std::vector<std::string> numbers;
  while (std::ssize(numbers) < numbers_of(task_)) {
    std::string number = random_digits(task_.digits, random);
    if (std::ranges::find(numbers, number) == numbers.end()) numbers.push_back(std::move(number));
  }
  const auto fact = [](std::string_view label, std::string_view number) {
    return cat(" The magic number of ", label, " is ", number, ".");
  };
  const auto labels = choose(task_.needles, std::ssize(label_words()), random);
  const std::string_view label = label_words()[labels[0]];
  draft.numbers = draft.answer = {numbers[0]};
  switch (task_.kind) {
    case RetrievalKind::kPasskey:
      draft.groups = {{cat(" The pass key is ", numbers[0], ". Remember it. ", numbers[0],
                           " is the pass key.")}};
      draft.question = " What is the pass key? The pass key is ";
      break;
    case RetrievalKind::kSingle:
    case RetrievalKind::kMultiKey:
      for (std::size_t i = 0; i < numbers.size(); ++i)
        draft.groups.push_back({fact(label_words()[labels[i]], numbers[i])});
      draft.question =
          cat(" What is the magic number of ", label, "? The magic number of ", label, " is ");
      break;
    case RetrievalKind::kMultiValue:
      draft.groups.emplace_back();
      for (const auto& number : numbers) draft.groups[0].push_back(fact(label, number));
      draft.question = cat(" What are the magic numbers of ", label, "? They are ");
      draft.numbers = draft.answer = numbers;
      break;
    case RetrievalKind::kTracking: {
      const auto letters =
          choose(task_.chains * (task_.hops + 1), std::ssize(letter_words()), random);
      draft.answer.clear();
      for (std::size_t i = 0; i < letters.size(); ++i) {
        const std::string variable = upper(letter_words()[letters[i]]);
        const auto chain = i / static_cast<std::size_t>(task_.hops + 1);
        if (chain == draft.groups.size()) {
          draft.groups.push_back({cat(" VAR ", variable, " = ", numbers[chain], ".")});
        } else {
          draft.groups[chain].push_back(
              cat(" VAR ", variable, " = VAR ", upper(letter_words()[letters[i - 1]]), "."));
        }
        if (chain == 0) draft.answer.push_back(variable);
      }
      draft.question = cat(" Which variables hold ", numbers[0], "? They are ");
      break;
    }
  }
  return draft;
}

void RetrievalPrompts::add_answer(const Draft& draft, RetrievalPrompt& prompt) const {
  for (const auto& part : draft.answer) {
    if (!prompt.answer.empty()) tokenizer_->encode(", ", prompt.answer);
    prompt.scored.resize(prompt.answer.size(), 0);
    tokenizer_->encode(part, prompt.answer);
    prompt.scored.resize(prompt.answer.size(), 1);
  }
}

Result<RetrievalPrompt> RetrievalPrompts::lay_out(const Draft& draft, const PromptPlace& place,
                                                  Random& random) const {
  struct Placed {
    std::int64_t offset;  // filler tokens before it
    bool asked;
    Ids tokens;
  };
  Ids intro = tokenizer_->encode(kIntro), question = tokenizer_->encode(draft.question);
  std::vector<Placed> facts;
  std::int64_t fixed = std::ssize(intro) + std::ssize(question);
  for (const auto& group : draft.groups)
    for (const auto& fact : group) {
      facts.push_back({0, facts.empty(), tokenizer_->encode(fact)});
      fixed += std::ssize(facts.back().tokens);
    }
  const std::int64_t room = place.tokens - fixed;
  if (room < 0)
    return invalid_argument("a prompt of ", place.tokens, " tokens has no room for the task ",
                            name(task_.kind), ", which needs ", fixed, " (tokenizer \"",
                            tokenizer_->name(), "\"); ask for longer prompts or fewer needles");
  std::size_t next = 0;
  for (std::size_t g = 0; g < draft.groups.size(); ++g) {
    const auto wanted = std::llround(place.depth * static_cast<double>(room));
    const std::int64_t moved = wanted + random.between(-place.jitter, place.jitter);
    const std::int64_t first =
        g == 0 ? std::clamp<std::int64_t>(moved, 0, room) : random.between(0, room);
    std::vector<std::int64_t> offsets = {first};
    while (offsets.size() < draft.groups[g].size()) offsets.push_back(random.between(first, room));
    std::ranges::sort(offsets);
    for (const std::int64_t offset : offsets) facts[next++].offset = offset;
  }
  std::ranges::stable_sort(facts, {}, &Placed::offset);

  RetrievalPrompt prompt;
  prompt.tokens = place.tokens;
  prompt.filler_seed = random();
  prompt.pieces.push_back({0, std::move(intro)});
  std::int64_t filler = 0, position = std::ssize(prompt.pieces[0].tokens);
  for (auto& fact : facts) {
    position += fact.offset - filler;
    if (fact.asked) {
      prompt.fact_begin = position;
      prompt.fact_end = position + std::ssize(fact.tokens);
    }
    position += std::ssize(fact.tokens);
    prompt.pieces.push_back({fact.offset - filler, std::move(fact.tokens)});
    filler = fact.offset;
  }
  prompt.pieces.push_back({room - filler, std::move(question)});

  add_answer(draft, prompt);
  return prompt;
}

Result<RetrievalPrompts> RetrievalPrompts::make(const RetrievalTask& task,
                                                const Tokenizer& tokenizer, const Filler& filler) {
  EVERLONG_RETURN_IF_ERROR(validate(task));
  RetrievalPrompts prompts(task, tokenizer, filler);
  Random random{1};
  const Draft draft = prompts.draft(random);
  prompts.least_tokens_ =
      std::ssize(tokenizer.encode(kIntro)) + std::ssize(tokenizer.encode(draft.question));
  for (const auto& group : draft.groups)
    for (const auto& fact : group) prompts.least_tokens_ += std::ssize(tokenizer.encode(fact));
  RetrievalPrompt answered;
  prompts.add_answer(draft, answered);
  prompts.answer_tokens_ = std::ssize(answered.answer);
  return prompts;
}

Result<RetrievalPrompt> RetrievalPrompts::prompt(const PromptPlace& place,
                                                 std::uint64_t seed) const {
  if (!(place.depth >= 0 && place.depth <= 1) || place.jitter < 0 || place.tokens < 0)
    return invalid_argument("depth = ", place.depth, ", jitter = ", place.jitter,
                            ", tokens = ", place.tokens,
                            "; a depth from 0 to 1 and counts >= 0 are needed");
  for (int draw = 0; draw < kMostDraws; ++draw) {
    Random random{mixed_seed({seed, static_cast<std::uint64_t>(draw)})};
    const Draft made = draft(random);
    EVERLONG_ASSIGN(auto prompt, lay_out(made, place, random));
    if (!filler_->may_hold_digits()) return prompt;
    bool leaked = false;
    for (const auto& number : made.numbers) {
      const Ids wanted = tokenizer_->encode(number);
      std::int64_t said = 0;
      for (const auto& piece : prompt.pieces) said += occurrences(piece.tokens, wanted);
      EVERLONG_ASSIGN(const std::int64_t found, occurrences(prompt, *filler_, wanted));
      leaked = leaked || found != said;
    }
    if (!leaked) return prompt;
  }
  return invalid_argument("every number of ", task_.digits, " digits that was drawn (", kMostDraws,
                          " times) also occurs in a filler of ", place.tokens,
                          " tokens; ask for more digits");
}

Result<std::int64_t> occurrences(const RetrievalPrompt& prompt, const Filler& filler,
                                 std::span<const std::int32_t> part) {
  PromptReader reader(prompt, filler);
  const std::int64_t overlap = std::max<std::int64_t>(std::ssize(part) - 1, 0);
  Ids window(static_cast<std::size_t>(overlap + kScanTokens));
  std::int64_t kept = 0, found = 0;
  for (;;) {
    EVERLONG_ASSIGN(const std::int64_t read,
                    reader.next(std::span(window).subspan(static_cast<std::size_t>(kept))));
    if (read == 0) return found;
    const auto now = std::span(window).first(static_cast<std::size_t>(kept + read));
    found += occurrences(now, part);
    // One token less than the part: nothing is counted twice, nothing is cut.
    kept = std::min<std::int64_t>(overlap, std::ssize(now));
    std::copy(now.end() - kept, now.end(), window.begin());
  }
}

PromptReader::PromptReader(const RetrievalPrompt& prompt, const Filler& filler)
    : prompt_(&prompt), filler_(&filler), stretch_(filler.stretch(prompt.filler_seed)) {}

Result<std::int64_t> PromptReader::next(std::span<std::int32_t> out) {
  std::int64_t filled = 0;
  while (!out.empty() && piece_ < prompt_->pieces.size()) {
    const auto& piece = prompt_->pieces[piece_];
    const std::int64_t whole = piece.filler + std::ssize(piece.tokens);
    if (done_ == whole) {
      ++piece_;
      done_ = 0;
      stretch_ =
          filler_->stretch(mixed_seed({prompt_->filler_seed, static_cast<std::uint64_t>(piece_)}));
      continue;
    }
    std::int64_t count;
    if (done_ < piece.filler) {
      count = std::min<std::int64_t>(piece.filler - done_, std::ssize(out));
      EVERLONG_RETURN_IF_ERROR(stretch_.next(out.first(static_cast<std::size_t>(count))));
    } else {
      count = std::min<std::int64_t>(whole - done_, std::ssize(out));
      std::copy_n(piece.tokens.begin() + (done_ - piece.filler), count, out.begin());
    }
    done_ += count;
    filled += count;
    out = out.subspan(static_cast<std::size_t>(count));
  }
  return filled;
}

}  // namespace everlong
