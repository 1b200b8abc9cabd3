// Registers the CUDA launchers as ops. Loads on machines without a driver or without CUDA torch:
// nothing here refers to libtorch_cuda by name at link time.
#include <dlfcn.h>

#include "checks.h"
#include "cuda/launchers.h"
#include "guard.h"
#include "planes.h"
#include "relu.h"

namespace esper::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

using GetCurrentStream = AOTITorchError (*)(int32_t, void**);

// A CUDA tensor exists, so libtorch_cuda is loaded; a weak symbol would have stayed null, since
// this library may have been loaded first.
GetCurrentStream find_get_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  STD_TORCH_CHECK(library != nullptr, "libtorch_cuda.so is not loaded");
  void* symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
  STD_TORCH_CHECK(symbol != nullptr, "libtorch_cuda.so has no aoti_torch_get_current_cuda_stream");
  return reinterpret_cast<GetCurrentStream>(symbol);
}

cudaStream_t current_stream(const Tensor& t) {
  static const GetCurrentStream get_current_stream = find_get_current_stream();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_current_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, "launch of ", op, " failed: ", cudaGetErrorString(error));
}

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kFloat;
  }
}

void tick(Tensor arena, int64_t num_seeds, int64_t max_errors) {
  check_arena(arena, num_seeds, max_errors);
  const DeviceGuard guard(arena.get_device_index());
  check_launch(launch_tick(arena.mutable_data_ptr(), num_seeds, max_errors, current_stream(arena)),
               "tick");
}

Operand operand_of(const Tensor& t, const Planes& planes) {
  return {t.const_data_ptr(), dtype_of(t), planes.outer, planes.channels, planes.inner};
}

Columns columns_of(const Tensor& health, int64_t first_seed, int64_t num_seeds) {
  return {static_cast<float*>(health.mutable_data_ptr()) + first_seed, health.size(1), num_seeds};
}

// Calls launch(scratch, stream) with the scratch memory that observing `operand` takes.
template <typename Launch>
void launch_with_scratch(const Tensor& t, const Operand& operand, const char* op,
                         const Launch& launch) {
  const int64_t size = scratch_doubles(operand);
  const Tensor scratch = torch::stable::new_empty(t, {&size, 1}, ScalarType::Double);
  check_launch(launch(static_cast<double*>(scratch.mutable_data_ptr()), current_stream(t)), op);
}

using Observe = cudaError_t (*)(const Operand&, const Columns&, double*, cudaStream_t);

void observe_with(Observe launch, const char* op, const Tensor& t, int64_t channel_dim,
                  const Columns& columns) {
  if (t.numel() == 0) return;
  const DeviceGuard guard(t.get_device_index());
  const MemoryOrder order = memory_order(t, channel_dim);
  const Tensor dense = in_order(t, channel_dim, order);
  const Operand operand = operand_of(dense, planes_of(dense, channel_dim, order));
  launch_with_scratch(t, operand, op, [&](double* scratch, cudaStream_t stream) {
    return launch(operand, columns, scratch, stream);
  });
}

void observe(Tensor y, int64_t channel_dim, Tensor health, int64_t first_seed, int64_t num_seeds) {
  const int64_t dim = check_observed(y, "y", channel_dim, health, first_seed, num_seeds);
  observe_with(&launch_observe, "observe", y, dim, columns_of(health, first_seed, num_seeds));
}

void observe_grad(Tensor grad, int64_t channel_dim, Tensor health, int64_t first_seed,
                  int64_t num_seeds) {
  const int64_t dim = check_observed(grad, "grad", channel_dim, health, first_seed, num_seeds);
  observe_with(&launch_observe_grad, "observe_grad", grad, dim,
               columns_of(health, first_seed, num_seeds));
}

// Calls launch(operand, columns, scratch, stream) to write `result` from `source` while observing
// it, both being the same in memory; returns false where that had to go by one nameless channel,
// whose health is thrown away, so that the seeds' chunks are still to be observed.
template <typename Launch>
bool observe_while_writing(const Tensor& source, const Tensor& result, int64_t channel_dim,
                           const Columns& columns, const char* op, const Launch& launch) {
  const DeviceGuard guard(source.get_device_index());
  const auto observe_as = [&](const Planes& planes, const Columns& into) {
    const Operand operand = operand_of(source, planes);
    launch_with_scratch(source, operand, op, [&](double* scratch, cudaStream_t stream) {
      return launch(operand, into, scratch, stream);
    });
  };
  if (has_planes(result, channel_dim)) {
    observe_as(planes_of(result, channel_dim, memory_order(result, channel_dim)), columns);
    return true;
  }
  const int64_t rows = kHealthRows;
  const Tensor unused = torch::stable::new_empty(source, {&rows, 1}, ScalarType::Float);
  observe_as({1, 1, result.numel()}, {static_cast<float*>(unused.mutable_data_ptr()), 1, 1});
  return false;
}

Tensor relu_observe(Tensor x, int64_t channel_dim, Tensor health, int64_t first_seed,
                    int64_t num_seeds) {
  const int64_t dim = check_observed(x, "x", channel_dim, health, first_seed, num_seeds);
  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0) return y;
  const bool observed = observe_while_writing(
      with_strides_of(x, y), y, dim, columns_of(health, first_seed, num_seeds), "relu_observe",
      [&](const Operand& operand, const Columns& columns, double* scratch, cudaStream_t stream) {
        return launch_relu_observe(operand, y.mutable_data_ptr(), columns, scratch, stream);
      });
  if (!observed) observe(y, dim, health, first_seed, num_seeds);
  return y;
}

Tensor relu_observe_grad(Tensor grad, Tensor y, int64_t channel_dim, Tensor health,
                         int64_t first_seed, int64_t num_seeds) {
  const int64_t dim = check_observed(grad, "grad", channel_dim, health, first_seed, num_seeds);
  check_alike(grad, "grad", y, "y");
  Tensor grad_x = torch::stable::empty_like(y);
  if (grad_x.numel() == 0) return grad_x;
  const Tensor dense_y = with_strides_of(y, grad_x);
  const bool observed = observe_while_writing(
      with_strides_of(grad, grad_x), grad_x, dim, columns_of(health, first_seed, num_seeds),
      "relu_observe_grad",
      [&](const Operand& operand, const Columns& columns, double* scratch, cudaStream_t stream) {
        return launch_relu_observe_grad(operand, dense_y.const_data_ptr(),
                                        grad_x.mutable_data_ptr(), columns, scratch, stream);
      });
  if (!observed) observe_grad(grad, dim, health, first_seed, num_seeds);
  return grad_x;
}

std::vector<Tensor> guard_grads(std::vector<Tensor> grads, Tensor non_finite, Tensor fault) {
  const DeviceGuard device(non_finite.get_device_index());
  return guard_each(grads, non_finite, fault, [&](const Tensor& grad, Tensor& result) {
    check_launch(
        launch_guard(grad.const_data_ptr(), result.mutable_data_ptr(), dtype_of(grad), grad.numel(),
                     static_cast<float*>(non_finite.mutable_data_ptr()),
                     static_cast<uint8_t*>(fault.mutable_data_ptr()), current_stream(grad)),
        "guard_grads");
  });
}

}  // namespace
}  // namespace esper::cuda

STABLE_TORCH_LIBRARY_IMPL(esper, CUDA, m) {
  m.impl("tick", TORCH_BOX(&esper::cuda::tick));
  m.impl("observe", TORCH_BOX(&esper::cuda::observe));
  m.impl("observe_grad", TORCH_BOX(&esper::cuda::observe_grad));
  m.impl("relu_observe", TORCH_BOX(&esper::cuda::relu_observe));
  m.impl("relu_observe_grad", TORCH_BOX(&esper::cuda::relu_observe_grad));
  m.impl("guard_grads", TORCH_BOX(&esper::cuda::guard_grads));
}
