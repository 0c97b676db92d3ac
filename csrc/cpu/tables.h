#pragma once

#include <vector>

#include "cpu/dispatch.h"

namespace eapo::cpu {

// One table per instruction set in this build, narrowest first.
const std::vector<KernelTable>& compiled_tables();

}  // namespace eapo::cpu
