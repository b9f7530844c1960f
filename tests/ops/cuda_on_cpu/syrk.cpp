// What test_syrk_cuda.py calls: csrc/*.cu, which a copy beside these headers brings.
#include "syrk_cuda.cu"
#include "syrk_wgmma.cu"

extern "C" void syrk(double* total, const void* rows, int dtype, int64_t width, int64_t stride, const uint8_t* mask,
                     int64_t count, int* kept, void* planes, int64_t plane_stride, bool wgmma, float* parts, int splits,
                     int processors, unsigned seed) {
    cuda_on_cpu::processors = processors, cuda_on_cpu::random_order.seed(seed);
    fastedit::syrk_cuda(total, rows, static_cast<fastedit::DType>(dtype), width, stride, mask, count, kept, planes,
                        plane_stride, wgmma, parts, splits, 0, nullptr);
}
