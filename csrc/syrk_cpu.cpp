// total += rowsᵀ rows on the CPU, lower triangle. Chunks of rows are widened into fp32 panels that all threads share;
// register tiles sum the products of a chunk in fp32 and add them to the fp64 total.

#include "syrk_cpu.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace fastedit {
namespace {

constexpr int64_t kRowsPerTask = 32;               // scanned or packed
constexpr int64_t kBlocksPerTask = 4;              // of PANEL × PANEL sums
constexpr int64_t kProductsPerThread = 1 << 22;    // about as long as starting the thread takes, ten times over

// Threads that do one thing at the same time. They live for one call: a pool would not survive fork(), and OpenMP
// would be a second runtime beside the one that torch brings, with threads that spin against its own.
class Team {
public:
    template <class Work>
    static void run(int wanted, const Work& work) {
        Team team;
        std::vector<std::thread> threads;
        {
            std::lock_guard<std::mutex> hold(team.mutex_);  // nobody meets before the size is known
            try {
                for (int i = 1; i < wanted; ++i) threads.emplace_back([&] { work(team); });
            } catch (const std::system_error&) {  // as many as there are
            }
            team.size_ = static_cast<int>(threads.size()) + 1;
        }
        work(team);
        for (std::thread& thread : threads) thread.join();
    }

    void meet() {
        std::unique_lock<std::mutex> lock(mutex_);
        if (++arrived_ == size_) {
            arrived_ = 0;
            ++round_;
            all_here_.notify_all();
        } else {
            all_here_.wait(lock, [this, round = round_] { return round_ != round; });
        }
    }

private:
    std::mutex mutex_;
    std::condition_variable all_here_;
    int size_ = 0, arrived_ = 0;
    int64_t round_ = 0;
};

struct Block { int64_t row, column; };  // in panels

// Tasks of at most kBlocksPerTask blocks of a block row, the long rows first; one after the other, they share a left panel.
std::vector<Block> tasks_of(int64_t panels) {
    std::vector<Block> tasks;
    for (int64_t row = panels - 1; row >= 0; --row)
        for (int64_t column = 0; column <= row; column += kBlocksPerTask) tasks.push_back({row, column});
    return tasks;
}

template <class T>
int64_t syrk(double* total, const Rows& rows, int threads, const Kernels<T>& kernel) {
    const int64_t d = rows.width, panels = (d + kernel.panel - 1) / kernel.panel;
    const int64_t chunks = (rows.count + kChunk - 1) / kChunk;
    const std::vector<Block> tasks = tasks_of(panels);
    struct Free { void operator()(float* p) const { ::operator delete(p, std::align_val_t{64}); } };
    const size_t bytes = sizeof(float) * std::min(kChunk, rows.count) * panels * kernel.panel;
    std::unique_ptr<float, Free> packed(static_cast<float*>(::operator new(bytes, std::align_val_t{64})));
    std::vector<std::atomic<int64_t>> next(1 + 2 * chunks);  // task of each phase: all rows scanned; chunks packed, summed
    std::atomic<int64_t> bad{rows.count};

    Team::run(threads, [&](Team& team) {
        for (int64_t k; (k = next[0].fetch_add(kRowsPerTask)) < rows.count;)
            for (int64_t i = k; i < std::min(k + kRowsPerTask, rows.count); ++i)
                if (kernel.unusable(rows.at<T>(i), d))
                    for (int64_t seen = bad; i < seen && !bad.compare_exchange_weak(seen, i);) {}
        team.meet();
        if (bad < rows.count) return;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t start = chunk * kChunk, depth = std::min(kChunk, rows.count - start);
            for (int64_t k; (k = next[1 + 2 * chunk].fetch_add(kRowsPerTask)) < depth;)
                kernel.pack(rows, start, k, std::min(k + kRowsPerTask, depth), depth, packed.get());
            team.meet();
            for (int64_t n; (n = next[2 + 2 * chunk].fetch_add(1)) < static_cast<int64_t>(tasks.size());) {
                const auto [row, column] = tasks[n];
                for (int64_t j = column; j <= std::min(row, column + kBlocksPerTask - 1); ++j)
                    kernel.block(packed.get() + row * kernel.panel * depth, packed.get() + j * kernel.panel * depth, depth,
                                 total, d, row * kernel.panel, j * kernel.panel);
            }
            team.meet();  // before the panels are packed anew
        }
    });
    return bad < rows.count ? rows.index(bad) : -1;
}

const AllKernels& kernels_of(Isa isa) {
#ifdef __x86_64__
    if (isa == Isa::avx512) return avx512;
    if (isa == Isa::avx2) return avx2;
#endif
    return portable;
}

}  // namespace

bool supports(Isa isa) {
#ifdef __x86_64__
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return isa == Isa::portable;
}

int64_t syrk_cpu(double* total, const void* data, DType dtype, int64_t width, int64_t stride, const int64_t* kept,
                 int64_t count, int threads, Isa isa) {
    const Rows rows{data, width, stride, count, kept};
    const AllKernels& kernels = kernels_of(isa);
    const double products = 0.5 * static_cast<double>(width) * static_cast<double>(width) * static_cast<double>(count);
    threads = static_cast<int>(std::clamp(products / kProductsPerThread, 1.0, static_cast<double>(std::max(threads, 1))));
    if (dtype == DType::bfloat16) return syrk(total, rows, threads, std::get<Kernels<BFloat16>>(kernels));
    if (dtype == DType::float16) return syrk(total, rows, threads, std::get<Kernels<Float16>>(kernels));
    return syrk(total, rows, threads, std::get<Kernels<float>>(kernels));
}

}  // namespace fastedit
