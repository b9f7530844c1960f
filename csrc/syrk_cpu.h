// What syrk_cpu.cpp shares with the kernels of each instruction set, syrk_cpu_*.cpp.
#pragma once

#include <tuple>

#include "syrk.h"

namespace fastedit {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

struct Rows {
    const void* data;
    int64_t width, stride, count;
    const int64_t* kept;
    int64_t index(int64_t k) const { return kept ? kept[k] : k; }
    template <class T>
    const T* at(int64_t k) const { return static_cast<const T*>(data) + index(k) * stride; }
};

template <class T>
struct Kernels {
    int64_t panel;
    bool (*unusable)(const T*, int64_t);
    void (*pack)(const Rows&, int64_t, int64_t, int64_t, int64_t, float*);
    void (*block)(const float*, const float*, int64_t, double*, int64_t, int64_t, int64_t);
};

using AllKernels = std::tuple<Kernels<float>, Kernels<BFloat16>, Kernels<Float16>>;
extern const AllKernels portable, avx2, avx512;  // the last two on x86-64

}  // namespace fastedit
