// fastedit._C: what Python calls. Pointers come as integers, so that one binary serves every torch; shapes, dtypes and
// devices are checked by the caller, fastedit/ops/syrk.py.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "syrk.h"

namespace py = pybind11;
using namespace fastedit;

namespace {

DType dtype_of(const std::string& name) {
    if (name == "float32") return DType::float32;
    if (name == "bfloat16") return DType::bfloat16;
    if (name == "float16") return DType::float16;
    throw std::invalid_argument("no rows of dtype " + name);
}

Isa isa_of(const std::string& name) {
    const bool any = name == "auto";
    if ((any || name == "avx512") && supports(Isa::avx512)) return Isa::avx512;
    if ((any || name == "avx2") && supports(Isa::avx2)) return Isa::avx2;
    if (any || name == "portable") return Isa::portable;
    throw std::invalid_argument("this processor has no " + name);
}

// mask: `count` bytes, or 0 for all rows
int64_t cpu(uintptr_t total, uintptr_t rows, const std::string& dtype, int64_t width, int64_t stride, uintptr_t mask,
            int64_t count, int threads, const std::string& isa) {
    std::vector<int64_t> kept;
    if (const auto* keep = reinterpret_cast<const uint8_t*>(mask)) {
        for (int64_t k = 0; k < count; ++k)
            if (keep[k]) kept.push_back(k);
        count = static_cast<int64_t>(kept.size());
    }
    return syrk_cpu(reinterpret_cast<double*>(total), reinterpret_cast<const void*>(rows), dtype_of(dtype), width,
                    stride, mask ? kept.data() : nullptr, count, threads, isa_of(isa));
}

#ifdef FASTEDIT_CUDA
// addresses of memory on the device, 0 for none; see syrk.h
void cuda(uintptr_t total, uintptr_t rows, const std::string& dtype, int64_t width, int64_t stride, uintptr_t mask,
          int64_t count, uintptr_t kept, uintptr_t planes, int64_t plane_stride, bool wgmma, uintptr_t parts, int splits,
          int device, uintptr_t stream) {
    syrk_cuda(reinterpret_cast<double*>(total), reinterpret_cast<const void*>(rows), dtype_of(dtype), width, stride,
              reinterpret_cast<const uint8_t*>(mask), count, reinterpret_cast<int*>(kept),
              reinterpret_cast<void*>(planes), plane_stride, wgmma, reinterpret_cast<float*>(parts), splits, device,
              reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    using namespace py::literals;
    m.def("syrk_cpu", &cpu, "total"_a, "rows"_a, "dtype"_a, "width"_a, "stride"_a, "mask"_a, "count"_a, "threads"_a,
          "isa"_a = "auto", py::call_guard<py::gil_scoped_release>());
    py::list isas;
    for (const char* name : {"avx512", "avx2"})
        if (supports(name[3] == '5' ? Isa::avx512 : Isa::avx2)) isas.append(name);
    isas.append("portable");
    m.attr("isas") = py::tuple(isas);
#ifdef FASTEDIT_CUDA
    m.attr("cuda_architectures") = FASTEDIT_CUDA;
    m.def("syrk_cuda", &cuda, "total"_a, "rows"_a, "dtype"_a, "width"_a, "stride"_a, "mask"_a, "count"_a, "kept"_a,
          "planes"_a, "plane_stride"_a, "wgmma"_a, "parts"_a, "splits"_a, "device"_a, "stream"_a, py::call_guard<py::gil_scoped_release>());
    m.def("syrk_cuda_splits", &syrk_cuda_splits, "width"_a, "count"_a, "device"_a);
#else
    m.attr("cuda_architectures") = "";
#endif
}
