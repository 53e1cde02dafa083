// merge_branches: each block's children join their parent, by the page tables alone; see cpu.py for the legend.
//
// One thread block per block of the tree. First the sum of what the children have and the highest position; then their
// entries, THREADS children at a time: prefix sums of their lengths say where each one goes, and every thread finds the
// child of its entry by bisection, so that writes are coalesced whatever the lengths. A block that does not fit, or
// whose numbers are out of range, is left as it is and sets its bit in `error`.
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
    __shared__ unsigned long long total;  // entries of all children: more than an int holds, where they do not fit
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
        // What was checked holds where blocks are disjoint, as they must be; the bound keeps others inside their row.
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
        __syncthreads();  // rows and ends are written again
    }
    if (thread == 0) {
        used[parent] = filled;
        position[parent] = next;
    }
}
