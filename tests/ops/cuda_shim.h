// Runs CUDA C++ kernels on the CPU, from their own source: every CUDA thread is a coroutine that hands over at
// __syncthreads(), so one thread block is one sequence of phases. Thread blocks run one after the other, which makes
// __shared__ a static. In which order the threads run within a phase is the caller's choice: a result that depends on
// it is a race. Covers what the kernels of this project use and nothing else.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __shared__ static
#define __launch_bounds__(threads)
#define __syncthreads() shim::wait(__LINE__)

struct Index3 {
    unsigned x = 0, y = 0, z = 0;
};
static Index3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

// Coroutines hand over at barriers only, so a plain operation is atomic.
template <class T, class U> T atomicAdd(T* at, U value) { T old = *at; *at = old + value; return old; }
template <class T> T atomicMax(T* at, T value) { T old = *at; *at = max(old, value); return old; }
template <class T> T atomicOr(T* at, T value) { T old = *at; *at = old | value; return old; }

namespace shim {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr int RUNNING = 0, FINISHED = -1;  // else: the line of the barrier at which a thread waits

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    int at = RUNNING;
};

static ucontext_t scheduler;
static std::vector<Thread> threads;
static int current;
static void (*body)(void*);
static void* body_arguments;

inline void wait(int line) {
    threads[current].at = line;
    swapcontext(&threads[current].context, &scheduler);
}

inline void start() {
    body(body_arguments);
    threads[current].at = FINISHED;
}

// Runs one thread block; false where its threads do not all come to the same barrier, or not all to the end.
inline bool run_block(int order, std::mt19937& random) {
    const int count = static_cast<int>(threads.size());
    for (Thread& thread : threads) {
        thread.at = RUNNING;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, start, 0);
    }
    std::vector<int> turns(count);
    std::iota(turns.begin(), turns.end(), 0);
    if (order == 1) std::reverse(turns.begin(), turns.end());
    while (true) {
        if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
        for (int turn : turns) {
            current = turn;
            threadIdx.x = turn;
            swapcontext(&scheduler, &threads[turn].context);
        }
        for (Thread& thread : threads) {
            if (thread.at != threads[0].at) return false;
        }
        if (threads[0].at == FINISHED) return true;
    }
}

// order: 0 ascending, 1 descending, else the seed of a new order in each phase. Returns 0, or 1 for a divergent barrier.
template <class Body> int run_grid(int blocks, int block_threads, int order, Body kernel) {
    threads.resize(block_threads);
    body = [](void* arguments) { (*static_cast<Body*>(arguments))(); };
    body_arguments = &kernel;
    gridDim.x = blocks;
    blockDim.x = block_threads;
    std::mt19937 random(order);
    for (int block = 0; block < blocks; block++) {
        blockIdx.x = block;
        if (!run_block(order, random)) return 1;
    }
    return 0;
}

}  // namespace shim
