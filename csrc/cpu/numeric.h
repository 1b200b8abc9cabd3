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

#include "vector_width.h"

namespace esper::cpu {

// In which float16 and bfloat16 are computed too.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
ESPER_INLINE bool is_finite(T value) {
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

// Several whole rows, or a span of columns of one long row.
struct Tile {
  Span rows;
  Span columns;
};

// A matrix in tiles. Their borders depend on the shape alone: sums taken tile by tile come out the
// same for any number of threads.
struct Tiles {
  int64_t rows;
  int64_t row_size;
  int64_t rows_per_tile;
  int64_t tiles_per_row;
  int64_t count;

  Tiles(int64_t rows, int64_t row_size)
      : rows(rows),
        row_size(row_size),
        rows_per_tile(std::max<int64_t>(1, kElementsPerTile / std::max<int64_t>(1, row_size))),
        tiles_per_row((row_size + kElementsPerTile - 1) / kElementsPerTile),
        count((rows + rows_per_tile - 1) / rows_per_tile * tiles_per_row) {}

  Tile operator[](int64_t i) const {
    const int64_t row = i / tiles_per_row * rows_per_tile;
    const int64_t column = i % tiles_per_row * kElementsPerTile;
    return {{row, std::min(rows, row + rows_per_tile)},
            {column, std::min(row_size, column + kElementsPerTile)}};
  }

  // Calls body(i, tile) for each tile, in parallel.
  template <typename Body>
  void for_each(Body&& body) const {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i, (*this)[i]);
    });
  }

 private:
  static constexpr int64_t kElementsPerTile = 32768;
};

}  // namespace esper::cpu
