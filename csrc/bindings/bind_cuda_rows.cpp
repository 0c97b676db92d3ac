#include <pybind11/stl.h>

#include <optional>

#include "bindings/cuda_bindings.h"
#include "linear_token_stats/launch.h"

namespace py = pybind11;

namespace eapo {
namespace {

constexpr int64_t kAny = -1;

// The token program of all rows, by row where it is a tensor.
struct RowProgram {
  py::object weights, old_logprob, advantages, factor, ref_logprob;
  int surrogate, kl;
  float least, most, delta, beta, entropy_coef;

  void into(RunRowsArgs& args, int64_t tokens, Device device) const {
    require(surrogate >= 0 && surrogate < 4, "surrogate: got ", surrogate, ", want 0 to 3");
    require(kl >= 0 && kl < 4, "kl: got ", kl, ", want 0 to 3");
    args.weights = values_of<float>({weights, "weights", device}, {tokens});
    args.old_logprob = values_of<float>({old_logprob, "old_logprob", device}, {tokens});
    args.advantages = values_of<float>({advantages, "advantages", device}, {tokens});
    args.factor = values_or_null<float>(factor, "factor", device, tokens);
    args.ref_logprob = values_or_null<float>(ref_logprob, "ref_logprob", device, tokens);
    args.surrogate = static_cast<cpu::Surrogate>(surrogate);
    args.kl = static_cast<cpu::KlEstimator>(kl);
    args.least = least;
    args.most = most;
    args.delta = delta;
    args.beta = beta;
    args.entropy_coef = entropy_coef;
  }
};

void run_rows(py::handle z_, py::handle out_, py::handle rows_, py::handle span,
              py::handle targets_, double temperature, py::handle state_, py::handle logprob,
              py::handle entropy, py::handle a, py::handle b, py::handle losses,
              const std::optional<RowProgram>& program, int64_t size, bool given, bool zeros,
              int cluster, Device device) {
  const TensorView z(z_, "z", device), rows(rows_, "rows", device),
      targets(targets_, "targets", device);
  z.expect_shape({kAny, kAny}).expect_packed_columns();
  rows.expect_shape({kAny});
  targets.expect_shape({kAny});
  const int64_t tokens = targets.size(0), vocab = z.size(1);
  require(vocab > 0 && vocab < int64_t{1} << 30, "z: a row has ", vocab, " entries");
  require(size >= 0 && size <= rows.size(0), "size: got ", size, ", rows has ", rows.size(0));
  require(z.size(0) >= (given ? tokens : size), "z: has ", z.size(0), " rows, too few");
  require(cluster == 0 || cluster == 1 || cluster == 2 || cluster == 4 || cluster == 8,
          "cluster: got ", cluster, ", want 1, 2, 4 or 8, or 0 for the best");
  RunRowsArgs args{};
  args.storage = args.out_type = storage_of(z);
  args.z = z.data();
  args.z_stride = z.stride(0);
  args.vocab = static_cast<int32_t>(vocab);
  args.size = size;
  args.given = given;
  args.rows = values_of<int64_t>(rows, {rows.size(0)});
  args.span = values_of<int64_t>({span, "span", device}, {2});
  args.targets = values_of<int64_t>(targets, {tokens});
  args.inverse = static_cast<float>(1.0 / temperature);
  args.logprob = values_of<float>({logprob, "logprob", device}, {tokens});
  args.entropy = values_of<float>({entropy, "entropy", device}, {tokens});
  args.a = values_of<float>({a, "a", device}, {tokens});
  args.b = values_or_null<float>(b, "b", device, tokens);
  args.zeros = zeros;
  args.cluster = cluster;
  if (!state_.is_none()) {
    const TensorView state(state_, "state", device);
    state.expect<float>().expect_shape({tokens, kAny}).expect_packed_columns();
    require(state.size(1) >= 3, "state: has ", state.size(1), " columns, want 3 or more");
    args.state = state.as<float>();
    args.state_stride = state.stride(0);
  }
  if (program) {
    args.losses = values_of<float>({losses, "losses", device}, {tokens});
    program->into(args, tokens, device);
  }
  args.gradient = !out_.is_none();
  if (args.gradient) {
    const TensorView out(out_, "out", device);
    out.expect_shape({kAny, vocab}).expect_packed_columns();
    require(out.size(0) >= (given ? tokens : size), "out: has ", out.size(0), " rows, too few");
    args.out_type = storage_of(out);
    args.out = out.data();
    args.out_stride = out.stride(0);
  }
  check_launch("run_rows", cuda::run_rows(args, target_of(z)));
}

}  // namespace

void bind_cuda_rows(py::module_& m, Device device) {
  py::class_<RowProgram>(m, "RowProgram")
      .def(py::init([](py::object weights, py::object old_logprob, py::object advantages,
                       py::object factor, py::object ref_logprob, int surrogate, int kl,
                       float least, float most, float delta, float beta, float entropy_coef) {
             return RowProgram{weights, old_logprob, advantages, factor, ref_logprob, surrogate,
                               kl,      least,       most,       delta,  beta,        entropy_coef};
           }),
           py::kw_only(), py::arg("weights"), py::arg("old_logprob"), py::arg("advantages"),
           py::arg("factor"), py::arg("ref_logprob"), py::arg("surrogate"), py::arg("kl"),
           py::arg("least"), py::arg("most"), py::arg("delta"), py::arg("beta"),
           py::arg("entropy_coef"));
  m.def(
      "run_rows",
      [device](py::handle z, py::handle out, py::handle rows, py::handle span, py::handle targets,
               double temperature, py::handle state, py::handle logprob, py::handle entropy,
               py::handle a, py::handle b, py::handle losses,
               const std::optional<RowProgram>& program, int64_t size, bool given, bool zeros,
               int cluster) {
        run_rows(z, out, rows, span, targets, temperature, state, logprob, entropy, a, b, losses,
                 program, size, given, zeros, cluster, device);
      },
      py::arg("z"), py::kw_only(), py::arg("out"), py::arg("rows"), py::arg("span"),
      py::arg("targets"), py::arg("temperature"), py::arg("state"), py::arg("logprob"),
      py::arg("entropy"), py::arg("a"), py::arg("b"), py::arg("losses"), py::arg("program"),
      py::arg("size"), py::arg("given"), py::arg("zeros"), py::arg("cluster"));
  m.def("longest_row", &cuda::longest_row, py::arg("device"));
}

}  // namespace eapo
