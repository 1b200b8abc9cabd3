#include "matmul.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

namespace esper::cpu {
namespace {

template <typename T, int kBytes>
struct VectorOf {
  typedef T Type __attribute__((vector_size(kBytes)));
};

// One tile of the result, held in registers: kRows rows of kVectors vectors.
template <typename Vector, int kRows, int kVectors, typename T>
[[gnu::always_inline]] inline void multiply_tile(const Product<T>& p, int64_t row, int64_t column) {
  Vector sums[kRows][kVectors] = {};
  if (p.bias != nullptr) {
    for (int i = 0; i < kRows; ++i) std::memcpy(sums[i], p.bias + column, sizeof(sums[i]));
  }
  const T* a = p.a + row * p.a_row_stride;
  const T* b = p.b + column;
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_column_stride, b += p.b_row_stride) {
    Vector line[kVectors];
    std::memcpy(line, b, sizeof(line));
    for (int i = 0; i < kRows; ++i) {
      const T factor = a[i * p.a_row_stride];
      for (int j = 0; j < kVectors; ++j) sums[i][j] += factor * line[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    std::memcpy(p.out + (row + i) * p.out_row_stride + column, sums[i], sizeof(sums[i]));
  }
}

// Returns the first column that is left over.
template <typename Vector, int kVectors, typename T>
[[gnu::always_inline]] inline int64_t multiply_columns(const Product<T>& p, int64_t column) {
  constexpr int64_t kColumns = kVectors * sizeof(Vector) / sizeof(T);
  // As many independent sums as hide the latency of one, and still fit into the registers.
  constexpr int kRows = 8 / kVectors;
  for (; column + kColumns <= p.columns; column += kColumns) {
    int64_t row = 0;
    for (; row + kRows <= p.rows; row += kRows) {
      multiply_tile<Vector, kRows, kVectors>(p, row, column);
    }
    for (; row < p.rows; ++row) multiply_tile<Vector, 1, kVectors>(p, row, column);
  }
  return column;
}

// In registers of kBytes, and in smaller ones for the last columns.
template <int kBytes, typename T>
[[gnu::always_inline]] inline void multiply_in(const Product<T>& p) {
  int64_t column = multiply_columns<typename VectorOf<T, kBytes>::Type, 2>(p, 0);
  column = multiply_columns<typename VectorOf<T, kBytes>::Type, 1>(p, column);
  if constexpr (kBytes > 32)
    column = multiply_columns<typename VectorOf<T, 32>::Type, 1>(p, column);
  if constexpr (kBytes > 16)
    column = multiply_columns<typename VectorOf<T, 16>::Type, 1>(p, column);
  multiply_columns<T, 1>(p, column);
}

template <typename T>
void multiply_by_16_bytes(const Product<T>& p) {
  multiply_in<16>(p);
}

// Vector types take the shape of the registers, so each width is a function of its own.
#if defined(__x86_64__)
template <typename T>
__attribute__((target("avx2,fma"))) void multiply_by_32_bytes(const Product<T>& p) {
  multiply_in<32>(p);
}

template <typename T>
__attribute__((target("avx512f,avx512vl,fma"))) void multiply_by_64_bytes(const Product<T>& p) {
  multiply_in<64>(p);
}
#endif

template <typename T>
auto widest_multiply() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) {
    return multiply_by_64_bytes<T>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return multiply_by_32_bytes<T>;
  }
#endif
  return multiply_by_16_bytes<T>;
}

const auto multiply_floats = widest_multiply<float>();
const auto multiply_doubles = widest_multiply<double>();

}  // namespace

void multiply(const Product<float>& product) { multiply_floats(product); }
void multiply(const Product<double>& product) { multiply_doubles(product); }

void matmul_blas(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace esper::cpu
