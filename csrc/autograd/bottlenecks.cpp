#include "bottlenecks.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/node.h>
#include <torch/csrc/autograd/saved_variable.h>

#include "differentiable.h"
#include "find_op.h"

namespace esper::autograd {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The edges of a node lead to y, to inp and from here on to the leaves.
constexpr size_t kInp = 1, kLeaves = 2;

struct BottleneckBackward : torch::autograd::Node {
  SavedVariable inp;
  SavedVariable hidden;
  SavedVariable lost;
  std::vector<SavedVariable> leaves;
  // The leaves share the memory of the weights, and so the count of its changes.
  Weights weights;
  Places places;
  bool hooked;  // somebody has a hand in what is saved

  BottleneckBackward(Weights weights, Places places)
      : weights(std::move(weights)),
        places(std::move(places)),
        hooked(at::SavedTensorDefaultHooks::get_hooks().has_value()) {}

  std::string name() const override { return "BottleneckBackward"; }

  void save(const Tensor& inp, const Tensor& hidden, const Tensor& lost,
            const std::vector<Tensor>& leaves) {
    this->inp = SavedVariable(inp, false);
    this->hidden = SavedVariable(hidden, false);
    this->lost = SavedVariable(lost, false);
    for (const Tensor& leaf : leaves) this->leaves.emplace_back(leaf, false);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&inp, &hidden, &lost}) saved->reset_data();
    for (SavedVariable& leaf : leaves) leaf.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list result(num_outputs());
    if (!grads[0].defined()) return result;
    result[0] = grads[0];
    std::vector<bool> needed;
    for (size_t i = kInp; i < num_outputs(); ++i) needed.push_back(task_should_compute_output(i));
    const bool needs_weights = std::find(needed.begin() + 1, needed.end(), true) != needed.end();
    if (!needed[0] && !needs_weights) return result;

    const Tensor grad = places.alpha ? grads[0] : grads[0].detach();
    std::vector<Tensor> inputs{inp.unpack()};
    for (const SavedVariable& leaf : leaves) inputs.push_back(leaf.unpack());
    // Grad mode is on where these gradients will be differentiated again.
    std::vector<Tensor> computed = at::GradMode::is_enabled()
                                       ? differentiable_grads(grad, inputs, needed, weights, places)
                                       : grads_of(grad, inputs, needed[0], needs_weights);
    for (size_t i = 0; i < computed.size(); ++i) {
      if (needed[i]) result[kInp + i] = std::move(computed[i]);
    }
    return result;
  }

 private:
  // The weights of the forward pass; the leaves as they were saved follow the first of the inputs.
  Weights weights_then(const std::vector<Tensor>& inputs) const {
    if (!hooked) return weights;
    const size_t per_seed = leaves.size() / places.seeds.size();
    size_t kind = 0;
    const auto stacked = [&] {
      std::vector<Tensor> parts;
      for (size_t i = kind++; i < leaves.size(); i += per_seed) parts.push_back(inputs[1 + i]);
      return at::cat(parts);
    };
    const auto& [down, down_bias, up, up_bias] = weights;
    Weights then;
    std::get<0>(then) = stacked();
    if (down_bias) std::get<1>(then) = stacked();
    std::get<2>(then) = stacked();
    if (up_bias) std::get<3>(then) = stacked();
    return then;
  }

  // The gradients of inp and of each leaf.
  std::vector<Tensor> grads_of(const Tensor& grad, const std::vector<Tensor>& inputs,
                               bool needs_inp, bool needs_weights) const {
    using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&,
        const std::optional<Tensor>&, const Tensor&, const std::optional<Tensor>&, int64_t,
        at::IntArrayRef, at::IntArrayRef, const std::optional<Tensor>&, const Tensor&,
        const Tensor&, bool, bool);
    static const auto op = find_op<Backward>("esper::bottleneck_backward");
    const auto [down, down_bias, up, up_bias] = weights_then(inputs);
    const Tensor unpacked_lost = lost.unpack();
    const std::optional<Tensor> known_lost =
        unpacked_lost.defined() ? std::optional(unpacked_lost) : std::nullopt;
    const auto [grad_inp, grad_down, grad_down_bias, grad_up, grad_up_bias] =
        op.call(grad, inputs[0], hidden.unpack(), known_lost, down, down_bias, up, up_bias,
                places.activation, places.seeds, places.starts, places.alpha, places.non_finite,
                places.fault, needs_inp, needs_weights);
    std::vector<Tensor> grads{grad_inp};
    if (!needs_weights) {
      grads.resize(1 + leaves.size());
      return grads;
    }
    std::vector<Tensor> stacked{grad_down};
    if (down_bias) stacked.push_back(grad_down_bias);
    stacked.push_back(grad_up);
    if (up_bias) stacked.push_back(grad_up_bias);
    const auto num_seeds = static_cast<int64_t>(places.seeds.size());
    for (int64_t seed = 0; seed < num_seeds; ++seed) {
      for (const Tensor& all : stacked) {
        const int64_t rows = all.size(0) / num_seeds;
        grads.push_back(num_seeds == 1 ? all : all.narrow(0, seed * rows, rows));
      }
    }
    return grads;
  }
};

// Calls body(), whose errors are refusals, except that there is no memory left.
template <typename Body>
auto refusing(const Body& body) {
  try {
    return body();
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const c10::Error& error) {
    throw Refused(error.what_without_backtrace());
  } catch (const std::runtime_error& error) {  // what ops of the stable interface throw
    throw Refused(error.what());
  }
}

torch::autograd::edge_list edges(const Tensor& y, const Tensor& inp,
                                 const std::vector<Tensor>& leaves) {
  return torch::autograd::collect_next_edges(y, inp, leaves);
}

}  // namespace

Tensor bottleneck(const Tensor& y, const Tensor& inp, const Weights& weights,
                  const std::vector<Tensor>& leaves, const Places& places, bool in_place) {
  using Forward = std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&,
      const std::optional<Tensor>&, int64_t, at::IntArrayRef, at::IntArrayRef, const Tensor&,
      const Tensor&, const Tensor&);
  static const auto op = find_op<Forward>("esper::bottleneck_");
  const auto& [down, down_bias, up, up_bias] = weights;
  const bool differentiable = torch::autograd::compute_requires_grad(y, inp, leaves);
  if (in_place) torch::autograd::check_inplace(y, differentiable);
  Tensor result, hidden, lost;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = in_place ? y : y.clone();
    std::tie(hidden, lost) = refusing([&] {
      return op.call(result, inp, down, down_bias, up, up_bias, places.activation, places.seeds,
                     places.starts, *places.alpha, places.non_finite, places.fault);
    });
  }
  if (!differentiable) return result;
  const auto node = c10::make_intrusive<BottleneckBackward>(weights, places);
  node->set_next_edges(edges(y, inp, leaves));
  if (in_place) {
    torch::autograd::increment_version(result);
    torch::autograd::rebase_history(result, node);
  } else {
    torch::autograd::set_history(result, node);
  }
  node->save(inp, hidden, lost, leaves);
  return result;
}

Tensor isolated_bottleneck(const Tensor& y, const Tensor& inp, const Weights& weights,
                           const std::vector<Tensor>& leaves, const Places& places) {
  if (!torch::autograd::compute_requires_grad(leaves)) return y;
  // Above the guard, so that they count changes together with what they are detached from.
  const Tensor result = y.detach(), unheard = inp.detach();
  Tensor hidden;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    hidden =
        refusing([&] { return at::linear(unheard, std::get<0>(weights), std::get<1>(weights)); });
  }
  const auto node = c10::make_intrusive<BottleneckBackward>(weights, places);
  node->set_next_edges(edges(y, unheard, leaves));
  torch::autograd::set_history(result, node);
  node->save(unheard, hidden, Tensor(), leaves);
  return result;
}

}  // namespace esper::autograd
