// Every op sees a tensor as `outer` planes of `channels` lines of `inner` elements, one after the
// other in memory. That covers contiguous tensors with the channels at any dimension, and tensors
// that keep their channels last in memory (inner is 1).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

namespace esper {

using torch::stable::Tensor;

enum class MemoryOrder { kContiguous, kChannelsLast };

struct Planes {
  int64_t outer;
  int64_t channels;
  int64_t inner;
};

inline Tensor move_dim(const Tensor& t, int64_t source, int64_t destination) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(t), from(source), from(destination)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::movedim", "int", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline MemoryOrder memory_order(const Tensor& t, int64_t channel_dim) {
  if (t.is_contiguous() || !move_dim(t, channel_dim, -1).is_contiguous()) {
    return MemoryOrder::kContiguous;
  }
  return MemoryOrder::kChannelsLast;
}

// Returns `t` itself where it already has that order, otherwise a copy.
inline Tensor in_order(const Tensor& t, int64_t channel_dim, MemoryOrder order) {
  if (order == MemoryOrder::kContiguous) return torch::stable::contiguous(t);
  return move_dim(torch::stable::contiguous(move_dim(t, channel_dim, -1)), -1, channel_dim);
}

inline Planes planes_of(const Tensor& t, int64_t channel_dim, MemoryOrder order) {
  const int64_t channels = t.size(channel_dim);
  if (t.numel() == 0) return {0, channels, 0};
  int64_t inner = 1;
  if (order == MemoryOrder::kContiguous) {
    for (int64_t d = channel_dim + 1; d < t.dim(); ++d) inner *= t.size(d);
  }
  return {t.numel() / (channels * inner), channels, inner};
}

}  // namespace esper
