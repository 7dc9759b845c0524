// CUDA on a CPU, for tests: the kernel files compile with g++ and run one thread of a block after another.
//
// Every thread of a block is a fiber. It runs until it waits: for its block, its warp (a shuffle) or its cluster. When
// all have waited or ended, whoever may go on does; if nobody may, the launch fails: a deadlock. Shared memory that a
// kernel declares is static, which is right as long as one block runs at a time, so a kernel for clusters, of which
// RESIDENT run at once, may have dynamic shared memory only. Copies are made when they are waited for and no sooner;
// what odd warps send comes when nobody could go on without it, what even warps send at once. A block may be sent
// something from its first step to its last: before and after that the launch fails too, and so it does where an access
// is not aligned. Races between threads are not seen.
#pragma once

#include <cuda_runtime_api.h>
#include <functional>
#include <math.h>
#include <memory>
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

namespace emulation {

constexpr int RESIDENT = 2;

enum class Wait { NONE, WARP, BLOCK, CLUSTER, BARRIER, ENDED };

// In 8 bytes of shared memory. A phase ends when one thread has come and no byte is due.
struct Barrier {
    uint32_t phase : 1, come : 1, unused : 30;
    int32_t due;

    void add(int bytes) {
        due += bytes;
        if (come && due == 0) phase ^= 1, come = 0;
    }
};

struct Copy {
    void *to;
    const void *from;
    int bytes; // of 16
};

struct Message {
    void *to;
    uint64_t value;
    int bytes;
    Barrier *barrier;
    size_t block; // whose memory that is
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    uint3 thread, block;
    size_t place; // of its block among those that run at once
    Wait wait;
    const Barrier *barrier; // and the parity of its phase that it waits for
    uint32_t parity;
    uint64_t sent[2]; // what it gives to a shuffle, and to the next: nobody is further ahead
    unsigned shuffles;
    std::vector<std::vector<Copy>> copies; // asynchronous ones, by groups; the last group is open
};

struct Machine {
    dim3 grid, size;
    int cluster = 1;
    std::vector<Thread> threads;
    std::vector<std::vector<unsigned char>> shared; // dynamic, of each block that runs
    std::vector<Message> messages;                  // on their way
    Thread *now = nullptr;
    ucontext_t scheduler;
    std::vector<char> started; // of the blocks that run
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
    m.started[m.now->place] = 1;
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

inline bool release_barriers() {
    bool any = false;
    for (Thread &t : machine().threads) {
        if (t.wait != Wait::BARRIER || t.barrier->phase == t.parity) continue;
        t.wait = Wait::NONE;
        any = true;
    }
    return any;
}

inline void deliver(const Message &message) {
    Machine &m = machine();
    const size_t first = message.block * m.size.x;
    bool there = m.started[message.block];
    for (size_t i = first; i < first + m.size.x; ++i) there = there && m.threads[i].wait != Wait::ENDED;
    if (!there) m.fault = cudaErrorIllegalAddress;
    memcpy(message.to, &message.value, message.bytes);
    message.barrier->add(-message.bytes);
}

inline bool deliver_all() {
    std::vector<Message> messages;
    messages.swap(machine().messages);
    for (const Message &message : messages) deliver(message);
    return !messages.empty();
}

// All blocks of the grid, `at_once` of them at a time.
inline int run(dim3 grid, dim3 size, size_t shared, int cluster, unsigned at_once, std::function<void()> kernel) {
    Machine &m = machine();
    if (size.x % 32 || size.x > 1024 || size.y != 1 || size.z != 1 || grid.x % at_once) return cudaErrorInvalidValue;
    m.grid = grid, m.size = size, m.cluster = cluster, m.kernel = kernel;
    m.threads.resize(static_cast<size_t>(size.x) * at_once);
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; x += at_once) {
            m.started.assign(at_once, 0);
            m.messages.clear();
            m.fault = cudaSuccess;
            m.shared.assign(at_once, std::vector<unsigned char>(shared + 16, 0xA5));
            for (size_t i = 0; i < m.threads.size(); ++i) {
                Thread &t = m.threads[i];
                constexpr size_t STACK = 1 << 16;
                if (!t.stack) t.stack.reset(new char[STACK]);
                t.place = i / size.x;
                t.thread = {static_cast<unsigned>(i % size.x), 0, 0};
                t.block = {static_cast<unsigned>(x + t.place), y, 0};
                t.wait = Wait::NONE;
                t.shuffles = 0;
                t.copies.assign(1, {});
                getcontext(&t.context);
                t.context.uc_stack.ss_sp = t.stack.get();
                t.context.uc_stack.ss_size = STACK;
                t.context.uc_link = &m.scheduler;
                makecontext(&t.context, enter, 0);
            }
            const size_t all = m.threads.size();
            do {
                for (size_t first = 0; first < all; first += size.x) run_block(first, first + size.x);
            } while (release(0, all, size.x * cluster, Wait::CLUSTER) || release_barriers() ||
                     (deliver_all() && release_barriers()));
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
    const unsigned turn = self->shuffles++ % 2;
    memcpy(&self->sent[turn], &value, sizeof(T));
    wait(Wait::WARP);
    const size_t index = self - m.threads.data();
    T got;
    memcpy(&got, &m.threads[index - index % 32 + source].sent[turn], sizeof(T));
    return got;
}

inline uintptr_t shared_of(size_t place) {
    return (reinterpret_cast<uintptr_t>(machine().shared[place].data()) + 15) & ~uintptr_t(15);
}

inline int run_clusters(int64_t most, int block, size_t shared, int cluster, std::function<void()> kernel) {
    const unsigned blocks = cluster * static_cast<unsigned>(most < RESIDENT ? most : RESIDENT);
    return run(dim3(blocks), dim3(block), shared, cluster, blocks, kernel);
}

} // namespace emulation

#define threadIdx (emulation::machine().now->thread)
#define blockIdx (emulation::machine().now->block)
#define blockDim (emulation::machine().size)
#define gridDim (emulation::machine().grid)

inline void __syncthreads() { emulation::wait(emulation::Wait::BLOCK); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::shuffle(value, (threadIdx.x & 31) ^ mask);
}
template <typename T> T __shfl_sync(unsigned, T value, int source) { return emulation::shuffle(value, source); }

#define SFR_CLUSTERS
#define SFR_LAUNCH(kernel, grid, block, shared, stream, ...)                                                          \
    emulation::run((grid), (block), (shared), 1, 1, [=]() mutable { (kernel)(__VA_ARGS__); })
#define SFR_DYNAMIC_SHARED(name)                                                                                      \
    unsigned char *name = reinterpret_cast<unsigned char *>(emulation::shared_of(emulation::machine().now->place))
#define SFR_LAUNCH_CLUSTER(kernel, most, block, shared, cluster, stream, ...)                                         \
    emulation::run_clusters((most), (block), (shared), (cluster), [=]() mutable { (kernel)(__VA_ARGS__); })

namespace sfr {

inline int cluster_rank() { return static_cast<int>(emulation::machine().now->place % emulation::machine().cluster); }
inline int cluster_size() { return emulation::machine().cluster; }
inline void cluster_sync() { emulation::wait(emulation::Wait::CLUSTER); }

template <typename Kernel> int code_of(Kernel *) { return 90; }
inline int64_t most_resident(int) { return emulation::RESIDENT; } // so that tests have blocks with several rows

inline int64_t claim(int64_t *at) { return (*at)++; }

inline void start_barrier(uint64_t *barrier) { *barrier = 0; }
inline void expect_bytes(uint64_t *at, int bytes) {
    emulation::Barrier *barrier = reinterpret_cast<emulation::Barrier *>(at);
    barrier->come = 1;
    barrier->add(bytes);
}
inline void wait_for_bytes(uint64_t *at, int parity) {
    emulation::Thread *self = emulation::machine().now;
    self->barrier = reinterpret_cast<emulation::Barrier *>(at), self->parity = parity;
    if (self->barrier->phase == self->parity) emulation::wait(emulation::Wait::BARRIER);
}
template <typename T> void send(T *to, int rank, T value, uint64_t *barrier) {
    auto &m = emulation::machine();
    const size_t here = m.now->place, there = here - here % m.cluster + rank;
    const uintptr_t moved = emulation::shared_of(there) - emulation::shared_of(here);
    emulation::Message message{reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(to) + moved), 0, sizeof(T),
                               reinterpret_cast<emulation::Barrier *>(reinterpret_cast<uintptr_t>(barrier) + moved),
                               there};
    memcpy(&message.value, &value, sizeof(T));
    if (m.now->thread.x / 32 % 2)
        m.messages.push_back(message);
    else
        emulation::deliver(message);
}

template <typename T> void copy_async(T *to, const T *from, int bytes) {
    emulation::machine().now->copies.back().push_back({to, from, bytes});
}
inline void commit_copies() { emulation::machine().now->copies.emplace_back(); }
inline void wait_for_all_copies_but_the_last() {
    auto &groups = emulation::machine().now->copies;
    for (; groups.size() > 2; groups.erase(groups.begin()))
        for (const auto &copy : groups.front()) {
            memset(copy.to, 0, 16);
            memcpy(copy.to, copy.from, copy.bytes);
        }
}

inline void check_alignment(const void *at, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(at) % bytes) emulation::machine().fault = cudaErrorMisalignedAddress;
}
template <typename T> void store_global(T *at, T value) { *at = value; }
inline uint64_t product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float reciprocal_root(float x) { return 1.0f / sqrtf(x); }
inline int clear(void *at, size_t bytes, void *) {
    memset(at, 0, bytes);
    return cudaSuccess;
}

} // namespace sfr
