// CUDA on a CPU, for tests: the kernel files compile with g++ and run one thread of a block after another.
//
// Every thread of a block is a fiber. It runs until it waits: for its block, its warp (a shuffle) or its cluster. When
// all have waited or ended, whoever may go on does; if nobody may, the launch fails: a deadlock. Shared memory that a
// kernel declares is static, which is right as long as one block runs at a time, so a kernel for clusters may have
// dynamic shared memory only. A block may reach into another's shared memory from its first step to its last: before
// and after that the launch fails too, and so it does where an access is not aligned. Races between threads are not seen.
#pragma once

#include <cuda_runtime_api.h>
#include <functional>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>
#include <ucontext.h>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __align__
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

namespace emulation {

enum class Wait { NONE, WARP, BLOCK, CLUSTER, ENDED };

struct Copy {
    void *to;
    const void *from;
    bool last; // of its group
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    uint3 thread, block;
    int rank; // of its block in the cluster
    Wait wait;
    uint64_t sent; // what it gives to a shuffle
    std::vector<Copy> copies; // asynchronous ones: made when they are waited for, and no sooner
};

struct Machine {
    dim3 grid, size;
    int cluster = 1;
    std::vector<Thread> threads;
    std::vector<std::vector<unsigned char>> shared; // dynamic, of each block of the cluster
    Thread *now = nullptr;
    ucontext_t scheduler;
    std::vector<char> started; // of the blocks of the cluster
    int fault;                 // what a thread did that a GPU would not let it do, as a cudaError_t
    std::function<void()> kernel;
};

inline Machine &machine() {
    static Machine one;
    return one;
}

inline void wait(Wait kind) {
    Machine &m = machine();
    m.now->wait = kind;
    swapcontext(&m.now->context, &m.scheduler);
}

inline void enter() {
    Machine &m = machine();
    m.started[m.now->rank] = 1;
    m.kernel();
    m.now->wait = Wait::ENDED;
    swapcontext(&m.now->context, &m.scheduler);
}

// Lets the threads from `first` on go on, `count` at a time, that all wait for the same; false if nobody may.
inline bool release(size_t first, size_t last, size_t count, Wait kind) {
    auto &threads = machine().threads;
    bool any = false;
    for (; first < last; first += count) {
        bool all = true;
        for (size_t i = first; i < first + count; ++i) all = all && threads[i].wait == kind;
        for (size_t i = first; all && i < first + count; ++i) threads[i].wait = Wait::NONE;
        any = any || all;
    }
    return any;
}

// Runs a block as far as it comes without the others of its cluster.
inline void run_block(size_t first, size_t last) {
    Machine &m = machine();
    do {
        for (size_t i = first; i < last; ++i) {
            if (m.threads[i].wait != Wait::NONE) continue;
            m.now = &m.threads[i];
            swapcontext(&m.scheduler, &m.now->context);
        }
    } while (release(first, last, 32, Wait::WARP) || release(first, last, last - first, Wait::BLOCK));
}

// All blocks of the grid, one cluster after another.
inline int run(dim3 grid, dim3 size, size_t shared, int cluster, std::function<void()> kernel) {
    Machine &m = machine();
    if (size.x % 32 || size.x > 1024 || size.y != 1 || size.z != 1 || grid.x % cluster) return cudaErrorInvalidValue;
    m.grid = grid, m.size = size, m.cluster = cluster, m.kernel = kernel;
    m.threads.resize(static_cast<size_t>(size.x) * cluster);
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; x += cluster) {
            m.started.assign(cluster, 0);
            m.fault = cudaSuccess;
            m.shared.assign(cluster, std::vector<unsigned char>(shared + 16, 0xA5));
            for (size_t i = 0; i < m.threads.size(); ++i) {
                Thread &t = m.threads[i];
                t.stack.resize(1 << 16);
                t.rank = static_cast<int>(i / size.x);
                t.thread = {static_cast<unsigned>(i % size.x), 0, 0};
                t.block = {x + t.rank, y, 0};
                t.wait = Wait::NONE;
                t.copies.clear();
                getcontext(&t.context);
                t.context.uc_stack.ss_sp = t.stack.data();
                t.context.uc_stack.ss_size = t.stack.size();
                t.context.uc_link = &m.scheduler;
                makecontext(&t.context, enter, 0);
            }
            const size_t all = m.threads.size();
            do {
                for (size_t first = 0; first < all; first += size.x) run_block(first, first + size.x);
            } while (release(0, all, all, Wait::CLUSTER));
            for (const Thread &t : m.threads)
                if (t.wait != Wait::ENDED) return cudaErrorLaunchTimeout; // nobody may go on
            if (m.fault != cudaSuccess) return m.fault;
        }
    }
    return cudaSuccess;
}

template <typename T> T shuffle(T value, int source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves one number");
    Machine &m = machine();
    Thread *self = m.now;
    self->sent = 0;
    memcpy(&self->sent, &value, sizeof(T));
    wait(Wait::WARP);
    const size_t index = self - m.threads.data();
    T got;
    memcpy(&got, &m.threads[index - index % 32 + source].sent, sizeof(T));
    wait(Wait::WARP); // before anybody sends anew
    return got;
}

inline int lane() { return machine().now->thread.x & 31; }

} // namespace emulation

#define threadIdx (emulation::machine().now->thread)
#define blockIdx (emulation::machine().now->block)
#define blockDim (emulation::machine().size)
#define gridDim (emulation::machine().grid)

inline void __syncthreads() { emulation::wait(emulation::Wait::BLOCK); }
inline void __syncwarp(unsigned = 0xFFFFFFFFu) { emulation::wait(emulation::Wait::WARP); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::shuffle(value, emulation::lane() ^ mask);
}
template <typename T> T __shfl_sync(unsigned, T value, int source) { return emulation::shuffle(value, source); }

#define SFR_LAUNCH(kernel, grid, block, shared, stream, ...)                                                          \
    emulation::run((grid), (block), (shared), 1, [=]() mutable { (kernel)(__VA_ARGS__); })
#define SFR_DYNAMIC_SHARED(name)                                                                                      \
    unsigned char *name = reinterpret_cast<unsigned char *>(                                                          \
        (reinterpret_cast<uintptr_t>(emulation::machine().shared[emulation::machine().now->rank].data()) + 15) & ~15ull)
#define SFR_LAUNCH_CLUSTER(kernel, grid, block, shared, cluster, stream, ...)                                         \
    emulation::run((grid), (block), (shared), (cluster), [=]() mutable { (kernel)(__VA_ARGS__); })

inline int cluster_rank() { return emulation::machine().now->rank; }
inline int cluster_size() { return emulation::machine().cluster; }
inline void cluster_sync() { emulation::wait(emulation::Wait::CLUSTER); }
template <typename T> T *remote(T *mine, int rank) {
    auto &m = emulation::machine();
    const auto first = m.threads.begin() + static_cast<size_t>(rank) * m.size.x;
    bool there = m.started[rank];
    for (auto t = first; t != first + m.size.x; ++t) there = there && t->wait != emulation::Wait::ENDED;
    if (!there) m.fault = cudaErrorIllegalAddress;
    const auto base = [&](int r) { return (reinterpret_cast<uintptr_t>(m.shared[r].data()) + 15) & ~uintptr_t(15); };
    return reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(mine) - base(m.now->rank) + base(rank));
}
template <typename T> void copy_async(T *to, const T *from) {
    emulation::machine().now->copies.push_back({to, from, false});
}
inline void commit_copies() { emulation::machine().now->copies.push_back({nullptr, nullptr, true}); }
inline void wait_for_all_copies_but_the_last() {
    auto &copies = emulation::machine().now->copies;
    size_t groups = 0, done = 0;
    for (const auto &copy : copies) groups += copy.last;
    for (; groups > 1; ++done) {
        if (copies[done].last)
            --groups;
        else
            memcpy(copies[done].to, copies[done].from, 16);
    }
    copies.erase(copies.begin(), copies.begin() + done);
}
namespace sfr {
inline void check_alignment(const void *at, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(at) % bytes) emulation::machine().fault = cudaErrorMisalignedAddress;
}
template <typename T> void store_global(T *at, T value) { *at = value; }
} // namespace sfr
