#include "cpu/loss.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string_view>
#include <type_traits>
#include <vector>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/targets.h"

#if EAPO_X86
#include <immintrin.h>
#endif

namespace eapo::cpu {
namespace {

namespace scalar {
#define EAPO_LANES 4
#include "cpu/vec-inl.h"
#include "cpu/loss-inl.h"
#include "cpu/loss_plain-inl.h"
#include "cpu/loss_gradient-inl.h"
#include "cpu/loss_rows-inl.h"
#undef EAPO_LANES
}  // namespace scalar

#if EAPO_X86
EAPO_BEGIN_AVX2
namespace avx2 {
#define EAPO_LANES 8
#include "cpu/vec-inl.h"
#include "cpu/loss-inl.h"
#include "cpu/loss_plain-inl.h"
#include "cpu/loss_gradient-inl.h"
#include "cpu/loss_rows-inl.h"
#undef EAPO_LANES
}  // namespace avx2
EAPO_END_TARGET

EAPO_BEGIN_AVX512
namespace avx512 {
#define EAPO_LANES 16
#include "cpu/vec-inl.h"
#include "cpu/loss-inl.h"
#include "cpu/loss_plain-inl.h"
#include "cpu/loss_gradient-inl.h"
#include "cpu/loss_rows-inl.h"
#undef EAPO_LANES
}  // namespace avx512
EAPO_END_TARGET

EAPO_BEGIN_AVX512BF16
namespace avx512bf16 {
#define EAPO_LANES 16
#define EAPO_BF16 1
#include "cpu/vec-inl.h"
#include "cpu/loss-inl.h"
#include "cpu/loss_plain-inl.h"
#include "cpu/loss_gradient-inl.h"
#include "cpu/loss_rows-inl.h"
#undef EAPO_BF16
#undef EAPO_LANES
}  // namespace avx512bf16
EAPO_END_TARGET
#endif

struct LossTable {
  std::string_view isa;
  decltype(&eapo::cpu::absorb_logits) absorb_logits;
  decltype(&eapo::cpu::logit_gradient) logit_gradient;
  decltype(&eapo::cpu::absorb_rows) absorb_rows;
  decltype(&eapo::cpu::gradient_rows) gradient_rows;
  decltype(&eapo::cpu::fill_rows) fill_rows;
  decltype(&eapo::cpu::add_to_planes) add_to_planes;
  decltype(&eapo::cpu::round_planes) round_planes;
  decltype(&eapo::cpu::take_transposed) take_transposed;
};

#define EAPO_LOSS_TABLE(isa)                                                          \
  {                                                                                   \
    #isa, isa::absorb_logits, isa::logit_gradient, isa::absorb_any, isa::gradient_any, \
        isa::fill_rows, isa::add_to_planes, isa::round_planes, isa::take_transposed   \
  }

constexpr LossTable kTables[] = {
    EAPO_LOSS_TABLE(scalar),
#if EAPO_X86
    EAPO_LOSS_TABLE(avx2),
    EAPO_LOSS_TABLE(avx512),
    EAPO_LOSS_TABLE(avx512bf16),
#endif
};

// The functions of the instruction set in use.
const LossTable& table() {
  const std::string_view isa = kernels().isa;
  for (const LossTable& one : kTables)
    if (isa == one.isa) return one;
  throw std::logic_error("the loss kernels were not built for " + std::string(isa));
}

}  // namespace

void absorb_logits(const AbsorbArgs& args) { table().absorb_logits(args); }

void logit_gradient(const LogitGradientArgs& args) { table().logit_gradient(args); }

void absorb_rows(const AbsorbArgs& args, int64_t first, int64_t last) {
  table().absorb_rows(args, first, last);
}

void gradient_rows(const LogitGradientArgs& args, int64_t first, int64_t last) {
  table().gradient_rows(args, first, last);
}

void fill_rows(uint16_t* out, const float* values, int64_t rows, int64_t width) {
  table().fill_rows(out, values, rows, width);
}

void add_to_planes(uint16_t* high, uint16_t* low, const uint16_t* addend, int64_t count) {
  table().add_to_planes(high, low, addend, count);
}

void round_planes(uint16_t* high, const uint16_t* low, int64_t count) {
  table().round_planes(high, low, count);
}

void take_transposed(float* to, const float* from, int64_t rows, int64_t width, bool add) {
  table().take_transposed(to, from, rows, width, add);
}

}  // namespace eapo::cpu
