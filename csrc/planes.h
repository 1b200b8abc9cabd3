// Every op sees a tensor as `outer` planes of `channels` lines of `inner` elements, one after the
// other in memory. That covers contiguous tensors with the channels at any dimension, and tensors
// that keep their channels last in memory (inner is 1).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

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

// Whether `t` would be contiguous with its channels moved last. Every op asks this of every tensor,
// so it is answered from the strides, without a call to the dispatcher.
inline bool has_channels_last(const Tensor& t, int64_t channel_dim) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t expected = 1;
  const auto continues = [&](int64_t d) {
    const bool fits = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return fits;
  };
  if (!continues(channel_dim)) return false;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (d != channel_dim && !continues(d)) return false;
  }
  return true;
}

inline MemoryOrder memory_order(const Tensor& t, int64_t channel_dim) {
  return t.is_contiguous() || !has_channels_last(t, channel_dim) ? MemoryOrder::kContiguous
                                                                 : MemoryOrder::kChannelsLast;
}

// Returns `t` itself where it already has that order, otherwise a copy.
inline Tensor in_order(const Tensor& t, int64_t channel_dim, MemoryOrder order) {
  if (order == MemoryOrder::kContiguous) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }
  if (has_channels_last(t, channel_dim)) return t;
  return move_dim(torch::stable::contiguous(move_dim(t, channel_dim, -1)), -1, channel_dim);
}

// Like empty_strided with the shape of `t`, past the dispatcher: half of its cost.
inline Tensor empty_strided_like(const Tensor& t, const int64_t* strides) {
  AtenTensorHandle result;
  int32_t dtype, device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      t.dim(), t.sizes().data(), strides, dtype, device_type, t.get_device_index(), &result));
  return Tensor(result);
}

// Like empty_like for a tensor without gaps in memory.
inline Tensor empty_with_strides_of(const Tensor& t) {
  return empty_strided_like(t, t.strides().data());
}

// The dimensions of `t` as that order has them in memory, the innermost first.
inline std::vector<int64_t> dims_inside_out(const Tensor& t, int64_t channel_dim,
                                            MemoryOrder order) {
  std::vector<int64_t> dims;
  dims.reserve(static_cast<size_t>(t.dim()));
  const bool channels_last = order == MemoryOrder::kChannelsLast;
  if (channels_last) dims.push_back(channel_dim);
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (!channels_last || d != channel_dim) dims.push_back(d);
  }
  return dims;
}

// A tensor of the shape of `t` in that order, without gaps.
inline Tensor empty_in_order(const Tensor& t, int64_t channel_dim, MemoryOrder order) {
  std::vector<int64_t> strides(static_cast<size_t>(t.dim()));
  int64_t stride = 1;
  for (const int64_t d : dims_inside_out(t, channel_dim, order)) {
    strides[d] = stride;
    stride *= t.size(d);
  }
  return empty_strided_like(t, strides.data());
}

// From one row of `t` to the next, a row being a plane. None where `t` is not in that order or its
// rows have gaps; there may be gaps between them, as in some channels of a larger tensor.
inline std::optional<int64_t> row_stride(const Tensor& t, int64_t channel_dim, MemoryOrder order) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t expected = 1;
  bool in_row = true;
  std::optional<int64_t> result;
  for (const int64_t d : dims_inside_out(t, channel_dim, order)) {
    if (sizes[d] != 1) {
      if (!in_row && !result && strides[d] > expected) expected = strides[d];
      if (strides[d] != expected) return std::nullopt;
      if (!in_row && !result) result = expected;
      expected *= sizes[d];
    }
    if (d == channel_dim) in_row = false;
  }
  return result.value_or(expected);
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
