// Python arguments of group_advantages, checked, for whichever device.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <utility>

#include "bindings/tensor_view.h"
#include "core/error.h"
#include "group_advantages/args.h"

namespace eapo {

template <typename T>
const T* vector_of(const TensorView& tensor, int64_t size) {
  tensor.expect<T>().expect_shape({size}).expect_contiguous();
  return tensor.as<T>();
}

template <typename Choice, size_t Count>
Choice choice_of(const std::string& got, const char* name,
                 const std::array<std::pair<const char*, Choice>, Count>& choices) {
  std::string allowed;
  for (const auto& [text, choice] : choices) {
    if (got == text) return choice;
    allowed += (allowed.empty() ? "" : ", ") + std::string(text);
  }
  throw InvalidArgument(join(name, " is '", got, "', want one of ", allowed));
}

inline AdvantageArgs::Center center_of(const std::string& name) {
  using Center = AdvantageArgs::Center;
  static constexpr std::array<std::pair<const char*, Center>, 4> kCenters{
      {{"mean", Center::kMean},
       {"loo", Center::kLeaveOneOut},
       {"length", Center::kLength},
       {"none", Center::kNone}}};
  return choice_of(name, "center", kCenters);
}

inline AdvantageArgs::Scale scale_of(const std::string& name) {
  using Scale = AdvantageArgs::Scale;
  static constexpr std::array<std::pair<const char*, Scale>, 3> kScales{
      {{"std", Scale::kGroupStd}, {"batch_std", Scale::kBatchStd}, {"none", Scale::kNone}}};
  return choice_of(name, "scale", kScales);
}

inline AdvantageArgs advantage_args(const TensorView& rewards, pybind11::handle group_ids,
                                    const std::string& center, const std::string& scale,
                                    pybind11::handle lengths, double eps, int64_t ddof,
                                    pybind11::handle valid, pybind11::handle out, Device device) {
  const int64_t rollouts = rewards.expect_shape({-1}).size(0);
  const TensorView target(out, "out", device);
  vector_of<float>(target, rollouts);
  AdvantageArgs args{.rollouts = rollouts,
                     .rewards = vector_of<float>(rewards, rollouts),
                     .group_ids = vector_of<int64_t>({group_ids, "group_ids", device}, rollouts),
                     .lengths = nullptr,
                     .valid = nullptr,
                     .center = center_of(center),
                     .scale = scale_of(scale),
                     .eps = eps,
                     .ddof = ddof,
                     .out = target.as<float>()};
  if (!lengths.is_none())
    args.lengths = vector_of<int64_t>({lengths, "lengths", device}, rollouts);
  if (!valid.is_none()) args.valid = vector_of<bool>({valid, "valid", device}, rollouts);
  require(args.center != AdvantageArgs::Center::kLength || !lengths.is_none(),
          "center 'length' needs lengths, got None");
  return args;
}

}  // namespace eapo
