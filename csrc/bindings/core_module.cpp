#include "bindings/bindings.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of eapo_fast: scheduler, matchers, random numbers and CPU kernels.";
  m.attr("__version__") = EAPO_FAST_VERSION;
#ifdef EAPO_HAVE_BIND_CORE
  eapo::bind_core(m);
#endif
  eapo::bind_cpu(m);
}
