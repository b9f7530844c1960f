// csrc/ptx.cuh for a CPU. Which element of a fragment a lane holds: PTX ISA, mma.m16n8k16 and ldmatrix.
#pragma once

#include "cuda_runtime.h"

namespace fastedit {

inline uint32_t dynamic_shared() { return 1024; }

inline void copy_async(uint32_t to, const void* from, int bytes) {
    cuda_on_cpu::current->open.push_back([=, memory = cuda_on_cpu::block().memory.data()] {
        std::memset(memory + to, 0, 16);
        std::memcpy(memory + to, from, bytes);
    });
}

inline void commit_copies() { cuda_on_cpu::commit(); }

template <int pending>
void wait_copies() {
    cuda_on_cpu::finish(pending);
}

inline void load_transposed(uint32_t (&x)[4], uint32_t from) {
    cuda_on_cpu::exchange(from, [&](auto of) {
        const int lane = cuda_on_cpu::lane();
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t pair[2];
            for (int e = 0; e < 2; ++e)
                std::memcpy(&pair[e], &cuda_on_cpu::block().memory.at(of(matrix * 8 + lane % 4 * 2 + e) + lane / 4 * 2), 2);
            std::memcpy(&x[matrix], pair, 4);
        }
    });
}

template <bool kHalf>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Fragments {
        uint16_t a[8], b[4];
    } mine;
    std::memcpy(mine.a, a, 16), std::memcpy(mine.b, &b0, 4), std::memcpy(mine.b + 2, &b1, 4);
    cuda_on_cpu::exchange(mine, [&](auto of) {
        const int lane = cuda_on_cpu::lane();
        for (int e = 0; e < 4; ++e) {
            const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
            double total = sum[e];
            for (int k = 0; k < 16; ++k) {
                const uint16_t left = of(row % 8 * 4 + k % 8 / 2).a[k / 8 * 4 + row / 8 * 2 + k % 2];
                const uint16_t right = of(column * 4 + k % 8 / 2).b[k / 8 * 2 + k % 2];
                total += cuda_on_cpu::number(left, kHalf) * cuda_on_cpu::number(right, kHalf);
            }
            sum[e] = cuda_on_cpu::nearest_zero(total);
        }
    });
}

}  // namespace fastedit
