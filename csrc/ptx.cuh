// The instructions of sm_80 that CUDA C++ has no name for.
#pragma once

#include <cstdint>

namespace fastedit {

// what the launch gave, from the first 1,024-byte boundary: the same address in every block of a cluster
__device__ inline uint32_t dynamic_shared() {
    extern __shared__ uint8_t bytes[];
    return (static_cast<uint32_t>(__cvta_generic_to_shared(bytes)) + 1023) & ~1023u;
}

// 16 bytes of which the first `bytes` are read and the rest is zero
__device__ inline void copy_async(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// until at most `pending` groups are on their way
template <int pending>
__device__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// four 8 × 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8
__device__ inline void load_transposed(uint32_t (&x)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(from)
                 : "memory");
}

// sum [16, 8] += a [16, 16] b [16, 8], of fp16 or bf16
template <bool kHalf>
__device__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define FASTEDIT_MMA(type)                                                                                        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
                 "{%8, %9}, {%0, %1, %2, %3};"                                                                    \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (kHalf)
        FASTEDIT_MMA("f16");
    else
        FASTEDIT_MMA("bf16");
#undef FASTEDIT_MMA
}

}  // namespace fastedit
