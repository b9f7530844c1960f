// The instructions of sm_90a that CUDA C++ has no name for: barriers that count bytes, copies of boxes, warpgroup products.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fastedit {

__device__ inline uint32_t rank_in_cluster() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// makes the barriers' first state known to the cluster and to copies, before cluster_sync
__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// one arrival, and `bytes` that copies into this block's memory bring
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// an arrival at the barrier of the same address in block `rank` of the cluster. It and the wait below have the scope of
// the block: with the cluster's, ptxas waits for all of the GPU's memory and empties L1, for stores that there are none
// of, since copies bring the data and products, ended by their wait, read it
__device__ inline void barrier_arrive(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// until the phase of this parity is over
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t over;
    do asm volatile(
        "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.b32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
    while (!over);
}

// the box of a tensor map at (column, row, plane), into this block's memory; what is out of bounds is zero
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, int plane, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier)
        : "memory");
}

// the same, into the memory of every block whose bit of `blocks` is set, and counted at the barrier of each
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, int column, int row, int plane, uint32_t barrier,
                                uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier), "h"(blocks)
        : "memory");
}

template <int registers>
__device__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// until at most `pending` committed groups run
template <int pending>
__device__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// after products_wait<0>: what reads `sum` stays after it
__device__ inline void products_done(float (&sum)[96]) {
#pragma unroll
    for (int e = 0; e < 96; ++e) asm volatile("" : "+f"(sum[e])::"memory");
}

// sum [64, 192] (of the warpgroup) = aᵀ b, of fp16 or bf16, added to sum where `add`; a [16, 64] and b [16, 192] by their
// matrix descriptors, columns side by side in memory
template <bool kHalf>
__device__ void multiply_add(float (&sum)[96], uint64_t a, uint64_t b, bool add) {
#define FASTEDIT_4(e) "+f"(sum[e]), "+f"(sum[e + 1]), "+f"(sum[e + 2]), "+f"(sum[e + 3])
#define FASTEDIT_16(e) FASTEDIT_4(e), FASTEDIT_4(e + 4), FASTEDIT_4(e + 8), FASTEDIT_4(e + 12)
#define FASTEDIT_WGMMA(type)                                                                                         \
    asm volatile(                                                                                                    \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %98, 0;\n"                                                             \
        "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type " {"                                            \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                     \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                           \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                           \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                           \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                           \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "                          \
        "%96, %97, add, 1, 1, 1, 1;\n}"                                                                              \
        : FASTEDIT_16(0), FASTEDIT_16(16), FASTEDIT_16(32), FASTEDIT_16(48), FASTEDIT_16(64), FASTEDIT_16(80)        \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)))
    if constexpr (kHalf)
        FASTEDIT_WGMMA("f16");
    else
        FASTEDIT_WGMMA("bf16");
#undef FASTEDIT_WGMMA
#undef FASTEDIT_16
#undef FASTEDIT_4
}

}  // namespace fastedit
