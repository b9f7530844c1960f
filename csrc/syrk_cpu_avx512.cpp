// The kernels of the CPU update for x86-64 with AVX-512.
#ifdef __x86_64__
#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define LANES 16
#define MR 8
#include "syrk_cpu_kernel.h"
#endif
