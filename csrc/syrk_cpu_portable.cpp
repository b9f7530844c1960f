// The kernels of the CPU update for every processor.
#define ISA portable
#define TARGET
#define LANES 4
#define MR 4
#include "syrk_cpu_kernel.h"
