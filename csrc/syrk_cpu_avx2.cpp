// The kernels of the CPU update for x86-64 with AVX2.
#ifdef __x86_64__
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define MR 4
#include "syrk_cpu_kernel.h"
#endif
