// One step of one seed, shared by the CPU loop and the CUDA kernel.
#pragma once

#include <cmath>

#include "seed_layout.h"

namespace esper {

// Maps progress in [0, 1] to [0, 1], hitting both ends exactly.
ESPER_HOST_DEVICE inline float ramp(RampCurve curve, float progress) {
  constexpr float kPi = 3.14159265358979f;
  constexpr float kSteepness = 12.0f;
  const auto logistic = [](float p) { return 1.0f / (1.0f + expf(-kSteepness * (p - 0.5f))); };
  switch (curve) {
    case RampCurve::COSINE:
      return (1.0f - cosf(kPi * progress)) / 2.0f;
    case RampCurve::SIGMOID:
      return (logistic(progress) - logistic(0.0f)) / (logistic(1.0f) - logistic(0.0f));
    case RampCurve::LINEAR:
      break;
  }
  return progress;
}

// The last step of n has to arrive although n * (1/n) may round to just below 1.
ESPER_HOST_DEVICE inline float advance_progress(float progress, float slope) {
  const float next = progress + slope;
  return next > 1.0f - slope / 16.0f ? 1.0f : next;
}

ESPER_HOST_DEVICE inline void record_fault(const SeedArrays& seeds, int64_t i, int64_t max_errors) {
  if (!seeds.fault[i]) return;
  seeds.fault[i] = 0;
  seeds.error_count[i] += 1;
  if (seeds.error_count[i] >= max_errors) seeds.fallback_active[i] = 1;
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
  const auto state = static_cast<SeedState>(seeds.lifecycle_states[i]);
  if (state < SeedState::TRAINING || state > SeedState::FOSSILIZED) return;
  record_fault(seeds, i, max_errors);
  if (seeds.fallback_active[i]) {
    seeds.alpha_blend[i] = 0.0f;
    seeds.alpha_slope[i] = 0.0f;
  } else {
    advance_ramp(seeds, i);
  }
}

}  // namespace esper
