#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "bindings/advantage_args.h"
#include "bindings/bindings.h"
#include "bindings/tensor_view.h"
#include "core/error.h"
#include "cpu/logits_policy_loss.h"
#include "cpu/policy.h"

namespace py = pybind11;

namespace eapo {
namespace {

using cpu::Aggregation;
using cpu::KlEstimator;
using cpu::Surrogate;

constexpr std::array<std::pair<const char*, Surrogate>, 4> kSurrogates{
    {{"clip", Surrogate::kClip},
     {"detached_clip", Surrogate::kDetachedClip},
     {"none", Surrogate::kNone},
     {"reinforce", Surrogate::kReinforce}}};
constexpr std::array<std::pair<const char*, KlEstimator>, 4> kEstimators{
    {{"k1", KlEstimator::kK1},
     {"abs", KlEstimator::kAbs},
     {"k2", KlEstimator::kK2},
     {"k3", KlEstimator::kK3}}};
constexpr std::array<std::pair<const char*, Aggregation>, 5> kAggregations{
    {{"token-mean", Aggregation::kTokenMean},
     {"seq-mean-token-mean", Aggregation::kSeqMeanTokenMean},
     {"seq-mean-token-sum", Aggregation::kSeqMeanTokenSum},
     {"seq-mean-token-sum-norm", Aggregation::kSeqMeanNorm},
     {"token-sum-norm", Aggregation::kNorm}}};

// A vector that may be None: null.
template <typename T>
T* vector_or_null(py::handle object, const char* name, int64_t size) {
  if (object.is_none()) return nullptr;
  return const_cast<T*>(vector_of<T>({object, name}, size));
}

// cu_seqlens rises from 0 to the number of tokens.
void check_sequences(const int64_t* cu_seqlens, int64_t sequences, int64_t tokens) {
  require(cu_seqlens[0] == 0 && cu_seqlens[sequences] == tokens, "cu_seqlens must run from 0 to ",
          tokens, " (logprob), got ", cu_seqlens[0], " to ", cu_seqlens[sequences]);
  for (int64_t i = 0; i < sequences; ++i)
    require(cu_seqlens[i] <= cu_seqlens[i + 1], "cu_seqlens falls after entry ", i);
}

// The settings of a recipe.
struct Method {
  Surrogate surrogate;
  KlEstimator kl;
  Aggregation aggregation;
  float least, most, delta, beta, entropy_coef;
  double max_length;
};

Method method_of(const std::string& surrogate, const std::string& kl,
                 const std::string& aggregation, float least, float most, float delta, float beta,
                 float entropy_coef, double max_length) {
  require(max_length > 0, "max_length is ", max_length, ", want a number above 0");
  return {.surrogate = choice_of(surrogate, "surrogate", kSurrogates),
          .kl = choice_of(kl, "kl", kEstimators),
          .aggregation = choice_of(aggregation, "aggregation", kAggregations),
          .least = least,
          .most = most,
          .delta = delta,
          .beta = beta,
          .entropy_coef = entropy_coef,
          .max_length = max_length};
}

// The vectors of a batch of N tokens and S sequences.
struct Batch {
  py::handle old_logprob, advantages, cu_seqlens, mask, ref_logprob, factor;
  double num_tokens, num_sequences;
};

struct Results {
  py::handle a, b, token_loss, sums;
};

double* sums_of(const Results& results) {
  const TensorView sums(results.sums, "sums");
  return const_cast<double*>(
      vector_of<double>(sums, sizeof(cpu::PolicySums) / sizeof(double)));
}

cpu::PolicyArgs args_of(const float* logprob, const float* entropy, int64_t tokens,
                        const Batch& batch, const Method& method, const Results& results) {
  const TensorView advantages(batch.advantages, "advantages"),
      cu_seqlens(batch.cu_seqlens, "cu_seqlens");
  advantages.expect<float>().expect_shape({-1}).expect_contiguous();
  cu_seqlens.expect<int64_t>().expect_shape({-1}).expect_contiguous();
  require(cu_seqlens.size(0) > 0, "cu_seqlens is empty, want S + 1 entries");
  const int64_t sequences = cu_seqlens.size(0) - 1;
  require(advantages.size(0) == sequences || advantages.size(0) == tokens, "advantages has ",
          advantages.size(0), " values, want ", sequences, " (sequences) or ", tokens, " (tokens)");
  const cpu::PolicyArgs args{
      .tokens = tokens,
      .sequences = sequences,
      .logprob = logprob,
      .old_logprob = vector_of<float>({batch.old_logprob, "old_logprob"}, tokens),
      .advantages = advantages.as<float>(),
      .advantage_per_token = advantages.size(0) != sequences,
      .cu_seqlens = cu_seqlens.as<int64_t>(),
      .mask = vector_or_null<bool>(batch.mask, "mask", tokens),
      .ref_logprob = vector_or_null<float>(batch.ref_logprob, "ref_logprob", tokens),
      .entropy = entropy,
      .factor = vector_or_null<float>(batch.factor, "factor", tokens),
      .surrogate = method.surrogate,
      .kl = method.kl,
      .aggregation = method.aggregation,
      .least = method.least,
      .most = method.most,
      .delta = method.delta,
      .beta = method.beta,
      .entropy_coef = method.entropy_coef,
      .max_length = method.max_length,
      .num_tokens = batch.num_tokens,
      .num_sequences = batch.num_sequences,
      .a = const_cast<float*>(vector_of<float>({results.a, "a"}, tokens)),
      .b = vector_or_null<float>(results.b, "b", tokens),
      .token_loss = const_cast<float*>(vector_of<float>({results.token_loss, "token_loss"}, tokens)),
  };
  check_sequences(args.cu_seqlens, sequences, tokens);
  return args;
}

void policy_loss(py::handle logprob_, py::handle entropy, const Batch& batch, const Method& method,
                 const Results& results) {
  const TensorView logprob(logprob_, "logprob");
  logprob.expect<float>().expect_shape({-1}).expect_contiguous();
  const int64_t tokens = logprob.size(0);
  const cpu::PolicyArgs args = args_of(
      logprob.as<float>(), vector_or_null<float>(entropy, "entropy", tokens), tokens, batch,
      method, results);
  double* out = sums_of(results);
  const py::gil_scoped_release unlocked;
  *reinterpret_cast<cpu::PolicySums*>(out) = cpu::policy_loss(args);
}

void logits_policy_loss(py::handle logits_, py::handle targets, float temperature, py::handle out_,
                        py::handle state_, py::handle logprob_, py::handle entropy_,
                        const Batch& batch, const Method& method, const Results& results) {
  const TensorView logits(logits_, "logits"), out(out_, "out"), state(state_, "state");
  logits.expect_float32_or_bfloat16().expect_shape({-1, -1}).expect_contiguous();
  const int64_t rows = logits.size(0), width = logits.size(1);
  out.expect_same_dtype(logits).expect_shape({rows, width}).expect_contiguous();
  state.expect<double>().expect_shape({rows, sizeof(cpu::LossRow) / sizeof(double)});
  state.expect_contiguous();
  require(temperature > 0, "temperature is ", temperature, ", want a number above 0");
  auto* logprob = const_cast<float*>(vector_of<float>({logprob_, "logprob"}, rows));
  auto* entropy = const_cast<float*>(vector_of<float>({entropy_, "entropy"}, rows));
  const cpu::LogitsPolicyLossArgs args{
      .logits = {.storage = logits.is_bfloat16() ? cpu::Storage::kBFloat16 : cpu::Storage::kFloat32,
                 .logits = logits.data(),
                 .rows = rows,
                 .width = width,
                 .column = 0,
                 .map = {.temperature = temperature},
                 .targets = vector_of<int64_t>({targets, "targets"}, rows),
                 .state = reinterpret_cast<cpu::LossRow*>(state.as<double>()),
                 .powers = false,
                 .out = out.data(),
                 .references = nullptr},
      .policy = args_of(logprob, entropy, rows, batch, method, results),
      .logprob = logprob,
      .entropy = entropy,
  };
  double* sums = sums_of(results);
  const py::gil_scoped_release unlocked;
  *reinterpret_cast<cpu::PolicySums*>(sums) = cpu::logits_policy_loss(args);
}

}  // namespace

void bind_policy(py::module_& m) {
  m.attr("POLICY_SUMS") = sizeof(cpu::PolicySums) / sizeof(double);
  py::class_<Method>(m, "PolicyMethod")
      .def(py::init(&method_of), py::kw_only(), py::arg("surrogate"), py::arg("kl"),
           py::arg("aggregation"), py::arg("least"), py::arg("most"), py::arg("delta"),
           py::arg("beta"), py::arg("entropy_coef"), py::arg("max_length"));
  m.def(
      "policy_loss",
      [](py::handle logprob, py::handle old_logprob, py::handle advantages, py::handle cu_seqlens,
         py::handle mask, py::handle ref_logprob, py::handle entropy, py::handle factor,
         const Method& method, double num_tokens, double num_sequences, py::handle a, py::handle b,
         py::handle token_loss, py::handle sums) {
        policy_loss(logprob, entropy,
                    {old_logprob, advantages, cu_seqlens, mask, ref_logprob, factor, num_tokens,
                     num_sequences},
                    method, {a, b, token_loss, sums});
      },
      py::arg("logprob"), py::arg("old_logprob"), py::arg("advantages"), py::arg("cu_seqlens"),
      py::kw_only(), py::arg("mask"), py::arg("ref_logprob"), py::arg("entropy"),
      py::arg("factor"), py::arg("method"), py::arg("num_tokens"), py::arg("num_sequences"),
      py::arg("a"), py::arg("b"), py::arg("token_loss"), py::arg("sums"));
  m.def(
      "logits_policy_loss",
      [](py::handle logits, py::handle targets, float temperature, py::handle out,
         py::handle state, py::handle logprob, py::handle entropy, py::handle old_logprob,
         py::handle advantages, py::handle cu_seqlens, py::handle mask, py::handle ref_logprob,
         py::handle factor, const Method& method, double num_tokens, double num_sequences,
         py::handle a, py::handle b, py::handle token_loss, py::handle sums) {
        logits_policy_loss(logits, targets, temperature, out, state, logprob, entropy,
                           {old_logprob, advantages, cu_seqlens, mask, ref_logprob, factor,
                            num_tokens, num_sequences},
                           method, {a, b, token_loss, sums});
      },
      py::arg("logits"), py::arg("targets"), py::kw_only(), py::arg("temperature"), py::arg("out"),
      py::arg("state"), py::arg("logprob"), py::arg("entropy"), py::arg("old_logprob"),
      py::arg("advantages"), py::arg("cu_seqlens"), py::arg("mask"), py::arg("ref_logprob"),
      py::arg("factor"), py::arg("method"), py::arg("num_tokens"), py::arg("num_sequences"),
      py::arg("a"), py::arg("b"), py::arg("token_loss"), py::arg("sums"));
}

}  // namespace eapo
