// csrc/ptx_sm90.cuh for a CPU. How operands lie in memory and which element a thread holds: PTX ISA, "Matrix descriptor" and
// wgmma.m64n192k16.
#pragma once

#include "cuda.h"

namespace fastedit {

inline uint32_t rank_in_cluster() { return cuda_on_cpu::current->rank; }

inline void cluster_sync() {
    cuda_on_cpu::meet(cuda_on_cpu::cluster, static_cast<int>(cuda_on_cpu::blocks.size() * blockDim.x));
}

inline void barrier_init(uint32_t barrier, int arrivals) {
    cuda_on_cpu::block().barriers[barrier] = {arrivals, arrivals};
}

inline void barrier_init_done() {}

inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    auto& at = cuda_on_cpu::block().barriers.at(barrier);
    at.bytes += bytes, --at.pending;
    at.settle();
}

inline void barrier_arrive(uint32_t barrier, uint32_t rank) {
    auto& at = cuda_on_cpu::blocks.at(rank).barriers.at(barrier);
    if (--at.pending < 0) throw std::runtime_error("more arrivals than the barrier was made for");
    at.settle();
    for (auto rounds = cuda_on_cpu::random_order() % 8; rounds; --rounds)  // what was let go may be written to now
        cuda_on_cpu::wait_until([] { return true; });
}

inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    cuda_on_cpu::wait_until([&at = cuda_on_cpu::block().barriers.at(barrier), parity] { return at.phase % 2 != parity; });
}

inline void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, int plane, uint32_t barrier, uint16_t blocks) {
    cuda_on_cpu::in_flight.push_back([=, map = *map] {
        for (size_t rank = 0; rank < cuda_on_cpu::blocks.size(); ++rank) {
            if (!(blocks >> rank & 1)) continue;
            auto& block = cuda_on_cpu::blocks[rank];
            for (uint32_t r = 0; r < map.box[1]; ++r)
                for (uint32_t c = 0; c < map.box[0]; ++c) {
                    const uint64_t x = column + c, y = row + r, z = plane;
                    uint8_t* at = &block.memory.at(cuda_on_cpu::permuted(to + r * 128 + c * 2));
                    if (x < map.sizes[0] && y < map.sizes[1] && z < map.sizes[2])
                        std::memcpy(at, map.base + x * 2 + y * map.bytes[1] + z * map.bytes[2], 2);
                    else
                        std::memset(at, 0, 2);
                }
            block.barriers.at(barrier).bytes -= map.box[0] * map.box[1] * 2;
            block.barriers.at(barrier).settle();
        }
    });
}

inline void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, int plane, uint32_t barrier) {
    copy_box(to, map, column, row, plane, barrier, static_cast<uint16_t>(1 << rank_in_cluster()));
}

template <int registers>
void give_registers() {}

template <int registers>
void take_registers() {}

inline void products_begin() {}

inline void products_commit() { cuda_on_cpu::commit(); }

template <int pending>
void products_wait() {
    cuda_on_cpu::finish(pending);
    cuda_on_cpu::meet(cuda_on_cpu::block().warps[cuda_on_cpu::warp()].all, 32);  // .sync: the warp waits as one
}

inline void products_done(float (&)[96]) {}

template <bool kHalf>
void multiply_add(float (&sum)[96], uint64_t a, uint64_t b, bool add) {
    cuda_on_cpu::current->open.push_back([&sum, a, b, add] {
        const auto element = [](uint64_t descriptor, int k, int column) {
            const auto field = [&](int from) { return static_cast<uint32_t>(descriptor >> from & 0x3fff) << 4; };
            if (descriptor >> 62 != 1 || descriptor >> 49 & 7) throw std::runtime_error("not chunks permuted in 128 bytes");
            const uint32_t at = field(0) + column / 64 * field(16) + k / 8 * field(32) + k % 8 * 128 + column % 64 * 2;
            uint16_t bits;
            std::memcpy(&bits, &cuda_on_cpu::block().memory.at(cuda_on_cpu::permuted(at)), 2);
            return cuda_on_cpu::number(bits, kHalf);
        };
        const int lane = cuda_on_cpu::lane(), warp = cuda_on_cpu::warp() % 4;
        double left[16][2], total[96];
        for (int e = 0; e < 96; ++e) total[e] = add ? sum[e] : 0;
        for (int k = 0; k < 16; ++k) {
            for (int half = 0; half < 2; ++half) left[k][half] = element(a, k, warp * 16 + lane / 4 + half * 8);
            for (int n = 0; n < 48; ++n) {  // columns
                const double right = element(b, k, n / 2 * 8 + lane % 4 * 2 + n % 2);
                for (int half = 0; half < 2; ++half) total[n / 2 * 4 + half * 2 + n % 2] += left[k][half] * right;
            }
        }
        for (int e = 0; e < 96; ++e) sum[e] = cuda_on_cpu::nearest_zero(total[e]);
    });
}

}  // namespace fastedit
