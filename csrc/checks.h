// Checks of the ops' arguments. Each message names the tensor, its value and what was expected.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

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

inline std::string list_name(const std::vector<int64_t>& values) {
  std::string text = "[";
  for (const int64_t value : values) text += std::to_string(value) + ", ";
  return text + "]";
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

// A field of a layer's seeds: a slice of the arena.
inline void check_field(const Tensor& t, const char* name, ScalarType dtype, const Tensor& like,
                        const char* like_name) {
  check_dtype(t, name, dtype);
  check_device(t, name, like, like_name);
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous(), name,
                  " must be contiguous with one element per seed, got shape ", shape_name(t));
}

inline void check_seeds(const std::vector<int64_t>& seeds, int64_t num_seeds) {
  std::vector<int64_t> sorted = seeds;
  std::sort(sorted.begin(), sorted.end());
  STD_TORCH_CHECK(sorted.front() >= 0 && sorted.back() < num_seeds, "seeds must lie in [0, ",
                  num_seeds, "), the length of alpha, got ", list_name(seeds));
  STD_TORCH_CHECK(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(),
                  "seeds must be distinct, got ", list_name(seeds));
}

inline void check_chunk(const Tensor& t, const char* name, const Tensor& out, size_t i,
                        int64_t start, int64_t dim) {
  STD_TORCH_CHECK(out.scalar_type() == t.scalar_type(), "outs[", i, "] must be ",
                  toString(t.scalar_type()), " like ", name, ", got ", toString(out.scalar_type()));
  STD_TORCH_CHECK(out.device() == t.device(), "outs[", i, "] must be on ", name, "'s device ",
                  device_name(t), ", got ", device_name(out));
  const auto expected = t.sizes();
  const auto got = out.sizes();
  bool fits = got.size() == expected.size();
  for (size_t d = 0; fits && d < got.size(); ++d) {
    fits = static_cast<int64_t>(d) == dim || got[d] == expected[d];
  }
  STD_TORCH_CHECK(fits, "outs[", i, "] must have ", name, "'s shape ", shape_name(t),
                  " except at channel_dim ", dim, ", got ", shape_name(out));
  STD_TORCH_CHECK(0 <= start && start <= expected[dim] - got[dim], "starts[", i,
                  "] must lie in [0, ", expected[dim] - got[dim], "] for ", got[dim],
                  " channels of ", expected[dim], ", got ", start);
}

// Returns the indices of `outs` in the order of their channels.
inline std::vector<size_t> check_disjoint(const std::vector<Tensor>& outs,
                                          const std::vector<int64_t>& starts, int64_t dim) {
  std::vector<size_t> by_start(outs.size());
  std::iota(by_start.begin(), by_start.end(), size_t{0});
  std::sort(by_start.begin(), by_start.end(), [&](size_t a, size_t b) {
    return std::pair(starts[a], outs[a].size(dim)) < std::pair(starts[b], outs[b].size(dim));
  });
  int64_t end = 0;
  for (const size_t i : by_start) {
    const int64_t channels = outs[i].size(dim);
    if (channels == 0) continue;
    STD_TORCH_CHECK(starts[i] >= end, "outs must not overlap, but outs[", i, "] begins at channel ",
                    starts[i], ", before channel ", end, " where another ends");
    end = starts[i] + channels;
  }
  return by_start;
}

// Where blending takes place.
struct Chunks {
  int64_t dim;                   // the channels', counted from the front
  std::vector<size_t> by_start;  // the indices of the outs in the order of their channels
};

inline Chunks check_blended(const Tensor& t, const char* name, const std::vector<Tensor>& outs,
                            const std::vector<int64_t>& seeds, const std::vector<int64_t>& starts,
                            const Tensor& alpha, int64_t channel_dim) {
  check_floating(t, name);
  check_field(alpha, "alpha", ScalarType::Float, t, name);
  const int64_t dim = checked_dim(t, name, channel_dim);
  STD_TORCH_CHECK(!outs.empty(), "outs must have at least one tensor, got none");
  STD_TORCH_CHECK(seeds.size() == outs.size() && starts.size() == outs.size(),
                  "seeds and starts must be as many as the ", outs.size(), " outs, got ",
                  seeds.size(), " and ", starts.size());
  check_seeds(seeds, alpha.size(0));
  for (size_t i = 0; i < outs.size(); ++i) check_chunk(t, name, outs[i], i, starts[i], dim);
  return {dim, check_disjoint(outs, starts, dim)};
}

inline void check_needed(size_t num_needed, size_t num_outs) {
  STD_TORCH_CHECK(num_needed == 1 + num_outs, "needed must tell of y and each of the ", num_outs,
                  " outs, got ", num_needed, " values");
}

// Of the same dtype, device and shape.
inline void check_alike(const Tensor& t, const char* name, const Tensor& other,
                        const char* other_name) {
  check_dtype(t, name, other.scalar_type());
  check_device(t, name, other, other_name);
  const auto expected = other.sizes();
  const auto got = t.sizes();
  STD_TORCH_CHECK(std::equal(got.begin(), got.end(), expected.begin(), expected.end()), name,
                  " must have ", other_name, "'s shape ", shape_name(other), ", got ",
                  shape_name(t));
}

inline void check_counts(const Tensor& non_finite, const Tensor& fault, const Tensor& alpha) {
  check_field(non_finite, "non_finite", ScalarType::Float, alpha, "alpha");
  check_field(fault, "fault", ScalarType::Byte, alpha, "alpha");
  STD_TORCH_CHECK(non_finite.size(0) == alpha.size(0) && fault.size(0) == alpha.size(0),
                  "non_finite and fault must be as long as alpha, ", alpha.size(0), ", got ",
                  non_finite.size(0), " and ", fault.size(0));
}

inline void check_counters(const Tensor& non_finite, const Tensor& fault, const Tensor& like,
                           const char* like_name) {
  check_cell(non_finite, "non_finite", ScalarType::Float, like, like_name);
  check_cell(fault, "fault", ScalarType::Byte, like, like_name);
}

}  // namespace esper
