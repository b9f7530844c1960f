// total += rowsᵀ rows on the GPU, lower triangle. Here: which rows count, fp32 rows as 16-bit ones, and the products by
// mma.sync, with sums in fp32 and the total in fp64, for what is not sm_90a.
//
// One thread block makes one TILE × TILE tile of the total. Rows come by cp.async, STAGES of them ahead of the products,
// through a list of the rows that count; an operand of mma is a column block of the rows, transposed by ldmatrix. fp32
// rows are first split into three bf16 planes, x = a + b + c, of whose nine products the six that fp32 can see are summed.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_launch.h"
#include "planes.cuh"
#include "ptx.cuh"
#include "syrk.h"
#include "syrk_wgmma.h"

namespace fastedit {
namespace {

constexpr int kTile = 128;         // columns of an operand
constexpr int kStageRows = 32;     // rows that one stage holds of both operands
constexpr int kStages = 4;
constexpr int kThreads = 256;      // 2 × 4 warps, each of a 64 × 32 part of the tile
constexpr int kPromoteStages = 4;  // tensor cores truncate their sums: after 128 rows these go, rounded, into another
constexpr int kSuper = 8;          // tiles are taken in squares of kSuper × kSuper, whose operands the L2 cache holds
constexpr int64_t kLaunchRows = 8192;  // rows summed in fp32 before the fp64 total
constexpr int kChunkBytes = 16;        // of one cp.async: 8 elements
constexpr int kRowBytes = kTile * 2;
constexpr int kOperandBytes = kStageRows * kRowBytes;
constexpr int kSharedBytes = kStages * 2 * kOperandBytes + 1024;

struct Problem {
    double* total;             // [d, d]
    const uint16_t* planes;    // [planes, rows, stride] of bf16 or fp16, rows 16-byte aligned
    int64_t plane_size, stride;
    const int* kept;           // rows that count, or null for all
    const int* kept_count;     // on the device, or null for `rows`
    int64_t first, rows;
    int d, terms;
};

// Byte offset of 8 columns in an operand of a stage: rows of 256 bytes would meet in one bank, so chunks are permuted.
__device__ int offset_of(int row, int chunk) { return row * kRowBytes + (chunk ^ (row & 7)) * kChunkBytes; }

template <bool kHalf>
__global__ void __launch_bounds__(kThreads, 1) syrk_kernel(const Problem p) {
    // squares of kSuper × kSuper tiles, lower ones only; then the tile of this block in its square
    const int square = blockIdx.x / (kSuper * kSuper), within = blockIdx.x % (kSuper * kSuper);
    int square_row = static_cast<int>((sqrtf(8.0f * square + 1.0f) - 1.0f) * 0.5f);
    while (square_row * (square_row + 1) / 2 > square) --square_row;
    while ((square_row + 1) * (square_row + 2) / 2 <= square) ++square_row;
    const int square_column = square - square_row * (square_row + 1) / 2;
    const int i0 = (square_row * kSuper + within / kSuper) * kTile, j0 = (square_column * kSuper + within % kSuper) * kTile;
    if (j0 > i0 || i0 >= p.d) return;

    const int64_t available = (p.kept_count ? *p.kept_count : p.rows) - p.first;
    const int count = static_cast<int>(available < kLaunchRows ? available : kLaunchRows);
    if (count <= 0) return;
    const int steps_per_term = (count + kStageRows - 1) / kStageRows, steps = steps_per_term * p.terms;

    const uint32_t shared = dynamic_shared();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_i = warp / 4 * 64, warp_j = warp % 4 * 32;

    // every thread copies one chunk of two rows of both operands
    const int chunk = threadIdx.x % 16, copy_row = threadIdx.x / 16;
    const int left_column = i0 + chunk * 8, right_column = j0 + chunk * 8;
    const int left_bytes = max(0, min(kChunkBytes, (p.d - left_column) * 2));
    const int right_bytes = max(0, min(kChunkBytes, (p.d - right_column) * 2));
    const auto fetch = [&](int step) {
        if (step < steps) {
            const int before = step / steps_per_term, start = (step - before * steps_per_term) * kStageRows;
            const int term = p.terms - 1 - before;  // the smallest first: then little is cut off
            const uint16_t* left = p.planes + kLeftPlane[term] * p.plane_size;
            const uint16_t* right = p.planes + kRightPlane[term] * p.plane_size;
            const uint32_t to = shared + step % kStages * 2 * kOperandBytes;
#pragma unroll
            for (int part = 0; part < kStageRows; part += kThreads / 16) {
                const int row = copy_row + part;
                const bool there = start + row < count;
                const int64_t k = there ? p.first + start + row : 0;
                const int64_t from = (there && p.kept ? p.kept[k] : k) * p.stride;
                copy_async(to + offset_of(row, chunk), left + (left_bytes ? from + left_column : 0), there ? left_bytes : 0);
                copy_async(to + kOperandBytes + offset_of(row, chunk), right + (right_bytes ? from + right_column : 0),
                           there ? right_bytes : 0);
            }
        }
        commit_copies();  // none too: the wait below counts groups
    };

    float sum[4][4][4] = {}, part[4][4][4] = {};  // [16 rows of the tile][8 columns][element of a thread]
    const auto promote = [&] {
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    sum[m][n][e] += part[m][n][e];
                    part[m][n][e] = 0;
                }
    };

    for (int step = 0; step < kStages - 1; ++step) fetch(step);
    for (int step = 0; step < steps; ++step) {
        wait_copies<kStages - 2>();
        __syncthreads();  // this stage has arrived for all, and all have left the one that is fetched into next
        fetch(step + kStages - 1);
        const uint32_t left = shared + step % kStages * 2 * kOperandBytes, right = left + kOperandBytes;
#pragma unroll
        for (int k = 0; k < kStageRows; k += 16) {
            uint32_t a[4][4], b[2][4];
#pragma unroll
            for (int m = 0; m < 4; ++m)  // 8 × 8 parts: rows 0-7 then 8-15, in each columns 0-7 then 8-15
                load_transposed(a[m], left + offset_of(k + lane % 8 + lane / 16 * 8, (warp_i + m * 16) / 8 + lane / 8 % 2));
#pragma unroll
            for (int n = 0; n < 2; ++n)  // columns 0-7 then 8-15, in each rows 0-7 then 8-15
                load_transposed(b[n], right + offset_of(k + lane % 8 + lane / 8 % 2 * 8, (warp_j + n * 16) / 8 + lane / 16));
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int n = 0; n < 4; ++n) multiply_add<kHalf>(part[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
        if (step % kPromoteStages == kPromoteStages - 1) promote();
    }
    promote();

#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int i = i0 + warp_i + m * 16 + lane / 4 + e / 2 * 8;
            if (i >= p.d) continue;
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const int j = j0 + warp_j + n * 8 + lane % 4 * 2 + e % 2;
                if (j <= i) p.total[static_cast<int64_t>(i) * p.d + j] += static_cast<double>(sum[m][n][e]);
            }
        }
}

// kept[0] = number of rows that count, kept[1 …] their indices, in order. One block.
__global__ void __launch_bounds__(1024) compact_kernel(const uint8_t* mask, int count, int* kept) {
    __shared__ int before[33];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int done = 0;
    for (int start = 0; start < count; start += 1024) {
        const int k = start + static_cast<int>(threadIdx.x);
        const bool keep = k < count && mask[k];
        const unsigned votes = __ballot_sync(0xffffffff, keep);
        if (lane == 0) before[warp + 1] = __popc(votes);
        __syncthreads();
        if (threadIdx.x == 0) {
            before[0] = 0;
            for (int w = 0; w < 32; ++w) before[w + 1] += before[w];
        }
        __syncthreads();
        if (keep) kept[1 + done + before[warp] + __popc(votes & ((1u << lane) - 1))] = k;
        done += before[32];
        __syncthreads();  // before the counts are written anew
    }
    if (threadIdx.x == 0) kept[0] = done;
}

// end of the zeros after `there` rows
__device__ int64_t zeros_end(int64_t there, int64_t count) {
    return min(count, (there + kZeroRows - 1) / kZeroRows * kZeroRows);
}

// fp32 rows that count, one after the other, into three planes of bf16 that add up to them; then zeros.
__global__ void split_kernel(const float* rows, int64_t stride, const int* kept, int64_t count, int d,
                             __nv_bfloat16* planes, int64_t plane_size, int64_t plane_stride) {
    const int64_t there = kept ? kept[0] : count;
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= d) return;
    for (int64_t k = blockIdx.y; k < zeros_end(there, count); k += gridDim.y) {
        float rest = k < there ? rows[(kept ? kept[1 + k] : k) * stride + column] : 0;
#pragma unroll
        for (int plane = 0; plane < 3; ++plane) {
            const __nv_bfloat16 part = __float2bfloat16_rn(rest);
            planes[plane * plane_size + k * plane_stride + column] = part;
            rest -= __bfloat162float(part);
        }
    }
}

// 16-bit rows that count, one after the other, 8 columns a thread; then zeros.
__global__ void gather_kernel(const uint16_t* rows, int64_t stride, const int* kept, int64_t count, int d, uint16_t* plane,
                              int64_t plane_stride) {
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (column >= d) return;
    for (int64_t k = blockIdx.y; k < zeros_end(kept[0], count); k += gridDim.y) {
        union {
            uint16_t element[8] = {};
            uint4 all;
        } chunk;
        if (k < kept[0]) {
            const uint16_t* from = rows + kept[1 + k] * stride + column;
            if (column + 8 <= d) chunk.all = *reinterpret_cast<const uint4*>(from);
            else
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    if (column + e < d) chunk.element[e] = from[e];
        }
        *reinterpret_cast<uint4*>(plane + k * plane_stride + column) = chunk.all;
    }
}

struct OnDevice {  // makes a device current for as long as it lives
    int before = 0;
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before));
        check(cudaSetDevice(device));
    }
    ~OnDevice() { cudaSetDevice(before); }
};

int processors_of(int device) {
    int processors;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    return processors;
}

}  // namespace

int syrk_cuda_splits(int64_t width, int64_t count, int device) {
    return wgmma::splits_for(static_cast<int>(width), std::min(count, kLaunchRows), processors_of(device));
}

void syrk_cuda(double* total, const void* rows, DType dtype, int64_t width, int64_t stride, const uint8_t* mask,
               int64_t count, int* kept, void* planes, int64_t plane_stride, bool by_wgmma, float* parts, int splits,
               int device, void* stream_handle) {
    const OnDevice current(device);
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    const int d = static_cast<int>(width);
    const auto some_rows = static_cast<unsigned>(std::min<int64_t>(count, 4096));
    if (mask) launch(compact_kernel, {1, 1024}, stream, mask, static_cast<int>(count), kept);
    else kept = nullptr;
    const int* list = kept ? kept + 1 : nullptr;
    int64_t plane_size = 0;
    int terms = 1;
    const auto use_planes = [&] { rows = planes, stride = plane_stride, list = nullptr; };
    if (dtype == DType::float32) {
        plane_size = count * plane_stride, terms = 6;
        launch(split_kernel, {dim3((d + 255) / 256, some_rows), 256}, stream, static_cast<const float*>(rows), stride, kept,
               count, d, static_cast<__nv_bfloat16*>(planes), plane_size, plane_stride);
        use_planes();
    } else if (by_wgmma && mask) {  // a box has rows that follow one another
        launch(gather_kernel, {dim3((d + 1023) / 1024, some_rows), 128}, stream, static_cast<const uint16_t*>(rows), stride,
               kept, count, d, static_cast<uint16_t*>(planes), plane_stride);
        use_planes();
    }
    const bool half = dtype == DType::float16;
    if (by_wgmma) {
        const wgmma::Work work{total, parts, kept, 0, count, kLaunchRows, d, terms, splits};
        wgmma::run(work, rows, half, stride, plane_size, processors_of(device), stream);
        return;
    }
    Problem p{total, static_cast<const uint16_t*>(rows), plane_size, stride, list, kept, 0, count, d, terms};
    const int squares = (d + kTile * kSuper - 1) / (kTile * kSuper);
    const Shape shape{unsigned(squares * (squares + 1) / 2 * kSuper * kSuper), kThreads, kSharedBytes};
    for (; p.first < count; p.first += kLaunchRows) launch(half ? syrk_kernel<true> : syrk_kernel<false>, shape, stream, p);
}

}  // namespace fastedit
