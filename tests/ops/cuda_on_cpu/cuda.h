// Tensor maps, as far as csrc/ uses them.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda_runtime.h"

using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };

struct CUtensorMap {
    const uint8_t* base;
    uint64_t sizes[3], bytes[3];
    uint32_t box[3];
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                                       const cuuint64_t* sizes, const cuuint64_t* bytes, const cuuint32_t* box,
                                       const cuuint32_t* every, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    bool right = rank == 3 && reinterpret_cast<uintptr_t>(base) % 16 == 0 && box[0] * 2 <= 128;
    *map = {static_cast<const uint8_t*>(base), {}, {2, bytes[0], bytes[1]}, {}};
    for (int i = 0; i < 3; ++i) {
        right = right && sizes[i] && sizes[i] < uint64_t{1} << 32 && box[i] && box[i] <= 256 && every[i] == 1;
        right = right && (i == 0 || (map->bytes[i] && map->bytes[i] % 16 == 0 && map->bytes[i] < uint64_t{1} << 40));
        map->sizes[i] = sizes[i], map->box[i] = box[i];
    }
    return right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
    if (std::string(name) != "cuTensorMapEncodeTiled") throw std::runtime_error(name);
    *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled), *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
