#pragma once

#include <cstdint>

namespace eapo::cpu {

// Asks the system to back memory that has not been touched yet by large pages, so that its first
// use costs few faults. Does nothing where there are none.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace eapo::cpu
