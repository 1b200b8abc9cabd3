// Where second derivatives are asked for, Python computes the first ones by operators that autograd
// knows: that is rare, and esper.bottleneck says once how it is done.
#pragma once

#include "bottlenecks.h"

namespace esper::autograd {

// The gradients of inp and of the leaves, those that are needed.
std::vector<at::Tensor> differentiable_grads(const at::Tensor& grad,
                                             const std::vector<at::Tensor>& inputs,
                                             const std::vector<bool>& needed,
                                             const Weights& weights, const Places& places);

}  // namespace esper::autograd
