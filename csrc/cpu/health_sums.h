// Health statistics of all seeds of a tensor, from one pass over its memory. Numbers are added up
// in float over at most 2 * kRowsAtOnce of them and from there on in double, block by block; blocks
// depend on the shape alone, so the sums come out the same for any number of threads.
#pragma once

#include <atomic>
#include <cstring>
#include <vector>

#include "health.h"
#include "planes.h"
#include "simd.h"

namespace esper::cpu {

// Sources hand out the observed numbers by their bits and write what the op returns beside them.
template <typename Number>
struct Plain {
  using T = Number;
  const T* observed;

  template <int kLanes>
  ESPER_INLINE BitVector<T, kLanes> take(int64_t i) const {
    return load_bits<kLanes>(observed + i);
  }

  ESPER_INLINE void prefetch(int64_t i) const { __builtin_prefetch(observed + i, 0, 3); }
};

// All ones where the number is below zero, which -0.0 and NaN are not.
template <typename T, typename V>
ESPER_INLINE V is_negative(V bits) {
  constexpr auto kLeastNegative = static_cast<Bits<T>>(kSignBit<T> + 1);
  return (V)((bits - kLeastNegative) < kInfinityBits<T>);
}

template <typename Number>
struct Relu {
  using T = Number;
  const T* x;
  T* observed;

  template <int kLanes>
  ESPER_INLINE BitVector<T, kLanes> take(int64_t i) const {
    auto bits = load_bits<kLanes>(x + i);
    bits &= ~is_negative<T>(bits);
    store(observed + i, bits);
    return bits;
  }

  ESPER_INLINE void prefetch(int64_t i) const { __builtin_prefetch(x + i, 0, 3); }
};

template <typename Number>
struct ReluGrad {
  using T = Number;
  const T* observed;
  const T* y;
  T* grad_x;

  template <int kLanes>
  ESPER_INLINE BitVector<T, kLanes> take(int64_t i) const {
    using V = BitVector<T, kLanes>;
    const V bits = load_bits<kLanes>(observed + i);
    const V y_bits = load_bits<kLanes>(y + i);
    store(grad_x + i, bits & ~(is_negative<T>(y_bits) | (V)((y_bits << 1) == 0)));
    return bits;
  }

  ESPER_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(observed + i, 0, 3);
    __builtin_prefetch(y + i, 0, 3);
  }
};

// Writes what `source` returns for [0, n) and observes nothing.
template <typename Source>
void apply(const Source& source, int64_t n) {
  vectorized([&](auto vector_bytes) {
    constexpr int kLanes = vector_bytes / sizeof(typename Source::T);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) source.template take<kLanes>(i);
    for (; i < n; ++i) source.template take<1>(i);
  });
}

constexpr int kRowsAtOnce = 16;
constexpr int64_t kBytesAhead = 8192;

// What is summed up: all that health() tells, or what energy() does, which is less work.
enum class Statistics { kMoments, kEnergy };

// Sums of neighbouring columns of a matrix, and in `bits` whatever bit was set in one of them.
template <typename T>
struct ColumnSums {
  double* sum;
  double* sum_squares;
  Bits<T>* bits;

  ESPER_INLINE ColumnSums operator+(int64_t i) const {
    return {sum + i, sum_squares + i, bits + i};
  }
};

template <typename T, int kLanes>
ESPER_INLINE void add_parts(double* to, const Values<T, kLanes>& sums, int skip) {
  using V = Values<T, kLanes>;
  const V ordered = in_memory_order<T, kLanes>(sums);
  for (int part = 0; part < V::kParts; ++part) {
    const int first = part * V::kPartLanes;
    const auto counted = without_first<V::kPartLanes>(ordered.parts[part], skip - first,
                                                      LaneIndices<V::kPartLanes>{});
    add_to<V::kPartLanes>(to + first, skip > first ? counted : ordered.parts[part]);
  }
}

template <typename V, size_t kChains>
ESPER_INLINE V total(const V (&sums)[kChains]) {
  V all = sums[0];
  for (size_t chain = 1; chain < kChains; ++chain) {
    for (int part = 0; part < V::kParts; ++part) all.parts[part] += sums[chain].parts[part];
  }
  return all;
}

// What is summed up of a number: energies are not shifted.
template <Statistics kWhat, typename V, typename Shift>
ESPER_INLINE V deviation(const V& value, const Shift& shift) {
  if constexpr (kWhat == Statistics::kEnergy) return value;
  return value - shift;
}

// Adds kRows rows, `pitch` apart and the first at `at`, to kLanes columns without the first `skip`.
template <Statistics kWhat, int kRows, int kLanes, typename Source, typename T = typename Source::T>
ESPER_INLINE void add_rows(const Source& source, int64_t at, int64_t pitch,
                           const Values<T, kLanes>& shift, int skip, ColumnSums<T> columns) {
  using V = Values<T, kLanes>;
  // As one sum would be waited for by the next row's.
  constexpr int kChains = kRows > 1 ? 2 : 1;
  const int64_t ahead = std::max<int64_t>(kRows * pitch, kBytesAhead / sizeof(T));
  V sum[kChains], sum_squares[kChains];
  BitVector<T, kLanes> seen{};
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    const int64_t place = at + row * pitch;
    // CPUs foresee neighbours, but not the order in which rows are read here.
    if constexpr (kRows > 1) source.prefetch(place + ahead);
    const auto bits = source.template take<kLanes>(place);
    const V values = widen<T, kLanes>(bits);
    for (int part = 0; part < V::kParts; ++part) {
      const auto shifted = deviation<kWhat>(values.parts[part], shift.parts[part]);
      sum_squares[row % kChains].parts[part] += shifted * shifted;
      if constexpr (kWhat == Statistics::kMoments) sum[row % kChains].parts[part] += shifted;
    }
    if constexpr (kWhat == Statistics::kMoments) seen |= bits;
  }
  add_parts<T, kLanes>(columns.sum_squares, total<V>(sum_squares), skip);
  if constexpr (kWhat == Statistics::kMoments) {
    add_parts<T, kLanes>(columns.sum, total<V>(sum), skip);
    store(columns.bits, load_bits<kLanes>(columns.bits) | seen);
  }
}

// Adds kRows rows of `width` columns.
template <Statistics kWhat, int kRows, int kLanes, typename Source, typename T = typename Source::T>
ESPER_INLINE void add_wide_rows(const Source& source, int64_t at, int64_t pitch, int64_t width,
                                const Compute<T>* shifts, ColumnSums<T> columns) {
  const auto add = [&]<int kWidth>(std::integral_constant<int, kWidth>, int64_t column, int skip) {
    add_rows<kWhat, kRows, kWidth>(source, at + column, pitch,
                                   load_values<T, kWidth>(shifts + column), skip, columns + column);
  };
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) {
    add(std::integral_constant<int, kLanes>{}, column, 0);
  }
  if (column == width) return;
  if (width < kLanes) {
    for (; column < width; ++column) add(std::integral_constant<int, 1>{}, column, 0);
  } else {
    add(std::integral_constant<int, kLanes>{}, width - kLanes,
        static_cast<int>(column - (width - kLanes)));
  }
}

// Adds `rows` rows of `width` columns and returns where the next one begins.
template <Statistics kWhat, int kLanes, int kRows = kRowsAtOnce, typename Source,
          typename T = typename Source::T>
ESPER_INLINE int64_t add_all_rows(const Source& source, int64_t at, int64_t pitch, int64_t rows,
                                  int64_t width, const Compute<T>* shifts, ColumnSums<T> columns) {
  for (; rows >= kRows; rows -= kRows, at += kRows * pitch) {
    add_wide_rows<kWhat, kRows, kLanes>(source, at, pitch, width, shifts, columns);
  }
  if constexpr (kRows > 1) {
    return add_all_rows<kWhat, kLanes, kRows / 4>(source, at, pitch, rows, width, shifts, columns);
  }
  return at;
}

// Sums of numbers that lie next to each other, in as many parts as are computed at once.
template <typename T, int kLanes>
struct RunSums {
  static constexpr int kPartLanes = Values<T, kLanes>::kPartLanes;
  double count = 0;
  double sum[kPartLanes] = {};
  double sum_squares[kPartLanes] = {};

  // Not finite where one of the numbers is not.
  ESPER_INLINE ShiftedSums total() const {
    using Doubles = Vector<double, kPartLanes>;
    return {count, lane_total<kPartLanes>(load<Doubles>(sum)),
            lane_total<kPartLanes>(load<Doubles>(sum_squares))};
  }
};

// Adds kVectors vectors of numbers.
template <Statistics kWhat, int kVectors, int kLanes, typename Source,
          typename T = typename Source::T>
ESPER_INLINE void add_vectors(const Source& source, int64_t at, Compute<T> shift,
                              RunSums<T, kLanes>& to) {
  using V = Values<T, kLanes>;
  constexpr int kChains = 2;  // as one sum would be waited for by the next vector's
  typename V::Part sum[kChains] = {}, sum_squares[kChains] = {};
#pragma GCC unroll 16
  for (int vector = 0; vector < kVectors; ++vector) {
    const int64_t place = at + vector * kLanes;
    // Further ahead than CPUs look by themselves, which left half of the memory's speed unused.
    source.prefetch(place + kBytesAhead / sizeof(T));
    const V values = widen<T, kLanes>(source.template take<kLanes>(place));
    for (int part = 0; part < V::kParts; ++part) {
      const int chain = (vector * V::kParts + part) % kChains;
      const auto shifted = deviation<kWhat>(values.parts[part], shift);
      sum_squares[chain] += shifted * shifted;
      if constexpr (kWhat == Statistics::kMoments) sum[chain] += shifted;
    }
  }
  add_to<V::kPartLanes>(to.sum_squares, sum_squares[0] + sum_squares[1]);
  if constexpr (kWhat == Statistics::kMoments) add_to<V::kPartLanes>(to.sum, sum[0] + sum[1]);
}

// Adds n numbers.
template <Statistics kWhat, int kLanes, int kVectors = kRowsAtOnce, typename Source,
          typename T = typename Source::T>
ESPER_INLINE void add_run(const Source& source, int64_t at, int64_t n, Compute<T> shift,
                          RunSums<T, kLanes>& to) {
  constexpr int64_t kStep = kVectors * kLanes;
  for (; n >= kStep; at += kStep, n -= kStep) {
    add_vectors<kWhat, kVectors>(source, at, shift, to);
  }
  if constexpr (kVectors > 1) return add_run<kWhat, kLanes, kVectors / 2>(source, at, n, shift, to);
  for (int64_t i = 0; i < n; ++i) {
    const auto value = widen<T, 1>(source.template take<1>(at + i)).parts[0][0];
    const auto shifted = static_cast<double>(deviation<kWhat>(value, shift));
    to.sum[i % RunSums<T, kLanes>::kPartLanes] += shifted;
    to.sum_squares[i % RunSums<T, kLanes>::kPartLanes] += shifted * shifted;
  }
}

// The same over the finite ones of n numbers `stride` apart, in double throughout.
template <typename T>
ShiftedSums finite_sums(const T* x, int64_t n, int64_t stride, double shift) {
  ShiftedSums sums;
  for (int64_t i = 0; i < n; ++i) {
    const T value = x[i * stride];
    if (!is_finite(value)) continue;
    const double shifted = static_cast<double>(value) - shift;
    sums.add({1.0, shifted, shifted * shifted});
  }
  return sums;
}

// Whether one of n numbers is not zero.
template <int kLanes, typename T>
ESPER_INLINE bool any_nonzero(const T* x, int64_t n) {
  int64_t i = 0;
  for (; i + kRowsAtOnce * kLanes <= n; i += kRowsAtOnce * kLanes) {
    BitVector<T, kLanes> seen{};
    for (int row = 0; row < kRowsAtOnce; ++row) seen |= load_bits<kLanes>(x + i + row * kLanes);
    if (any_bit(seen << 1)) return true;
  }
  for (; i < n; ++i) {
    if (x[i] != T(0)) return true;
  }
  return false;
}

// The statistics of every seed's chunk of channels. Those of moments are taken of sums shifted by
// the chunk's first number; see ShiftedSums.
template <Statistics kWhat, typename Source>
class SeedSums {
 public:
  using T = typename Source::T;

  SeedSums(const Source& source, const Planes& planes, int64_t num_seeds)
      : source_(source),
        planes_(planes),
        plane_(planes.channels * planes.inner),
        num_seeds_(num_seeds),
        borders_(static_cast<size_t>(num_seeds) + 1),
        shifts_(static_cast<size_t>(num_seeds)),
        alive_(static_cast<size_t>(planes.channels)) {
    for (int64_t seed = 0; seed < num_seeds; ++seed) {
      borders_[seed + 1] = seed_chunk(planes.channels, num_seeds, seed).end * planes.inner;
    }
    if constexpr (kTakesMoments) set_shifts();
    has_long_chunks() ? add_stretches() : add_strips();
  }

  double energy(int64_t seed) const { return total(seed).sum_squares; }

  ChunkHealth health(int64_t seed) const {
    const Chunk chunk = seed_chunk(planes_.channels, num_seeds_, seed);
    const auto items = static_cast<double>(planes_.outer * planes_.inner);
    const auto channels = static_cast<double>(chunk.end - chunk.begin);
    const auto dead = std::count(alive_.begin() + chunk.begin, alive_.begin() + chunk.end, 0);
    const ShiftedSums sums = total(seed);
    return {sums.moments(shifts_[seed]), static_cast<double>(dead) * items,
            channels * items - sums.count};
  }

 private:
  static constexpr bool kTakesMoments = kWhat == Statistics::kMoments;
  static constexpr int64_t kBlocks = 64;

  // Long chunks are added up along memory, which is read in order then; short ones by columns, as
  // there the ends of the runs would cost more than the order saves.
  bool has_long_chunks() const {
    constexpr int64_t kLongBytes = 512;
    return planes_.channels / num_seeds_ * planes_.inner >= kLongBytes / int64_t{sizeof(T)};
  }

  void set_shifts() {
    for (int64_t seed = 0; seed < num_seeds_; ++seed) {
      const auto first = widen<T, 1>(source_.template take<1>(borders_[seed])).parts[0][0];
      shifts_[seed] = is_finite(first) ? static_cast<double>(first) : 0.0;
    }
  }

  ShiftedSums total(int64_t seed) const {
    ShiftedSums sums;
    for (size_t i = seed; i < blocks_.size(); i += num_seeds_) sums.add(blocks_[i]);
    return sums;
  }

  template <typename Body>
  void for_each_block(int64_t count, const Body& body) {
    blocks_.resize(static_cast<size_t>(count * num_seeds_));
    if (count == 1) return body(0);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) body(block);
    });
  }

  // Several blocks may find the same channel alive.
  void set_alive(int64_t channel) {
    std::atomic_ref(alive_[channel]).store(1, std::memory_order_relaxed);
  }

  // ---- along memory: a block is a stretch of it

  // Small enough to stay in the nearest cache until its channels have been looked at.
  static constexpr int64_t kRun = 4096;
  // After which sums are looked at, whether they are finite.
  static constexpr int64_t kPiece = kRun * 8;

  // Which channels a stretch has found alive, and which seeds have no others.
  struct Seen {
    std::vector<uint8_t> channels;
    std::vector<uint8_t> seeds;
  };

  void add_stretches() {
    const int64_t numel = planes_.outer * plane_;
    const int64_t size = std::max(kPiece, (numel + kBlocks - 1) / kBlocks);
    for_each_block((numel + size - 1) / size, [&](int64_t block) {
      Seen seen{std::vector<uint8_t>(alive_.size()), std::vector<uint8_t>(shifts_.size())};
      vectorized([&](auto vector_bytes) {
        constexpr int kLanes = vector_bytes / sizeof(T);
        const int64_t end = std::min(numel, (block + 1) * size);
        for (int64_t at = block * size; at < end; at += kPiece) {
          add_stretch<kLanes>(at, std::min(end, at + kPiece), &blocks_[block * num_seeds_], seen);
        }
      });
      for (int64_t channel = 0; channel < planes_.channels; ++channel) {
        if (seen.channels[channel]) set_alive(channel);
      }
    });
  }

  // Calls body(seed, in_plane, at, n) for runs of memory that belong to one seed each.
  template <typename Body>
  ESPER_INLINE void for_each_run(int64_t at, int64_t end, const Body& body) const {
    int64_t plane_begin = at / plane_ * plane_;
    int64_t seed = 0;
    while (at < end) {
      while (at - plane_begin >= borders_[seed + 1]) ++seed;
      const int64_t n = std::min({end - at, plane_begin + borders_[seed + 1] - at, kRun});
      body(seed, at - plane_begin, at, n);
      at += n;
      if (at == plane_begin + plane_) plane_begin = at, seed = 0;
    }
  }

  template <int kLanes>
  ESPER_INLINE void add_stretch(int64_t at, int64_t end, ShiftedSums* seeds, Seen& seen) {
    std::vector<RunSums<T, kLanes>> sums(shifts_.size());
    for_each_run(at, end, [&](int64_t seed, int64_t in_plane, int64_t from, int64_t n) {
      add_run<kWhat, kLanes>(source_, from, n, static_cast<Compute<T>>(shifts_[seed]), sums[seed]);
      sums[seed].count += static_cast<double>(n);
      if (kTakesMoments && !seen.seeds[seed]) {
        mark_channels<kLanes>(in_plane, from, n, seen.channels.data());
        seen.seeds[seed] =
            in_plane + n == borders_[seed + 1] && has_seen_all(seed, seen.channels.data());
      }
    });
    for (int64_t seed = 0; seed < num_seeds_; ++seed) {
      const ShiftedSums all = sums[seed].total();
      seeds[seed].add(is_finite(all.sum_squares) ? all : finite_sums_of(seed, at, end));
    }
  }

  ShiftedSums finite_sums_of(int64_t seed, int64_t at, int64_t end) const {
    ShiftedSums sums;
    for_each_run(at, end, [&](int64_t of, int64_t, int64_t from, int64_t n) {
      if (of == seed) sums.add(finite_sums(source_.observed + from, n, 1, shifts_[seed]));
    });
    return sums;
  }

  bool has_seen_all(int64_t seed, const uint8_t* channels) const {
    const Chunk chunk = seed_chunk(planes_.channels, num_seeds_, seed);
    return std::memchr(channels + chunk.begin, 0, chunk.end - chunk.begin) == nullptr;
  }

  // Marks the channels that have a number other than zero among the n at `at`.
  template <int kLanes>
  ESPER_INLINE void mark_channels(int64_t in_plane, int64_t at, int64_t n, uint8_t* channels) {
    if (planes_.inner == 1) {
      const auto* bits = reinterpret_cast<const Bits<T>*>(source_.observed + at);
      for (int64_t i = 0; i < n; ++i) {
        channels[in_plane + i] |= static_cast<Bits<T>>(bits[i] << 1) != 0;
      }
      return;
    }
    const int64_t end = in_plane + n;
    for (int64_t channel = in_plane / planes_.inner; in_plane < end; ++channel) {
      const int64_t length = std::min(end, (channel + 1) * planes_.inner) - in_plane;
      channels[channel] = channels[channel] || any_nonzero<kLanes>(source_.observed + at, length);
      in_plane += length;
      at += length;
    }
  }

  // ---- by columns: a block is a strip of several planes, with one sum for each of its columns

  static constexpr int64_t kStrip = 1024;
  static constexpr int64_t kNarrow = 64;
  static constexpr int64_t kLeastRows = 128;

  struct Strip {
    int64_t first_column;
    int64_t width;
    int64_t first_plane;
    int64_t planes;
  };

  void add_strips() {
    // Narrow planes make a row together, so that there are vectors to fill.
    const int64_t planes_per_row = (kNarrow + plane_ - 1) / plane_;
    const int64_t strips = (plane_ + kStrip - 1) / kStrip;
    const int64_t rows = (planes_.outer + planes_per_row - 1) / planes_per_row;
    const int64_t step = std::max(kLeastRows, (rows + kBlocks - 1) / kBlocks) * planes_per_row;
    const int64_t count = (planes_.outer + step - 1) / step * strips;
    for_each_block(count, [&](int64_t block) {
      const int64_t column = block % strips * kStrip, plane = block / strips * step;
      const Strip strip{column, std::min(kStrip, plane_ - column), plane,
                        std::min(step, planes_.outer - plane)};
      add_strip(strip, planes_per_row, &blocks_[block * num_seeds_]);
    });
  }

  void add_strip(const Strip& strip, int64_t planes_per_row, ShiftedSums* seeds) {
    const int64_t width = strip.width * planes_per_row;
    std::vector<double> sums(static_cast<size_t>(2 * width));
    std::vector<Bits<T>> bits(static_cast<size_t>(width));
    const ColumnSums<T> columns{sums.data(), sums.data() + width, bits.data()};
    const std::vector<Compute<T>> shifts = column_shifts(strip, planes_per_row);
    vectorized([&](auto vector_bytes) {
      constexpr int kLanes = vector_bytes / sizeof(T);
      add_planes<kLanes>(strip, planes_per_row, shifts.data(), columns);
    });
    for (int64_t row = 1; row < planes_per_row; ++row) {
      for (int64_t i = 0; i < strip.width; ++i) {
        columns.sum[i] += columns.sum[row * strip.width + i];
        columns.sum_squares[i] += columns.sum_squares[row * strip.width + i];
        columns.bits[i] |= columns.bits[row * strip.width + i];
      }
    }
    add_to_seeds(strip, columns, seeds);
    if constexpr (kTakesMoments) mark_columns(strip, columns.bits);
  }

  template <int kLanes>
  ESPER_INLINE void add_planes(const Strip& strip, int64_t planes_per_row, const Compute<T>* shifts,
                               ColumnSums<T> columns) {
    const int64_t pitch = planes_per_row * plane_, width = planes_per_row * strip.width;
    const int64_t rows = strip.planes / planes_per_row;
    const int64_t rest = strip.planes % planes_per_row * strip.width;
    int64_t at = strip.first_plane * plane_ + strip.first_column;
    at = add_all_rows<kWhat, kLanes>(source_, at, pitch, rows, width, shifts, columns);
    if (rest > 0) add_wide_rows<kWhat, 1, kLanes>(source_, at, pitch, rest, shifts, columns);
  }

  // Calls body(seed, begin, end) for the columns of each seed in the strip, counted from its first.
  template <typename Body>
  void for_each_seed_in(const Strip& strip, const Body& body) const {
    const int64_t end = strip.first_column + strip.width;
    auto border = std::upper_bound(borders_.begin(), borders_.end(), strip.first_column);
    for (int64_t column = strip.first_column; column < end; ++border) {
      const int64_t next = std::min(end, *border);
      body(border - borders_.begin() - 1, column - strip.first_column, next - strip.first_column);
      column = next;
    }
  }

  std::vector<Compute<T>> column_shifts(const Strip& strip, int64_t planes_per_row) const {
    std::vector<Compute<T>> shifts(static_cast<size_t>(strip.width * planes_per_row));
    for_each_seed_in(strip, [&](int64_t seed, int64_t begin, int64_t end) {
      for (int64_t row = 0; row < planes_per_row; ++row) {
        const auto first = shifts.begin() + row * strip.width;
        std::fill(first + begin, first + end, static_cast<Compute<T>>(shifts_[seed]));
      }
    });
    return shifts;
  }

  void add_to_seeds(const Strip& strip, const ColumnSums<T>& columns, ShiftedSums* seeds) const {
    const T* first = source_.observed + strip.first_plane * plane_ + strip.first_column;
    for_each_seed_in(strip, [&](int64_t seed, int64_t begin, int64_t end) {
      Lanes<double> sum, sum_squares;
      for_each_in_lanes(end - begin, [&](int64_t i, int64_t lane) {
        sum.values[lane] += columns.sum[begin + i];
        sum_squares.values[lane] += columns.sum_squares[begin + i];
      });
      if (is_finite(sum_squares.total())) {
        const auto count = static_cast<double>((end - begin) * strip.planes);
        return seeds[seed].add({count, sum.total(), sum_squares.total()});
      }
      for (int64_t i = begin; i < end; ++i) {
        seeds[seed].add(finite_sums(first + i, strip.planes, plane_, shifts_[seed]));
      }
    });
  }

  void mark_columns(const Strip& strip, const Bits<T>* bits) {
    int64_t channel = strip.first_column / planes_.inner;
    int64_t left = (channel + 1) * planes_.inner - strip.first_column;
    for (int64_t i = 0; i < strip.width; ++i) {
      if (static_cast<Bits<T>>(bits[i] << 1) != 0) set_alive(channel);
      if (--left == 0) ++channel, left = planes_.inner;
    }
  }

  const Source source_;
  const Planes planes_;
  const int64_t plane_;
  const int64_t num_seeds_;
  std::vector<int64_t> borders_;  // first column of each seed in a plane, and the end
  std::vector<double> shifts_;
  std::vector<uint8_t> alive_;
  std::vector<ShiftedSums> blocks_;  // [block][seed]
};

}  // namespace esper::cpu
