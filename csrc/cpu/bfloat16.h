#pragma once

#include <cstdint>

namespace eapo::cpu {

// Bit pattern of a bfloat16; converted by the vector loads and stores only.
struct BFloat16 {
  uint16_t bits;
};

}  // namespace eapo::cpu
