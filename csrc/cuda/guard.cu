#include "device.h"

namespace esper::cuda {
namespace {

template <typename T>
__global__ void guard_kernel(const T* grad, T* result, int64_t numel, float* non_finite,
                             uint8_t* fault) {
  unsigned lost = 0;
  for (int64_t i = thread_index(); i < numel; i += thread_count()) {
    const T value = grad[i];
    const bool finite = isfinite(widen(value));
    result[i] = finite ? value : T(0.0f);
    lost += !finite;
  }
  // Rare, so plain atomics will do; the sum of whole numbers does not depend on their order.
  if (lost > 0) {
    atomicAdd(non_finite, static_cast<float>(lost));
    *fault = 1;
  }
}

}  // namespace

cudaError_t launch_guard(const void* grad, void* result, Dtype dtype, int64_t numel,
                         float* non_finite, uint8_t* fault, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    guard_kernel<<<blocks_for(numel), kThreads, 0, stream>>>(
        static_cast<const T*>(grad), static_cast<T*>(result), numel, non_finite, fault);
  });
  return cudaGetLastError();
}

}  // namespace esper::cuda
