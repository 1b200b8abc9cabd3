#include <vector>

#include "checks.h"
#include "health.h"
#include "numeric.h"
#include "planes.h"

namespace esper::cpu {
namespace {

// A seed's chunk of a tensor: one contiguous segment in each outer plane.
template <typename T>
struct Segments {
  const T* first;
  int64_t count;
  int64_t stride;
  int64_t channels;
  int64_t inner;

  Segments(const T* data, const Planes& planes, const Chunk& chunk)
      : first(data + chunk.begin * planes.inner),
        count(planes.outer),
        stride(planes.channels * planes.inner),
        channels(chunk.end - chunk.begin),
        inner(planes.inner) {}

  int64_t size() const { return channels * inner; }
  int64_t numel() const { return count * size(); }
  const T* operator[](int64_t i) const { return first + i * stride; }
};

struct LaneSums {
  Lanes<double> count, sum, sum_squares;

  ShiftedSums total() const { return {count.total(), sum.total(), sum_squares.total()}; }
};

template <typename T>
void add_segment(LaneSums& sums, const T* x, int64_t n, double shift) {
  for_each_in_lanes(n, [&](int64_t i, int64_t lane) {
    const bool finite = is_finite(x[i]);
    const double shifted = finite ? static_cast<double>(x[i]) - shift : 0.0;
    sums.count.values[lane] += finite ? 1.0 : 0.0;
    sums.sum.values[lane] += shifted;
    sums.sum_squares.values[lane] += shifted * shifted;
  });
}

template <typename T>
void mark_alive(std::vector<uint8_t>& alive, const T* x, int64_t inner) {
  const auto is_alive = [](T value) { return value != T(0); };
  for (size_t c = 0; c < alive.size(); ++c, x += inner) {
    alive[c] = alive[c] || std::any_of(x, x + inner, is_alive);
  }
}

template <typename T>
ChunkHealth chunk_health(const Segments<T>& segments) {
  const double shift = is_finite(*segments.first) ? static_cast<double>(*segments.first) : 0.0;
  LaneSums lanes;
  std::vector<uint8_t> alive(static_cast<size_t>(segments.channels), 0);
  for (int64_t i = 0; i < segments.count; ++i) {
    add_segment(lanes, segments[i], segments.size(), shift);
    mark_alive(alive, segments[i], segments.inner);
  }
  const ShiftedSums sums = lanes.total();
  const auto dead_channels = static_cast<double>(std::count(alive.begin(), alive.end(), 0));
  return {sums.moments(shift), dead_channels * static_cast<double>(segments.count * segments.inner),
          static_cast<double>(segments.numel()) - sums.count};
}

template <typename T>
double chunk_energy(const Segments<T>& segments) {
  Lanes<double> energy;
  for (int64_t i = 0; i < segments.count; ++i) {
    const T* x = segments[i];
    for_each_in_lanes(segments.size(), [&](int64_t j, int64_t lane) {
      const double value = is_finite(x[j]) ? static_cast<double>(x[j]) : 0.0;
      energy.values[lane] += value * value;
    });
  }
  return energy.total();
}

// Calls body(segments, column) for each seed, in parallel; the seeds share no memory.
template <typename Body>
void for_each_seed(const Tensor& t, int64_t channel_dim, const Tensor& health, int64_t first_seed,
                   int64_t num_seeds, Body&& body) {
  if (t.numel() == 0) return;
  const MemoryOrder order = memory_order(t, channel_dim);
  const Tensor dense = in_order(t, channel_dim, order);
  const Planes planes = planes_of(dense, channel_dim, order);
  float* columns = static_cast<float*>(health.mutable_data_ptr()) + first_seed;
  dispatch_floating(t.scalar_type(), [&]<typename T>(T) {
    const auto* data = static_cast<const T*>(dense.const_data_ptr());
    torch::stable::parallel_for(0, num_seeds, 1, [&](int64_t begin, int64_t end) {
      for (int64_t seed = begin; seed < end; ++seed) {
        body(Segments<T>(data, planes, seed_chunk(planes.channels, num_seeds, seed)),
             columns + seed);
      }
    });
  });
}

void observe(Tensor y, int64_t channel_dim, Tensor health, int64_t first_seed, int64_t num_seeds) {
  const int64_t dim = check_observed(y, "y", channel_dim, health, first_seed, num_seeds);
  const int64_t capacity = health.size(1);
  for_each_seed(y, dim, health, first_seed, num_seeds, [=](const auto& segments, float* column) {
    accumulate_health(column, capacity, chunk_health(segments));
  });
}

void observe_grad(Tensor grad, int64_t channel_dim, Tensor health, int64_t first_seed,
                  int64_t num_seeds) {
  const int64_t dim = check_observed(grad, "grad", channel_dim, health, first_seed, num_seeds);
  const int64_t row = kGradEnergy * health.size(1);
  for_each_seed(grad, dim, health, first_seed, num_seeds, [=](const auto& segments, float* column) {
    column[row] = saturate(column[row] + chunk_energy(segments));
  });
}

}  // namespace
}  // namespace esper::cpu

STABLE_TORCH_LIBRARY_IMPL(esper, CPU, m) {
  m.impl("observe", TORCH_BOX(&esper::cpu::observe));
  m.impl("observe_grad", TORCH_BOX(&esper::cpu::observe_grad));
}
