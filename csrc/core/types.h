#pragma once

#include <cstdint>

namespace eapo {

using TokenId = std::int32_t;
using BlockId = std::int32_t;
using SeqId = std::int32_t;

constexpr BlockId kNoBlock = -1;
constexpr TokenId kNoToken = -1;

// The life of one row. Only PREFILL and RUNNING rows hold a batch slot.
enum class State : std::uint8_t {
  kWaiting,    // not begun, or forked from its group's prompt and not yet given a slot
  kPrefill,    // in the batch, more than one token to compute
  kRunning,    // in the batch, one token to compute
  kParked,     // aside until inject() or finish()
  kInjected,   // runnable again after inject(), waiting for a slot
  kPreempted,  // lost its slot (and perhaps KV), waiting for one
  kDone,
};

}  // namespace eapo
