// fp32 rows as three bf16 planes, x = a + b + c: what both kernels need to know of them.
#pragma once

namespace fastedit {

// (left plane, right plane) of each product that fp32 can see; bf16 and fp16 rows have only the first
static __constant__ int kLeftPlane[6] = {0, 0, 1, 1, 0, 2};
static __constant__ int kRightPlane[6] = {0, 1, 0, 1, 2, 0};

constexpr int kZeroRows = 64;  // rows that count are followed by zeros up to a multiple of this: a stage of wgmma

}  // namespace fastedit
