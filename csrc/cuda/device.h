// What all CUDA kernels share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launchers.h"

namespace esper::cuda {

inline constexpr int kThreads = 256;
inline constexpr int64_t kMaxBlocks = 1 << 16;

inline unsigned blocks_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

__device__ inline int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

__device__ inline double widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline double widen(__half value) { return __half2float(value); }
__device__ inline double widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// Calls body(T{}) with the C++ type of a dtype.
template <typename Body>
void dispatch(Dtype dtype, Body&& body) {
  switch (dtype) {
    case Dtype::kFloat:
      return body(float{});
    case Dtype::kDouble:
      return body(double{});
    case Dtype::kHalf:
      return body(__half{});
    case Dtype::kBFloat16:
      return body(__nv_bfloat16{});
  }
}

}  // namespace esper::cuda
