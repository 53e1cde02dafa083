// merge_branches: the page tables of each block's children are appended to their parent's; cpu.py has the arguments.
//
// One thread block per block of the tree. First it sums the lengths of the children and finds the highest position.
// Then it copies entries, THREADS children at a time: prefix sums of the lengths give the target of each child, and
// every thread finds the child of its entry by bisection, so that writes are coalesced for any lengths. A block that
// does not fit, or has numbers out of range, is left unchanged and sets its bit in `error`.
//
// No reordering, no float, one writer per word: the result does not depend on the schedule.

#ifndef THREADS
#error "THREADS: threads per thread block, a definition of the command line"
#endif
#define NO_BLOCK -1
#define ERROR_OVERFLOW 1
#define ERROR_INVALID 2

extern "C" __global__ void __launch_bounds__(THREADS) merge_branches(
    int* __restrict__ pages,     // [num_branches, capacity]
    int* __restrict__ counts,    // [num_branches, capacity]
    int* __restrict__ used,      // [num_branches]
    int* __restrict__ position,  // [num_branches]
    int* __restrict__ error,     // [1]
    const int* __restrict__ parents,    // [gridDim.x]
    const int* __restrict__ children,   // [num_children]
    const int* __restrict__ child_ptr,  // [gridDim.x + 1]
    const int num_branches, const int capacity, const int num_children)
{
    __shared__ unsigned long long total;  // entries of all children; may exceed an int if they do not fit
    __shared__ int next;
    __shared__ int invalid;
    __shared__ int rows[THREADS];
    __shared__ int ends[THREADS];

    const int thread = threadIdx.x;
    const int parent = parents[blockIdx.x];
    if (parent == NO_BLOCK) return;
    const int first = child_ptr[blockIdx.x];
    const int last = child_ptr[blockIdx.x + 1];
    if (parent < 0 || parent >= num_branches || first < 0 || last < first || last > num_children) {
        if (thread == 0) atomicOr(error, ERROR_INVALID);
        return;
    }
    const int base = used[parent];
    if (thread == 0) {
        total = 0;
        next = position[parent];
        invalid = base < 0 || base > capacity;
    }
    __syncthreads();

    unsigned long long entries = 0;
    for (int i = first + thread; i < last; i += THREADS) {
        const int child = children[i];
        const bool known = child >= 0 && child < num_branches && child != parent;
        const int length = known ? used[child] : -1;
        if (length < 0 || length > capacity) {
            atomicOr(&invalid, 1);
            continue;
        }
        entries += length;
        atomicMax(&next, position[child]);
    }
    if (entries > 0) atomicAdd(&total, entries);
    __syncthreads();
    if (invalid || base + total > (unsigned long long)capacity) {
        if (thread == 0) atomicOr(error, invalid ? ERROR_INVALID : ERROR_OVERFLOW);
        return;
    }

    int filled = base;
    for (int begin = first; begin < last; begin += THREADS) {
        const int here = min(last - begin, THREADS);
        int child = 0;
        int length = 0;
        if (thread < here) {
            child = children[begin + thread];
            length = used[child];
            used[child] = 0;
        }
        rows[thread] = child;
        ends[thread] = length;
        __syncthreads();
        for (int step = 1; step < here; step *= 2) {
            const int before = thread >= step ? ends[thread - step] : 0;
            __syncthreads();
            ends[thread] += before;
            __syncthreads();
        }
        // The checks hold for disjoint blocks, as required; the bound keeps writes of other blocks inside their row.
        const int copied = min(ends[here - 1], capacity - filled);
        for (int entry = thread; entry < copied; entry += THREADS) {
            int low = 0;
            int high = here - 1;
            while (low < high) {
                const int middle = (low + high) / 2;
                if (ends[middle] > entry) high = middle;
                else low = middle + 1;
            }
            const int offset = entry - (low > 0 ? ends[low - 1] : 0);
            const long long from = (long long)rows[low] * capacity + offset;
            const long long to = (long long)parent * capacity + filled + entry;
            pages[to] = pages[from];
            counts[to] = counts[from];
        }
        filled += copied;
        __syncthreads();  // before rows and ends are overwritten
    }
    if (thread == 0) {
        used[parent] = filled;
        position[parent] = next;
    }
}
