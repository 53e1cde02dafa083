// The kernel of merge.cu as a function of the host; KERNEL_SOURCE is its path.
#include "cuda_shim.h"
#include KERNEL_SOURCE

extern "C" int run_merge(
    int* pages, int* counts, int* used, int* position, int* error, const int* parents, const int* children,
    const int* child_ptr, int num_branches, int capacity, int num_children, int blocks, int order)
{
    return shim::run_grid(blocks, THREADS, order, [&] {
        merge_branches(
            pages, counts, used, position, error, parents, children, child_ptr, num_branches, capacity, num_children);
    });
}
