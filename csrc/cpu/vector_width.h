// Loops compiled for several widths of vectors, of which the widest that this CPU has is run.
#pragma once

#define ESPER_INLINE [[gnu::always_inline]] inline

namespace esper::cpu {

// Not target_clones: it cannot be put on templates, and its ifuncs run before AddressSanitizer is
// ready. What Loop::run calls has to be ESPER_INLINE as well, or it is left at the narrow width.
#if defined(__x86_64__)

enum class VectorWidth { k128, k256, k512 };

inline VectorWidth vector_width() {
  static const VectorWidth width = __builtin_cpu_supports("avx512bw") &&
                                           __builtin_cpu_supports("avx512dq") &&
                                           __builtin_cpu_supports("avx512vl")
                                       ? VectorWidth::k512
                                   : __builtin_cpu_supports("avx2") ? VectorWidth::k256
                                                                    : VectorWidth::k128;
  return width;
}

template <typename Loop, typename... Args>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl")]] auto run_512(const Args&... args) {
  return Loop::run(args...);
}

template <typename Loop, typename... Args>
[[gnu::target("avx2")]] auto run_256(const Args&... args) {
  return Loop::run(args...);
}

template <typename Loop, typename... Args>
auto run_widest(const Args&... args) {
  switch (vector_width()) {
    case VectorWidth::k512:
      return run_512<Loop>(args...);
    case VectorWidth::k256:
      return run_256<Loop>(args...);
    case VectorWidth::k128:
      break;
  }
  return Loop::run(args...);
}

#else

template <typename Loop, typename... Args>
auto run_widest(const Args&... args) {
  return Loop::run(args...);
}

#endif

}  // namespace esper::cpu
