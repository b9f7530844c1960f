// What syrk_cuda.cu asks of syrk_wgmma.cu, which is an object of its own because it is for sm_90a alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastedit::wgmma {

struct Work {
    double* total;          // [d, d]
    float* parts;           // [splits, d, d] where splits > 1
    const int* kept_count;  // on the device, or null for `rows`
    int64_t first, rows;
    int most;  // rows summed in fp32
    int d, terms, splits;
};

// into how many parts the rows of a launch go, so that every cluster has work; at least 1,024 rows each
int splits_for(int d, int64_t rows, int processors);

// enqueues the sums of all rows; planes: [1 or 3, rows, stride] of bf16, or of fp16 (half), plane_size elements apart
void run(Work work, const void* planes, bool half, int64_t stride, int64_t plane_size, int processors,
         cudaStream_t stream);

}  // namespace fastedit::wgmma
