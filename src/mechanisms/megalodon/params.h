// The three carriers of a Megalodon layer: sizes and what they may be. README.md of this room, 1.
//
// Legend of the room: B batch, T tokens, N sequences, D width, G norm groups, M modes of the moving
// average, H heads, K key dim of a head (the paper's z_head_dim), V value dim of a head.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/status.h"

namespace everlong::megalodon {

inline constexpr double kNormEps = 1e-5;    // of the published code, inside the root
inline constexpr double kRopeBase = 10000;  // where the published configuration says null
inline constexpr std::int64_t kMostModes = 256;

// Timestep norm: each of G groups of D / G channels has statistics of its own.
Status check_norm(std::int64_t width, std::int64_t groups, double eps);

// Complex moving average of M modes a channel.
Status check_ema(std::int64_t width, std::int64_t modes);

// Attention inside chunks of `chunk` tokens; K is even, because coordinates turn in pairs.
Status check_attention(std::int64_t heads, std::int64_t key_dim, std::int64_t value_dim,
                       std::int64_t chunk, double rope_base, double eps);

// A run of tokens that lies in one chunk, or in `chunks` whole ones.
struct Piece {
  std::int64_t begin = 0;   // first token of the call
  std::int64_t length = 0;  // tokens of each chunk
  std::int64_t past = 0;    // keys of the same chunk that were there before: one chunk only then
  std::int64_t chunks = 1;
};

// How `tokens` after `past` tokens of an unfinished chunk divide: the rest of that chunk, whole
// chunks as one piece, what is left over. Empty pieces are left out.
std::vector<Piece> pieces_of(std::int64_t past, std::int64_t tokens, std::int64_t chunk);

// Pairs (query, key) inside chunks: what the cost counts.
double pairs_in_chunks(std::int64_t past, std::int64_t tokens, std::int64_t chunk);

}  // namespace everlong::megalodon
