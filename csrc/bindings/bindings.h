#pragma once

#include <pybind11/pybind11.h>

namespace eapo {

// Random numbers, block allocator, tag matcher, scheduler.
void bind_core(pybind11::module_& m);

// ISA choice, threads and the CPU kernels.
void bind_cpu(pybind11::module_& m);

// Pieces of a transformer layer on the CPU.
void bind_layers(pybind11::module_& m);
// The CPU kernel of the policy losses.
void bind_policy(pybind11::module_& m);
// The CPU kernels of the LM-head losses.
void bind_loss(pybind11::module_& m);

}  // namespace eapo
