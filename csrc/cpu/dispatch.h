#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace eapo::cpu {

// Function pointers of one instruction set.
struct KernelTable {
  const char* isa;
  void (*sample)(const SampleArgs&);
  void (*paged_attention)(const AttentionArgs&);
  void (*rms_norm)(const RmsNormArgs&);
  void (*gated_activation)(const GatedActivationArgs&);
  void (*rotary)(const RotaryArgs&);
};

// The table in use: EAPO_FAST_ISA if set, else the widest this CPU runs. Throws
// std::invalid_argument when EAPO_FAST_ISA names an unknown or unsupported one.
const KernelTable& kernels();

// Names of the instruction sets that this CPU runs, narrowest first.
std::vector<std::string> supported_isas();

// Replaces the table in use. Throws std::invalid_argument like kernels().
void set_isa(const std::string& name);

}  // namespace eapo::cpu
