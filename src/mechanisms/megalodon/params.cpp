#include "mechanisms/megalodon/params.h"

#include <algorithm>
#include <cmath>

namespace everlong::megalodon {
namespace {

constexpr std::int64_t kMostWidth = std::int64_t{1} << 20, kMostHeads = 65536;
constexpr std::int64_t kLongestChunk = std::int64_t{1} << 40;

Status check_eps(double eps) {
  if (std::isfinite(eps) && eps >= 0) return {};
  return invalid_argument("megalodon: eps = ", eps, "; a finite number >= 0 is needed");
}

Status check_size(const char* name, std::int64_t value, std::int64_t most) {
  if (value >= 1 && value <= most) return {};
  return invalid_argument("megalodon: ", name, " = ", value, "; 1 to ", most, " are allowed");
}

}  // namespace

Status check_norm(std::int64_t width, std::int64_t groups, double eps) {
  EVERLONG_RETURN_IF_ERROR(check_size("width", width, kMostWidth));
  if (groups < 1 || width % groups != 0)
    return invalid_argument("megalodon: ", groups, " norm groups do not divide a width of ", width,
                            "; give a divisor of the width");
  return check_eps(eps);
}

Status check_ema(std::int64_t width, std::int64_t modes) {
  EVERLONG_RETURN_IF_ERROR(check_size("width", width, kMostWidth));
  return check_size("modes of the moving average (ndim)", modes, kMostModes);
}

Status check_attention(std::int64_t heads, std::int64_t key_dim, std::int64_t value_dim,
                       std::int64_t chunk, double rope_base, double eps) {
  EVERLONG_RETURN_IF_ERROR(check_size("num_heads", heads, kMostHeads));
  EVERLONG_RETURN_IF_ERROR(check_size("key dim of a head", key_dim, kMostWidth));
  EVERLONG_RETURN_IF_ERROR(check_size("value dim of a head", value_dim, kMostWidth));
  EVERLONG_RETURN_IF_ERROR(check_size("chunk_size", chunk, kLongestChunk));
  if (key_dim % 2 != 0)
    return invalid_argument("megalodon: the key dim of a head is ", key_dim,
                            ", which is odd; coordinates turn in pairs, so give an even one");
  if (!std::isfinite(rope_base) || rope_base < 1)
    return invalid_argument("megalodon: rope_base = ", rope_base,
                            "; a finite number >= 1 is needed");
  return check_eps(eps);
}

std::vector<Piece> pieces_of(std::int64_t past, std::int64_t tokens, std::int64_t chunk) {
  std::vector<Piece> pieces;
  std::int64_t begin = 0;
  if (past > 0 && tokens > 0) {
    begin = std::min(tokens, chunk - past);
    pieces.push_back({0, begin, past, 1});
  }
  if (const std::int64_t whole = (tokens - begin) / chunk; whole > 0) {
    pieces.push_back({begin, chunk, 0, whole});
    begin += whole * chunk;
  }
  if (tokens > begin) pieces.push_back({begin, tokens - begin, 0, 1});
  return pieces;
}

double pairs_in_chunks(std::int64_t past, std::int64_t tokens, std::int64_t chunk) {
  double pairs = 0;
  for (const Piece& piece : pieces_of(past, tokens, chunk)) {
    const auto n = static_cast<double>(piece.length);
    pairs +=
        static_cast<double>(piece.chunks) * (n * static_cast<double>(piece.past) + n * (n + 1) / 2);
  }
  return pairs;
}

}  // namespace everlong::megalodon
