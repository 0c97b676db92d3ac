#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/tables.h"
#include "cpu/targets.h"

namespace eapo::cpu {
namespace {

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

bool runs_here(const std::string& isa) {
#if EAPO_X86
  __builtin_cpu_init();
  if (isa == "avx512bf16") return runs_here("avx512") && __builtin_cpu_supports("avx512bf16");
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == "scalar";
}

const KernelTable& table_of(const std::string& name, const std::string& source) {
  for (const KernelTable& table : compiled_tables())
    if (table.isa == name && runs_here(name)) return table;
  throw std::invalid_argument(source + " is '" + name + "', but this build on this CPU runs: " +
                              joined(supported_isas()) + ", auto (the widest).");
}

const KernelTable& initial_table() {
  const char* forced = std::getenv("EAPO_FAST_ISA");
  const std::string name = forced == nullptr ? "" : forced;
  if (!name.empty() && name != "auto") return table_of(name, "EAPO_FAST_ISA");
  return table_of(supported_isas().back(), "isa");
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable& table : compiled_tables())
    if (runs_here(table.isa)) names.emplace_back(table.isa);
  return names;
}

const KernelTable& kernels() {
  const KernelTable* table = current.load(std::memory_order_acquire);
  if (table == nullptr) current.store(table = &initial_table(), std::memory_order_release);
  return *table;
}

void set_isa(const std::string& name) {
  current.store(&table_of(name, "isa"), std::memory_order_release);
}

}  // namespace eapo::cpu
