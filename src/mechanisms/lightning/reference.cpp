#include "mechanisms/lightning/reference.h"

#include <algorithm>
#include <cmath>

namespace everlong::lightning::reference {
namespace {

using Index = std::int64_t;

// Rows of one head of one sequence: element (t, i) of a [B, T, H, D] array.
template <class Value>
struct Rows {
  Value* data;
  Index stride, dim;
  Value& operator()(Index t, Index i) const { return data[t * stride + i]; }
};
template <class A, class B>
double dot(const Rows<A>& a, Index t, const Rows<B>& b, Index j) {
  double sum = 0;
  for (Index i = 0; i < a.dim; ++i) sum += a(t, i) * b(j, i);
  return sum;
}
// to(t) += factor * from(j)
template <class A>
void add(const Rows<double>& to, Index t, double factor, const Rows<A>& from, Index j) {
  for (Index i = 0; i < to.dim; ++i) to(t, i) += factor * from(j, i);
}

// A K x V matrix.
struct Matrix {
  double* data;
  Index rows, columns;
  double& operator()(Index i, Index j) const { return data[i * columns + j]; }
  void scale(double factor) const {
    for (Index i = 0; i < rows * columns; ++i) data[i] *= factor;
  }
  // += factor * a(t) b(j)^T
  template <class A, class B>
  void add_outer(double factor, const Rows<A>& a, Index t, const Rows<B>& b, Index j) const {
    for (Index i = 0; i < rows; ++i)
      for (Index c = 0; c < columns; ++c) (*this)(i, c) += factor * a(t, i) * b(j, c);
  }
  // to(t) += factor * M^T x(t)
  template <class A>
  void add_transposed(const Rows<double>& to, double factor, const Rows<A>& x, Index t) const {
    for (Index i = 0; i < rows; ++i)
      for (Index c = 0; c < columns; ++c) to(t, c) += factor * (*this)(i, c) * x(t, i);
  }
  // to(t) += factor * M x(t)
  template <class A>
  void add_product(const Rows<double>& to, double factor, const Rows<A>& x, Index t) const {
    for (Index i = 0; i < rows; ++i)
      for (Index c = 0; c < columns; ++c) to(t, i) += factor * (*this)(i, c) * x(t, c);
  }
};

// One head of one sequence. `state` holds S on the way forward, dL/dS on the way back.
struct Head {
  Index tokens;
  double slope, scale;
  Rows<const double> q, k, v, grad_o;
  Rows<double> o, dq, dk, dv;
  Matrix state, initial;

  double decay(Index tokens_between) const {
    return std::exp(-slope * static_cast<double>(tokens_between));
  }
};

template <class Vector>
auto rows_of(Vector& values, const Shape& s, Index first, Index head, Index dim) {
  using Value = std::remove_pointer_t<decltype(values.data())>;
  return Rows<Value>{values.data() + (values.empty() ? 0 : (first * s.heads + head) * dim),
                     s.heads * dim, dim};
}

Status check_sizes(const Input& in, std::span<const double> grad_o,
                   std::span<const double> grad_state) {
  EVERLONG_RETURN_IF_ERROR(validate(in.shape, in.slope_H, in.scale));
  const Shape& s = in.shape;
  const Index rows = s.batch * s.tokens * s.heads,
              state = s.sequences() * s.heads * s.key_dim * s.value_dim;
  struct Expected {
    const char* name;
    std::size_t given;
    Index needed;
    bool optional;
  };
  for (const Expected& e : {Expected{"q", in.q_BTHK.size(), rows * s.key_dim, false},
                            Expected{"k", in.k_BTHK.size(), rows * s.key_dim, false},
                            Expected{"v", in.v_BTHV.size(), rows * s.value_dim, false},
                            Expected{"state", in.state_NHKV.size(), state, true},
                            Expected{"grad_o", grad_o.size(), rows * s.value_dim, true},
                            Expected{"grad_state", grad_state.size(), state, true}})
    if (static_cast<Index>(e.given) != e.needed && !(e.optional && e.given == 0))
      return invalid_argument("lightning: ", e.name, " has ", e.given,
                              " elements; the shape needs ", e.needed);
  return {};
}

// Calls `visit` for every head of every sequence, on zeroed outputs and with `state` filled from
// `start`.
template <class Visit>
void for_each_head(const Input& in, std::span<const double> start, std::span<const double> grad_o,
                   Output* out, Gradient* gradient, const Visit& visit) {
  const Shape& s = in.shape;
  const Index K = s.key_dim, V = s.value_dim, rows = s.batch * s.tokens * s.heads;
  std::vector<double> nothing,
      zero_grad(grad_o.empty() ? static_cast<std::size_t>(rows * V) : 0, 0.0);
  const std::span<const double> grad = grad_o.empty() ? std::span<const double>(zero_grad) : grad_o;
  std::vector<double> no_state(static_cast<std::size_t>(K * V), 0.0);
  std::vector<double>& states = out != nullptr ? out->state_NHKV : gradient->state_NHKV;
  states.assign(static_cast<std::size_t>(s.sequences() * s.heads * K * V), 0.0);
  std::ranges::copy(start, states.begin());
  if (out != nullptr) out->o_BTHV.assign(static_cast<std::size_t>(rows * V), 0.0);
  if (gradient != nullptr) {
    gradient->q_BTHK.assign(static_cast<std::size_t>(rows * K), 0.0);
    gradient->k_BTHK.assign(static_cast<std::size_t>(rows * K), 0.0);
    gradient->v_BTHV.assign(static_cast<std::size_t>(rows * V), 0.0);
  }
  for (Index n = 0; n < s.sequences(); ++n) {
    const Index first =
        s.cu_seqlens.empty() ? n * s.tokens : s.cu_seqlens[static_cast<std::size_t>(n)];
    const Index end =
        s.cu_seqlens.empty() ? first + s.tokens : s.cu_seqlens[static_cast<std::size_t>(n) + 1];
    for (Index h = 0; h < s.heads; ++h) {
      const auto at = (n * s.heads + h) * K * V;
      std::vector<double> initial = no_state;
      if (!in.state_NHKV.empty()) std::copy_n(in.state_NHKV.begin() + at, K * V, initial.begin());
      visit(Head{.tokens = end - first,
                 .slope = in.slope_H[static_cast<std::size_t>(h)],
                 .scale = in.scale,
                 .q = rows_of(in.q_BTHK, s, first, h, K),
                 .k = rows_of(in.k_BTHK, s, first, h, K),
                 .v = rows_of(in.v_BTHV, s, first, h, V),
                 .grad_o = rows_of(grad, s, first, h, V),
                 .o = rows_of(out != nullptr ? out->o_BTHV : nothing, s, first, h, V),
                 .dq = rows_of(gradient != nullptr ? gradient->q_BTHK : nothing, s, first, h, K),
                 .dk = rows_of(gradient != nullptr ? gradient->k_BTHK : nothing, s, first, h, K),
                 .dv = rows_of(gradient != nullptr ? gradient->v_BTHV : nothing, s, first, h, V),
                 .state = {states.data() + at, K, V},
                 .initial = {initial.data(), K, V}});
    }
  }
}

template <class Visit>
Result<Output> forward(const Input& in, const Visit& visit) {
  EVERLONG_RETURN_IF_ERROR(check_sizes(in, {}, {}));
  Output out;
  for_each_head(in, in.state_NHKV, {}, &out, nullptr, visit);
  return out;
}
template <class Visit>
Result<Gradient> backward(const Input& in, std::span<const double> grad_o,
                          std::span<const double> grad_state, const Visit& visit) {
  EVERLONG_RETURN_IF_ERROR(check_sizes(in, grad_o, grad_state));
  Gradient gradient;
  for_each_head(in, grad_state, grad_o, nullptr, &gradient, visit);
  return gradient;
}

Status check_chunk(Index chunk) {
  if (chunk < 1)
    return invalid_argument("lightning: chunk = ", chunk, "; at least 1 token is needed");
  return {};
}

// S' = lambda^m S + (diag(w) K)^T V over tokens [from, from + m), w_j = lambda^(m-1-j)
void fold(const Head& h, const Matrix& state, Index from, Index m) {
  state.scale(h.decay(m));
  for (Index j = 0; j < m; ++j) state.add_outer(h.decay(m - 1 - j), h.k, from + j, h.v, from + j);
}

}  // namespace

Result<Output> parallel(const Input& in) {
  return forward(in, [](const Head& h) {
    for (Index t = 0; t < h.tokens; ++t) {
      for (Index j = 0; j <= t; ++j)
        add(h.o, t, h.scale * h.decay(t - j) * dot(h.q, t, h.k, j), h.v, j);
      h.initial.add_transposed(h.o, h.scale * h.decay(t + 1), h.q, t);
    }
    h.state.scale(h.decay(h.tokens));
    for (Index j = 0; j < h.tokens; ++j)
      h.state.add_outer(h.decay(h.tokens - 1 - j), h.k, j, h.v, j);
  });
}

Result<Output> recurrent(const Input& in) {
  return forward(in, [](const Head& h) {
    for (Index t = 0; t < h.tokens; ++t) {
      h.state.scale(h.decay(1));
      h.state.add_outer(1.0, h.k, t, h.v, t);
      h.state.add_transposed(h.o, h.scale, h.q, t);
    }
  });
}

Result<Output> chunked(const Input& in, std::int64_t chunk) {
  EVERLONG_RETURN_IF_ERROR(check_chunk(chunk));
  return forward(in, [chunk](const Head& h) {
    for (Index from = 0; from < h.tokens; from += chunk) {
      const Index m = std::min(chunk, h.tokens - from);
      for (Index i = 0; i < m; ++i) {
        for (Index j = 0; j <= i; ++j)
          add(h.o, from + i, h.scale * h.decay(i - j) * dot(h.q, from + i, h.k, from + j), h.v,
              from + j);
        h.state.add_transposed(h.o, h.scale * h.decay(i + 1), h.q, from + i);
      }
      fold(h, h.state, from, m);
    }
  });
}

Result<Gradient> parallel_gradient(const Input& in, std::span<const double> grad_o,
                                   std::span<const double> grad_state) {
  return backward(in, grad_o, grad_state, [](const Head& h) {
    const Index last = h.tokens - 1;
    for (Index t = 0; t < h.tokens; ++t) {
      for (Index j = 0; j <= t; ++j) {
        const double weight = h.scale * h.decay(t - j);
        const double g = weight * dot(h.grad_o, t, h.v, j);
        add(h.dq, t, g, h.k, j);
        add(h.dk, j, g, h.q, t);
        add(h.dv, j, weight * dot(h.q, t, h.k, j), h.grad_o, t);
      }
      h.initial.add_product(h.dq, h.scale * h.decay(t + 1), h.grad_o, t);
      h.state.add_product(h.dk, h.decay(last - t), h.v, t);
      h.state.add_transposed(h.dv, h.decay(last - t), h.k, t);
    }
    h.state.scale(h.decay(h.tokens));
    for (Index t = 0; t < h.tokens; ++t)
      h.state.add_outer(h.scale * h.decay(t + 1), h.q, t, h.grad_o, t);
  });
}

Result<Gradient> recurrent_gradient(const Input& in, std::span<const double> grad_o,
                                    std::span<const double> grad_state) {
  return backward(in, grad_o, grad_state, [](const Head& h) {
    for (Index t = 0; t < h.tokens; ++t) {  // h.initial walks through S_t
      h.initial.scale(h.decay(1));
      h.initial.add_outer(1.0, h.k, t, h.v, t);
      h.initial.add_product(h.dq, h.scale, h.grad_o, t);
    }
    for (Index t = h.tokens - 1; t >= 0; --t) {  // h.state walks back through dL/dS_t
      h.state.add_outer(h.scale, h.q, t, h.grad_o, t);
      h.state.add_product(h.dk, 1.0, h.v, t);
      h.state.add_transposed(h.dv, 1.0, h.k, t);
      h.state.scale(h.decay(1));
    }
  });
}

Result<Gradient> chunked_gradient(const Input& in, std::int64_t chunk,
                                  std::span<const double> grad_o,
                                  std::span<const double> grad_state) {
  EVERLONG_RETURN_IF_ERROR(check_chunk(chunk));
  return backward(in, grad_o, grad_state, [chunk](const Head& h) {
    for (Index from = 0; from < h.tokens; from += chunk) {  // dQ needs S before each chunk
      const Index m = std::min(chunk, h.tokens - from);
      for (Index i = 0; i < m; ++i)
        h.initial.add_product(h.dq, h.scale * h.decay(i + 1), h.grad_o, from + i);
      fold(h, h.initial, from, m);
    }
    const Index chunks = (h.tokens + chunk - 1) / chunk;
    for (Index from = (chunks - 1) * chunk; from >= 0; from -= chunk) {
      const Index m = std::min(chunk, h.tokens - from);
      for (Index i = 0; i < m; ++i)
        for (Index j = 0; j <= i; ++j) {
          const double weight = h.scale * h.decay(i - j);
          const double g = weight * dot(h.grad_o, from + i, h.v, from + j);
          add(h.dq, from + i, g, h.k, from + j);
          add(h.dk, from + j, g, h.q, from + i);
          add(h.dv, from + j, weight * dot(h.q, from + i, h.k, from + j), h.grad_o, from + i);
        }
      for (Index j = 0; j < m; ++j) {  // R = dL/dS after the chunk
        h.state.add_product(h.dk, h.decay(m - 1 - j), h.v, from + j);
        h.state.add_transposed(h.dv, h.decay(m - 1 - j), h.k, from + j);
      }
      h.state.scale(h.decay(m));
      for (Index i = 0; i < m; ++i)
        h.state.add_outer(h.scale * h.decay(i + 1), h.q, from + i, h.grad_o, from + i);
    }
  });
}

}  // namespace everlong::lightning::reference
