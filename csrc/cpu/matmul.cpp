#include "matmul.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "simd.h"

namespace esper::cpu {
namespace {

// One tile of the result, held in registers: kRows rows of kVectors vectors. Arrays that are read
// or written as a whole would be held in memory instead.
template <typename V, int kRows, int kVectors, typename T>
ESPER_INLINE void multiply_tile(const Product<T>& p, int64_t row, int64_t column) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  V sums[kRows][kVectors] = {};
  if (p.bias != nullptr) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) sums[i][j] = load<V>(p.bias + column + j * kLanes);
    }
  }
  const T* a = p.a + row * p.a_row_stride;
  const T* b = p.b + column;
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_column_stride, b += p.b_row_stride) {
    V line[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) line[j] = load<V>(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const T factor = a[i * p.a_row_stride];
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) sums[i][j] += factor * line[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    T* out = p.out + (row + i) * p.out_row_stride + column;
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) store(out + j * kLanes, sums[i][j]);
  }
}

// Rows from `row` on, kRows at a time and then half as many.
template <typename V, int kRows, int kVectors, typename T>
ESPER_INLINE void multiply_rows(const Product<T>& p, int64_t row, int64_t column) {
  for (; row + kRows <= p.rows; row += kRows) multiply_tile<V, kRows, kVectors>(p, row, column);
  if constexpr (kRows > 1) multiply_rows<V, kRows / 2, kVectors>(p, row, column);
}

// Returns the first column that is left over.
template <typename V, int kRows, int kVectors, typename T>
ESPER_INLINE int64_t multiply_columns(const Product<T>& p, int64_t column) {
  constexpr int64_t kColumns = kVectors * sizeof(V) / sizeof(T);
  for (; column + kColumns <= p.columns; column += kColumns) {
    multiply_rows<V, kRows, kVectors>(p, 0, column);
  }
  return column;
}

// In registers of kBytes, and in smaller ones for the last columns.
template <int kBytes, typename T>
ESPER_INLINE void multiply_in(const Product<T>& p) {
  // As many independent sums as hide the latency of one, and still fit into the registers.
  constexpr int kRows = kBytes == 64 ? 8 : 4;
  using V = Vector<T, kBytes / sizeof(T)>;
  int64_t column = multiply_columns<V, kRows, 2>(p, 0);
  column = multiply_columns<V, kRows, 1>(p, column);
  if constexpr (kBytes > 32)
    column = multiply_columns<Vector<T, 32 / sizeof(T)>, kRows, 1>(p, column);
  if constexpr (kBytes > 16)
    column = multiply_columns<Vector<T, 16 / sizeof(T)>, kRows, 1>(p, column);
  multiply_columns<T, kRows, 1>(p, column);
}

// Shuffles the first half of the lines into the second, each two of them lane by lane: as often as
// the lines can be halved, it transposes them.
template <int kLanes, typename V>
ESPER_INLINE void shuffle_lines(V (&lines)[kLanes]) {
  const LaneIndices<kLanes> lanes;
  V shuffled_lines[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes / 2; ++i) {
    const V first = lines[i], second = lines[i + kLanes / 2];
    shuffled_lines[2 * i] =
        shuffled<[](int lane) { return lane % 2 * kLanes + lane / 2; }>(first, second, lanes);
    shuffled_lines[2 * i + 1] =
        shuffled<[](int lane) { return lane % 2 * kLanes + (kLanes + lane) / 2; }>(first, second,
                                                                                   lanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) lines[i] = shuffled_lines[i];
}

template <int kLanes, typename T>
ESPER_INLINE void transpose_square(const Transposition<T>& t, int64_t row, int64_t column) {
  using V = Vector<T, kLanes>;
  V lines[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) lines[i] = load<V>(t.from + (row + i) * t.row_stride + column);
#pragma GCC unroll 4
  for (int size = kLanes; size > 1; size /= 2) shuffle_lines<kLanes>(lines);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(t.to + (column + i) * t.rows + row, lines[i]);
}

// In squares of kLanes lines, at the edges in smaller ones down to kMinLanes, and then one by one.
template <int kLanes, int kMinLanes, typename T>
ESPER_INLINE void transpose_squares(const Transposition<T>& t, Span rows, Span columns) {
  if constexpr (kLanes < kMinLanes) {
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      for (int64_t j = columns.begin; j < columns.end; ++j) {
        t.to[j * t.rows + i] = t.from[i * t.row_stride + j];
      }
    }
  } else {
    const int64_t row_end = rows.end - rows.size() % kLanes;
    const int64_t column_end = columns.end - columns.size() % kLanes;
    for (int64_t i = rows.begin; i < row_end; i += kLanes) {
      for (int64_t j = columns.begin; j < column_end; j += kLanes) {
        transpose_square<kLanes>(t, i, j);
      }
    }
    transpose_squares<kLanes / 2, kMinLanes>(t, {rows.begin, row_end}, {column_end, columns.end});
    transpose_squares<kLanes / 2, kMinLanes>(t, {row_end, rows.end}, columns);
  }
}

template <int kBytes, typename T>
ESPER_INLINE void transpose_in(const Transposition<T>& t) {
  constexpr int kLanes = kBytes / sizeof(T);
  transpose_squares<kLanes, kLanes / 2>(t, {0, t.rows}, {0, t.columns});
}

// Vector types take the shape of the registers, so each width is a function of its own.
template <typename T>
void multiply_by_16_bytes(const Product<T>& p) {
  multiply_in<16>(p);
}

template <typename T>
void transpose_by_16_bytes(const Transposition<T>& t) {
  transpose_in<16>(t);
}

#if defined(__x86_64__)
template <typename T>
[[gnu::target("avx2,fma")]] void multiply_by_32_bytes(const Product<T>& p) {
  multiply_in<32>(p);
}

template <typename T>
[[gnu::target("avx512f,avx512vl,fma")]] void multiply_by_64_bytes(const Product<T>& p) {
  multiply_in<64>(p);
}

template <typename T>
[[gnu::target("avx2,fma")]] void transpose_by_32_bytes(const Transposition<T>& t) {
  transpose_in<32>(t);
}

template <typename T>
[[gnu::target("avx512f,avx512vl,fma")]] void transpose_by_64_bytes(const Transposition<T>& t) {
  transpose_in<64>(t);
}
#endif

// The loops for this CPU's widest registers.
template <typename T>
struct Loops {
  void (*multiply)(const Product<T>&) = multiply_by_16_bytes<T>;
  void (*transpose)(const Transposition<T>&) = transpose_by_16_bytes<T>;

  Loops() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) {
      multiply = multiply_by_64_bytes<T>;
      transpose = transpose_by_64_bytes<T>;
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      multiply = multiply_by_32_bytes<T>;
      transpose = transpose_by_32_bytes<T>;
    }
#endif
  }
};

const Loops<float> float_loops;
const Loops<double> double_loops;

}  // namespace

void multiply(const Product<float>& product) { float_loops.multiply(product); }
void multiply(const Product<double>& product) { double_loops.multiply(product); }
void transpose(const Transposition<float>& t) { float_loops.transpose(t); }
void transpose(const Transposition<double>& t) { double_loops.transpose(t); }

void matmul_blas(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace esper::cpu
