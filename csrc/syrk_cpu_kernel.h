// The inner loops of the CPU update, included by syrk_cpu_*.cpp, an object for each instruction set, with
//   ISA     name of its table of kernels
//   TARGET  attribute of every function, not a flag of the object: the linker keeps one copy of what headers define
//           inline, and that one must run on every processor
//   LANES   floats in a vector register
//   MR      columns of the left operand in a register tile; the right one has PANEL, three registers of them
// Vector types are the compiler's own: no intrinsics, and one source for every architecture.

#include <algorithm>
#include <bit>

#include "syrk_cpu.h"

namespace fastedit {
namespace {

constexpr uint32_t kLargest = (127 + 57) << 23;  // 2⁵⁷ as bits: 8,192 of its squares sum to a finite number
constexpr int PANEL = 3 * LANES;
constexpr int64_t DEPTH = 128;  // rows of two panels, 24 KiB or 48, stay in the first cache while all their tiles are summed
static_assert(PANEL % MR == 0, "left operands are read from the same panels");

using Vector = float __attribute__((vector_size(4 * LANES)));

TARGET static bool unusable(const float* x, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= (std::bit_cast<uint32_t>(x[i]) & 0x7fffffff) > kLargest;
    return bad;
}
TARGET static bool unusable(const BFloat16* x, int64_t n) {
    uint16_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= (x[i].bits & 0x7fff) > (kLargest >> 16);
    return bad;
}
TARGET static bool unusable(const Float16* x, int64_t n) {
    uint16_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= (x[i].bits & 0x7fff) >= 0x7c00;
    return bad;
}

TARGET static inline float widen(float x) { return x; }
TARGET static inline float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
TARGET static inline float widen(Float16 x) {  // finite, and by integers: an x that is denormal must not be flushed
    const uint32_t magnitude = x.bits & 0x7fff, sign = (x.bits & 0x8000u) << 16;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t denormal = std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    return std::bit_cast<float>((magnitude < 0x400 ? denormal : normal) | sign);
}

// Rows [first, last) of the chunk at `start` into all panels; a panel holds `depth` rows of PANEL columns.
template <class T>
TARGET static void pack(const Rows& rows, int64_t start, int64_t first, int64_t last, int64_t depth, float* packed) {
    for (int64_t column = 0; column < rows.width; column += PANEL) {
        const int64_t n = std::min<int64_t>(PANEL, rows.width - column);
        for (int64_t k = first; k < last; ++k) {
            const T* from = rows.at<T>(start + k) + column;
            float* to = packed + column * depth + k * PANEL;
            if (n == PANEL)
                for (int c = 0; c < PANEL; ++c) to[c] = widen(from[c]);
            else
                for (int c = 0; c < PANEL; ++c) to[c] = c < n ? widen(from[c]) : 0.0f;
        }
    }
}

// total[i … i+PANEL, j … j+PANEL] += leftᵀ right over two panels, what of it is in the lower triangle.
TARGET static void block(const float* left, const float* right, int64_t depth, double* total, int64_t d, int64_t i,
                         int64_t j) {
    const int64_t end = std::min<int64_t>(i + PANEL, d);
    alignas(64) Vector sums[PANEL][3] = {};
    for (int64_t start = 0; start < depth; start += DEPTH) {
        const int64_t stop = std::min(start + DEPTH, depth);
        for (int64_t row = i + start; row < end && row < i + stop; ++row)  // arrives while products are summed
            for (int64_t column = j; column <= row && column < j + PANEL; column += 8)
                __builtin_prefetch(total + row * d + column, 1);
        for (int m = 0; m < PANEL; m += MR) {
            // the next DEPTH rows come out of the second cache: of the left panel in the first half, then the right one
            const float* next = (m < PANEL / 2 ? left : right) + stop * PANEL + m % (PANEL / 2) * 2 * DEPTH;
            Vector sum[MR][3] = {};  // from zero, as sums of sums err less than one long sum
            for (int64_t k = start; k < stop; ++k, next += 2 * MR) {
                __builtin_prefetch(next);
                const Vector* b = reinterpret_cast<const Vector*>(right + k * PANEL);
                const float* a = left + k * PANEL + m;
#pragma GCC unroll 8
                for (int r = 0; r < MR; ++r) {
                    sum[r][0] += b[0] * a[r];
                    sum[r][1] += b[1] * a[r];
                    sum[r][2] += b[2] * a[r];
                }
            }
            for (int r = 0; r < MR; ++r)
                for (int v = 0; v < 3; ++v) sums[m + r][v] += sum[r][v];
        }
    }
    const float* value = reinterpret_cast<const float*>(sums);
    for (int64_t row = i; row < end; ++row, value += PANEL) {
        const int64_t n = std::min<int64_t>(PANEL, row - j + 1);
        for (int64_t c = 0; c < n; ++c) total[row * d + j + c] += value[c];
    }
}

template <class T>
constexpr Kernels<T> kernels = {PANEL, unusable, pack<T>, block};

}  // namespace

constinit const AllKernels ISA{kernels<float>, kernels<BFloat16>, kernels<Float16>};

}  // namespace fastedit
