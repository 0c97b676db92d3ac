#include "bindings/advantage_args.h"
#include "bindings/cuda_bindings.h"
#include "bindings/tensor_view.h"
#include "group_advantages/launch.h"

namespace py = pybind11;

namespace eapo {
namespace {

// Queued on torch's current stream of the rewards' device; nothing is waited for.
void group_advantages(py::handle rewards_, py::handle group_ids, const std::string& center,
                      const std::string& scale, py::handle lengths, double eps, int64_t ddof,
                      py::handle valid, py::handle out) {
  const TensorView rewards(rewards_, "rewards", Device::kCuda);
  const AdvantageArgs args = advantage_args(rewards, group_ids, center, scale, lengths, eps, ddof,
                                            valid, out, Device::kCuda);
  const char* problem =
      cuda::group_advantages(args, rewards.device_index(), rewards.current_stream());
  if (problem != nullptr) throw std::runtime_error(join("group_advantages on CUDA: ", problem));
}

}  // namespace
}  // namespace eapo

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of eapo_fast; the module imports on a machine without a GPU.";
  m.attr("__version__") = EAPO_FAST_VERSION;
  m.def("group_advantages", &eapo::group_advantages, py::arg("rewards"), py::arg("group_ids"),
        py::arg("center"), py::arg("scale"), py::arg("lengths"), py::arg("eps"), py::arg("ddof"),
        py::arg("valid"), py::arg("out"));
  eapo::bind_cuda_cache(m, eapo::Device::kCuda);
  eapo::bind_cuda_attention(m, eapo::Device::kCuda);
  eapo::bind_cuda_sample(m, eapo::Device::kCuda);
  eapo::bind_cuda_rows(m, eapo::Device::kCuda);
}
