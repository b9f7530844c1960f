// total += rowsᵀ rows over the rows that count, lower triangle, row-major fp64; what both devices share.
#pragma once

#include <cstdint>
#include <string>

namespace fastedit {

enum class DType { float32, bfloat16, float16 };
enum class Isa { portable, avx2, avx512 };

constexpr int64_t kChunk = 1024;  // rows whose products are summed in fp32 before they go into the fp64 total

// kept: indices of the `count` rows that count, or null for rows 0 … count-1; stride in elements. Returns -1, or the
// index of a row with a value that is not finite or too large to be squared and summed in fp32; total is then unchanged.
int64_t syrk_cpu(double* total, const void* rows, DType dtype, int64_t width, int64_t stride, const int64_t* kept,
                 int64_t count, int threads, Isa isa);

bool supports(Isa isa);

// Only enqueues. mask: bytes, or null for all rows. Scratch on the device: kept [count + 1] int32 where there is a mask,
// planes [3, count, plane_stride] bf16 for fp32 rows, [1, count, plane_stride] for others that wgmma takes by a mask,
// parts [splits, width, width] fp32 where splits > 1; plane_stride a multiple of 8, planes and rows of bf16 and fp16 begin on
// 16 bytes. by_wgmma: on compute capability 9.0, where the binary has sm_90a.
void syrk_cuda(double* total, const void* rows, DType dtype, int64_t width, int64_t stride, const uint8_t* mask,
               int64_t count, int* kept, void* planes, int64_t plane_stride, bool by_wgmma, float* parts, int splits,
               int device, void* stream);

// how many parts wgmma wants
int syrk_cuda_splits(int64_t width, int64_t count, int device);

}  // namespace fastedit
