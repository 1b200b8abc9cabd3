// Arithmetic that all CPU kernels share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>

namespace esper::cpu {

// In which float16 and bfloat16 are computed too.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
bool is_finite(T value) {
  return std::abs(static_cast<Compute<T>>(value)) <= std::numeric_limits<Compute<T>>::max();
}

// Calls body(T{}) with the C++ type of a floating-point dtype.
template <typename Body>
void dispatch_floating(torch::headeronly::ScalarType dtype, Body&& body) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      STD_TORCH_CHECK(false, "dtype must be floating-point, got ", toString(dtype));
  }
}

// Independent accumulators, so that a sum vectorises although its order is fixed.
template <typename T>
struct Lanes {
  static constexpr int64_t kCount = 8;
  std::array<T, kCount> values{};

  T total() const { return std::accumulate(values.begin(), values.end(), T{}); }
};

// Calls body(i, lane) for i in [0, n).
template <typename Body>
void for_each_in_lanes(int64_t n, Body&& body) {
  constexpr int64_t kLanes = Lanes<double>::kCount;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) body(i + lane, lane);
  }
  for (; i < n; ++i) body(i, i % kLanes);
}

// Elements [begin, end) of a row.
struct Span {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }

  // The part of `other` that lies in this span; empty, and at one of its ends, where none does.
  Span clamp(const Span& other) const {
    return {std::clamp(other.begin, begin, end), std::clamp(other.end, begin, end)};
  }
};

// Rows in blocks, each of several rows or of a span of a long one. Their borders depend on the
// shape alone: sums taken block by block come out the same for any number of threads.
struct RowBlocks {
  int64_t rows;
  int64_t row_size;
  int64_t rows_per_block;
  int64_t spans_per_row;
  int64_t count;

  RowBlocks(int64_t rows, int64_t row_size)
      : rows(rows),
        row_size(row_size),
        rows_per_block(std::max<int64_t>(1, kElementsPerBlock / std::max<int64_t>(1, row_size))),
        spans_per_row((row_size + kElementsPerBlock - 1) / kElementsPerBlock),
        count((rows + rows_per_block - 1) / rows_per_block * spans_per_row) {}

  // Calls body(block, row, span) in parallel over the blocks, and in order within each.
  template <typename Body>
  void for_each_span(Body&& body) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block / spans_per_row * rows_per_block;
        const int64_t last = std::min(rows, first + rows_per_block);
        const int64_t column = block % spans_per_row * kElementsPerBlock;
        const Span span{column, std::min(row_size, column + kElementsPerBlock)};
        for (int64_t row = first; row < last; ++row) body(block, row, span);
      }
    });
  }

 private:
  static constexpr int64_t kElementsPerBlock = 32768;
};

}  // namespace esper::cpu
