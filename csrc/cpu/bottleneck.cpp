// Seeds of one design on one layer: y[chunk] += alpha * (f(inp @ down.T) @ up.T), all in one op.
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "matmul.h"
#include "numeric.h"
#include "vector_width.h"

namespace esper::cpu {
namespace {

// The order of esper.reference.ACTIVATIONS.
enum class Activation : int64_t { kIdentity, kRelu, kGelu, kGeluTanh, kSilu, kTanh, kSigmoid };
constexpr int64_t kNumActivations = 7;

using Indices = std::vector<int64_t>;

struct Weights {
  Tensor down;  // (seeds * rank, inputs)
  std::optional<Tensor> down_bias;
  Tensor up;  // (seeds * chunk, rank)
  std::optional<Tensor> up_bias;
};

struct Sizes {
  int64_t rows;
  int64_t inputs;
  int64_t channels;
  int64_t seeds;
  int64_t rank;
  int64_t chunk;
};

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional(dense(*t)) : std::nullopt;
}

Weights dense(const Weights& w) {
  return {dense(w.down), dense(w.down_bias), dense(w.up), dense(w.up_bias)};
}

// Without the dispatcher's search for an op by its name, half a microsecond.
Tensor empty(const std::vector<int64_t>& shape, int32_t dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) strides[d] = stride;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()),
                                                         shape.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return empty(shape, dtype);
}

// The shape of t with another last dimension.
std::vector<int64_t> with_last(const Tensor& t, int64_t size) {
  const auto sizes = t.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = size;
  return shape;
}

void check_like(const Tensor& t, const char* name, const Tensor& y, const char* y_name) {
  check_dtype(t, name, y.scalar_type());
  // Only what is elsewhere is worth the comparison of two devices.
  if (!t.is_cpu()) check_device(t, name, y, y_name);
}

void check_shape(const Tensor& t, const char* name, const std::vector<int64_t>& expected) {
  const auto got = t.sizes();
  if (std::equal(got.begin(), got.end(), expected.begin(), expected.end())) return;
  std::string text = "(";
  for (const int64_t size : expected) text += std::to_string(size) + ", ";
  STD_TORCH_CHECK(false, name, " must have shape ", text, "), got ", shape_name(t));
}

void check_bank(const Tensor& t, const char* name, ScalarType dtype, const Tensor& y,
                const char* y_name, const Indices& seeds) {
  check_dtype(t, name, dtype);
  if (!t.is_cpu()) check_device(t, name, y, y_name);
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous(), name,
                  " must be contiguous of shape (num_seeds, ), got ", shape_name(t));
  for (const int64_t seed : seeds) {
    STD_TORCH_CHECK(seed >= 0 && seed < t.numel(), "seeds must lie in [0, ", t.numel(), ") of ",
                    name, ", got ", seed);
  }
}

// y is the output or its gradient, named `name`.
Sizes checked_sizes(const Tensor& y, const char* name, const Tensor& inp, const Weights& w,
                    int64_t activation, const Indices& seeds, const Indices& starts) {
  check_floating(y, name);
  check_like(inp, "inp", y, name);
  check_like(w.down, "down", y, name);
  check_like(w.up, "up", y, name);
  const auto leading = y.sizes();
  const auto inp_sizes = inp.sizes();
  STD_TORCH_CHECK(y.dim() >= 1 && inp.dim() == y.dim() &&
                      std::equal(leading.begin(), leading.end() - 1, inp_sizes.begin()),
                  "inp must have ", name, "'s shape ", shape_name(y),
                  " except at the last "
                  "dimension, got ",
                  shape_name(inp));
  STD_TORCH_CHECK(activation >= 0 && activation < kNumActivations, "activation must lie in [0, ",
                  kNumActivations, "), got ", activation);
  const auto count = static_cast<int64_t>(seeds.size());
  STD_TORCH_CHECK(count >= 1 && starts.size() == seeds.size(),
                  "seeds and starts must have one entry per seed, got ", count, " and ",
                  starts.size());
  STD_TORCH_CHECK(w.up.dim() == 2 && w.up.size(0) % count == 0,
                  "up must have shape (seeds * chunk, rank) for ", count, " seeds, got ",
                  shape_name(w.up));
  Sizes sizes{1, inp.size(-1), y.size(-1), count, w.up.size(1), w.up.size(0) / count};
  for (auto size = leading.begin(); size != leading.end() - 1; ++size) sizes.rows *= *size;
  check_shape(w.down, "down", {count * sizes.rank, sizes.inputs});
  if (w.down_bias) {
    check_like(*w.down_bias, "down_bias", y, name);
    check_shape(*w.down_bias, "down_bias", {count * sizes.rank});
  }
  if (w.up_bias) {
    check_like(*w.up_bias, "up_bias", y, name);
    check_shape(*w.up_bias, "up_bias", {count * sizes.chunk});
  }
  for (const int64_t start : starts) {
    STD_TORCH_CHECK(start >= 0 && start <= sizes.channels - sizes.chunk, "starts must lie in [0, ",
                    sizes.channels - sizes.chunk, "] for ", sizes.chunk, " channels of ",
                    sizes.channels, ", got ", start);
  }
  return sizes;
}

void record_lost(int64_t lost, int64_t seed, const Tensor& non_finite, const Tensor& fault) {
  if (lost == 0) return;
  static_cast<float*>(non_finite.mutable_data_ptr())[seed] += static_cast<float>(lost);
  static_cast<uint8_t*>(fault.mutable_data_ptr())[seed] = 1;
}

template <size_t kArguments>
Tensor call(const char* op, std::array<StableIValue, kArguments> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <typename T>
Tensor relu(const Tensor& z) {
  Tensor a = torch::stable::empty_like(z);
  const auto* source = static_cast<const T*>(z.const_data_ptr());
  auto* result = static_cast<T*>(a.mutable_data_ptr());
  for (int64_t i = 0; i < z.numel(); ++i) result[i] = source[i] < T(0) ? T(0) : source[i];
  return a;
}

// f(z); z itself for the identity.
template <typename T>
Tensor activate(const Tensor& z, Activation activation) {
  using torch::stable::detail::from;
  switch (activation) {
    case Activation::kIdentity:
      return z;
    case Activation::kRelu:
      return relu<T>(z);
    case Activation::kGelu:
      return call<2>("aten::gelu", {from(z), from(std::string("none"))});
    case Activation::kGeluTanh:
      return call<2>("aten::gelu", {from(z), from(std::string("tanh"))});
    case Activation::kSilu:
      return call<1>("aten::silu", {from(z)});
    case Activation::kTanh:
      return call<1>("aten::tanh", {from(z)});
    default:
      return call<1>("aten::sigmoid", {from(z)});
  }
}

// Overwrites grad, the gradient of a = f(z).
template <typename T>
Tensor relu_backward(const Tensor& grad, const Tensor& z) {
  const auto* source = static_cast<const T*>(z.const_data_ptr());
  auto* result = static_cast<T*>(grad.mutable_data_ptr());
  for (int64_t i = 0; i < z.numel(); ++i) result[i] = source[i] <= T(0) ? T(0) : result[i];
  return grad;
}

// The gradient of z from grad, that of a = f(z); grad may be overwritten.
template <typename T>
Tensor activate_backward(const Tensor& grad, const Tensor& z, const Tensor& a,
                         Activation activation) {
  using torch::stable::detail::from;
  switch (activation) {
    case Activation::kIdentity:
      return grad;
    case Activation::kRelu:
      return relu_backward<T>(grad, z);
    case Activation::kGelu:
      return call<3>("aten::gelu_backward", {from(grad), from(z), from(std::string("none"))});
    case Activation::kGeluTanh:
      return call<3>("aten::gelu_backward", {from(grad), from(z), from(std::string("tanh"))});
    case Activation::kSilu:
      return call<2>("aten::silu_backward", {from(grad), from(z)});
    case Activation::kTanh:
      return call<2>("aten::tanh_backward", {from(grad), from(a)});
    default:
      return call<2>("aten::sigmoid_backward", {from(grad), from(a)});
  }
}

// Values in the dtype of the arithmetic: the tensor's own memory where that is its dtype.
template <typename T>
class Widened {
 public:
  explicit Widened(const Tensor& t) : data_(static_cast<const Compute<T>*>(t.const_data_ptr())) {
    if constexpr (!std::is_same_v<T, Compute<T>>) {
      const auto* source = static_cast<const T*>(t.const_data_ptr());
      copy_ = scratch<Compute<T>>(t.numel());
      std::copy(source, source + t.numel(), copy_.get());
      data_ = copy_.get();
    }
  }

  const Compute<T>* data() const { return data_; }

 private:
  Scratch<Compute<T>> copy_;
  const Compute<T>* data_;
};

// Calls body(seed, row, branch) for each row of each seed's branch a @ up.T + up_bias, in parallel
// over blocks of rows. The branch is in the dtype of the arithmetic and never all in memory.
template <typename T, typename Body>
void for_each_branch_row(const Tensor& a, const Weights& w, const Sizes& n, Body&& body) {
  using C = Compute<T>;
  const Widened<T> wide_a(a);
  const Widened<T> wide_bias(w.up_bias.value_or(w.up));
  const Matrix<const T> up(w.up, n.seeds * n.chunk, n.rank);
  std::vector<Scratch<C>> transposed_ups;
  for (int64_t s = 0; s < n.seeds; ++s) {
    transposed_ups.push_back(transposed<C>(up.row_block(s * n.chunk, n.chunk)));
  }
  constexpr int64_t kScratchElements = 8192;  // half of a first-level cache in float32
  const int64_t block_rows =
      std::clamp<int64_t>(kScratchElements / std::max<int64_t>(n.chunk, 1) / 8 * 8, 8, 512);
  const int64_t blocks = (n.rows + block_rows - 1) / block_rows;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const auto branch = scratch<C>(block_rows * n.chunk);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_rows;
      const int64_t rows = std::min(block_rows, n.rows - first);
      for (int64_t s = 0; s < n.seeds; ++s) {
        multiply({wide_a.data() + (first * n.seeds + s) * n.rank, n.seeds * n.rank, 1,
                  transposed_ups[s].get(), n.chunk,
                  w.up_bias ? wide_bias.data() + s * n.chunk : nullptr, branch.get(), n.chunk, rows,
                  n.chunk, n.rank});
        for (int64_t i = 0; i < rows; ++i) body(s, first + i, branch.get() + i * n.chunk);
      }
    }
  });
}

struct Losses {
  int32_t broken = 0;   // elements of the branch that are not finite
  int32_t charged = 0;  // elements of the output that only the branch kept from being finite
};

struct AddBranch {
  template <typename T>
  ESPER_INLINE static Losses run(T* y, const Compute<T>* branch, int64_t n, Compute<T> alpha) {
    using C = Compute<T>;
    // A product with zero would cost the host the sign of its zeros.
    const bool moves = alpha != 0;
    Losses losses;
    for (int64_t i = 0; i < n; ++i) {  // without a branch, so that it vectorises
      const T host = y[i];
      const C act = static_cast<C>(host);
      const bool usable = is_finite(static_cast<T>(act + branch[i]));
      const T moved = static_cast<T>(act + alpha * branch[i]);
      y[i] = usable & moves ? moved : host;
      losses.broken += !is_finite(branch[i]);
      losses.charged += !usable & is_finite(act);
    }
    return losses;
  }
};

// alpha * grad where that is finite, else 0.
struct Weigh {
  template <typename T>
  ESPER_INLINE static void run(const T* grad, T* result, int64_t n, Compute<T> alpha) {
    for (int64_t i = 0; i < n; ++i) {
      const auto g = static_cast<Compute<T>>(grad[i]);
      result[i] = is_finite(g) ? static_cast<T>(alpha * g) : T(0);
    }
  }
};

struct ZeroWhereBroken {
  template <typename T>
  ESPER_INLINE static void run(T* grad, const Compute<T>* branch, int64_t n) {
    for (int64_t i = 0; i < n; ++i) grad[i] = is_finite(branch[i]) ? grad[i] : T(0);
  }
};

struct AddTo {
  template <typename T>
  ESPER_INLINE static void run(double* sums, const T* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(static_cast<Compute<T>>(x[i]));
  }
};

struct CountNonFinite {
  template <typename T>
  ESPER_INLINE static int32_t run(const T* x, int64_t n) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += !is_finite(x[i]);
    return count;
  }
};

// Replaces what is not finite by zero and returns how much that was.
template <typename T>
int64_t make_finite(T* x, int64_t n) {
  constexpr int64_t kBlock = 4096;
  int64_t lost = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    T* block = x + begin;
    const int64_t size = std::min(kBlock, n - begin);
    const int32_t count = run_widest<CountNonFinite>(block, size);
    lost += count;
    if (count > 0) std::replace_if(block, block + size, [](T v) { return !is_finite(v); }, T(0));
  }
  return lost;
}

template <typename T>
Tensor column_sums(const Tensor& t, int64_t rows, int64_t columns) {
  Tensor result = empty(t, {columns});
  const auto* data = static_cast<const T*>(t.const_data_ptr());
  auto* out = static_cast<T*>(result.mutable_data_ptr());
  constexpr int64_t kGrain = 64;
  torch::stable::parallel_for(0, columns, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(static_cast<size_t>(end - begin), 0.0);
    for (int64_t i = 0; i < rows; ++i) {
      run_widest<AddTo>(sums.data(), data + i * columns + begin, end - begin);
    }
    for (int64_t j = begin; j < end; ++j) {
      out[j] = static_cast<T>(static_cast<Compute<T>>(sums[j - begin]));
    }
  });
  return result;
}

template <typename T>
std::tuple<Tensor, Tensor> forward(Tensor& y, const Tensor& inp, const Weights& w, const Sizes& n,
                                   Activation activation, const Indices& seeds,
                                   const Indices& starts, const Tensor& alpha,
                                   const Tensor& non_finite, const Tensor& fault) {
  const int64_t hidden_size = n.seeds * n.rank;
  Tensor hidden = empty(y, with_last(y, hidden_size));
  matmul<T>(Matrix<const T>(inp, n.rows, n.inputs),
            Matrix<const T>(w.down, hidden_size, n.inputs).transposed(),
            Matrix<T>(hidden, n.rows, hidden_size),
            w.down_bias ? static_cast<const T*>(w.down_bias->const_data_ptr()) : nullptr);

  const Tensor target = dense(y);
  auto* data = static_cast<T*>(target.mutable_data_ptr());
  const auto* alphas = static_cast<const float*>(alpha.const_data_ptr());
  std::vector<int64_t> charged(seeds.size(), 0);
  std::atomic<int32_t> broken = 0;
  for_each_branch_row<T>(
      activate<T>(hidden, activation), w, n, [&](int64_t s, int64_t row, const Compute<T>* branch) {
        const Losses losses =
            run_widest<AddBranch>(data + row * n.channels + starts[s], branch, n.chunk,
                                  static_cast<Compute<T>>(alphas[seeds[s]]));
        if (losses.broken > 0) broken += losses.broken;
        if (losses.charged > 0) std::atomic_ref(charged[s]) += losses.charged;
      });
  if (target.get() != y.get()) torch::stable::copy_(y, target);
  for (int64_t s = 0; s < n.seeds; ++s) record_lost(charged[s], seeds[s], non_finite, fault);
  Tensor lost = empty({1}, aoti_torch_dtype_int32());
  *static_cast<int32_t*>(lost.mutable_data_ptr()) = broken;
  return {hidden, lost};
}

std::tuple<Tensor, Tensor> bottleneck_(Tensor y, Tensor inp, Tensor down,
                                       std::optional<Tensor> down_bias, Tensor up,
                                       std::optional<Tensor> up_bias, int64_t activation,
                                       Indices seeds, Indices starts, Tensor alpha,
                                       Tensor non_finite, Tensor fault) {
  const Weights w{down, down_bias, up, up_bias};
  const Sizes n = checked_sizes(y, "y", inp, w, activation, seeds, starts);
  check_bank(alpha, "alpha", ScalarType::Float, y, "y", seeds);
  check_bank(non_finite, "non_finite", ScalarType::Float, y, "y", seeds);
  check_bank(fault, "fault", ScalarType::Byte, y, "y", seeds);
  std::tuple<Tensor, Tensor> result{y, y};
  dispatch_floating(y.scalar_type(), [&]<typename T>(T) {
    result = forward<T>(y, dense(inp), dense(w), n, static_cast<Activation>(activation), seeds,
                        starts, alpha, non_finite, fault);
  });
  return result;
}

// The gradients of the branches, (rows, seeds * chunk): alpha times the seeds' chunks of grad, and
// zero where that is not finite.
template <typename T>
Tensor branch_gradient(const Tensor& grad, const Sizes& n, const Indices& seeds,
                       const Indices& starts, const std::optional<Tensor>& alpha) {
  Tensor result = empty(grad, {n.rows, n.seeds * n.chunk});
  const auto* source = static_cast<const T*>(grad.const_data_ptr());
  auto* data = static_cast<T*>(result.mutable_data_ptr());
  const auto* alphas = alpha ? static_cast<const float*>(alpha->const_data_ptr()) : nullptr;
  for (int64_t row = 0; row < n.rows; ++row) {
    for (int64_t s = 0; s < n.seeds; ++s) {
      run_widest<Weigh>(source + row * n.channels + starts[s], data + (row * n.seeds + s) * n.chunk,
                        n.chunk, static_cast<Compute<T>>(alphas ? alphas[seeds[s]] : 1.0f));
    }
  }
  return result;
}

struct Gradients {
  Tensor inp, down, down_bias, up, up_bias;
};

template <typename T>
Gradients backward(const Tensor& grad, const Tensor& inp, const Tensor& hidden,
                   const std::optional<Tensor>& lost, const Weights& w, const Sizes& n,
                   Activation activation, const Indices& seeds, const Indices& starts,
                   const std::optional<Tensor>& alpha, bool needs_inp, bool needs_weights) {
  const int64_t hidden_size = n.seeds * n.rank;
  const int64_t branch_size = n.seeds * n.chunk;
  const Tensor a = activate<T>(hidden, activation);
  const Tensor grad_branch = branch_gradient<T>(grad, n, seeds, starts, alpha);
  auto* grad_branch_data = static_cast<T*>(grad_branch.mutable_data_ptr());
  if (lost && *static_cast<const int32_t*>(lost->const_data_ptr()) > 0) {
    for_each_branch_row<T>(a, w, n, [&](int64_t s, int64_t row, const Compute<T>* branch) {
      run_widest<ZeroWhereBroken>(grad_branch_data + (row * n.seeds + s) * n.chunk, branch,
                                  n.chunk);
    });
  }

  // Tensors that nobody needs are empty, each for itself: results of an op must not share memory.
  const auto result = [&](bool needed, const std::vector<int64_t>& shape) {
    return empty(grad, needed ? shape : std::vector<int64_t>{0});
  };
  Gradients grads{result(needs_inp, with_last(grad, n.inputs)),
                  result(needs_weights, {hidden_size, n.inputs}), result(false, {}),
                  result(needs_weights, {branch_size, n.rank}), result(false, {})};
  const Matrix<const T> by_branch(grad_branch, n.rows, branch_size);
  const Matrix<const T> up(w.up, branch_size, n.rank);
  if (needs_weights) {
    const Matrix<T> by_up(grads.up, branch_size, n.rank);
    const Matrix<const T> activated(a, n.rows, hidden_size);
    for (int64_t s = 0; s < n.seeds; ++s) {
      matmul<T>(by_branch.column_block(s * n.chunk, n.chunk).transposed(),
                activated.column_block(s * n.rank, n.rank), by_up.row_block(s * n.chunk, n.chunk));
    }
    if (w.up_bias) grads.up_bias = column_sums<T>(grad_branch, n.rows, branch_size);
  }

  const Tensor grad_a = empty(grad, with_last(grad, hidden_size));
  const Matrix<T> by_a(grad_a, n.rows, hidden_size);
  for (int64_t s = 0; s < n.seeds; ++s) {
    matmul<T>(by_branch.column_block(s * n.chunk, n.chunk), up.row_block(s * n.chunk, n.chunk),
              by_a.column_block(s * n.rank, n.rank));
  }
  const Tensor grad_z = activate_backward<T>(grad_a, hidden, a, activation);
  const Matrix<const T> by_z(grad_z, n.rows, hidden_size);
  if (needs_weights) {
    matmul<T>(by_z.transposed(), Matrix<const T>(inp, n.rows, n.inputs),
              Matrix<T>(grads.down, hidden_size, n.inputs));
    if (w.down_bias) grads.down_bias = column_sums<T>(grad_z, n.rows, hidden_size);
  }
  if (needs_inp) {
    matmul<T>(by_z, Matrix<const T>(w.down, hidden_size, n.inputs),
              Matrix<T>(grads.inp, n.rows, n.inputs));
  }
  return grads;
}

// Makes every gradient finite, each seed's part on that seed's account; what the seeds share, which
// is the gradient of inp, on the first one's.
template <typename T>
void guard(const Gradients& grads, const Indices& seeds, const Tensor& non_finite,
           const Tensor& fault) {
  record_lost(make_finite(static_cast<T*>(grads.inp.mutable_data_ptr()), grads.inp.numel()),
              seeds.front(), non_finite, fault);
  const auto count = static_cast<int64_t>(seeds.size());
  for (const Tensor* t : {&grads.down, &grads.down_bias, &grads.up, &grads.up_bias}) {
    const int64_t size = t->numel() / count;
    auto* data = static_cast<T*>(t->mutable_data_ptr());
    for (int64_t s = 0; s < count; ++s) {
      record_lost(make_finite(data + s * size, size), seeds[s], non_finite, fault);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(
    Tensor grad, Tensor inp, Tensor hidden, std::optional<Tensor> lost, Tensor down,
    std::optional<Tensor> down_bias, Tensor up, std::optional<Tensor> up_bias, int64_t activation,
    Indices seeds, Indices starts, std::optional<Tensor> alpha, Tensor non_finite, Tensor fault,
    bool needs_inp, bool needs_weights) {
  const Weights w{down, down_bias, up, up_bias};
  const Sizes n = checked_sizes(grad, "grad", inp, w, activation, seeds, starts);
  check_like(hidden, "hidden", grad, "grad");
  check_shape(hidden, "hidden", with_last(grad, n.seeds * n.rank));
  if (lost) check_cell(*lost, "lost", ScalarType::Int, grad, "grad");
  if (alpha) check_bank(*alpha, "alpha", ScalarType::Float, grad, "grad", seeds);
  check_bank(non_finite, "non_finite", ScalarType::Float, grad, "grad", seeds);
  check_bank(fault, "fault", ScalarType::Byte, grad, "grad", seeds);
  Gradients grads{grad, grad, grad, grad, grad};
  dispatch_floating(grad.scalar_type(), [&]<typename T>(T) {
    grads = backward<T>(dense(grad), dense(inp), dense(hidden), lost, dense(w), n,
                        static_cast<Activation>(activation), seeds, starts, alpha, needs_inp,
                        needs_weights);
    guard<T>(grads, seeds, non_finite, fault);
  });
  return {grads.inp, grads.down, grads.down_bias, grads.up, grads.up_bias};
}

}  // namespace
}  // namespace esper::cpu

STABLE_TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("bottleneck_", TORCH_BOX(&esper::cpu::bottleneck_));
  m.impl("bottleneck_backward", TORCH_BOX(&esper::cpu::bottleneck_backward));
}
