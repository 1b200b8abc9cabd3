#include "checks.h"
#include "seed_tick.h"

namespace esper::cpu {
namespace {

void tick(Tensor arena, int64_t num_seeds, int64_t max_errors) {
  check_arena(arena, num_seeds, max_errors);
  const SeedArrays seeds = seed_arrays(arena.mutable_data_ptr(), seed_capacity(num_seeds));
  for (int64_t i = 0; i < num_seeds; ++i) tick_seed(seeds, i, max_errors);
}

}  // namespace
}  // namespace esper::cpu

STABLE_TORCH_LIBRARY_IMPL(esper, CPU, m) { m.impl("tick", TORCH_BOX(&esper::cpu::tick)); }
