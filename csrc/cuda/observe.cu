// Two kernels an op: the first leaves sums per channel and slice of the data in scratch, the
// second lets one block a seed add up its channels. Every sum has an order fixed by the shape.
#include "../health.h"
#include "device.h"

namespace esper::cuda {
namespace {

constexpr int kChannelTile = 32;
constexpr int kRowTile = kThreads / kChannelTile;
constexpr int64_t kItemsPerSlice = 2048;
constexpr int64_t kMaxSlices = 256;

// Sums over one slice of one channel, shifted by the channel's first element.
struct Partial {
  ShiftedSums sums;
  double energy = 0;
  double alive = 0;

  __device__ void add(const Partial& other) {
    sums.add(other.sums);
    energy += other.energy;
    alive += other.alive;
  }
};
constexpr int64_t kDoublesPerPartial = sizeof(Partial) / sizeof(double);

int64_t slices_of(const Operand& y) {
  const int64_t slices = (y.outer * y.inner + kItemsPerSlice - 1) / kItemsPerSlice;
  return slices < kMaxSlices ? slices : kMaxSlices;
}

// Item k of a channel: element k % inner of outer plane k / inner.
template <typename T>
__device__ double load(const T* data, const Operand& y, int64_t channel, int64_t k) {
  return widen(data[(k / y.inner * y.channels + channel) * y.inner + k % y.inner]);
}

template <typename T>
__device__ double shift_of(const T* data, const Operand& y, int64_t channel) {
  const double first = load(data, y, channel, 0);
  return isfinite(first) ? first : 0.0;
}

__device__ void add_value(Partial& partial, double value, double shift) {
  partial.alive += value != 0.0;
  if (!isfinite(value)) return;
  const double shifted = value - shift;
  partial.sums.add({1.0, shifted, shifted * shifted});
  partial.energy += value * value;
}

// Block (channel tile, slice); threadIdx.x runs over channels, threadIdx.y over items, so that
// neighbours read neighbours where channels lie last in memory.
template <typename T>
__global__ void partial_kernel(const T* data, Operand y, Partial* partials) {
  __shared__ Partial rows[kRowTile][kChannelTile];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChannelTile + threadIdx.x;
  const int64_t items = y.outer * y.inner;
  Partial own;
  if (channel < y.channels) {
    const double shift = shift_of(data, y, channel);
    const int64_t step = static_cast<int64_t>(gridDim.y) * kRowTile;
    for (int64_t k = blockIdx.y * kRowTile + threadIdx.y; k < items; k += step) {
      add_value(own, load(data, y, channel, k), shift);
    }
  }
  rows[threadIdx.y][threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.y != 0 || channel >= y.channels) return;
  for (int row = 1; row < kRowTile; ++row) own.add(rows[row][threadIdx.x]);
  partials[channel * gridDim.y + blockIdx.y] = own;
}

__device__ Partial channel_total(const Partial* partials, int64_t slices, int64_t channel) {
  Partial total;
  for (int64_t i = 0; i < slices; ++i) total.add(partials[channel * slices + i]);
  return total;
}

// One block of one warp a seed; each lane takes every 32nd channel, lane 0 merges the lanes.
template <typename T>
__global__ void observe_kernel(const T* data, Operand y, const Partial* partials, int64_t slices,
                               Columns health) {
  __shared__ ChunkHealth lanes[kChannelTile];
  const Chunk chunk = seed_chunk(y.channels, health.num_seeds, blockIdx.x);
  const auto items = static_cast<double>(y.outer * y.inner);
  ChunkHealth own;
  for (int64_t c = chunk.begin + threadIdx.x; c < chunk.end; c += kChannelTile) {
    const Partial total = channel_total(partials, slices, c);
    own.moments = merge(own.moments, total.sums.moments(shift_of(data, y, c)));
    own.dead += total.alive == 0 ? items : 0.0;
    own.non_finite += items - total.sums.count;
  }
  lanes[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int lane = 1; lane < kChannelTile; ++lane) {
    own.moments = merge(own.moments, lanes[lane].moments);
    own.dead += lanes[lane].dead;
    own.non_finite += lanes[lane].non_finite;
  }
  accumulate_health(health.first + blockIdx.x, health.capacity, own);
}

__global__ void observe_grad_kernel(Operand grad, const Partial* partials, int64_t slices,
                                    Columns health) {
  __shared__ double lanes[kChannelTile];
  const Chunk chunk = seed_chunk(grad.channels, health.num_seeds, blockIdx.x);
  double own = 0;
  for (int64_t c = chunk.begin + threadIdx.x; c < chunk.end; c += kChannelTile) {
    own += channel_total(partials, slices, c).energy;
  }
  lanes[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int lane = 1; lane < kChannelTile; ++lane) own += lanes[lane];
  float& energy = health.first[kGradEnergy * health.capacity + blockIdx.x];
  energy = saturate(energy + own);
}

template <typename T>
void launch_partials(const T* data, const Operand& y, Partial* partials, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((y.channels + kChannelTile - 1) / kChannelTile),
                  static_cast<unsigned>(slices_of(y)));
  partial_kernel<<<grid, dim3(kChannelTile, kRowTile), 0, stream>>>(data, y, partials);
}

}  // namespace

int64_t scratch_doubles(const Operand& y) { return y.channels * slices_of(y) * kDoublesPerPartial; }

cudaError_t launch_observe(const Operand& y, const Columns& health, double* scratch,
                           cudaStream_t stream) {
  auto* partials = reinterpret_cast<Partial*>(scratch);
  dispatch(y.dtype, [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(y.data);
    launch_partials(data, y, partials, stream);
    observe_kernel<<<static_cast<unsigned>(health.num_seeds), kChannelTile, 0, stream>>>(
        data, y, partials, slices_of(y), health);
  });
  return cudaGetLastError();
}

cudaError_t launch_observe_grad(const Operand& grad, const Columns& health, double* scratch,
                                cudaStream_t stream) {
  auto* partials = reinterpret_cast<Partial*>(scratch);
  dispatch(grad.dtype, [&](auto zero) {
    launch_partials(static_cast<const decltype(zero)*>(grad.data), grad, partials, stream);
  });
  observe_grad_kernel<<<static_cast<unsigned>(health.num_seeds), kChannelTile, 0, stream>>>(
      grad, partials, slices_of(grad), health);
  return cudaGetLastError();
}

}  // namespace esper::cuda
