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
    struct {
        uint32_t (&x)[4], from;
    } mine{x, from};
    cuda_on_cpu::together(mine, [](auto of) {
        for (int row = 0; row < 32; ++row) {  // 8 elements for 8 quads of lanes
            uint16_t elements[8];
            std::memcpy(elements, &cuda_on_cpu::block().memory.at(of(row).from), 16);
            for (int quad = 0; quad < 8; ++quad) {
                uint32_t& x = of(quad * 4 + row % 8 / 2).x[row / 8];
                std::memcpy(reinterpret_cast<uint8_t*>(&x) + row % 2 * 2, &elements[quad], 2);
            }
        }
    });
}

template <bool kHalf>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct {
        float (&sum)[4];
        uint16_t a[8], b[4];
    } mine{sum, {}, {}};
    std::memcpy(mine.a, a, 16), std::memcpy(mine.b, &b0, 4), std::memcpy(mine.b + 2, &b1, 4);
    cuda_on_cpu::together(mine, [](auto of) {
        double left[16][16], right[16][8], total[16][8];  // [k][row], [k][column], [row][column]
        for (int lane = 0; lane < 32; ++lane) {
            for (int e = 0; e < 8; ++e)
                left[lane % 4 * 2 + e / 4 * 8 + e % 2][lane / 4 + e / 2 % 2 * 8] = cuda_on_cpu::number(of(lane).a[e], kHalf);
            for (int e = 0; e < 4; ++e)
                right[lane % 4 * 2 + e / 2 * 8 + e % 2][lane / 4] = cuda_on_cpu::number(of(lane).b[e], kHalf);
            for (int e = 0; e < 4; ++e) total[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2] = of(lane).sum[e];
        }
        for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k)
                for (int column = 0; column < 8; ++column) total[row][column] += left[k][row] * right[k][column];
        for (int lane = 0; lane < 32; ++lane)
            for (int e = 0; e < 4; ++e)
                of(lane).sum[e] = cuda_on_cpu::nearest_zero(total[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2]);
    });
}

}  // namespace fastedit
