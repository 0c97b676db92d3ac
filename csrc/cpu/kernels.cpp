#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/attention_fetch.h"
#include "cpu/attention_plan.h"
#include "cpu/bfloat16.h"
#include "cpu/parallel.h"
#include "cpu/tables.h"
#include "cpu/targets.h"

#if EAPO_X86
#include <immintrin.h>
#endif

namespace eapo::cpu {

namespace {

// Scratch of the calling thread: at least `floats` of them, 64-byte aligned, overwritten by the
// next call on the same thread.
float* workspace(int64_t floats) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { ::operator delete[](data, std::align_val_t{64}); }
  };
  thread_local Buffer buffer;
  if (buffer.size < floats) {
    ::operator delete[](buffer.data, std::align_val_t{64});
    buffer.data = nullptr;
    buffer.size = 0;
    buffer.data = static_cast<float*>(
        ::operator new[](static_cast<size_t>(floats) * sizeof(float), std::align_val_t{64}));
    buffer.size = floats;
  }
  return buffer.data;
}

namespace scalar {
#define EAPO_LANES 4
#include "cpu/vec-inl.h"
#include "cpu/sample-inl.h"
#include "cpu/attention-inl.h"
#include "cpu/layers-inl.h"
#undef EAPO_LANES
}  // namespace scalar

#if EAPO_X86
EAPO_BEGIN_AVX2
namespace avx2 {
#define EAPO_LANES 8
#include "cpu/vec-inl.h"
#include "cpu/sample-inl.h"
#include "cpu/attention-inl.h"
#include "cpu/layers-inl.h"
#undef EAPO_LANES
}  // namespace avx2
EAPO_END_TARGET

EAPO_BEGIN_AVX512
namespace avx512 {
#define EAPO_LANES 16
#include "cpu/vec-inl.h"
#include "cpu/sample-inl.h"
#include "cpu/attention-inl.h"
#include "cpu/layers-inl.h"
#undef EAPO_LANES
}  // namespace avx512
EAPO_END_TARGET

// avx512 whose attention multiplies pairs of bfloat16.
EAPO_BEGIN_AVX512BF16
namespace avx512bf16 {
#define EAPO_LANES 16
#define EAPO_PAIR_DOTS 1
#include "cpu/vec-inl.h"
#include "cpu/attention-inl.h"
#undef EAPO_PAIR_DOTS
#undef EAPO_LANES
}  // namespace avx512bf16
EAPO_END_TARGET
#endif

}  // namespace

const std::vector<KernelTable>& compiled_tables() {
  static const std::vector<KernelTable> tables = {
      {"scalar", scalar::sample, scalar::paged_attention, scalar::rms_norm,
       scalar::gated_activation, scalar::rotary},
#if EAPO_X86
      {"avx2", avx2::sample, avx2::paged_attention, avx2::rms_norm, avx2::gated_activation,
       avx2::rotary},
      {"avx512", avx512::sample, avx512::paged_attention, avx512::rms_norm,
       avx512::gated_activation, avx512::rotary},
      {"avx512bf16", avx512::sample, avx512bf16::paged_attention, avx512::rms_norm,
       avx512::gated_activation, avx512::rotary},
#endif
  };
  return tables;
}

}  // namespace eapo::cpu
