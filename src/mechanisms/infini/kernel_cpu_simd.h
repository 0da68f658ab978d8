// The units of work of the CPU kernel, dispatched to the machine's vectors.
#pragma once
#include "mechanisms/infini/kernel.h"

namespace everlong::infini {

// Scratch of one thread, aligned to 64 bytes.
std::int64_t read_scratch_bytes(std::int64_t key_dim, std::int64_t value_dim);
std::int64_t write_scratch_bytes(std::int64_t key_dim, std::int64_t value_dim);

// Rows [first, last) of (token, head of the group) of segment p and key head g.
void read_unit(const ReadCall& call, const TensorView& out, std::int64_t p, std::int64_t g,
               std::int64_t first, std::int64_t last, std::byte* scratch);
void read_backward_unit(const ReadCall& call, const ReadGrads& grads, std::int64_t p,
                        std::int64_t g, std::byte* scratch);
void write_unit(const WriteCall& call, const TensorView& M, const TensorView& z, std::int64_t p,
                std::int64_t g, std::byte* scratch);
void write_backward_unit(const WriteCall& call, const WriteGrads& grads, std::int64_t p,
                         std::int64_t g, std::byte* scratch);

}  // namespace everlong::infini
