// Statistics of a seed's chunk and how they enter its column of the health accumulator; shared by
// the CPU loops and the CUDA kernels. Sums are kept in double, so that one batch is exact enough
// for any input dtype, and only the columns are float.
#pragma once

#include <cfloat>
#include <cmath>

#include "seed_layout.h"

namespace esper {

struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;  // sum of squared deviations from the mean
};

// Chan, Golub, LeVeque: "Updating formulae and a pairwise algorithm for computing sample
// variances" (1979), equations 2.1a and 2.1b.
ESPER_HOST_DEVICE inline Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0) return {};
  const double delta = b.mean - a.mean;
  return {count, a.mean + delta * (b.count / count),
          a.m2 + b.m2 + delta * delta * (a.count * (b.count / count))};
}

// Sums of x - shift. With one of the data as shift the difference of squares in moments() cancels
// little; without, a mean far from zero would cost every digit of the variance.
struct ShiftedSums {
  double count = 0;
  double sum = 0;
  double sum_squares = 0;

  ESPER_HOST_DEVICE void add(const ShiftedSums& other) {
    count += other.count;
    sum += other.sum;
    sum_squares += other.sum_squares;
  }

  ESPER_HOST_DEVICE Moments moments(double shift) const {
    if (count == 0) return {};
    const double mean = sum / count;
    const double m2 = sum_squares - sum * mean;
    return {count, shift + mean, m2 > 0 ? m2 : 0};
  }
};

struct ChunkHealth {
  Moments moments;
  double dead = 0;
  double non_finite = 0;
};

struct Chunk {
  int64_t begin;
  int64_t end;
};

// Channels of seed `seed` of `num_seeds`: contiguous, as even as possible, the longer ones first.
ESPER_HOST_DEVICE inline Chunk seed_chunk(int64_t channels, int64_t num_seeds, int64_t seed) {
  const int64_t size = channels / num_seeds;
  const int64_t longer = channels % num_seeds;
  const int64_t begin = seed * size + (seed < longer ? seed : longer);
  return {begin, begin + size + (seed < longer ? 1 : 0)};
}

// Columns saturate instead of becoming infinite: telemetry has no notation for infinity.
ESPER_HOST_DEVICE inline float saturate(double value) {
  constexpr double kLimit = FLT_MAX;
  return static_cast<float>(fmin(fmax(value, -kLimit), kLimit));
}

// `column` points at the seed's entry of the first row; rows lie `capacity` apart.
ESPER_HOST_DEVICE inline void accumulate_health(float* column, int64_t capacity,
                                                const ChunkHealth& batch) {
  const auto row = [=](HealthRow r) -> float& { return column[r * capacity]; };
  const Moments all = merge({row(kCount), row(kMean), row(kM2)}, batch.moments);
  row(kCount) = saturate(all.count);
  row(kMean) = saturate(all.mean);
  row(kM2) = saturate(all.m2);
  row(kDead) = saturate(row(kDead) + batch.dead);
  row(kNonFinite) = saturate(row(kNonFinite) + batch.non_finite);
}

}  // namespace esper
