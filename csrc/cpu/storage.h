// Floating-point numbers as they lie in memory, with conversions that the compiler vectorises: the
// operators of c10::BFloat16 and c10::Half branch, and structs are not stored under a mask.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "numeric.h"

namespace esper::cpu {

template <typename T>
using Stored = std::conditional_t<sizeof(T) == 2, uint16_t, T>;

template <typename T>
struct Storage {
  ESPER_INLINE static bool is_finite(T value) { return cpu::is_finite(value); }
  ESPER_INLINE static T widen(T value) { return value; }
  ESPER_INLINE static T narrow(T value) { return value; }
};

template <>
struct Storage<torch::headeronly::BFloat16> {
  ESPER_INLINE static bool is_finite(uint16_t bits) { return (bits & 0x7f80) != 0x7f80; }

  ESPER_INLINE static float widen(uint16_t bits) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }

  // Rounds to the nearest, ties to even.
  ESPER_INLINE static uint16_t narrow(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
  }
};

template <>
struct Storage<torch::headeronly::Half> {
  ESPER_INLINE static bool is_finite(uint16_t bits) { return (bits & 0x7c00) != 0x7c00; }

  ESPER_INLINE static float widen(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
    constexpr uint32_t kLeastNormal = 1u << 23, kInfinity = 31u << 23;
    const uint32_t normal = magnitude + (112u << 23);
    // 2^-14 (1 + m) - 2^-14, which is right even where the CPU flushes denormal numbers to zero.
    const float denormal = std::bit_cast<float>(magnitude + (113u << 23)) - 0x1p-14f;
    const uint32_t finite = magnitude < kLeastNormal ? std::bit_cast<uint32_t>(denormal) : normal;
    return std::bit_cast<float>(sign | (magnitude < kInfinity ? finite : magnitude | 0x7f800000));
  }

  // Rounds to the nearest, ties to even.
  ESPER_INLINE static uint16_t narrow(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    constexpr uint32_t kLeastNormal = 113u << 23, kOverflow = 143u << 23, kInfinity = 255u << 23;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // The sum's last bit is worth 2^-24, half's least denormal: the addition rounds.
    const uint32_t denormal =
        std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
    const uint32_t finite = magnitude < kLeastNormal ? denormal : normal;
    const uint32_t special = magnitude > kInfinity ? 0x7e00 : 0x7c00;
    return static_cast<uint16_t>(sign | (magnitude < kOverflow ? finite : special));
  }
};

}  // namespace esper::cpu
