// What relu_observe and its gradient do on both devices: a result with the strides that PyTorch's
// own op gives it, and inputs that lie in memory in the same order.
#pragma once

#include "guard.h"
#include "planes.h"

namespace esper {

// Returns `t` itself where it has the strides of `like`, which leave no gaps, otherwise a copy.
inline Tensor with_strides_of(const Tensor& t, const Tensor& like) {
  if (has_strides(t, like)) return t;
  Tensor copy = torch::stable::empty_like(like);
  return torch::stable::copy_(copy, t);
}

// Whether Planes can describe the memory of `t` as it is.
inline bool has_planes(const Tensor& t, int64_t channel_dim) {
  return t.is_contiguous() || memory_order(t, channel_dim) == MemoryOrder::kChannelsLast;
}

}  // namespace esper
