// Matrix products. Small ones run in loops of their own, which spares them the microseconds that a
// call through the dispatcher costs; all others go to torch's BLAS.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <memory>
#include <type_traits>

namespace esper::cpu {

using torch::stable::Tensor;

// A matrix within the memory of a dense tensor.
template <typename T>
struct Matrix {
  const Tensor* owner;
  T* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride = 1;

  Matrix(const Tensor& owner, int64_t rows, int64_t columns)
      : owner(&owner), data(first(owner)), rows(rows), columns(columns), row_stride(columns) {}

  Matrix transposed() const {
    Matrix m = *this;
    std::swap(m.rows, m.columns);
    std::swap(m.row_stride, m.column_stride);
    return m;
  }

  Matrix row_block(int64_t begin, int64_t count) const {
    Matrix m = *this;
    m.data += begin * row_stride;
    m.rows = count;
    return m;
  }

  Matrix column_block(int64_t begin, int64_t count) const {
    return transposed().row_block(begin, count).transposed();
  }

  T* row(int64_t i) const { return data + i * row_stride; }

  Tensor view() const {
    const std::array<int64_t, 2> sizes{rows, columns};
    const std::array<int64_t, 2> strides{row_stride, column_stride};
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(owner->get(), 2, sizes.data(), strides.data(),
                                       owner->storage_offset() + (data - first(*owner)), &handle));
    return Tensor(handle);
  }

 private:
  static T* first(const Tensor& t) {
    if constexpr (std::is_const_v<T>) {
      return static_cast<T*>(t.const_data_ptr());
    } else {
      return static_cast<T*>(t.mutable_data_ptr());
    }
  }
};

// a (rows, depth) @ b (depth, columns) + bias (columns), the bias only where there is one. Any
// strides for a, adjacent columns for b and the result.
template <typename T>
struct Product {
  const T* a;
  int64_t a_row_stride;
  int64_t a_column_stride;
  const T* b;
  int64_t b_row_stride;
  const T* bias;
  T* out;
  int64_t out_row_stride;
  int64_t rows;
  int64_t columns;
  int64_t depth;
};

// Runs on the calling thread.
void multiply(const Product<float>& product);
void multiply(const Product<double>& product);

// Memory that is not filled first.
template <typename T>
std::unique_ptr<T[]> scratch(int64_t size) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(size)]);
}

// Returns the transpose of a matrix with adjacent columns, row after row.
template <typename C, typename T>
std::unique_ptr<C[]> transpose(const Matrix<const T>& m) {
  auto result = scratch<C>(m.rows * m.columns);
  for (int64_t j = 0; j < m.columns; ++j) {
    for (int64_t i = 0; i < m.rows; ++i) result[j * m.rows + i] = static_cast<C>(m.row(i)[j]);
  }
  return result;
}

void matmul_blas(const Tensor& a, const Tensor& b, const Tensor& out);

// out = a @ b + bias, the bias only where there is one. Adjacent columns for out, and adjacent
// columns or rows for b.
template <typename T>
void matmul(const Matrix<const T>& a, const Matrix<const T>& b, const Matrix<T>& out,
            const T* bias = nullptr) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    // From here on BLAS makes up for its call.
    constexpr int64_t kMaxProducts = 1 << 18;
    if (a.rows * a.columns * b.columns <= kMaxProducts) {
      std::unique_ptr<T[]> packed;
      const bool packs = b.column_stride != 1;
      if (packs) packed = transpose<T>(b.transposed());
      return multiply({a.data, a.row_stride, a.column_stride, packs ? packed.get() : b.data,
                       packs ? b.columns : b.row_stride, bias, out.data, out.row_stride, a.rows,
                       b.columns, a.columns});
    }
  }
  matmul_blas(a.view(), b.view(), out.view());
  if (bias == nullptr) return;
  for (int64_t i = 0; i < out.rows; ++i) {
    for (int64_t j = 0; j < out.columns; ++j) out.row(i)[j] += bias[j];
  }
}

}  // namespace esper::cpu
