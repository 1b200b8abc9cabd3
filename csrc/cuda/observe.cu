// Two kernels an op: the first reads the data once and leaves sums per channel and slice of it in
// scratch, the second lets one block a seed add up its channels. Numbers are added up in float over
// short runs and in double from there on; every sum has an order fixed by the shape.
#include "../health.h"
#include "device.h"

namespace esper::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
// Loads under way at once in each thread.
constexpr int kRun = 4;
// Lines shorter than this are read by columns: neighbouring threads then read neighbouring lines.
constexpr int64_t kShortLine = 32;
constexpr int64_t kPiece = 1024;
constexpr int64_t kRowsPerSlice = 256;
constexpr int64_t kEnoughBlocks = 4096;

__device__ inline float compute(float value) { return value; }
__device__ inline double compute(double value) { return value; }
__device__ inline float compute(__half value) { return __half2float(value); }
__device__ inline float compute(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
using Compute = decltype(compute(T{}));

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T items[kWidth];
};

template <int kWidth, typename T>
__device__ Pack<T, kWidth> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kWidth>*>(from);
}

template <int kWidth, typename T>
__device__ void store_pack(T* to, const Pack<T, kWidth>& pack) {
  *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

// Sources load what belongs to kWidth places, write what the op returns there, and hand out the
// observed numbers. read() and write() are apart so that several reads can be under way.
template <typename Number>
struct Plain {
  using T = Number;
  template <int kWidth>
  using Read = Pack<T, kWidth>;
  const T* x;

  __device__ T observed(int64_t i) const { return x[i]; }

  template <int kWidth>
  __device__ Read<kWidth> read(int64_t i) const {
    return load_pack<kWidth>(x + i);
  }

  template <int kWidth>
  __device__ Pack<T, kWidth> write(int64_t, const Read<kWidth>& read) const {
    return read;
  }

  bool is_aligned(int64_t bytes) const { return reinterpret_cast<uintptr_t>(x) % bytes == 0; }
};

template <typename Number>
struct Relu {
  using T = Number;
  template <int kWidth>
  using Read = Pack<T, kWidth>;
  const T* x;
  T* y;

  // As PyTorch's CUDA kernel: a NaN stays, and -0.0 becomes 0.0.
  __device__ static T relu(T value) {
    const auto number = compute(value);
    return number > 0 || isnan(number) ? value : T(0.0f);
  }

  __device__ T observed(int64_t i) const { return relu(x[i]); }

  template <int kWidth>
  __device__ Read<kWidth> read(int64_t i) const {
    return load_pack<kWidth>(x + i);
  }

  template <int kWidth>
  __device__ Pack<T, kWidth> write(int64_t i, Read<kWidth> pack) const {
    for (int k = 0; k < kWidth; ++k) pack.items[k] = relu(pack.items[k]);
    store_pack(y + i, pack);
    return pack;
  }

  bool is_aligned(int64_t bytes) const {
    return (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % bytes == 0;
  }
};

template <typename Number>
struct ReluGrad {
  using T = Number;
  template <int kWidth>
  struct Read {
    Pack<T, kWidth> grad, y;
  };
  const T* grad;
  const T* y;
  T* grad_x;

  __device__ T observed(int64_t i) const { return grad[i]; }

  template <int kWidth>
  __device__ Read<kWidth> read(int64_t i) const {
    return {load_pack<kWidth>(grad + i), load_pack<kWidth>(y + i)};
  }

  template <int kWidth>
  __device__ Pack<T, kWidth> write(int64_t i, const Read<kWidth>& read) const {
    Pack<T, kWidth> result = read.grad;
    for (int k = 0; k < kWidth; ++k) {
      if (compute(read.y.items[k]) <= 0) result.items[k] = T(0.0f);
    }
    store_pack(grad_x + i, result);
    return read.grad;
  }

  bool is_aligned(int64_t bytes) const {
    return (reinterpret_cast<uintptr_t>(grad) | reinterpret_cast<uintptr_t>(y) |
            reinterpret_cast<uintptr_t>(grad_x)) %
               bytes ==
           0;
  }
};

// Sums over one slice of one channel, or of one column of it; shifted, see ShiftedSums.
struct Partial {
  double sum = 0;
  double sum_squares = 0;
  uint32_t lost = 0;  // not finite, and in no sum
  uint32_t alive = 0;

  __device__ void add(const Partial& other) {
    sum += other.sum;
    sum_squares += other.sum_squares;
    lost += other.lost;
    alive |= other.alive;
  }
};
constexpr int64_t kDoublesPerPartial = sizeof(Partial) / sizeof(double);

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a tensor is divided among the blocks: by its shape alone.
struct Division {
  bool by_columns;
  int64_t columns_per_channel;
  int64_t slices;

  explicit Division(const Operand& y)
      : by_columns(y.inner < kShortLine), columns_per_channel(by_columns ? y.inner : 1) {
    const int64_t width = y.channels * y.inner;
    const int64_t across = by_columns ? divide_up(width, kWarp) : y.channels;
    const int64_t wanted = by_columns ? divide_up(y.outer, kRowsPerSlice)
                                      : divide_up(y.outer * divide_up(y.inner, kPiece), kWarps);
    const int64_t enough = divide_up(kEnoughBlocks, across);
    slices = wanted < enough ? wanted : enough;
  }

  int64_t partials_per_channel() const { return columns_per_channel * slices; }
};

// Adds what add_run could not: one by one in double, without what is not finite.
template <int kWidth, int kColumns, typename Source>
__device__ void add_run_exactly(const Source& source, int64_t first, int64_t step, int count,
                                const Compute<typename Source::T> (&shifts)[kColumns],
                                Partial (&partials)[kColumns]) {
  for (int run = 0; run < count; ++run) {
    for (int k = 0; k < kWidth; ++k) {
      const double value = compute(source.observed(first + run * step + k));
      if (!isfinite(value)) {
        ++partials[k % kColumns].lost;
        continue;
      }
      const double shifted = value - static_cast<double>(shifts[k % kColumns]);
      partials[k % kColumns].sum += shifted;
      partials[k % kColumns].sum_squares += shifted * shifted;
    }
  }
}

// Adds `count` packs, at most kRun, `step` apart; item k belongs to column k, or all to the one.
template <int kWidth, int kColumns, typename Source>
__device__ void add_run(const Source& source, int64_t first, int64_t step, int count,
                        const Compute<typename Source::T> (&shifts)[kColumns],
                        Partial (&partials)[kColumns]) {
  using C = Compute<typename Source::T>;
  typename Source::template Read<kWidth> reads[kRun];
#pragma unroll
  for (int run = 0; run < kRun; ++run) {
    if (run < count) reads[run] = source.template read<kWidth>(first + run * step);
  }
  C sums[kColumns] = {}, sums_of_squares[kColumns] = {};
#pragma unroll
  for (int run = 0; run < kRun; ++run) {
    if (run >= count) continue;
    const auto pack = source.template write<kWidth>(first + run * step, reads[run]);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const C value = compute(pack.items[k]);
      const C shifted = value - shifts[k % kColumns];
      sums[k % kColumns] += shifted;
      sums_of_squares[k % kColumns] += shifted * shifted;
      partials[k % kColumns].alive |= value != 0;
    }
  }
  bool finite = true;
  for (int k = 0; k < kColumns; ++k) finite = finite && isfinite(sums_of_squares[k]);
  if (!finite) {
    add_run_exactly<kWidth>(source, first, step, count, shifts, partials);
    return;
  }
  for (int k = 0; k < kColumns; ++k) {
    partials[k].sum += static_cast<double>(sums[k]);
    partials[k].sum_squares += static_cast<double>(sums_of_squares[k]);
  }
}

// The channel's first number, at `first`, unless that is not finite or no shift is asked for.
template <typename Source>
__device__ Compute<typename Source::T> shift_at(const Source& source, int64_t first, bool shifted) {
  if (!shifted) return 0;
  const auto value = compute(source.observed(first));
  return isfinite(value) ? value : 0;
}

// Adds up over threadIdx.y; both sizes of the block are powers of two. The first row has the sum.
__device__ Partial sum_of_rows(const Partial& own) {
  __shared__ Partial all[kThreads];
  const unsigned place = threadIdx.y * blockDim.x + threadIdx.x;
  __syncthreads();
  all[place] = own;
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) all[place].add(all[place + half * blockDim.x]);
  }
  return all[place];
}

__device__ int runs_left(int64_t left, int64_t step) {
  const int64_t runs = (left + step - 1) / step;
  return static_cast<int>(runs < kRun ? runs : kRun);
}

// Block (channel, slice) of 1 x kThreads threads: each warp takes pieces of lines.
template <int kWidth, typename Source>
__global__ void lines_kernel(Source source, Operand y, Partial* partials, bool shifted) {
  constexpr int64_t kStep = kWarp * kWidth;
  const int64_t channel = blockIdx.x, slices = gridDim.y;
  const int64_t warp = threadIdx.y / kWarp, lane = threadIdx.y % kWarp;
  const int64_t pieces = (y.inner + kPiece - 1) / kPiece;
  const Compute<typename Source::T> shift[1] = {shift_at(source, channel * y.inner, shifted)};
  Partial own[1];
  for (int64_t unit = blockIdx.y * kWarps + warp; unit < y.outer * pieces;
       unit += slices * kWarps) {
    const int64_t line = (unit / pieces * y.channels + channel) * y.inner;
    const int64_t begin = unit % pieces * kPiece;
    const int64_t end = begin + kPiece < y.inner ? begin + kPiece : y.inner;
    for (int64_t i = begin + lane * kWidth; i < end; i += kRun * kStep) {
      add_run<kWidth>(source, line + i, kStep, runs_left(end - i, kStep), shift, own);
    }
  }
  const Partial total = sum_of_rows(own[0]);
  if (threadIdx.y == 0) partials[channel * slices + blockIdx.y] = total;
}

// Block (columns, slice): threadIdx.x runs over packs of columns, threadIdx.y over rows.
template <int kWidth, typename Source>
__global__ void columns_kernel(Source source, Operand y, Partial* partials, bool shifted) {
  const int64_t width = y.channels * y.inner, slices = gridDim.y;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
  Partial own[kWidth];
  if (column < width) {
    Compute<typename Source::T> shifts[kWidth];
    for (int k = 0; k < kWidth; ++k) {
      shifts[k] = shift_at(source, (column + k) / y.inner * y.inner, shifted);
    }
    const int64_t step = slices * blockDim.y;
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < y.outer;
         row += kRun * step) {
      add_run<kWidth>(source, row * width + column, step * width, runs_left(y.outer - row, step),
                      shifts, own);
    }
  }
  for (int k = 0; k < kWidth; ++k) {
    const Partial total = sum_of_rows(own[k]);
    if (threadIdx.y == 0 && column < width) partials[(column + k) * slices + blockIdx.y] = total;
  }
}

// The sum of a channel's partials, the same in every lane of the warp.
__device__ Partial channel_total(const Partial* partials, int64_t count, int64_t channel) {
  Partial total;
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) {
    total.add(partials[channel * count + i]);
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    Partial other;
    other.sum = __shfl_xor_sync(~0u, total.sum, distance);
    other.sum_squares = __shfl_xor_sync(~0u, total.sum_squares, distance);
    other.lost = __shfl_xor_sync(~0u, total.lost, distance);
    other.alive = __shfl_xor_sync(~0u, total.alive, distance);
    total.add(other);
  }
  return total;
}

__device__ void add_health(ChunkHealth& health, const ChunkHealth& other) {
  health.moments = merge(health.moments, other.moments);
  health.dead += other.dead;
  health.non_finite += other.non_finite;
}

// One block a seed; each warp takes every kWarps-th channel, thread 0 merges the warps.
template <typename Source>
__global__ void health_kernel(Source source, Operand y, const Partial* partials,
                              int64_t per_channel, Columns health) {
  __shared__ ChunkHealth warps[kWarps];
  const Chunk chunk = seed_chunk(y.channels, health.num_seeds, blockIdx.x);
  const auto items = static_cast<double>(y.outer * y.inner);
  const int warp = threadIdx.x / kWarp;
  ChunkHealth own;
  for (int64_t c = chunk.begin + warp; c < chunk.end; c += kWarps) {
    const Partial total = channel_total(partials, per_channel, c);
    const ShiftedSums sums{items - total.lost, total.sum, total.sum_squares};
    const auto shift = static_cast<double>(shift_at(source, c * y.inner, true));
    add_health(own,
               {sums.moments(shift), total.alive ? 0.0 : items, static_cast<double>(total.lost)});
  }
  if (threadIdx.x % kWarp == 0) warps[warp] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int other = 1; other < kWarps; ++other) add_health(own, warps[other]);
  accumulate_health(health.first + blockIdx.x, health.capacity, own);
}

__global__ void energy_kernel(int64_t channels, const Partial* partials, int64_t per_channel,
                              Columns health) {
  __shared__ double warps[kWarps];
  const Chunk chunk = seed_chunk(channels, health.num_seeds, blockIdx.x);
  const int warp = threadIdx.x / kWarp;
  double own = 0;
  for (int64_t c = chunk.begin + warp; c < chunk.end; c += kWarps) {
    own += channel_total(partials, per_channel, c).sum_squares;
  }
  if (threadIdx.x % kWarp == 0) warps[warp] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int other = 1; other < kWarps; ++other) own += warps[other];
  float& energy = health.first[kGradEnergy * health.capacity + blockIdx.x];
  energy = saturate(energy + own);
}

template <int kWidth, typename Source>
void launch_partials_of(const Source& source, const Operand& y, Partial* partials, bool shifted,
                        cudaStream_t stream) {
  const Division division(y);
  const auto slices = static_cast<unsigned>(division.slices);
  if (!division.by_columns) {
    const dim3 grid(static_cast<unsigned>(y.channels), slices);
    lines_kernel<kWidth><<<grid, dim3(1, kThreads), 0, stream>>>(source, y, partials, shifted);
    return;
  }
  const int64_t packs = y.channels * y.inner / kWidth;
  unsigned threads = 1;
  while (threads < kWarp && threads < packs) threads *= 2;
  const dim3 grid(static_cast<unsigned>(divide_up(packs, threads)), slices);
  columns_kernel<kWidth>
      <<<grid, dim3(threads, kThreads / threads), 0, stream>>>(source, y, partials, shifted);
}

// Reads 16 bytes at once where every line, or every row of columns, begins at a multiple of them.
template <typename Source>
void launch_partials(const Source& source, const Operand& y, Partial* partials, bool shifted,
                     cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(typename Source::T);
  const int64_t pitch = Division(y).by_columns ? y.channels * y.inner : y.inner;
  if (pitch % kWidth == 0 && source.is_aligned(16)) {
    launch_partials_of<kWidth>(source, y, partials, shifted, stream);
  } else {
    launch_partials_of<1>(source, y, partials, shifted, stream);
  }
}

template <typename Source>
void launch_health(const Source& source, const Operand& y, const Columns& health, double* scratch,
                   cudaStream_t stream) {
  auto* partials = reinterpret_cast<Partial*>(scratch);
  launch_partials(source, y, partials, true, stream);
  health_kernel<<<static_cast<unsigned>(health.num_seeds), kThreads, 0, stream>>>(
      source, y, partials, Division(y).partials_per_channel(), health);
}

template <typename Source>
void launch_energy(const Source& source, const Operand& grad, const Columns& health,
                   double* scratch, cudaStream_t stream) {
  auto* partials = reinterpret_cast<Partial*>(scratch);
  launch_partials(source, grad, partials, false, stream);
  energy_kernel<<<static_cast<unsigned>(health.num_seeds), kThreads, 0, stream>>>(
      grad.channels, partials, Division(grad).partials_per_channel(), health);
}

}  // namespace

int64_t scratch_doubles(const Operand& y) {
  return y.channels * Division(y).partials_per_channel() * kDoublesPerPartial;
}

cudaError_t launch_observe(const Operand& y, const Columns& health, double* scratch,
                           cudaStream_t stream) {
  dispatch(y.dtype, [&]<typename T>(T) {
    launch_health(Plain<T>{static_cast<const T*>(y.data)}, y, health, scratch, stream);
  });
  return cudaGetLastError();
}

cudaError_t launch_observe_grad(const Operand& grad, const Columns& health, double* scratch,
                                cudaStream_t stream) {
  dispatch(grad.dtype, [&]<typename T>(T) {
    launch_energy(Plain<T>{static_cast<const T*>(grad.data)}, grad, health, scratch, stream);
  });
  return cudaGetLastError();
}

cudaError_t launch_relu_observe(const Operand& x, void* y, const Columns& health, double* scratch,
                                cudaStream_t stream) {
  dispatch(x.dtype, [&]<typename T>(T) {
    const Relu<T> source{static_cast<const T*>(x.data), static_cast<T*>(y)};
    launch_health(source, x, health, scratch, stream);
  });
  return cudaGetLastError();
}

cudaError_t launch_relu_observe_grad(const Operand& grad, const void* y, void* grad_x,
                                     const Columns& health, double* scratch, cudaStream_t stream) {
  dispatch(grad.dtype, [&]<typename T>(T) {
    const ReluGrad<T> source{static_cast<const T*>(grad.data), static_cast<const T*>(y),
                             static_cast<T*>(grad_x)};
    launch_energy(source, grad, health, scratch, stream);
  });
  return cudaGetLastError();
}

}  // namespace esper::cuda
