// Seeds of one design on one layer and their backward pass, without a call into Python: what
// esper.bottleneck does where this is missing.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace esper::autograd {

// The op refuses its arguments; nothing has been changed.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// down, down_bias, up, up_bias: of the seeds stacked along the rows.
using Weights =
    std::tuple<at::Tensor, std::optional<at::Tensor>, at::Tensor, std::optional<at::Tensor>>;

// Where the weights are added to a layer's output, and who answers for them.
struct Places {
  int64_t activation;
  std::vector<int64_t> seeds;
  std::vector<int64_t> starts;
  std::optional<at::Tensor> alpha;  // none: the host does not hear the seeds
  at::Tensor non_finite;
  at::Tensor fault;
};

// Arguments and result as for esper.bottleneck.bottleneck, of which some input requires a gradient.
at::Tensor bottleneck(const at::Tensor& y, const at::Tensor& inp, const Weights& weights,
                      const std::vector<at::Tensor>& leaves, const Places& places, bool in_place);

// The same for esper.bottleneck.isolated_bottleneck.
at::Tensor isolated_bottleneck(const at::Tensor& y, const at::Tensor& inp, const Weights& weights,
                               const std::vector<at::Tensor>& leaves, const Places& places);

}  // namespace esper::autograd
