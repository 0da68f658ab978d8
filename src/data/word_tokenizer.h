// The tokenizer "words": a closed vocabulary for synthetic tasks, one id a word, digit or mark, so
// that a prompt of a given number of tokens says five times as much as in bytes and small models
// learn the task in minutes.
#pragma once
#include "data/tokenizer.h"

namespace everlong {

// Ids, fixed for ever (docs/formats.md): 0 end of document, 1 begin of document, 2 pad, 3 any word
// that is not in the list, then digits, marks, words. Case does not count and white space only
// parts words; decode() puts one space between words, so encoding its text gives the ids again.
std::unique_ptr<Tokenizer> make_word_tokenizer();

// Words of the list by use, for the generators of the tasks.
std::span<const std::string_view> label_words();   // 16 names of things: "fox", "owl", ...
std::span<const std::string_view> letter_words();  // 16 letters "a" to "p": symbols and variables
std::span<const std::string_view> plain_words();   // words that no question or answer is made of

}  // namespace everlong
