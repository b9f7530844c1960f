// Enough of CUDA to run csrc/syrk_cuda.cu on a CPU. A CUDA thread is a fiber; in each round all that can go on do so, in
// random order, up to where they wait. What is asynchronous happens as late as it may (products, cp.async) or at a random
// later time (copies of boxes). Shared memory begins as NaN. Threads that all wait for ever are an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <tuple>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static  // one block at a time where a kernel uses it
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct uint4 {
    unsigned x, y, z, w;
};

struct alignas(16) double2 {
    double x, y;
};

inline dim3 gridDim, blockDim;

namespace cuda_on_cpu {

struct Meeting {  // of all threads of a block or warp
    int arrived = 0;
    uint64_t held = 0;
};

struct Warp {
    Meeting all;
    std::array<void*, 32> brought;  // by each lane, to an instruction of the whole warp
};

struct ByteBarrier {
    int expected, pending;
    int64_t bytes = 0;
    uint32_t phase = 0;

    void settle() {
        if (pending == 0 && bytes == 0) ++phase, pending = expected;
    }
};

struct Block {
    std::vector<uint8_t> memory;
    std::map<uint32_t, ByteBarrier> barriers;
    Meeting all;
    std::vector<Warp> warps;
};

struct Thread {
    jmp_buf here;  // where it waits; swapcontext would call the kernel every time
    bool begun;
    std::unique_ptr<char[]> stack{new char[128 << 10]};
    dim3 index, block_index;
    unsigned rank;  // of its block in its cluster
    std::function<bool()> ready;
    bool done;
    std::deque<std::vector<std::function<void()>>> committed;  // groups of products or copies
    std::vector<std::function<void()>> open;
};

inline std::vector<std::unique_ptr<Thread>> threads;
inline std::vector<Block> blocks;  // of the cluster that runs
inline std::vector<std::function<void()>> in_flight;
inline Meeting cluster;
inline Thread* current;
inline jmp_buf scheduler;
inline std::function<void()> entry;
inline std::mt19937 random_order;
inline int processors = 132;

inline Block& block() { return blocks[current->rank]; }

[[gnu::noinline]] inline void wait_until(std::function<bool()> ready) {
    current->ready = std::move(ready);
    if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}

inline void meet(Meeting& meeting, int count) {
    if (++meeting.arrived == count) {
        meeting.arrived = 0, ++meeting.held;
    } else {
        wait_until([&meeting, held = meeting.held] { return meeting.held != held; });
    }
}

inline int lane() { return current->index.x % 32; }
inline int warp() { return current->index.x / 32; }

// work(what each lane of the warp brought), once, when the last of them has come
template <typename T, typename Work>
void together(T& mine, Work work) {
    Warp& lanes = block().warps[warp()];
    lanes.brought[lane()] = &mine;
    if (lanes.all.arrived == 31) work([&](int lane) -> T& { return *static_cast<T*>(lanes.brought[lane]); });
    meet(lanes.all, 32);
}

inline void commit() { current->committed.push_back(std::move(current->open)), current->open.clear(); }

inline void finish(size_t pending) {
    for (; current->committed.size() > pending; current->committed.pop_front())
        for (const auto& work : current->committed.front()) work();
}

inline void run_thread() {
    entry();
    current->done = true;
    _longjmp(scheduler, 1);
}

[[gnu::noinline]] inline void go_on(Thread& thread) {  // up to where it waits
    current = &thread;
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.here, 1);
    thread.begun = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack = {thread.stack.get(), 0, 128 << 10}, start.uc_link = nullptr;
    makecontext(&start, run_thread, 0);
    setcontext(&start);
}

inline void run_cluster(unsigned first, unsigned size, int shared) {
    const unsigned per_block = blockDim.x, count = size * per_block;
    blocks.assign(size, {});
    for (auto& block : blocks) {
        block.memory.assign(1024 + shared, 0xff);
        block.warps.resize((per_block + 31) / 32);
    }
    cluster = {};
    while (threads.size() < count) threads.push_back(std::make_unique<Thread>());
    std::vector<Thread*> left;
    for (unsigned t = 0; t < count; ++t) {
        Thread& thread = *threads[t];
        thread.index = t % per_block, thread.rank = t / per_block;
        const unsigned number = first + thread.rank;
        thread.block_index = {number % gridDim.x, number / gridDim.x % gridDim.y, 0};
        thread.begun = thread.done = false, thread.ready = [] { return true; }, thread.open.clear(), thread.committed.clear();
        left.push_back(&thread);
    }
    while (!left.empty()) {
        bool moved = false;
        std::shuffle(left.begin(), left.end(), random_order);
        for (Thread* thread : left) {
            if (!thread->ready()) continue;
            moved = true;
            go_on(*thread);
        }
        for (size_t n = 0; n < in_flight.size();) {
            if (moved && random_order() % 2) {
                ++n;
                continue;
            }
            moved = true;
            const auto work = std::move(in_flight[n]);
            in_flight.erase(in_flight.begin() + n);
            work();
        }
        if (!moved) std::fprintf(stderr, "all threads wait for ever\n"), std::abort();
        std::erase_if(left, [](Thread* thread) { return thread->done; });
    }
}

inline float nearest_zero(double x) {  // as tensor cores round
    const float rounded = static_cast<float>(x);
    return std::abs(rounded) > std::abs(x) ? std::nextafter(rounded, 0.0f) : rounded;
}

inline double number(uint16_t bits, bool half) {
    uint32_t wide = uint32_t{bits} << 16;
    if (half) {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        if (exponent == 0) return std::ldexp(bits >> 15 ? -1.0 * fraction : fraction, -24);
        wide = uint32_t{bits} >> 15 << 31 | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    }
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

inline uint32_t permuted(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }  // of 128-byte rows

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx (cuda_on_cpu::current->block_index)

inline void __syncthreads() { cuda_on_cpu::meet(cuda_on_cpu::block().all, blockDim.x); }
template <typename T>
T __ldcg(const T* from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) throw std::runtime_error("not aligned");
    return *from;
}
template <typename T>
void __stcg(T* to, T value) {
    if (reinterpret_cast<uintptr_t>(to) % sizeof(T)) throw std::runtime_error("not aligned");
    *to = value;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
[[noreturn]] inline void __trap() { std::abort(); }

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
    struct {
        T value;
        int from;
        T result;
    } mine{value, from, {}};
    cuda_on_cpu::together(mine, [](auto of) {
        for (int lane = 0; lane < 32; ++lane) of(lane).result = of(of(lane).from).value;
    });
    return mine.result;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
    struct {
        bool vote;
        unsigned votes;
    } mine{vote, 0};
    cuda_on_cpu::together(mine, [](auto of) {
        for (int lane = 0; lane < 32; ++lane)
            for (int from = 0; from < 32; ++from) of(lane).votes |= unsigned{of(from).vote} << from;
    });
    return mine.votes;
}

enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    return *value = cuda_on_cpu::processors, cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    return bytes <= 227 << 10 ? cudaSuccess : throw std::runtime_error("more shared memory than there is");
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    const std::tuple<std::decay_t<Parameters>...> values{arguments...};
    cuda_on_cpu::entry = [&] { std::apply(kernel, values); };
    gridDim = config->gridDim, blockDim = config->blockDim;
    const unsigned size = config->numAttrs ? config->attrs->val.clusterDim.x : 1;
    for (unsigned first = 0; first < config->gridDim.x * config->gridDim.y; first += size)
        cuda_on_cpu::run_cluster(first, size, static_cast<int>(config->dynamicSmemBytes));
    return cudaSuccess;
}
