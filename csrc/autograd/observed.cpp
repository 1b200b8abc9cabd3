#include "observed.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/node.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "find_op.h"

namespace esper::autograd {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Where the statistics of a layer belong.
struct Place {
  int64_t channel_dim;
  Tensor health;
  int64_t first_seed;
  int64_t num_seeds;
};

using Observe = void(const Tensor&, int64_t, const Tensor&, int64_t, int64_t);

void observe_grad(const Tensor& grad, const Place& at) {
  static const auto op = find_op<Observe>("esper::observe_grad");
  op.call(grad, at.channel_dim, at.health, at.first_seed, at.num_seeds);
}

struct ObservedReluBackward : torch::autograd::Node {
  SavedVariable y;
  Place place;

  explicit ObservedReluBackward(Place place) : place(std::move(place)) {}

  std::string name() const override { return "ObservedReluBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    y.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& grad = grads[0];
    if (!grad.defined()) return {Tensor()};
    const Tensor result = y.unpack(getptr());
    // Grad mode is on where this gradient will be differentiated again.
    if (at::GradMode::is_enabled()) {
      observe_grad(grad, place);
      return {at::threshold_backward(grad, result, 0)};
    }
    using Both = Tensor(const Tensor&, const Tensor&, int64_t, const Tensor&, int64_t, int64_t);
    static const auto op = find_op<Both>("esper::relu_observe_grad");
    return {
        op.call(grad, result, place.channel_dim, place.health, place.first_seed, place.num_seeds)};
  }
};

}  // namespace

void observe_both_passes(const Tensor& y, int64_t channel_dim, const Tensor& health,
                         int64_t first_seed, int64_t num_seeds) {
  static const auto op = find_op<Observe>("esper::observe");
  op.call(y, channel_dim, health, first_seed, num_seeds);
  if (!y.requires_grad()) return;
  y.register_hook([place = Place{channel_dim, health, first_seed, num_seeds}](const Tensor& grad) {
    if (grad.defined()) observe_grad(grad, place);
  });
}

Tensor observed_relu(const Tensor& x, int64_t channel_dim, const Tensor& health, int64_t first_seed,
                     int64_t num_seeds) {
  using Relu = Tensor(const Tensor&, int64_t, const Tensor&, int64_t, int64_t);
  static const auto op = find_op<Relu>("esper::relu_observe");
  const Tensor y = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(x, channel_dim, health, first_seed, num_seeds);
  }();
  if (!torch::autograd::compute_requires_grad(x)) return y;
  const auto node =
      c10::make_intrusive<ObservedReluBackward>(Place{channel_dim, health, first_seed, num_seeds});
  node->set_next_edges(torch::autograd::collect_next_edges(x));
  torch::autograd::set_history(y, node);
  node->y = SavedVariable(y, /*is_output=*/true);
  return y;
}

}  // namespace esper::autograd
