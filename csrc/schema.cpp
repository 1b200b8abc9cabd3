// Schemas of all ops. The argument (a!) is changed in place; nothing ever waits for the device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(esper, m) {
  m.def("tick(Tensor(a!) arena, int num_seeds, int max_errors) -> ()");
  m.def(
      "observe(Tensor y, int channel_dim, Tensor(a!) health, int first_seed, int num_seeds) -> ()");
  m.def(
      "observe_grad(Tensor grad, int channel_dim, Tensor(a!) health, int first_seed, "
      "int num_seeds) -> ()");
  m.def(
      "relu_observe(Tensor x, int channel_dim, Tensor(a!) health, int first_seed, "
      "int num_seeds) -> Tensor");
  m.def(
      "relu_observe_grad(Tensor grad, Tensor y, int channel_dim, Tensor(a!) health, "
      "int first_seed, int num_seeds) -> Tensor");
  m.def(
      "blend(Tensor y, Tensor[] outs, int[] seeds, int[] starts, Tensor alpha, int channel_dim, "
      "Tensor(a!) non_finite, Tensor(b!) fault) -> Tensor");
  m.def(
      "blend_(Tensor(a!) y, Tensor[] outs, int[] seeds, int[] starts, Tensor alpha, "
      "int channel_dim, Tensor(b!) non_finite, Tensor(c!) fault) -> ()");
  // The gradients that are needed of y and of each out, in that order, and alpha's if y is given.
  m.def(
      "blend_backward(Tensor grad, Tensor? y, Tensor[] outs, int[] seeds, int[] starts, "
      "Tensor alpha, int channel_dim, bool[] needed) -> Tensor[]");
  m.def("guard_grads(Tensor[] grads, Tensor(a!) non_finite, Tensor(b!) fault) -> Tensor[]");
  m.def(
      "bottleneck_(Tensor(a!) y, Tensor inp, Tensor down, Tensor? down_bias, Tensor up, "
      "Tensor? up_bias, int activation, int[] seeds, int[] starts, Tensor alpha, "
      "Tensor(b!) non_finite, Tensor(c!) fault) -> (Tensor hidden, Tensor lost)");
  m.def(
      "bottleneck_backward(Tensor grad, Tensor inp, Tensor hidden, Tensor? lost, Tensor down, "
      "Tensor? down_bias, Tensor up, Tensor? up_bias, int activation, int[] seeds, int[] starts, "
      "Tensor? alpha, Tensor(a!) non_finite, Tensor(b!) fault, bool needs_inp, "
      "bool needs_weights) -> (Tensor grad_inp, Tensor grad_down, Tensor grad_down_bias, "
      "Tensor grad_up, Tensor grad_up_bias)");
}
