#include "checks.h"
#include "health_sums.h"
#include "relu.h"

namespace esper::cpu {
namespace {

// The columns of a layer's seeds in the health accumulator.
struct Columns {
  float* first;
  int64_t capacity;
  int64_t num_seeds;

  Columns(const Tensor& health, int64_t first_seed, int64_t num_seeds)
      : first(static_cast<float*>(health.mutable_data_ptr()) + first_seed),
        capacity(health.size(1)),
        num_seeds(num_seeds) {}
};

template <typename Source>
void merge_health(const Source& source, const Planes& planes, const Columns& columns) {
  const SeedSums<Statistics::kMoments, Source> sums(source, planes, columns.num_seeds);
  for (int64_t seed = 0; seed < columns.num_seeds; ++seed) {
    accumulate_health(columns.first + seed, columns.capacity, sums.health(seed));
  }
}

template <typename Source>
void add_energy(const Source& source, const Planes& planes, const Columns& columns) {
  const SeedSums<Statistics::kEnergy, Source> sums(source, planes, columns.num_seeds);
  float* energies = columns.first + kGradEnergy * columns.capacity;
  for (int64_t seed = 0; seed < columns.num_seeds; ++seed) {
    energies[seed] = saturate(energies[seed] + sums.energy(seed));
  }
}

// Calls body(data, planes) with the memory of `t`, brought into an order that planes describe.
template <typename Body>
void with_planes(const Tensor& t, int64_t channel_dim, Body&& body) {
  if (t.numel() == 0) return;
  const MemoryOrder order = memory_order(t, channel_dim);
  const Tensor dense = in_order(t, channel_dim, order);
  const Planes planes = planes_of(dense, channel_dim, order);
  dispatch_floating(t.scalar_type(), [&]<typename T>(T) {
    body(static_cast<const T*>(dense.const_data_ptr()), planes);
  });
}

void observe(Tensor y, int64_t channel_dim, Tensor health, int64_t first_seed, int64_t num_seeds) {
  const int64_t dim = check_observed(y, "y", channel_dim, health, first_seed, num_seeds);
  const Columns columns(health, first_seed, num_seeds);
  with_planes(y, dim, [&]<typename T>(const T* data, const Planes& planes) {
    merge_health(Plain<T>{data}, planes, columns);
  });
}

void observe_grad(Tensor grad, int64_t channel_dim, Tensor health, int64_t first_seed,
                  int64_t num_seeds) {
  const int64_t dim = check_observed(grad, "grad", channel_dim, health, first_seed, num_seeds);
  const Columns columns(health, first_seed, num_seeds);
  with_planes(grad, dim, [&]<typename T>(const T* data, const Planes& planes) {
    add_energy(Plain<T>{data}, planes, columns);
  });
}

Tensor relu_observe(Tensor x, int64_t channel_dim, Tensor health, int64_t first_seed,
                    int64_t num_seeds) {
  const int64_t dim = check_observed(x, "x", channel_dim, health, first_seed, num_seeds);
  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0) return y;
  const Tensor dense = with_strides_of(x, y);
  const bool fused = has_planes(y, dim);
  dispatch_floating(x.scalar_type(), [&]<typename T>(T) {
    const Relu<T> source{static_cast<const T*>(dense.const_data_ptr()),
                         static_cast<T*>(y.mutable_data_ptr())};
    if (!fused) return apply(source, y.numel());
    merge_health(source, planes_of(y, dim, memory_order(y, dim)),
                 Columns(health, first_seed, num_seeds));
  });
  if (!fused) observe(y, dim, health, first_seed, num_seeds);
  return y;
}

Tensor relu_observe_grad(Tensor grad, Tensor y, int64_t channel_dim, Tensor health,
                         int64_t first_seed, int64_t num_seeds) {
  const int64_t dim = check_observed(grad, "grad", channel_dim, health, first_seed, num_seeds);
  check_alike(grad, "grad", y, "y");
  Tensor grad_x = torch::stable::empty_like(y);
  if (grad_x.numel() == 0) return grad_x;
  const Tensor dense = with_strides_of(grad, grad_x), dense_y = with_strides_of(y, grad_x);
  const bool fused = has_planes(grad_x, dim);
  dispatch_floating(grad.scalar_type(), [&]<typename T>(T) {
    const ReluGrad<T> source{static_cast<const T*>(dense.const_data_ptr()),
                             static_cast<const T*>(dense_y.const_data_ptr()),
                             static_cast<T*>(grad_x.mutable_data_ptr())};
    if (!fused) return apply(source, grad_x.numel());
    add_energy(source, planes_of(grad_x, dim, memory_order(grad_x, dim)),
               Columns(health, first_seed, num_seeds));
  });
  if (!fused) observe_grad(grad, dim, health, first_seed, num_seeds);
  return grad_x;
}

}  // namespace
}  // namespace esper::cpu

STABLE_TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("observe", TORCH_BOX(&esper::cpu::observe));
  m.impl("observe_grad", TORCH_BOX(&esper::cpu::observe_grad));
  m.impl("relu_observe", TORCH_BOX(&esper::cpu::relu_observe));
  m.impl("relu_observe_grad", TORCH_BOX(&esper::cpu::relu_observe_grad));
}
