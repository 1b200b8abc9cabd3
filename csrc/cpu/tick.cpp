#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "seed_tick.h"
#include "simd.h"

namespace esper::cpu {
namespace {

// As many seeds as are looked at together; their states fill one cache line.
constexpr int kBlock = kSeedAlignment;
constexpr int64_t kBlocksPerThread = 512;

bool any_running(const uint8_t* states) {
  uint8_t any = 0;
  for (int i = 0; i < kBlock; ++i) any |= is_running(states[i]);
  return any != 0;
}

void record_faults(const SeedArrays& seeds, int64_t first, int64_t max_errors) {
  uint8_t any = 0;
  for (int i = 0; i < kBlock; ++i) any |= seeds.fault[first + i];
  if (any == 0) return;
  for (int64_t i = first; i < first + kBlock; ++i) {
    if (is_running(seeds.lifecycle_states[i])) record_fault(seeds, i, max_errors);
  }
}

// All ones for the seeds of a block whose ramp may move, and for those taken out of the output.
struct Masks {
  int32_t ramping[kBlock];
  int32_t quarantined[kBlock];
};

Masks masks_of(const SeedArrays& seeds, int64_t first) {
  Masks masks;
  for (int i = 0; i < kBlock; ++i) {
    const bool running = is_running(seeds.lifecycle_states[first + i]);
    const bool fallback = seeds.fallback_active[first + i] != 0;
    masks.quarantined[i] = -static_cast<int32_t>(running & fallback);
    masks.ramping[i] = -static_cast<int32_t>(running & !fallback);
  }
  return masks;
}

// What tick_seed does to the ramps of kLanes seeds, without a branch for each.
template <int kLanes>
ESPER_INLINE void advance_ramps(const SeedArrays& seeds, int64_t i, const int32_t* ramping_mask,
                                const int32_t* quarantined_mask) {
  using Ints = Vector<int32_t, kLanes>;
  using Floats = Vector<float, kLanes>;
  const auto slope = load<Floats>(seeds.alpha_slope + i);
  const auto quarantined = load<Ints>(quarantined_mask);
  const Ints ramping = load<Ints>(ramping_mask) & (slope != 0.0f);
  if (!any_bit(ramping | quarantined)) return;
  const auto progress = load<Floats>(seeds.ramp_progress + i);
  const auto target = load<Floats>(seeds.alpha_target + i);
  const auto alpha = load<Floats>(seeds.alpha_blend + i);
  const auto curve =
      __builtin_convertvector(load<Vector<uint8_t, kLanes>>(seeds.ramp_curve + i), Ints);
  const Floats next = advance_progress(progress, slope);
  const Ints arrived = next == 1.0f;
  const Floats fraction = curve == static_cast<int32_t>(RampCurve::COSINE)    ? cosine_ramp(next)
                          : curve == static_cast<int32_t>(RampCurve::SIGMOID) ? sigmoid_ramp(next)
                                                                              : next;
  const Floats ramped = arrived ? target : target * fraction;
  const Ints stopped = quarantined | (ramping & arrived);
  store(seeds.ramp_progress + i, ramping ? next : progress);
  store(seeds.alpha_blend + i, quarantined ? Floats{} : ramping ? ramped : alpha);
  if (any_bit(stopped)) store(seeds.alpha_slope + i, stopped ? Floats{} : slope);
}

void tick_blocks(const SeedArrays& seeds, int64_t begin, int64_t end, int64_t max_errors) {
  vectorized([&](auto vector_bytes) {
    constexpr int kLanes = vector_bytes / sizeof(float);
    for (int64_t first = begin * kBlock; first < end * kBlock; first += kBlock) {
      if (!any_running(seeds.lifecycle_states + first)) continue;
      record_faults(seeds, first, max_errors);
      const Masks masks = masks_of(seeds, first);
      for (int i = 0; i < kBlock; i += kLanes) {
        advance_ramps<kLanes>(seeds, first + i, masks.ramping + i, masks.quarantined + i);
      }
    }
  });
}

void tick(Tensor arena, int64_t num_seeds, int64_t max_errors) {
  check_arena(arena, num_seeds, max_errors);
  const SeedArrays seeds = seed_arrays(arena.mutable_data_ptr(), seed_capacity(num_seeds));
  const int64_t blocks = num_seeds / kBlock;
  if (blocks <= kBlocksPerThread) {
    tick_blocks(seeds, 0, blocks, max_errors);
  } else {
    torch::stable::parallel_for(0, blocks, kBlocksPerThread, [&](int64_t begin, int64_t end) {
      tick_blocks(seeds, begin, end, max_errors);
    });
  }
  for (int64_t i = blocks * kBlock; i < num_seeds; ++i) tick_seed(seeds, i, max_errors);
}

}  // namespace
}  // namespace esper::cpu

STABLE_TORCH_LIBRARY_IMPL(esper, CPU, m) { m.impl("tick", TORCH_BOX(&esper::cpu::tick)); }
