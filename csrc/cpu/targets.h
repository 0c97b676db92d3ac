// Per-ISA code regions: an `*-inl.h` body is included once per target between the two pragmas, in a
// namespace of its own, and sees EAPO_LANES floats per register. Include every header the body
// needs before the first region, so that only the body is compiled for the wider ISA.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define EAPO_X86 1
#else
#define EAPO_X86 0
#endif

// avx512bw and avx512dq imply avx512f, which implies avx2; a _Pragma takes one literal.
#if defined(__clang__)
#define EAPO_BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to = function)")
#define EAPO_BEGIN_AVX512                                                            \
  _Pragma(                                                                           \
      "clang attribute push(__attribute__((target(\"avx512bw,avx512dq,avx512vl,fma\"))), apply_to = function)")
#define EAPO_BEGIN_AVX512BF16                                                        \
  _Pragma(                                                                           \
      "clang attribute push(__attribute__((target(\"avx512bf16,avx512bw,avx512dq,avx512vl,fma\"))), apply_to = function)")
#define EAPO_END_TARGET _Pragma("clang attribute pop")
#else
#define EAPO_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define EAPO_BEGIN_AVX512          \
  _Pragma("GCC push_options")      \
      _Pragma("GCC target(\"avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512\")")
#define EAPO_BEGIN_AVX512BF16 \
  _Pragma("GCC push_options") _Pragma( \
      "GCC target(\"avx512bf16,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512\")")
#define EAPO_END_TARGET _Pragma("GCC pop_options")
#endif

#define EAPO_INLINE inline __attribute__((always_inline))

// Lane i of the result is lane index[i] of a followed by b.
#if defined(__clang__)
#define EAPO_SHUFFLE(a, b, index) ::eapo::cpu::select_lanes(a, b, index)
#else
#define EAPO_SHUFFLE(a, b, index) __builtin_shuffle(a, b, index)
#endif

#if defined(__clang__)
namespace eapo::cpu {
// clang has no shuffle by a run-time index; its optimiser turns this loop over constants into one.
template <typename V, typename Index>
EAPO_INLINE V select_lanes(V a, V b, Index index) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  V result;
  for (int i = 0; i < lanes; ++i) result[i] = index[i] < lanes ? a[index[i]] : b[index[i] - lanes];
  return result;
}
}  // namespace eapo::cpu
#endif
