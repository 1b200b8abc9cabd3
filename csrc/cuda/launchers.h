// Plain launchers: raw device pointers in, work queued on `stream`, nothing awaited. No torch
// header, so the .cu files compile on machines whose torch knows no CUDA.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace esper::cuda {

enum class Dtype { kFloat, kDouble, kHalf, kBFloat16 };

// Memory as in planes.h.
struct Operand {
  const void* data;
  Dtype dtype;
  int64_t outer;
  int64_t channels;
  int64_t inner;
};

// The seeds' columns of the health accumulator; rows lie `capacity` apart.
struct Columns {
  float* first;
  int64_t capacity;
  int64_t num_seeds;
};

cudaError_t launch_tick(void* arena, int64_t num_seeds, int64_t max_errors, cudaStream_t stream);

// Partial results wait in `scratch`, which holds scratch_doubles(y) doubles.
int64_t scratch_doubles(const Operand& y);
cudaError_t launch_observe(const Operand& y, const Columns& health, double* scratch,
                           cudaStream_t stream);
cudaError_t launch_observe_grad(const Operand& grad, const Columns& health, double* scratch,
                                cudaStream_t stream);

// The same for relu(x) and for the gradient that it receives; results lie in memory as x and grad.
cudaError_t launch_relu_observe(const Operand& x, void* y, const Columns& health, double* scratch,
                                cudaStream_t stream);
cudaError_t launch_relu_observe_grad(const Operand& grad, const void* y, void* grad_x,
                                     const Columns& health, double* scratch, cudaStream_t stream);

cudaError_t launch_guard(const void* grad, void* result, Dtype dtype, int64_t numel,
                         float* non_finite, uint8_t* fault, cudaStream_t stream);

}  // namespace esper::cuda
