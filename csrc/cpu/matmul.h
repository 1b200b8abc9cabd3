// Matrix products. Small ones run in loops of their own, which hold the result in registers and
// need no call through the dispatcher; all others go to torch's BLAS.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <memory>
#include <new>
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

// A matrix with adjacent columns, and memory for its transpose, row after row.
template <typename T>
struct Transposition {
  const T* from;
  int64_t row_stride;
  int64_t rows;
  int64_t columns;
  T* to;
};

void transpose(const Transposition<float>& transposition);
void transpose(const Transposition<double>& transposition);

// On a line of the cache, so that no vector lies on two.
constexpr std::align_val_t kAlignment{64};

struct AlignedDelete {
  void operator()(void* memory) const { operator delete[](memory, kAlignment); }
};

template <typename T>
using Scratch = std::unique_ptr<T[], AlignedDelete>;

// Memory that is not filled first.
template <typename T>
Scratch<T> scratch(int64_t size) {
  return Scratch<T>(new (kAlignment) T[static_cast<size_t>(size)]);
}

// Returns the transpose of a matrix with adjacent columns, row after row.
template <typename C, typename T>
Scratch<C> transposed(const Matrix<const T>& m) {
  auto result = scratch<C>(m.rows * m.columns);
  if constexpr (std::is_same_v<C, T>) {
    transpose({m.data, m.row_stride, m.rows, m.columns, result.get()});
  } else {
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.columns; ++j) result[j * m.rows + i] = static_cast<C>(m.row(i)[j]);
    }
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
    // Beyond it BLAS makes up for its call, by blocks that fit the caches and by threads.
    constexpr int64_t kMaxProducts = 1 << 20;
    if (a.rows * a.columns * b.columns <= kMaxProducts) {
      Scratch<T> packed;
      const bool packs = b.column_stride != 1;
      if (packs) packed = transposed<T>(b.transposed());
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
