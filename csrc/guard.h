// What guard_grads does on both devices: a clean copy of each gradient, in the gradient's layout.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"

namespace esper {

inline bool has_strides(const Tensor& t, const Tensor& like) {
  const auto expected = like.strides();
  const auto got = t.strides();
  return std::equal(got.begin(), got.end(), expected.begin(), expected.end());
}

// Calls clean(source, result) for each gradient; both lie in memory in the same order, densely.
template <typename Clean>
std::vector<Tensor> guard_each(const std::vector<Tensor>& grads, const Tensor& non_finite,
                               const Tensor& fault, Clean&& clean) {
  check_counters(non_finite, fault, non_finite, "non_finite");
  for (const Tensor& grad : grads) {
    check_floating(grad, "grad");
    check_device(grad, "grad", non_finite, "non_finite");
  }
  std::vector<Tensor> results;
  results.reserve(grads.size());
  for (const Tensor& grad : grads) {
    Tensor result = torch::stable::empty_like(grad);
    clean(has_strides(grad, result) ? grad : torch::stable::clone(grad), result);
    results.push_back(result);
  }
  return results;
}

}  // namespace esper
