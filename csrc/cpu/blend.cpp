#include <tuple>
#include <vector>

#include "checks.h"
#include "counters.h"
#include "numeric.h"
#include "planes.h"

namespace esper::cpu {
namespace {

// y + weight * (out - y), like torch.lerp from the nearer end, so that out == y gives exactly y.
// The products are subtracted instead of the values because out - y may overflow.
template <typename C>
C lerp(C y, C out, C weight) {
  const C rest = 1 - weight;
  return weight < C(0.5) ? y + (weight * out - weight * y) : out - (rest * out - rest * y);
}

// Returns how many elements of `out` were non-finite where the host's own was not.
template <typename T>
int64_t blend_chunk(const T* y, const T* out, T* result, int64_t n, Compute<T> alpha) {
  using C = Compute<T>;
  int64_t lost = 0;
  for (int64_t i = 0; i < n; ++i) {
    const C mixed = lerp(static_cast<C>(y[i]), static_cast<C>(out[i]), alpha);
    // Ends are copied, not computed: the sign of a zero and the host's own NaN survive.
    const T blended = alpha == 0 ? y[i] : alpha == 1 ? out[i] : static_cast<T>(mixed);
    const bool usable = is_finite(out[i]);
    result[i] = usable ? blended : y[i];
    lost += !usable && is_finite(y[i]);
  }
  return lost;
}

// Returns the chunk's part of grad_alpha.
template <typename T>
double blend_backward_chunk(const T* grad, const T* y, const T* out, T* grad_y, T* grad_out,
                            int64_t n, Compute<T> alpha) {
  using C = Compute<T>;
  Lanes<double> grad_alpha;
  for_each_in_lanes(n, [&](int64_t i, int64_t lane) {
    const C g = static_cast<C>(grad[i]);
    const C slope = g * (static_cast<C>(out[i]) - static_cast<C>(y[i]));
    const bool usable = is_finite(out[i]);
    const bool sound = usable && is_finite(grad[i]);
    grad_y[i] = usable ? static_cast<T>(g * (1 - alpha)) : grad[i];
    grad_out[i] = sound ? static_cast<T>(g * alpha) : T(0);
    grad_alpha.values[lane] += sound ? static_cast<double>(slope) : 0.0;
  });
  return grad_alpha.total();
}

// Where the chunk [start, start + size) of channels lies within a row of one outer plane.
struct Row {
  int64_t size;
  Span chunk;

  Row(const Planes& planes, int64_t start, int64_t channels)
      : size(planes.channels * planes.inner),
        chunk{start * planes.inner, (start + channels) * planes.inner} {}
};

template <typename T>
void copy_outside(const Span& inside, const Span& span, const T* source, T* destination) {
  std::copy(source + span.begin, source + inside.begin, destination + span.begin);
  std::copy(source + inside.end, source + span.end, destination + inside.end);
}

Tensor blend(Tensor y, Tensor out, Tensor alpha, int64_t channel_dim, int64_t start,
             Tensor non_finite, Tensor fault) {
  const int64_t dim = check_blended(y, out, alpha, channel_dim, start);
  check_counters(non_finite, fault, y, "y");
  const MemoryOrder order = memory_order(y, dim);
  const Tensor host = in_order(y, dim, order);
  const Tensor seed = in_order(out, dim, order);
  Tensor result = torch::stable::empty_like(host);
  const Planes planes = planes_of(host, dim, order);
  const Row row(planes, start, out.size(dim));
  const RowBlocks blocks(planes.outer, row.size);
  std::vector<int64_t> lost(static_cast<size_t>(blocks.count), 0);
  const float weight = *static_cast<const float*>(alpha.const_data_ptr());
  dispatch_floating(y.scalar_type(), [&]<typename T>(T) {
    const auto* y_data = static_cast<const T*>(host.const_data_ptr());
    const auto* out_data = static_cast<const T*>(seed.const_data_ptr());
    auto* result_data = static_cast<T*>(result.mutable_data_ptr());
    blocks.for_each_span([&](int64_t block, int64_t i, const Span& span) {
      const Span inside = span.clamp(row.chunk);
      copy_outside(inside, span, y_data + i * row.size, result_data + i * row.size);
      if (inside.size() == 0) return;
      const int64_t at = i * row.size + inside.begin;
      const int64_t out_at = i * row.chunk.size() + inside.begin - row.chunk.begin;
      lost[block] +=
          blend_chunk(y_data + at, out_data + out_at, result_data + at, inside.size(), weight);
    });
  });
  record_lost(std::accumulate(lost.begin(), lost.end(), int64_t{0}), non_finite, fault);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> blend_backward(Tensor grad, Tensor y, Tensor out, Tensor alpha,
                                                  int64_t channel_dim, int64_t start) {
  const int64_t dim = check_blended(y, out, alpha, channel_dim, start);
  check_gradient(grad, y);
  const MemoryOrder order = memory_order(y, dim);
  const Tensor gradient = in_order(grad, dim, order);
  const Tensor host = in_order(y, dim, order);
  const Tensor seed = in_order(out, dim, order);
  Tensor grad_y = torch::stable::empty_like(host);
  Tensor grad_out = torch::stable::empty_like(seed);
  Tensor grad_alpha = torch::stable::empty_like(alpha);
  const Planes planes = planes_of(host, dim, order);
  const Row row(planes, start, out.size(dim));
  const RowBlocks blocks(planes.outer, row.size);
  std::vector<double> sums(static_cast<size_t>(blocks.count), 0.0);
  const float weight = *static_cast<const float*>(alpha.const_data_ptr());
  dispatch_floating(y.scalar_type(), [&]<typename T>(T) {
    const auto* grad_data = static_cast<const T*>(gradient.const_data_ptr());
    const auto* y_data = static_cast<const T*>(host.const_data_ptr());
    const auto* out_data = static_cast<const T*>(seed.const_data_ptr());
    auto* grad_y_data = static_cast<T*>(grad_y.mutable_data_ptr());
    auto* grad_out_data = static_cast<T*>(grad_out.mutable_data_ptr());
    blocks.for_each_span([&](int64_t block, int64_t i, const Span& span) {
      const Span inside = span.clamp(row.chunk);
      copy_outside(inside, span, grad_data + i * row.size, grad_y_data + i * row.size);
      if (inside.size() == 0) return;
      const int64_t at = i * row.size + inside.begin;
      const int64_t out_at = i * row.chunk.size() + inside.begin - row.chunk.begin;
      sums[block] +=
          blend_backward_chunk(grad_data + at, y_data + at, out_data + out_at, grad_y_data + at,
                               grad_out_data + out_at, inside.size(), weight);
    });
  });
  *static_cast<float*>(grad_alpha.mutable_data_ptr()) =
      static_cast<float>(std::accumulate(sums.begin(), sums.end(), 0.0));
  return {grad_y, grad_out, grad_alpha};
}

}  // namespace
}  // namespace esper::cpu

STABLE_TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("blend", TORCH_BOX(&esper::cpu::blend));
  m.impl("blend_backward", TORCH_BOX(&esper::cpu::blend_backward));
}
