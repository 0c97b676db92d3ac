#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "bindings/advantage_args.h"
#include "bindings/bindings.h"
#include "bindings/tensor_view.h"
#include "core/error.h"
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

void policy_loss(py::handle logprob_, py::handle old_logprob, py::handle advantages_,
                 py::handle cu_seqlens_, py::handle mask, py::handle ref_logprob,
                 py::handle entropy, py::handle factor, const std::string& surrogate,
                 const std::string& kl, const std::string& aggregation, float least, float most,
                 float delta, float beta, float entropy_coef, double max_length, double num_tokens,
                 double num_sequences, py::handle a, py::handle b, py::handle token_loss,
                 py::handle sums_) {
  const TensorView logprob(logprob_, "logprob"), advantages(advantages_, "advantages"),
      cu_seqlens(cu_seqlens_, "cu_seqlens"), sums(sums_, "sums");
  logprob.expect<float>().expect_shape({-1}).expect_contiguous();
  advantages.expect<float>().expect_shape({-1}).expect_contiguous();
  cu_seqlens.expect<int64_t>().expect_shape({-1}).expect_contiguous();
  require(cu_seqlens.size(0) > 0, "cu_seqlens is empty, want S + 1 entries");
  const int64_t tokens = logprob.size(0), sequences = cu_seqlens.size(0) - 1;
  require(advantages.size(0) == sequences || advantages.size(0) == tokens, "advantages has ",
          advantages.size(0), " values, want ", sequences, " (sequences) or ", tokens, " (tokens)");
  require(max_length > 0, "max_length is ", max_length, ", want a number above 0");
  const cpu::PolicyArgs args{
      .tokens = tokens,
      .sequences = sequences,
      .logprob = logprob.as<float>(),
      .old_logprob = vector_of<float>({old_logprob, "old_logprob"}, tokens),
      .advantages = advantages.as<float>(),
      .advantage_per_token = advantages.size(0) != sequences,
      .cu_seqlens = cu_seqlens.as<int64_t>(),
      .mask = vector_or_null<bool>(mask, "mask", tokens),
      .ref_logprob = vector_or_null<float>(ref_logprob, "ref_logprob", tokens),
      .entropy = vector_or_null<float>(entropy, "entropy", tokens),
      .factor = vector_or_null<float>(factor, "factor", tokens),
      .surrogate = choice_of(surrogate, "surrogate", kSurrogates),
      .kl = choice_of(kl, "kl", kEstimators),
      .aggregation = choice_of(aggregation, "aggregation", kAggregations),
      .least = least,
      .most = most,
      .delta = delta,
      .beta = beta,
      .entropy_coef = entropy_coef,
      .max_length = max_length,
      .num_tokens = num_tokens,
      .num_sequences = num_sequences,
      .a = const_cast<float*>(vector_of<float>({a, "a"}, tokens)),
      .b = vector_or_null<float>(b, "b", tokens),
      .token_loss = const_cast<float*>(vector_of<float>({token_loss, "token_loss"}, tokens)),
  };
  check_sequences(args.cu_seqlens, sequences, tokens);
  constexpr int64_t kSums = sizeof(cpu::PolicySums) / sizeof(double);
  auto* out = const_cast<double*>(vector_of<double>(sums, kSums));
  const py::gil_scoped_release unlocked;
  *reinterpret_cast<cpu::PolicySums*>(out) = cpu::policy_loss(args);
}

}  // namespace

void bind_policy(py::module_& m) {
  m.attr("POLICY_SUMS") = sizeof(cpu::PolicySums) / sizeof(double);
  m.def("policy_loss", &policy_loss, py::arg("logprob"), py::arg("old_logprob"),
        py::arg("advantages"), py::arg("cu_seqlens"), py::kw_only(), py::arg("mask"),
        py::arg("ref_logprob"), py::arg("entropy"), py::arg("factor"), py::arg("surrogate"),
        py::arg("kl"), py::arg("aggregation"), py::arg("least"), py::arg("most"), py::arg("delta"),
        py::arg("beta"), py::arg("entropy_coef"), py::arg("max_length"), py::arg("num_tokens"),
        py::arg("num_sequences"), py::arg("a"), py::arg("b"), py::arg("token_loss"),
        py::arg("sums"));
}

}  // namespace eapo
