// Registers the CUDA launchers as ops. Loads on machines without a driver or without CUDA torch:
// nothing here refers to libtorch_cuda by name at link time.
#include <dlfcn.h>

#include "checks.h"
#include "cuda/launchers.h"
#include "guard.h"
#include "planes.h"

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

using Observe = cudaError_t (*)(const Operand&, const Columns&, double*, cudaStream_t);

void observe_with(Observe launch, const char* op, const Tensor& t, int64_t channel_dim,
                  const Tensor& health, int64_t first_seed, int64_t num_seeds) {
  if (t.numel() == 0) return;
  const DeviceGuard guard(t.get_device_index());
  const MemoryOrder order = memory_order(t, channel_dim);
  const Tensor dense = in_order(t, channel_dim, order);
  const Planes planes = planes_of(dense, channel_dim, order);
  const Operand operand{dense.const_data_ptr(), dtype_of(t), planes.outer, planes.channels,
                        planes.inner};
  const Columns columns{static_cast<float*>(health.mutable_data_ptr()) + first_seed, health.size(1),
                        num_seeds};
  const int64_t size = scratch_doubles(operand);
  const Tensor scratch = torch::stable::new_empty(t, {&size, 1}, ScalarType::Double);
  check_launch(
      launch(operand, columns, static_cast<double*>(scratch.mutable_data_ptr()), current_stream(t)),
      op);
}

void observe(Tensor y, int64_t channel_dim, Tensor health, int64_t first_seed, int64_t num_seeds) {
  const int64_t dim = check_observed(y, "y", channel_dim, health, first_seed, num_seeds);
  observe_with(&launch_observe, "observe", y, dim, health, first_seed, num_seeds);
}

void observe_grad(Tensor grad, int64_t channel_dim, Tensor health, int64_t first_seed,
                  int64_t num_seeds) {
  const int64_t dim = check_observed(grad, "grad", channel_dim, health, first_seed, num_seeds);
  observe_with(&launch_observe_grad, "observe_grad", grad, dim, health, first_seed, num_seeds);
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
  m.impl("guard_grads", TORCH_BOX(&esper::cuda::guard_grads));
}
