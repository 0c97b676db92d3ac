// The token program (kernels/policy_loss/triton_program.py) for one token on the device.
#pragma once

#include "cpu/policy.h"
#include "cuda/device.cuh"

namespace eapo::cuda::program {

using cpu::KlEstimator;
using cpu::Surrogate;
using F = float;
using I = bool;

#define EAPO_INLINE __device__ __forceinline__

constexpr float kInf = __builtin_huge_valf();

EAPO_INLINE F broadcast(float x) { return x; }
EAPO_INLINE F select(I condition, F yes, F no) { return condition ? yes : no; }
EAPO_INLINE F filled(F, F value) { return value; }
EAPO_INLINE F absolute(F x) { return fabsf(x); }
EAPO_INLINE F exp_limited(F x) { return expf(x); }

// x inside [least, most]; NaN stays NaN.
EAPO_INLINE F bounded(F x, F least, F most) {
  x = x < least ? least : x;
  return x > most ? most : x;
}

// (exp(x) - 1 - x) for |x| <= ln(2) / 2: the polynomial of the Cephes library.
EAPO_INLINE F series(F x) {
  float p = 1.9875691500e-4f;
  p = p * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  return p * x * x;
}

// exp(x) - 1 and exp(x) - 1 - x with all their digits.
constexpr float kSmall = 0.34657359f;
EAPO_INLINE F expm1(F x) { return fabsf(x) < kSmall ? series(x) + x : expf(x) - 1.0f; }
EAPO_INLINE F exp_excess(F x) { return fabsf(x) < kSmall ? series(x) : expf(x) - 1.0f - x; }

#include "cpu/token_program-inl.h"

#undef EAPO_INLINE

}  // namespace eapo::cuda::program
