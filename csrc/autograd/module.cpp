// Python's view of the autograd functions for eager mode. They are made with PyTorch's own C++
// interface, so that, unlike the ops, they fit the torch alone that they were built with.
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "bottlenecks.h"
#include "differentiable.h"
#include "observed.h"

namespace py = pybind11;

namespace esper::autograd {
namespace {

// What esper.bottleneck does in Python. Never freed: the interpreter may be gone by then.
struct PythonSide {
  py::object differentiable_grads;
  py::object refused_error;
};
PythonSide* python = nullptr;

// Calls body() and raises its refusals as Python's RefusedError.
template <typename Body>
auto raising(const Body& body) {
  try {
    return body();
  } catch (const Refused& refused) {
    const py::gil_scoped_acquire gil;
    PyErr_SetString(python->refused_error.ptr(), refused.what());
    throw py::error_already_set();
  }
}

py::tuple as_call(const Weights& w, const Places& at) {
  return py::make_tuple(std::get<0>(w), std::get<1>(w), std::get<2>(w), std::get<3>(w),
                        at.activation, at.seeds, at.starts, at.alpha, at.non_finite, at.fault);
}

at::Tensor bottleneck_of(const at::Tensor& y, const at::Tensor& inp,
                         const std::vector<at::Tensor>& leaves, bool in_place, at::Tensor down,
                         std::optional<at::Tensor> down_bias, at::Tensor up,
                         std::optional<at::Tensor> up_bias, int64_t activation,
                         std::vector<int64_t> seeds, std::vector<int64_t> starts,
                         std::optional<at::Tensor> alpha, at::Tensor non_finite, at::Tensor fault) {
  const Weights weights{down, down_bias, up, up_bias};
  const Places places{activation, std::move(seeds), std::move(starts), alpha, non_finite, fault};
  return raising([&] {
    return alpha ? bottleneck(y, inp, weights, leaves, places, in_place)
                 : isolated_bottleneck(y, inp, weights, leaves, places);
  });
}

// All seeds of one design on one layer.
class Bottlenecks {
 public:
  // `places` tells where down, down_bias, up and up_bias stand among a seed's weights, -1 for none;
  // `stack` has those of several seeds, as many tensors, while `addresses` are those of the leaves.
  Bottlenecks(const std::array<int64_t, 4>& places, std::optional<std::vector<at::Tensor>> stack,
              std::vector<int64_t> addresses, int64_t channels, int64_t min_rank, int64_t max_rank,
              Places at)
      : places_(places),
        stack_(std::move(stack)),
        addresses_(std::move(addresses)),
        channels_(channels),
        min_rank_(min_rank),
        max_rank_(max_rank),
        at_(std::move(at)) {
    unheard_ = at_;
    unheard_.alpha.reset();
  }

  // The layer's output, or None for a call that is not for the op.
  std::optional<at::Tensor> blend(const at::Tensor& host, const at::Tensor& inp,
                                  const std::vector<at::Tensor>& leaves, bool in_place) const {
    if (!fits(host, inp, leaves)) return std::nullopt;
    return raising([&] { return bottleneck(host, inp, weights(leaves), leaves, at_, in_place); });
  }

  std::optional<at::Tensor> isolate(const at::Tensor& host, const at::Tensor& inp,
                                    const std::vector<at::Tensor>& leaves) const {
    if (!fits(host, inp, leaves)) return std::nullopt;
    return raising(
        [&] { return isolated_bottleneck(host, inp, weights(leaves), leaves, unheard_); });
  }

 private:
  bool fits(const at::Tensor& host, const at::Tensor& inp,
            const std::vector<at::Tensor>& leaves) const {
    const auto dtype = host.scalar_type();
    return host.dim() >= min_rank_ && host.dim() <= max_rank_ && host.size(-1) == channels_ &&
           inp.scalar_type() == dtype && leaves[0].scalar_type() == dtype &&
           !at::autocast::is_autocast_enabled(host.device().type()) && is_stacked(leaves);
  }

  bool is_stacked(const std::vector<at::Tensor>& leaves) const {
    if (at_.seeds.size() == 1) return true;
    if (!stack_ || leaves.size() != addresses_.size()) return false;
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (reinterpret_cast<int64_t>(leaves[i].data_ptr()) != addresses_[i]) return false;
    }
    return true;
  }

  Weights weights(const std::vector<at::Tensor>& leaves) const {
    const std::vector<at::Tensor>& all = stack_ ? *stack_ : leaves;
    const auto optional = [&](int64_t place) {
      return place < 0 ? std::nullopt : std::optional(all[place]);
    };
    return {all[places_[0]], optional(places_[1]), all[places_[2]], optional(places_[3])};
  }

  std::array<int64_t, 4> places_;
  std::optional<std::vector<at::Tensor>> stack_;
  std::vector<int64_t> addresses_;
  int64_t channels_;
  int64_t min_rank_;
  int64_t max_rank_;
  Places at_;
  Places unheard_;
};

}  // namespace

std::vector<at::Tensor> differentiable_grads(const at::Tensor& grad,
                                             const std::vector<at::Tensor>& inputs,
                                             const std::vector<bool>& needed,
                                             const Weights& weights, const Places& places) {
  const py::gil_scoped_acquire gil;
  const py::object grads =
      python->differentiable_grads(grad, inputs, needed, as_call(weights, places));
  std::vector<at::Tensor> result;
  for (const auto& one : grads.cast<std::vector<std::optional<at::Tensor>>>()) {
    result.push_back(one.value_or(at::Tensor()));
  }
  return result;
}

}  // namespace esper::autograd

PYBIND11_MODULE(_autograd, m) {
  using namespace esper::autograd;
  using at::Tensor;
  m.doc() = "Autograd functions for eager mode.";
  m.def("observe_both_passes", torch::wrap_pybind_function_no_gil(observe_both_passes));
  m.def("observed_relu", torch::wrap_pybind_function_no_gil(observed_relu));
  m.def("bottleneck", torch::wrap_pybind_function_no_gil(bottleneck_of));
  m.def("connect", [](py::object differentiable_grads, py::object refused_error) {
    python = new PythonSide{std::move(differentiable_grads), std::move(refused_error)};
  });
  py::class_<Bottlenecks>(m, "Bottlenecks")
      .def(py::init([](const std::array<int64_t, 4>& places,
                       std::optional<std::vector<Tensor>> stack, std::vector<int64_t> addresses,
                       int64_t channels, int64_t min_rank, int64_t max_rank, int64_t activation,
                       std::vector<int64_t> seeds, std::vector<int64_t> starts, Tensor alpha,
                       Tensor non_finite, Tensor fault) {
        return Bottlenecks(places, std::move(stack), std::move(addresses), channels, min_rank,
                           max_rank,
                           {activation, std::move(seeds), std::move(starts), std::move(alpha),
                            std::move(non_finite), std::move(fault)});
      }))
      .def("blend", torch::wrap_pybind_function_no_gil(&Bottlenecks::blend))
      .def("isolate", torch::wrap_pybind_function_no_gil(&Bottlenecks::isolate));
}
