// Layout of the seed bank: one structure of arrays, read by the host class, the CPU ops and the
// CUDA kernels alike. esper/contracts.py holds the same enums; a test pins that they agree.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ESPER_HOST_DEVICE __host__ __device__
#else
#define ESPER_HOST_DEVICE
#endif

#define ESPER_SEED_STATES(X) \
  X(DORMANT)                 \
  X(GERMINATED)              \
  X(LOADING)                 \
  X(TRAINING)                \
  X(GRAFTING)                \
  X(STABILIZATION)           \
  X(EVALUATING)              \
  X(FINE_TUNING)             \
  X(FOSSILIZED)              \
  X(CULLED)                  \
  X(CANCELLED)               \
  X(ROLLED_BACK)

#define ESPER_RAMP_CURVES(X) X(LINEAR) X(COSINE) X(SIGMOID)

// X(name, C++ type, torch dtype, rows). Ordered by falling item size, so that every array is
// aligned for its type whatever the capacity.
#define ESPER_SEED_FIELDS(X)                                    \
  X(active_kernel_id, int64_t, "int64", 1)                      \
  X(health_accumulator, float, "float32", ::esper::kHealthRows) \
  X(alpha_blend, float, "float32", 1)                           \
  X(alpha_target, float, "float32", 1)                          \
  X(alpha_slope, float, "float32", 1)                           \
  X(ramp_progress, float, "float32", 1)                         \
  X(exec_latency_us, float, "float32", 1)                       \
  X(last_update_epoch, int32_t, "int32", 1)                     \
  X(error_count, int32_t, "int32", 1)                           \
  X(lifecycle_states, uint8_t, "uint8", 1)                      \
  X(fallback_active, uint8_t, "uint8", 1)                       \
  X(ramp_curve, uint8_t, "uint8", 1)                            \
  X(fault, uint8_t, "uint8", 1)

namespace esper {

#define X(name) name,
enum class SeedState : uint8_t { ESPER_SEED_STATES(X) };
enum class RampCurve : uint8_t { ESPER_RAMP_CURVES(X) };
#undef X

enum HealthRow : int { kCount, kMean, kM2, kDead, kNonFinite, kGradEnergy, kHealthRows };

#define X(name, type, dtype, rows) +(rows) * static_cast<int64_t>(sizeof(type))
constexpr int64_t kBytesPerSeed = 0 ESPER_SEED_FIELDS(X);
#undef X
static_assert(kBytesPerSeed == 64);

constexpr int64_t kSeedAlignment = 64;
constexpr int64_t kMaxSeeds = int64_t{1} << 24;

// A multiple of 64, so that even the arrays of bytes begin on a cache line of their own.
ESPER_HOST_DEVICE constexpr int64_t seed_capacity(int64_t num_seeds) {
  return (num_seeds + kSeedAlignment - 1) / kSeedAlignment * kSeedAlignment;
}

struct SeedArrays {
#define X(name, type, dtype, rows) type* name;
  ESPER_SEED_FIELDS(X)
#undef X
};

ESPER_HOST_DEVICE inline SeedArrays seed_arrays(void* block, int64_t capacity) {
  auto* cursor = static_cast<unsigned char*>(block);
  SeedArrays arrays;
#define X(name, type, dtype, rows)               \
  arrays.name = reinterpret_cast<type*>(cursor); \
  cursor += (rows) * capacity * static_cast<int64_t>(sizeof(type));
  ESPER_SEED_FIELDS(X)
#undef X
  return arrays;
}

}  // namespace esper
