// The CPU sum on small sizes, many threads, every dtype: a program for ThreadSanitizer (tests/ops/test_syrk.py).
// The totals of one and of several threads must be the same bits.

#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/syrk.h"

using namespace fastedit;

int main() {
    const int64_t width = 261, count = 2100;  // more than a chunk; panels that are not full; enough work for 8 threads
    std::vector<uint32_t> rows(width * count);
    std::vector<int64_t> kept;  // about half
    uint32_t state = 1;
    for (uint32_t& x : rows) {
        state = state * 1664525u + 1013904223u;
        x = (state & 0x807fffffu) | 0x3f000000u;  // ±0.5 … 1 as fp32; as bf16 and fp16 some finite number or other
        x &= 0xbfffbfffu;
    }
    for (int64_t k = 0; k < count; k += 1 + k % 3) kept.push_back(k);
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
        for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable}) {
            if (!supports(isa)) continue;
            std::vector<double> alone;
            for (int threads : {1, 8}) {
                std::vector<double> total(width * width, 0.0);
                const int64_t n = static_cast<int64_t>(kept.size());
                if (syrk_cpu(total.data(), rows.data(), dtype, width, width, kept.data(), n, threads, isa) != -1) {
                    std::puts("a row was refused");
                    return 1;
                }
                if (alone.empty()) alone = total;
                if (std::memcmp(alone.data(), total.data(), total.size() * sizeof(double))) {
                    std::puts("the number of threads changed the total");
                    return 1;
                }
            }
            if (dtype != DType::float32) break;  // what threads share depends on both, but not on the pair
        }
    }
    std::puts("clean");
}
