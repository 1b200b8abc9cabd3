#include "guard.h"

#include "counters.h"
#include "numeric.h"

namespace esper::cpu {
namespace {

// Returns how many elements were replaced by zero.
template <typename T>
int64_t copy_finite(const T* grad, T* result, int64_t n) {
  int64_t lost = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool finite = is_finite(grad[i]);
    result[i] = finite ? grad[i] : T(0);
    lost += !finite;
  }
  return lost;
}

std::vector<Tensor> guard_grads(std::vector<Tensor> grads, Tensor non_finite, Tensor fault) {
  int64_t lost = 0;
  auto results = guard_each(grads, non_finite, fault, [&](const Tensor& grad, Tensor& result) {
    dispatch_floating(grad.scalar_type(), [&]<typename T>(T) {
      lost += copy_finite(static_cast<const T*>(grad.const_data_ptr()),
                          static_cast<T*>(result.mutable_data_ptr()), grad.numel());
    });
  });
  record_lost(lost, non_finite, fault);
  return results;
}

}  // namespace
}  // namespace esper::cpu

STABLE_TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("guard_grads", TORCH_BOX(&esper::cpu::guard_grads));
}
