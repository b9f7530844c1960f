// total += rowsᵀ rows on sm_90a, lower triangle: TMA brings the rows, wgmma multiplies them, sums in fp32, total in fp64.
//
// A cluster of two blocks makes 256 × 192 of the total, each block 128 of its rows; clusters stay and take tiles in turn.
// One thread of a block fetches STAGES ahead: its own 128 columns, and half of the rows of the 192 that both blocks need,
// which it sends to both. Two warpgroups multiply 64 × 192 each: an operand of wgmma is a column block of the rows as it
// lies in memory. Where tiles are fewer than clusters, a tile's rows are split, and the parts are added up afterwards.

#include "syrk_wgmma.h"

#include <cuda.h>

#include <algorithm>
#include <stdexcept>

#include "cuda_launch.h"
#include "planes.cuh"
#include "ptx.cuh"
#include "ptx_sm90.cuh"

namespace fastedit::wgmma {

constexpr int kTileI = 128, kTileJ = 192;   // of a block; a block below has the same columns
constexpr int kBlocks = 2;                  // of a cluster
constexpr int kGroups = 2;                  // warpgroups that multiply
constexpr int kThreads = (1 + kGroups) * 128;
constexpr int kStageRows = kZeroRows, kStages = 5;
constexpr int kBoxColumns = 64, kBoxRows = kStageRows / kBlocks;  // 128 bytes wide: as far as chunks are permuted
constexpr int kBoxBytes = kBoxRows * kBoxColumns * 2;
constexpr int kColumnBytes = kBlocks * kBoxBytes;  // 64 columns of a stage
constexpr int kLeft = kTileI / kBoxColumns, kRight = kTileJ / kBoxColumns;
constexpr int kStageBytes = (kLeft + kRight) * kColumnBytes;
constexpr int kSharedBytes = kStages * (kStageBytes + 2 * 8) + 1024;
constexpr int kSuper = 4;  // rows of tiles that are taken together: their operands stay in the L2 cache
constexpr int kPromoteRows = 2 * kStageRows;

struct Tile {
    int row, column;  // in units of kBlocks × kTileI and of kTileJ
};

__host__ __device__ inline int rows_of(int d) { return (d + kBlocks * kTileI - 1) / (kBlocks * kTileI); }

// tiles of a row of them that hold something of the lower triangle
__host__ __device__ inline int width_of(int row, int d) { return (min(d, (row + 1) * kBlocks * kTileI) - 1) / kTileJ + 1; }

// tiles of kSuper rows from `top`
__host__ __device__ inline int tiles_of(int top, int d) {
    int tiles = 0;
    for (int row = top; row < min(top + kSuper, rows_of(d)); ++row) tiles += width_of(row, d);
    return tiles;
}

// kSuper rows of tiles after the other, in them column after column
__host__ __device__ inline Tile tile_of(int index, int d) {
    int top = 0;
    for (int tiles; index >= (tiles = tiles_of(top, d)); top += kSuper) index -= tiles;
    const int height = min(kSuper, rows_of(d) - top), full = width_of(top, d);
    if (index < full * height) return {top + index % height, index / height};
    index -= full * height;
    for (int column = full;; ++column)
        for (int row = top; row < top + height; ++row)
            if (column < width_of(row, d) && index-- == 0) return {row, column};
}

// A tile and the rows that are summed for it, as producer and consumers of both blocks see them.
struct Share {
    int i0, j0, split, per_term, steps;
    int64_t start;

    __device__ Share(const Work& w, int index, int tiles) {
        const Tile tile = tile_of(index % tiles, w.d);
        i0 = tile.row * kBlocks * kTileI, j0 = tile.column * kTileJ, split = index / tiles;
        const int64_t left = (w.kept_count ? *w.kept_count : w.rows) - w.first;
        const int rows = static_cast<int>(max(int64_t{0}, min(left, int64_t{w.most})));
        const int each = (rows + w.splits * kPromoteRows - 1) / (w.splits * kPromoteRows) * kPromoteRows;
        start = w.first + split * each;
        per_term = (max(0, min(each, rows - split * each)) + kStageRows - 1) / kStageRows;
        steps = per_term * w.terms;
    }
};

// Matrix descriptor of 16-bit columns side by side: 64 to a row of 128 bytes, its chunks of 16 bytes permuted by the row's
// number; kColumnBytes from 64 columns to the next 64, 1,024 from 8 rows to the next 8.
__device__ inline uint64_t operand(uint32_t address) {
    return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{kColumnBytes >> 4} << 16) | (address >> 4);
}

// The stage of a step and how often all have been gone through.
struct Turn {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void next() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

__device__ inline void produce(const CUtensorMap* map, const Work& w, int units, int tiles, uint32_t stages, uint32_t full,
                               uint32_t empty) {
    const int rank = rank_in_cluster();
    Turn turn;
    for (int unit = blockIdx.x / kBlocks; unit < units; unit += gridDim.x / kBlocks) {
        const Share share(w, unit, tiles);
        for (int step = 0; step < share.steps; ++step, turn.next()) {
            const uint32_t to = stages + turn.stage * kStageBytes, arrived = full + turn.stage * 8;
            const int before = step / share.per_term, term = w.terms - 1 - before;  // the smallest first
            const int row = static_cast<int>(share.start) + (step - before * share.per_term) * kStageRows;
            barrier_wait(empty + turn.stage * 8, turn.parity ^ 1);
            barrier_expect(arrived, kStageBytes);
            for (int box = 0; box < kLeft * kBlocks; ++box)
                copy_box(to + box * kBoxBytes, map, share.i0 + rank * kTileI + box / kBlocks * kBoxColumns,
                         row + box % kBlocks * kBoxRows, kLeftPlane[term], arrived);
            for (int box = 0; box < kRight; ++box)
                copy_box(to + kLeft * kColumnBytes + box * kColumnBytes + rank * kBoxBytes, map,
                         share.j0 + box * kBoxColumns, row + rank * kBoxRows, kRightPlane[term], arrived,
                         static_cast<uint16_t>((1 << kBlocks) - 1));
        }
    }
}

// sum: [8 columns of the tile][rows lane / 4 and + 8 of the warp's 16][two columns of a lane]; kWhole: all of it is below
// the diagonal, and two columns of the total lie on 16 bytes
template <bool kWhole>
__device__ void add_to_total(const float (&sum)[96], double* total, int half, int i, int column) {
    constexpr int kBatch = 8;  // reads on their way before the first write
#pragma unroll
    for (int first = 0; first < kTileJ / 8; first += kBatch) {
        double2 old[kBatch];
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
            const int j = column + (first + n) * 8;
            if constexpr (kWhole) old[n] = __ldcg(reinterpret_cast<const double2*>(total + j));
            else old[n] = {j <= i ? total[j] : 0, j < i ? total[j + 1] : 0};
        }
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
            const int j = column + (first + n) * 8, e = (first + n) * 4 + half * 2;
            const double2 now = {old[n].x + static_cast<double>(sum[e]), old[n].y + static_cast<double>(sum[e + 1])};
            if constexpr (kWhole) __stcg(reinterpret_cast<double2*>(total + j), now);
            else {
                if (j <= i) total[j] = now.x;
                if (j < i) total[j + 1] = now.y;
            }
        }
    }
}

__device__ inline void store(const float (&sum)[96], const Work& w, const Share& share, int row, int lane) {
    const bool aligned = w.d % 2 == 0 && reinterpret_cast<uintptr_t>(w.total) % 16 == 0;
    const int column = share.j0 + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int i = row + lane / 4 + half * 8;
        if (i >= w.d) continue;
        const int64_t line = static_cast<int64_t>(i) * w.d;
        if (w.splits > 1) {
            float* part = w.parts + share.split * (static_cast<int64_t>(w.d) * w.d) + line;
#pragma unroll
            for (int e = 0; e < kTileJ / 4; ++e)
                if (const int j = column + e / 2 * 8 + e % 2; j <= i) part[j] = sum[e / 2 * 4 + half * 2 + e % 2];
        } else if (aligned && share.j0 + kTileJ <= row) {
            add_to_total<true>(sum, w.total + line, half, i, column);
        } else {
            add_to_total<false>(sum, w.total + line, half, i, column);
        }
    }
}

template <bool kHalf>
__device__ void consume(const Work& w, int units, int tiles, uint32_t stages, uint32_t full, uint32_t empty) {
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    Turn turn;
    float part[96] = {};
    const auto multiply = [&](bool add) {
        const uint32_t stage = stages + turn.stage * kStageBytes;
        const uint64_t a = operand(stage + group * kColumnBytes);
        const uint64_t b = operand(stage + kLeft * kColumnBytes);
        barrier_wait(full + turn.stage * 8, turn.parity);
        products_begin();
#pragma unroll
        for (int k = 0; k < kStageRows / 16; ++k)  // 16 rows of 128 bytes on, in units of 16 bytes
            multiply_add<kHalf>(part, a + k * 128, b + k * 128, add || k > 0);
        products_commit();
        turn.next();
    };
    const auto release = [&](int stage) {
        if (lane < kBlocks) barrier_arrive(empty + stage * 8, lane);
    };
    for (int unit = blockIdx.x / kBlocks; unit < units; unit += gridDim.x / kBlocks) {
        const Share share(w, unit, tiles);
        float sum[96] = {};
        // tensor cores truncate their sums: after 128 rows these go, rounded, into another. The second group is 64 rows
        // off, so that one multiplies while the other adds
        for (int step = 0; step < share.steps;) {
            const int first = turn.stage;
            const bool two = step + 1 < share.steps && (group == 0 || step > 0);
            multiply(false);
            if (two) {
                multiply(true);
                products_wait<1>();
                release(first);
            }
            products_wait<0>();
            products_done(part);
            release(two ? (first + 1) % kStages : first);
            step += 1 + two;
#pragma unroll
            for (int e = 0; e < 96; ++e) sum[e] += part[e];
        }
        const int row = share.i0 + static_cast<int>(rank_in_cluster()) * kTileI + group * 64 + warp * 16;
        if (share.steps || w.splits > 1) store(sum, w, share, row, lane);
    }
}

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 1)
    syrk_wgmma_kernel(const __grid_constant__ CUtensorMap map, const Work w, int tiles) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const uint32_t stages = dynamic_shared(), full = stages + kStages * kStageBytes, empty = full + kStages * 8;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            barrier_init(full + stage * 8, 1);
            barrier_init(empty + stage * 8, kBlocks * kGroups * 4);  // the warps that multiply, of both blocks
        }
        barrier_init_done();
    }
    cluster_sync();
    if (threadIdx.x < 128) {
        give_registers<40>();
        if (threadIdx.x == 0) produce(&map, w, tiles * w.splits, tiles, stages, full, empty);
    } else {
        take_registers<232>();
        consume<kHalf>(w, tiles * w.splits, tiles, stages, full, empty);
    }
    cluster_sync();  // no block's memory goes while the other may still send to it or arrive in it
#else
    __trap();  // compiled for something else; the caller asks for sm_90a first
#endif
}

// total += the parts, in their order
__global__ void add_kernel(double* total, const float* parts, int splits, int d) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    for (int i = blockIdx.y; i < d; i += gridDim.y) {
        if (j > i) continue;
        const int64_t at = static_cast<int64_t>(i) * d + j;
        double sum = 0;
        for (int split = 0; split < splits; ++split) sum += parts[split * (static_cast<int64_t>(d) * d) + at];
        total[at] += sum;
    }
}

inline int tiles_in(int d) {
    int tiles = 0;
    for (int top = 0; top < rows_of(d); top += kSuper) tiles += tiles_of(top, d);
    return tiles;
}

int splits_for(int d, int64_t rows, int processors) {
    const int64_t by_rows = rows / 1024, by_clusters = processors / kBlocks / tiles_in(d);
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({by_rows, by_clusters, 8})));
}

inline CUtensorMap map_of(const void* planes, bool half, int64_t d, int64_t rows, int64_t stride, int count, int64_t plane) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("CUDA: the driver knows no tensor maps");
    const cuuint64_t sizes[3] = {cuuint64_t(d), cuuint64_t(rows), cuuint64_t(count)};
    const cuuint64_t bytes[2] = {cuuint64_t(stride) * 2, cuuint64_t(plane) * 2};
    const cuuint32_t box[3] = {kBoxColumns, kBoxRows, 1}, every[3] = {1, 1, 1};
    CUtensorMap map;
    const CUresult status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
        &map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(planes), sizes,
        bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) throw std::runtime_error("CUDA: no tensor map, driver's error " + std::to_string(status));
    return map;
}

void run(Work work, const void* planes, bool half, int64_t stride, int64_t plane_size, int processors,
         cudaStream_t stream) {
    // 16-bit rows are one plane; the driver may refuse a stride of 0 all the same
    const int64_t plane = work.terms == 6 ? plane_size : work.rows * stride;
    const CUtensorMap map = map_of(planes, half, work.d, work.rows, stride, work.terms == 6 ? 3 : 1, plane);
    const int tiles = tiles_in(work.d), clusters = std::min(tiles * work.splits, std::max(1, processors / kBlocks));
    const auto kernel = half ? syrk_wgmma_kernel<true> : syrk_wgmma_kernel<false>;
    for (; work.first < work.rows; work.first += work.most) {
        launch(kernel, {unsigned(clusters * kBlocks), kThreads, kSharedBytes, kBlocks}, stream, map, work, tiles);
        if (work.splits > 1)
            launch(add_kernel, {dim3((work.d + 255) / 256, std::min(work.d, 4096)), 256}, stream, work.total,
                   static_cast<const float*>(work.parts), work.splits, work.d);
    }
}

}  // namespace fastedit::wgmma
