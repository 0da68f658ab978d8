// The host side of the CPU kernel: memory, and who computes what.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "mechanisms/lightning/kernel.h"
#include "mechanisms/lightning/kernel_cpu.h"
#include "mechanisms/lightning/kernel_cpu_check.h"

namespace everlong::lightning::cpu {
namespace {

// A column part computes the scores of its head again, which costs about this share of a sweep.
constexpr double kScoresAgain = 0.2;
// Below this slope S grows so large that half an ulp of it, up to 3e-8 / s of an update, matters
// when it is lost the same way at every step: at 1e-3 it is 3e-5.
constexpr double kDitherBelow = 1e-3;
constexpr std::int64_t kStreamBytes = std::int64_t{4} << 20;
// Sweeps are cut at multiples of this many columns. Columns are independent of each other: a part
// computes the same bits as the whole.
constexpr std::int64_t kPartColumns = 2 * kLanes;
// States smaller than this are not worth a task of their own in a step.
constexpr std::int64_t kStepBytes = std::int64_t{1} << 16;

// The tokens of one head of one sequence, forwards or backwards in time.
struct Place {
  std::int64_t batch, first, tokens, head;
};
Place place_of(const Shape& shape, std::int64_t sequence, std::int64_t head) {
  if (shape.cu_seqlens.empty()) return {sequence, 0, shape.tokens, head};
  const auto n = static_cast<std::size_t>(sequence);
  return {0, shape.cu_seqlens[n], shape.cu_seqlens[n + 1] - shape.cu_seqlens[n], head};
}

template <class Void>
Rows<Void> rows_of(const BasicTensorView<Void>& x, const Place& p, bool back,
                   std::int64_t first_col = 0) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
  if (!x) return {};
  const std::int64_t token = back ? p.first + std::max<std::int64_t>(p.tokens, 1) - 1 : p.first;
  const std::int64_t at =
      p.batch * x.strides[0] + token * x.strides[1] + p.head * x.strides[2] + first_col;
  return {static_cast<Byte*>(x.data) + at * static_cast<std::int64_t>(info(x.dtype).bytes),
          back ? -x.strides[1] : x.strides[1]};
}

// One head's matrix or its transpose, from a row and a column on.
template <class Float, class Void>
Matrix<Float> matrix_of(const BasicTensorView<Void>& x, std::int64_t sequence, std::int64_t head,
                        bool transposed, std::int64_t first_row, std::int64_t first_col) {
  if (!x) return {};
  Matrix<Float> m{static_cast<Float*>(x.data) + sequence * x.strides[0] + head * x.strides[1],
                  x.strides[2], x.strides[3]};
  if (transposed) std::swap(m.row_stride, m.col_stride);
  m.data += first_row * m.row_stride + first_col * m.col_stride;
  return m;
}

// Outputs that no cache holds anyway are not read into it before they are written: 10 to 15 % of a
// pass over 16 MB.
bool worth_streaming(const TensorView& o) {
  constexpr std::int64_t kAlign = 64, kElements = kAlign / 4;
  const auto multiple = [](std::int64_t stride) { return stride % kElements == 0; };
  return o && o.dtype == DType::kFloat32 &&
         o.sizes[0] * o.sizes[1] * o.sizes[2] * o.sizes[3] * 4 >= kStreamBytes &&
         reinterpret_cast<std::uintptr_t>(o.data) % kAlign == 0 && multiple(o.strides[0]) &&
         multiple(o.strides[1]) && multiple(o.strides[2]);
}

// The workspace: decays of all heads, then one piece a thread.
struct Workspace {
  float *decays = nullptr, *scratch = nullptr;
  std::int64_t scratch_floats = 0;
  const float* decays_of(std::int64_t head) const { return decays + head * kDecays; }
  float* scratch_of(int thread) const { return scratch + thread * scratch_floats; }
};

std::int64_t scratch_floats(std::int64_t heads, std::int64_t key_dim, std::int64_t value_dim) {
  const std::int64_t together = heads_together(heads, key_dim, value_dim);
  return padded(std::max(sweep_floats(key_dim, value_dim, together),
                         sweep_floats(value_dim, key_dim, together)));
}

// exp(-s n) from s in float64 for every n up to a chunk. What fp32 holds only as a denormal is
// zero: products with it would be slow, and it is below 1e-38 of anything.
void fill_decays(double slope, float* out) {
  for (std::int64_t t = 0; t < kDecays; ++t) {
    const double decay = t <= kChunk ? std::exp(-slope * static_cast<double>(kChunk - t)) : 0.0;
    out[t] = decay < std::numeric_limits<float>::min() ? 0.0F : static_cast<float>(decay);
  }
}

Result<Workspace> open_workspace(const Problem& p, std::span<std::byte> bytes,
                                 std::span<const double> slope, int threads) {
  const std::size_t needed =
      workspace_bytes(p.shape.heads, p.shape.key_dim, p.shape.value_dim, threads);
  if (bytes.size() < needed)
    return invalid_argument("lightning: the workspace has ", bytes.size(), " bytes; ", needed,
                            " are needed for ", threads, " threads (workspace_bytes)");
  constexpr std::uintptr_t kAlign = 64;
  const auto address = reinterpret_cast<std::uintptr_t>(bytes.data());
  Workspace w;
  w.decays = reinterpret_cast<float*>((address + kAlign - 1) / kAlign * kAlign);
  w.scratch = w.decays + p.shape.heads * kDecays;
  w.scratch_floats = scratch_floats(p.shape.heads, p.shape.key_dim, p.shape.value_dim);
  for (std::int64_t h = 0; h < p.shape.heads; ++h)
    fill_decays(slope[static_cast<std::size_t>(h)], w.decays + h * kDecays);
  return w;
}

// Into how many parts the columns of each sweep are cut so that all threads have work.
std::int64_t column_parts(std::int64_t sweeps, std::int64_t cols, int threads) {
  const std::int64_t most = (cols + kPartColumns - 1) / kPartColumns;
  std::int64_t best = 1;
  double best_time = std::numeric_limits<double>::infinity();
  for (std::int64_t parts = 1; parts <= most; ++parts) {
    const std::int64_t rounds = (sweeps * parts + threads - 1) / threads;
    const double time = static_cast<double>(rounds) *
                        (kScoresAgain + (1 - kScoresAgain) / static_cast<double>(parts));
    if (time < best_time * 0.95) best = parts, best_time = time;
  }
  return best;
}

// A part of `cols` columns, cut at whole panels of the widest vectors.
struct Range {
  std::int64_t first, count;
};
Range part_of(std::int64_t part, std::int64_t parts, std::int64_t cols) {
  const std::int64_t panels = (cols + kPartColumns - 1) / kPartColumns;
  const std::int64_t begin = panels * part / parts * kPartColumns,
                     end = panels * (part + 1) / parts * kPartColumns;
  return {begin, std::min(end, cols) - begin};
}

// One row of kernel_cpu.h's table, for all heads and sequences.
struct Pass {
  ConstTensorView q, k, v, u = {};
  TensorView o, p = {};
  ConstTensorView state_in = {};
  TensorView state_out = {};
  bool transposed = false, back = false;
  // o takes all rows of S and may be cut by its columns, p the other way round: never both at once.
  bool cut_rows = false;
  float score_scale = 1, cross_scale = 1, update_scale = 1;
};

Sweep sweep_of(const Problem& p, const Pass& pass, std::span<const double> slope,
               const Workspace& workspace, std::int64_t sequence, std::int64_t head, Range rows,
               Range cols) {
  const Place place = place_of(p.shape, sequence, head);
  return {.dtype = p.dtype,
          .tokens = place.tokens,
          .key_dim = rows.count,
          .value_dim = cols.count,
          .q = rows_of(pass.q, place, pass.back),
          .k = rows_of(pass.k, place, pass.back, rows.first),
          .v = rows_of(pass.v, place, pass.back, cols.first),
          .u = rows_of(pass.u, place, pass.back),
          .o = rows_of(pass.o, place, pass.back, cols.first),
          .p = rows_of(pass.p, place, pass.back, rows.first),
          .stream_o = worth_streaming(pass.o),
          .stream_p = worth_streaming(pass.p),
          .state_in = matrix_of<const float>(pass.state_in, sequence, head, pass.transposed,
                                             rows.first, cols.first),
          .state_out = matrix_of<float>(pass.state_out, sequence, head, pass.transposed, rows.first,
                                        cols.first),
          .decays = workspace.decays_of(head),
          .slope = slope[static_cast<std::size_t>(head)],
          .lead = pass.back ? 0 : 1,
          .score_scale = pass.score_scale,
          .cross_scale = pass.cross_scale,
          .update_scale = pass.update_scale};
}

// Of one sequence: a range of heads, a part of their columns.
void run_pass(const Problem& p, const Pass& pass, std::span<const double> slope,
              const Workspace& workspace, std::int64_t sequence, Range heads, std::int64_t part,
              std::int64_t parts, int thread) {
  const Range all_rows{0, pass.k.sizes[3]}, all_cols{0, pass.v.sizes[3]};
  const Range rows = pass.cut_rows ? part_of(part, parts, all_rows.count) : all_rows,
              cols = pass.cut_rows ? all_cols : part_of(part, parts, all_cols.count);
  if (rows.count <= 0 || cols.count <= 0) return;
  std::array<Sweep, kMostHeads> sweeps;
  for (std::int64_t i = 0; i < heads.count; ++i)
    sweeps[static_cast<std::size_t>(i)] =
        sweep_of(p, pass, slope, workspace, sequence, heads.first + i, rows, cols);
  run_sweep(std::span(sweeps).first(static_cast<std::size_t>(heads.count)),
            workspace.scratch_of(thread));
}

// Heads a task takes: as many as keep all threads busy to the end, and whose states fit the cache.
std::int64_t heads_per_task(const Shape& shape, std::int64_t tasks_per_head, int threads) {
  std::int64_t best = 1, best_rounds = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t together = heads_together(shape.heads, shape.key_dim, shape.value_dim);
       together >= 1; --together) {
    const std::int64_t tasks = (shape.heads + together - 1) / together * tasks_per_head;
    const std::int64_t rounds = (tasks + threads - 1) / threads * together;
    if (rounds < best_rounds) best = together, best_rounds = rounds;
  }
  return best;
}

// Tasks in the order of heads first: a thread's range then has every sequence of its heads, so that
// uneven lengths are spread over the threads.
void run_passes(const Problem& p, std::span<const Pass> passes, std::int64_t parts,
                std::span<const double> slope, const Workspace& workspace,
                const Executor& executor) {
  const std::int64_t N = p.shape.sequences(), H = p.shape.heads,
                     count = static_cast<std::int64_t>(passes.size());
  if (count == 0 || N == 0) return;
  const std::int64_t together = heads_per_task(p.shape, N * parts, executor.threads()),
                     groups = (H + together - 1) / together;
  executor.run(groups * parts * N * count, [&](std::int64_t index, int thread) {
    const Pass& pass = passes[static_cast<std::size_t>(index % count)];
    const std::int64_t sequence = index / count % N, part = index / count / N % parts,
                       first = index / count / N / parts * together;
    run_pass(p, pass, slope, workspace, sequence, {first, std::min(together, H - first)}, part,
             parts, thread);
  });
}

}  // namespace

std::size_t workspace_bytes(std::int64_t heads, std::int64_t key_dim, std::int64_t value_dim,
                            int threads) {
  const std::int64_t floats = heads * kDecays + threads * scratch_floats(heads, key_dim, value_dim);
  return static_cast<std::size_t>(floats) * sizeof(float) + 64;  // 64: to align the beginning
}

Status forward(const ForwardArgs& a, std::span<std::byte> workspace, const Executor& executor) {
  EVERLONG_ASSIGN(const Problem p, check_inputs(a.q_BTHK, a.k_BTHK, a.v_BTHV, a.state_NHKV,
                                                a.cu_seqlens, a.slope, a.scale));
  EVERLONG_RETURN_IF_ERROR(check_view("o", a.o_BTHV, p.dtype, p.values));
  EVERLONG_RETURN_IF_ERROR(
      check_optional("the final state", a.state_out_NHKV, DType::kFloat32, p.states));
  EVERLONG_ASSIGN(const Workspace w, open_workspace(p, workspace, a.slope, executor.threads()));
  const auto scale = static_cast<float>(a.scale);
  const Pass pass{.q = a.q_BTHK,
                  .k = a.k_BTHK,
                  .v = a.v_BTHV,
                  .o = a.o_BTHV,
                  .state_in = a.state_NHKV,
                  .state_out = a.state_out_NHKV,
                  .score_scale = scale,
                  .cross_scale = scale};
  const std::int64_t sweeps = p.shape.sequences() * p.shape.heads;
  run_passes(p, {&pass, 1}, column_parts(sweeps, p.shape.value_dim, executor.threads()), a.slope, w,
             executor);
  return {};
}

Status backward(const BackwardArgs& a, std::span<std::byte> workspace, const Executor& executor) {
  EVERLONG_ASSIGN(const Problem p, check_inputs(a.q_BTHK, a.k_BTHK, a.v_BTHV, a.state_NHKV,
                                                a.cu_seqlens, a.slope, a.scale));
  EVERLONG_RETURN_IF_ERROR(check_view("the gradient of o", a.grad_o_BTHV, p.dtype, p.values));
  EVERLONG_RETURN_IF_ERROR(check_optional("the gradient of the final state", a.grad_state_NHKV,
                                          DType::kFloat32, p.states));
  EVERLONG_RETURN_IF_ERROR(check_optional("the gradient of q", a.grad_q_BTHK, p.dtype, p.keys));
  EVERLONG_RETURN_IF_ERROR(check_optional("the gradient of k", a.grad_k_BTHK, p.dtype, p.keys));
  EVERLONG_RETURN_IF_ERROR(check_optional("the gradient of v", a.grad_v_BTHV, p.dtype, p.values));
  EVERLONG_RETURN_IF_ERROR(
      check_optional("the gradient of the state", a.grad_state_in_NHKV, DType::kFloat32, p.states));
  EVERLONG_ASSIGN(const Workspace w, open_workspace(p, workspace, a.slope, executor.threads()));
  const auto scale = static_cast<float>(a.scale);
  const std::int64_t sweeps = p.shape.sequences() * p.shape.heads * 2;
  const std::int64_t parts =
      column_parts(sweeps, std::min(p.shape.key_dim, p.shape.value_dim), executor.threads());
  std::array<Pass, 3> passes;
  std::size_t count = 0;
  if (a.grad_q_BTHK)
    passes[count++] = {.q = a.grad_o_BTHV,
                       .k = a.v_BTHV,
                       .v = a.k_BTHK,
                       .o = a.grad_q_BTHK,
                       .state_in = a.state_NHKV,
                       .transposed = true,
                       .score_scale = scale,
                       .cross_scale = scale};
  // The scale is in R: q enters it times the scale, and what reads R multiplies no more.
  const Pass both{.q = a.k_BTHK,
                  .k = a.q_BTHK,
                  .v = a.grad_o_BTHV,
                  .u = a.v_BTHV,
                  .o = a.grad_v_BTHV,
                  .p = a.grad_k_BTHK,
                  .state_in = a.grad_state_NHKV,
                  .state_out = a.grad_state_in_NHKV,
                  .back = true,
                  .score_scale = scale,
                  .update_scale = scale};
  if (parts == 1) {
    if (both.o || both.p || both.state_out) passes[count++] = both;
  } else {  // each of the two has R for itself, which costs a quarter more
    if (both.o || both.state_out) {
      passes[count++] = both;
      passes[count - 1].p = {};
    }
    if (both.p) {
      passes[count++] = both;
      passes[count - 1].o = {}, passes[count - 1].state_out = {};
      passes[count - 1].cut_rows = true;
    }
  }
  run_passes(p, std::span(passes).first(count), parts, a.slope, w, executor);
  return {};
}

Status step(const ForwardArgs& a, const Executor& executor) {
  EVERLONG_ASSIGN(const Problem p, check_inputs(a.q_BTHK, a.k_BTHK, a.v_BTHV, a.state_NHKV,
                                                a.cu_seqlens, a.slope, a.scale));
  EVERLONG_RETURN_IF_ERROR(check_view("o", a.o_BTHV, p.dtype, p.values));
  EVERLONG_RETURN_IF_ERROR(
      check_optional("the final state", a.state_out_NHKV, DType::kFloat32, p.states));
  if (p.shape.tokens != 1 || !p.shape.cu_seqlens.empty())
    return invalid_argument("lightning: a step takes one token of each sequence; given ",
                            p.shape.tokens, p.shape.cu_seqlens.empty() ? "" : ", packed");
  const std::int64_t H = p.shape.heads, count = p.shape.sequences() * H;
  const std::int64_t bytes = p.shape.key_dim * p.shape.value_dim * 4;
  const std::int64_t at_once = std::max<std::int64_t>(kStepBytes / bytes, 1);
  executor.run((count + at_once - 1) / at_once, [&](std::int64_t task, int) {
    for (std::int64_t i = task * at_once; i < std::min((task + 1) * at_once, count); ++i) {
      const std::int64_t n = i / H, h = i % H;
      const Place place{n, 0, 1, h};
      const auto in = matrix_of<const float>(a.state_NHKV, n, h, false, 0, 0);
      const auto out = matrix_of<float>(a.state_out_NHKV, n, h, false, 0, 0);
      run_step({.dtype = p.dtype,
                .key_dim = p.shape.key_dim,
                .value_dim = p.shape.value_dim,
                .q = rows_of(a.q_BTHK, place, false).data,
                .k = rows_of(a.k_BTHK, place, false).data,
                .v = rows_of(a.v_BTHV, place, false).data,
                .o = rows_of(a.o_BTHV, place, false).data,
                .state_in = in.data,
                .state_out = out.data,
                .in_stride = in.row_stride,
                .out_stride = out.row_stride,
                .lost = static_cast<float>(std::expm1(-a.slope[static_cast<std::size_t>(h)])),
                .scale = static_cast<float>(a.scale),
                .dither = a.slope[static_cast<std::size_t>(h)] < kDitherBelow});
    }
  });
  return {};
}

}  // namespace everlong::lightning::cpu
