#include "bindings/bindings.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of eapo_fast: scheduler, matchers, random numbers and CPU kernels.";
  m.attr("__version__") = EAPO_FAST_VERSION;
  eapo::bind_core(m);
  eapo::bind_cpu(m);
  eapo::bind_layers(m);
  eapo::bind_policy(m);
  eapo::bind_loss(m);
}
