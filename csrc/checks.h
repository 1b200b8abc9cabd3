// Checks of the ops' arguments. Each message names the tensor, its value and what was expected.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "seed_layout.h"

namespace esper {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "another device";
}

inline std::string shape_name(const Tensor& t) {
  std::string text = "(";
  for (const int64_t size : t.sizes()) text += std::to_string(size) + ", ";
  return text + ")";
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, name, " must be ", toString(expected), ", got ",
                  toString(t.scalar_type()));
}

inline void check_device(const Tensor& t, const char* name, const Tensor& other,
                         const char* other_name) {
  STD_TORCH_CHECK(t.device() == other.device(), name, " must be on ", other_name, "'s device ",
                  device_name(other), ", got ", device_name(t));
}

inline void check_floating(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  name, " must be float32, float64, float16 or bfloat16, got ", toString(dtype));
}

// A field of one seed: a one-element view of the arena.
inline void check_cell(const Tensor& t, const char* name, ScalarType dtype, const Tensor& like,
                       const char* like_name) {
  check_dtype(t, name, dtype);
  STD_TORCH_CHECK(t.numel() == 1, name, " must have one element, got shape ", shape_name(t));
  check_device(t, name, like, like_name);
}

// Returns the dimension counted from the front.
inline int64_t checked_dim(const Tensor& t, const char* name, int64_t channel_dim) {
  const int64_t dims = t.dim();
  STD_TORCH_CHECK(-dims <= channel_dim && channel_dim < dims, "channel_dim must be a dimension of ",
                  name, " of shape ", shape_name(t), ", got ", channel_dim);
  return channel_dim < 0 ? channel_dim + dims : channel_dim;
}

inline void check_arena(const Tensor& arena, int64_t num_seeds, int64_t max_errors) {
  check_dtype(arena, "arena", ScalarType::Byte);
  STD_TORCH_CHECK(1 <= num_seeds && num_seeds <= kMaxSeeds, "num_seeds must lie in [1, ", kMaxSeeds,
                  "], got ", num_seeds);
  const int64_t expected = seed_capacity(num_seeds) * kBytesPerSeed;
  STD_TORCH_CHECK(arena.is_contiguous() && arena.numel() == expected,
                  "arena must be contiguous with ", expected, " bytes for ", num_seeds,
                  " seeds, got shape ", shape_name(arena));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(arena.data_ptr()) % alignof(int64_t) == 0,
                  "arena must be aligned to ", alignof(int64_t), " bytes, got offset ",
                  arena.storage_offset());
  STD_TORCH_CHECK(max_errors >= 1, "max_errors must be at least 1, got ", max_errors);
}

// Returns the channel dimension counted from the front.
inline int64_t check_observed(const Tensor& t, const char* name, int64_t channel_dim,
                              const Tensor& health, int64_t first_seed, int64_t num_seeds) {
  check_floating(t, name);
  const int64_t dim = checked_dim(t, name, channel_dim);
  STD_TORCH_CHECK(1 <= num_seeds && num_seeds <= t.size(dim), "num_seeds must lie in [1, ",
                  t.size(dim), "], the channels of ", name, ", got ", num_seeds);
  check_dtype(health, "health", ScalarType::Float);
  check_device(health, "health", t, name);
  STD_TORCH_CHECK(health.dim() == 2 && health.size(0) == kHealthRows && health.is_contiguous(),
                  "health must be contiguous of shape (", +kHealthRows, ", capacity), got ",
                  shape_name(health));
  STD_TORCH_CHECK(first_seed >= 0 && first_seed <= health.size(1) - num_seeds,
                  "first_seed must lie in [0, ", health.size(1) - num_seeds, "], got ", first_seed);
  return dim;
}

// Returns the channel dimension counted from the front.
inline int64_t check_blended(const Tensor& y, const Tensor& out, const Tensor& alpha,
                             int64_t channel_dim, int64_t start) {
  check_floating(y, "y");
  check_dtype(out, "out", y.scalar_type());
  check_device(out, "out", y, "y");
  check_cell(alpha, "alpha", ScalarType::Float, y, "y");
  const int64_t dim = checked_dim(y, "y", channel_dim);
  bool fits = out.dim() == y.dim();
  for (int64_t d = 0; fits && d < y.dim(); ++d) fits = d == dim || out.size(d) == y.size(d);
  STD_TORCH_CHECK(fits, "out must have y's shape ", shape_name(y), " except at channel_dim ", dim,
                  ", got ", shape_name(out));
  STD_TORCH_CHECK(start >= 0 && start <= y.size(dim) - out.size(dim), "start must lie in [0, ",
                  y.size(dim) - out.size(dim), "] for ", out.size(dim), " channels of ",
                  y.size(dim), ", got ", start);
  return dim;
}

inline void check_gradient(const Tensor& grad, const Tensor& y) {
  check_dtype(grad, "grad", y.scalar_type());
  check_device(grad, "grad", y, "y");
  const auto expected = y.sizes();
  const auto got = grad.sizes();
  STD_TORCH_CHECK(std::equal(got.begin(), got.end(), expected.begin(), expected.end()),
                  "grad must have y's shape ", shape_name(y), ", got ", shape_name(grad));
}

inline void check_counters(const Tensor& non_finite, const Tensor& fault, const Tensor& like,
                           const char* like_name) {
  check_cell(non_finite, "non_finite", ScalarType::Float, like, like_name);
  check_cell(fault, "fault", ScalarType::Byte, like, like_name);
}

}  // namespace esper
