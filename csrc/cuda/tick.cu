#include "../seed_tick.h"
#include "device.h"

namespace esper::cuda {
namespace {

__global__ void tick_kernel(SeedArrays seeds, int64_t num_seeds, int64_t max_errors) {
  for (int64_t i = thread_index(); i < num_seeds; i += thread_count()) {
    tick_seed(seeds, i, max_errors);
  }
}

}  // namespace

cudaError_t launch_tick(void* arena, int64_t num_seeds, int64_t max_errors, cudaStream_t stream) {
  const SeedArrays seeds = seed_arrays(arena, seed_capacity(num_seeds));
  tick_kernel<<<blocks_for(num_seeds), kThreads, 0, stream>>>(seeds, num_seeds, max_errors);
  return cudaGetLastError();
}

}  // namespace esper::cuda
