#pragma once

#include <torch/csrc/stable/tensor.h>

namespace esper::cpu {

// Books `lost` non-finite elements on one of the seeds that the two fields belong to.
inline void record_lost(int64_t lost, const torch::stable::Tensor& non_finite,
                        const torch::stable::Tensor& fault, int64_t seed = 0) {
  if (lost == 0) return;
  static_cast<float*>(non_finite.mutable_data_ptr())[seed] += static_cast<float>(lost);
  static_cast<uint8_t*>(fault.mutable_data_ptr())[seed] = 1;
}

}  // namespace esper::cpu
