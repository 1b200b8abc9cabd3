// Observation of both passes without a call into Python: what esper.ops does where this is missing.
#pragma once

#include <ATen/core/Tensor.h>

namespace esper::autograd {

// Takes the statistics of y, and in its backward pass those of the gradient that it receives.
void observe_both_passes(const at::Tensor& y, int64_t channel_dim, const at::Tensor& health,
                         int64_t first_seed, int64_t num_seeds);

at::Tensor observed_relu(const at::Tensor& x, int64_t channel_dim, const at::Tensor& health,
                         int64_t first_seed, int64_t num_seeds);

}  // namespace esper::autograd
