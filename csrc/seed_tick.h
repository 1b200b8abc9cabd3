// One step of one seed, shared by the CPU loop and the CUDA kernel.
#pragma once

#include "seed_layout.h"

namespace esper {

// The curves map progress in [0, 1] to [0, 1], hitting both ends exactly; they take a number or a
// vector of them. Each is a simple curve that is exact at both ends and in the middle, plus a
// correction that vanishes there, fitted by least squares in u = (p - 1/2)^2. Within 1.1e-7.

// (1 - cos(pi p)) / 2, which lies near 3 p^2 - 2 p^3.
template <typename Float>
ESPER_HOST_DEVICE inline Float cosine_ramp(Float p) {
  const Float centred = p - 0.5f, u = centred * centred, ends = p * (1.0f - p);
  const Float bend = 1.132740231f + u * (-0.2797084412f + u * 0.03834819234f);
  return p * p * (3.0f - 2.0f * p) + ends * ends * centred * bend;
}

// The logistic function of 12 (p - 1/2), scaled to reach 0 and 1.
template <typename Float>
ESPER_HOST_DEVICE inline Float sigmoid_ramp(Float p) {
  const Float centred = p - 0.5f, u = centred * centred;
  const Float numerator = 8.059634688f + u * (17.19601651f + u * 0.6551878121f);
  const Float denominator = 1.0f + u * (16.08911809f + u * 21.8810207f);
  return p + p * (1.0f - p) * centred * (numerator / denominator);
}

ESPER_HOST_DEVICE inline float ramp(RampCurve curve, float progress) {
  switch (curve) {
    case RampCurve::COSINE:
      return cosine_ramp(progress);
    case RampCurve::SIGMOID:
      return sigmoid_ramp(progress);
    case RampCurve::LINEAR:
      break;
  }
  return progress;
}

// The last step of n has to arrive although n * (1/n) may round to just below 1.
template <typename Float>
ESPER_HOST_DEVICE inline Float advance_progress(Float progress, Float slope) {
  const Float next = progress + slope;
  return next > 1.0f - slope / 16.0f ? 1.0f : next;
}

ESPER_HOST_DEVICE inline void record_fault(const SeedArrays& seeds, int64_t i, int64_t max_errors) {
  if (!seeds.fault[i]) return;
  seeds.fault[i] = 0;
  seeds.error_count[i] += 1;
  if (seeds.error_count[i] >= max_errors) seeds.fallback_active[i] = 1;
}

ESPER_HOST_DEVICE inline bool is_running(uint8_t state) {
  return static_cast<uint8_t>(SeedState::TRAINING) <= state &&
         state <= static_cast<uint8_t>(SeedState::FOSSILIZED);
}

ESPER_HOST_DEVICE inline void advance_ramp(const SeedArrays& seeds, int64_t i) {
  if (seeds.alpha_slope[i] == 0.0f) return;
  const float progress = advance_progress(seeds.ramp_progress[i], seeds.alpha_slope[i]);
  const float target = seeds.alpha_target[i];
  const bool arrived = progress == 1.0f;
  const auto curve = static_cast<RampCurve>(seeds.ramp_curve[i]);
  seeds.ramp_progress[i] = progress;
  seeds.alpha_blend[i] = arrived ? target : target * ramp(curve, progress);
  if (arrived) seeds.alpha_slope[i] = 0.0f;
}

ESPER_HOST_DEVICE inline void tick_seed(const SeedArrays& seeds, int64_t i, int64_t max_errors) {
  if (!is_running(seeds.lifecycle_states[i])) return;
  record_fault(seeds, i, max_errors);
  if (seeds.fallback_active[i]) {
    seeds.alpha_blend[i] = 0.0f;
    seeds.alpha_slope[i] = 0.0f;
  } else {
    advance_ramp(seeds, i);
  }
}

}  // namespace esper
