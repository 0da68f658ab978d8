// Products of small tiles in shared memory by the tensor cores of sm_80 and later, one warp at a
// time (mma.sync). Pitches count elements. An operand is "by k" where the summed index is
// contiguous in memory, "across k" where the other one is.
//
// Tile, what a tile holds, says how it is multiplied:
//   bf16   as it is;
//   float  kSplit: as two tf32 numbers of 11 bits each, the product of the two small ones left out,
//          so good to 2^-22; else rounded to one, which fp16 numbers fit exactly.
// Sums are fp32. Fragment layouts: PTX ISA, mma.m16n8k16 (bf16) and mma.m16n8k8 (tf32).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace everlong::lightning::sweep {

__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

template <class Tile, bool kSplit>
struct Product;

template <>
struct Product<__nv_bfloat16, false> {
  using Tile = __nv_bfloat16;
  static constexpr int kDepth = 16;  // k of one instruction
  struct Left {                      // 16 rows
    std::uint32_t at[4];
  };
  struct Right {  // 8 columns
    std::uint32_t at[2];
  };

  __device__ static Left left_by_k(const Tile* from, int pitch) {
    Left a;
    const int lane = lane_of_warp();
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a.at[0]), "=r"(a.at[1]), "=r"(a.at[2]), "=r"(a.at[3])
                 : "r"(shared_address(from + lane % 16 * pitch + lane / 16 * 8))
                 : "memory");
    return a;
  }
  // Each k times its weight.
  __device__ static Left left_across_k(const Tile* from, int pitch, const float* weight) {
    Left a;
    const int lane = lane_of_warp();
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a.at[0]), "=r"(a.at[1]), "=r"(a.at[2]), "=r"(a.at[3])
                 : "r"(shared_address(from + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8))
                 : "memory");
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* w = weight + i / 2 * 8 + lane % 4 * 2;
      const float2 x = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(a.at[i]));
      const __nv_bfloat162 y = __floats2bfloat162_rn(x.x * w[0], x.y * w[1]);
      a.at[i] = reinterpret_cast<const std::uint32_t&>(y);
    }
    return a;
  }
  __device__ static Right right_by_k(const Tile* from, int pitch) {
    Right b;
    const int lane = lane_of_warp() % 16;
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(b.at[0]), "=r"(b.at[1])
                 : "r"(shared_address(from + lane % 8 * pitch + lane / 8 * 8))
                 : "memory");
    return b;
  }
  __device__ static Right right_across_k(const Tile* from, int pitch) {
    Right b;
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(b.at[0]), "=r"(b.at[1])
                 : "r"(shared_address(from + lane_of_warp() % 16 * pitch))
                 : "memory");
    return b;
  }
  __device__ static void add(float (&d)[4], const Left& a, const Right& b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]));
  }
};

template <bool kSplit>
struct Product<float, kSplit> {
  using Tile = float;
  static constexpr int kDepth = 8;
  static constexpr int kParts = kSplit ? 2 : 1;
  struct Left {
    std::uint32_t at[kParts][4];
  };
  struct Right {
    std::uint32_t at[kParts][2];
  };

  __device__ static std::uint32_t rounded(float x) {
    std::uint32_t out;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
    return out;
  }
  template <int kCount>
  __device__ static void put(std::uint32_t (&to)[kParts][kCount], int i, float x) {
    to[0][i] = rounded(x);
    if constexpr (kSplit) to[1][i] = rounded(x - __uint_as_float(to[0][i]));
  }
  __device__ static Left left_by_k(const Tile* from, int pitch) {
    Left a;
    const Tile* x = from + lane_of_warp() / 4 * pitch + lane_of_warp() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) put(a.at, i, x[i % 2 * 8 * pitch + i / 2 * 4]);
    return a;
  }
  __device__ static Left left_across_k(const Tile* from, int pitch, const float* weight) {
    Left a;
    const int row = lane_of_warp() / 4, k = lane_of_warp() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      put(a.at, i, from[(k + i / 2 * 4) * pitch + row + i % 2 * 8] * weight[k + i / 2 * 4]);
    return a;
  }
  __device__ static Right right_by_k(const Tile* from, int pitch) {
    Right b;
    const Tile* x = from + lane_of_warp() / 4 * pitch + lane_of_warp() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) put(b.at, i, x[i * 4]);
    return b;
  }
  __device__ static Right right_across_k(const Tile* from, int pitch) {
    Right b;
    const Tile* x = from + lane_of_warp() % 4 * pitch + lane_of_warp() / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) put(b.at, i, x[i * 4 * pitch]);
    return b;
  }
  __device__ static void multiply(float (&d)[4], const std::uint32_t (&a)[4],
                                  const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  __device__ static void add(float (&d)[4], const Left& a, const Right& b) {
    if constexpr (kSplit) {
      multiply(d, a.at[1], b.at[0]);
      multiply(d, a.at[0], b.at[1]);
    }
    multiply(d, a.at[0], b.at[0]);
  }
};

// Where a thread's four sums of a 16 x 8 tile lie.
__device__ inline int row_of(int i) { return lane_of_warp() / 4 + i / 2 * 8; }
__device__ inline int column_of(int i) { return lane_of_warp() % 4 * 2 + i % 2; }

__device__ inline float as_float(float x) { return x; }
__device__ inline float as_float(__half x) { return __half2float(x); }
__device__ inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class Element>
__device__ Element as(float x) {
  return static_cast<Element>(x);
}

// Two neighbours, the first at an even place.
__device__ inline void store_pair(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}
__device__ inline void store_pair(__nv_bfloat16* to, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b);
}
__device__ inline void store_pair(__half* to, float a, float b) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b);
}

// rows x columns of `from`, token_stride apart, to a tile of kRows x kColumns; zero beyond them.
// aligned: 16 bytes at a time, which the pointer, the stride and `columns` must then allow. The
// copies may be under way on return: wait_for_tiles(). Unrolled, their addresses take registers.
template <int kRows, int kColumns, int kThreads, int kUnroll, class Element, class Tile>
__device__ void load_tile(Tile* to, int pitch, const Element* from, std::int64_t token_stride,
                          int rows, int columns, bool aligned) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(Element));
  if (aligned) {
    constexpr int kPieces = kColumns / kPiece;
#pragma unroll(sizeof(Tile) == sizeof(Element) ? kUnroll : 4)
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kPieces; i += kThreads) {
      const int row = i / kPieces, column = i % kPieces * kPiece;
      const bool there = row < rows && column < columns;
      const Element* at = there ? from + row * token_stride + column : from;
      if constexpr (sizeof(Tile) == sizeof(Element)) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                         shared_address(to + row * pitch + column)),
                     "l"(at), "r"(there ? 16 : 0)
                     : "memory");
      } else {
        alignas(16) Element piece[kPiece];
        *reinterpret_cast<uint4*>(piece) = there ? *reinterpret_cast<const uint4*>(at) : uint4{};
#pragma unroll
        for (int e = 0; e < kPiece; ++e) to[row * pitch + column + e] = as_float(piece[e]);
      }
    }
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kThreads) {
    const int row = i / kColumns, column = i % kColumns;
    const bool there = row < rows && column < columns;
    to[row * pitch + column] = as<Tile>(there ? as_float(from[row * token_stride + column]) : 0.0f);
  }
}
__device__ inline void wait_for_tiles() {
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
}

}  // namespace everlong::lightning::sweep
