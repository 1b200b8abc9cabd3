// Vectors of numbers as they lie in memory, widened to the type in which they are computed.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "numeric.h"
#include "vector_width.h"

namespace esper::cpu {

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

template <typename T>
inline constexpr Bits<T> kSignBit = Bits<T>{1} << (8 * sizeof(T) - 1);

template <typename T>
inline constexpr Bits<T> kInfinityBits =
    std::is_same_v<T, double>                        ? Bits<T>(0x7ff0000000000000)
    : std::is_same_v<T, torch::headeronly::Half>     ? Bits<T>(0x7c00)
    : std::is_same_v<T, torch::headeronly::BFloat16> ? Bits<T>(0x7f80)
                                                     : Bits<T>(0x7f800000);

template <typename T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
};
template <typename T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;

// Numbers by their bits.
template <typename T, int kLanes>
using BitVector = Vector<Bits<T>, kLanes>;

template <typename V>
ESPER_INLINE V load(const void* from) {
  V vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <int kLanes, typename T>
ESPER_INLINE BitVector<T, kLanes> load_bits(const T* from) {
  return load<BitVector<T, kLanes>>(from);
}

template <typename T, typename V>
ESPER_INLINE void store(T* to, V vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// Numbers by their values. Two vectors hold numbers of 16 bits: those at even places and those at
// odd ones, which a shift and a mask tell apart.
template <typename T, int kLanes>
struct Values {
  static constexpr int kParts = sizeof(T) == 2 && kLanes > 1 ? 2 : 1;
  static constexpr int kPartLanes = kLanes / kParts;
  using Part = Vector<Compute<T>, kPartLanes>;
  std::array<Part, kParts> parts{};
};

// The value of a float16, which fills the low half of each lane.
template <typename Floats, typename Words>
ESPER_INLINE Floats widen_half(Words bits) {
  constexpr uint32_t kLeastNormal = 1u << 23, kInfinity = 31u << 23;
  const Words magnitude = (bits & 0x7fff) << 13;
  // 2^-14 (1 + m) - 2^-14, right even where the CPU flushes denormal numbers to zero.
  const Floats denormal = (Floats)(magnitude + (113u << 23)) - 0x1p-14f;
  const Words finite = magnitude < kLeastNormal ? (Words)denormal : magnitude + (112u << 23);
  const Words any = magnitude < kInfinity ? finite : magnitude | 0x7f800000;
  return (Floats)((bits & 0x8000) << 16 | any);
}

template <typename T, int kLanes>
ESPER_INLINE Values<T, kLanes> widen(BitVector<T, kLanes> bits) {
  using V = Values<T, kLanes>;
  using Part = typename V::Part;
  if constexpr (sizeof(T) != 2) {
    return {{(Part)bits}};
  } else {
    using Words = Vector<uint32_t, V::kPartLanes>;
    Words words{};
    std::memcpy(&words, &bits, sizeof(bits));
    V values;
    if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
      values.parts[0] = (Part)(words << 16);
      if constexpr (V::kParts == 2) values.parts[1] = (Part)(words & 0xffff0000);
    } else {
      values.parts[0] = widen_half<Part>(words);
      if constexpr (V::kParts == 2) values.parts[1] = widen_half<Part>(words >> 16);
    }
    return values;
  }
}

// Lane i of the result is lane kFrom(i) of `a` followed by `b`.
template <auto kFrom, typename V, int... i>
ESPER_INLINE auto shuffled(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, kFrom(i)...);
}

template <int kLanes>
using LaneIndices = std::make_integer_sequence<int, kLanes>;

// Loads computed numbers as widen() would leave them.
template <typename T, int kLanes>
ESPER_INLINE Values<T, kLanes> load_values(const Compute<T>* from) {
  using V = Values<T, kLanes>;
  auto values = load<V>(from);
  if constexpr (V::kParts == 2) {
    const auto [a, b] = values.parts;
    const LaneIndices<V::kPartLanes> lanes;
    values.parts = {shuffled<[](int i) { return 2 * i; }>(a, b, lanes),
                    shuffled<[](int i) { return 2 * i + 1; }>(a, b, lanes)};
  }
  return values;
}

// Puts the numbers into the order in which they lie in memory.
template <typename T, int kLanes>
ESPER_INLINE Values<T, kLanes> in_memory_order(const Values<T, kLanes>& values) {
  using V = Values<T, kLanes>;
  if constexpr (V::kParts == 1) {
    return values;
  } else {
    constexpr int kN = V::kPartLanes;
    const auto [even, odd] = values.parts;
    const LaneIndices<kN> lanes;
    return {{shuffled<[](int i) { return i % 2 * kN + i / 2; }>(even, odd, lanes),
             shuffled<[](int i) { return i % 2 * kN + (kN + i) / 2; }>(even, odd, lanes)}};
  }
}

template <int kLanes>
ESPER_INLINE void add_to(double* to, Vector<double, kLanes> addend) {
  store(to, load<Vector<double, kLanes>>(to) + addend);
}

template <int kLanes>
ESPER_INLINE void add_to(double* to, Vector<float, kLanes> addend) {
  if constexpr (kLanes == 1) {
    *to += static_cast<double>(addend[0]);
  } else {
    constexpr int kHalf = kLanes / 2;
    using Doubles = Vector<double, kHalf>;
    const LaneIndices<kHalf> lanes;
    const auto low = shuffled<[](int i) { return i; }>(addend, addend, lanes);
    const auto high = shuffled<[](int i) { return i + kHalf; }>(addend, addend, lanes);
    add_to<kHalf>(to, __builtin_convertvector(low, Doubles));
    add_to<kHalf>(to + kHalf, __builtin_convertvector(high, Doubles));
  }
}

// The sum of all lanes, in halves, which wait for one another less often than single lanes.
template <int kLanes>
ESPER_INLINE double lane_total(Vector<double, kLanes> vector) {
  if constexpr (kLanes == 1) {
    return vector[0];
  } else {
    constexpr int kHalf = kLanes / 2;
    const LaneIndices<kHalf> lanes;
    return lane_total<kHalf>(shuffled<[](int i) { return i; }>(vector, vector, lanes) +
                             shuffled<[](int i) { return i + kHalf; }>(vector, vector, lanes));
  }
}

// Sets the first `count` lanes to zero.
template <int kLanes, typename V, int... i>
ESPER_INLINE V without_first(V vector, int count, std::integer_sequence<int, i...>) {
  using Element = std::remove_cvref_t<decltype(vector[0])>;
  using Indices = Vector<std::conditional_t<sizeof(Element) == 8, int64_t, int32_t>, kLanes>;
  const Indices lanes{i...};
  return lanes < count ? V{} : vector;
}

// Whether any bit is set anywhere.
template <typename V>
ESPER_INLINE bool any_bit(V bits) {
  constexpr int kWords = (sizeof(V) + 7) / 8;
  uint64_t words[kWords] = {}, any = 0;
  std::memcpy(words, &bits, sizeof(V));
  for (const uint64_t word : words) any |= word;
  return any != 0;
}

// Calls body(width), with the bytes of a vector as a constant, compiled for this CPU's widest one.
#if defined(__x86_64__)

template <typename Body>
[[gnu::flatten,
  gnu::target("avx512f,avx512bw,avx512dq,avx512vl")]] void vectorized_512(const Body& body) {
  body(std::integral_constant<int, 64>{});
}

template <typename Body>
[[gnu::flatten, gnu::target("avx2")]] void vectorized_256(const Body& body) {
  body(std::integral_constant<int, 32>{});
}

template <typename Body>
void vectorized(const Body& body) {
  switch (vector_width()) {
    case VectorWidth::k512:
      return vectorized_512(body);
    case VectorWidth::k256:
      return vectorized_256(body);
    case VectorWidth::k128:
      break;
  }
  body(std::integral_constant<int, 16>{});
}

#else

template <typename Body>
void vectorized(const Body& body) {
  body(std::integral_constant<int, 16>{});
}

#endif

}  // namespace esper::cpu
