#include <algorithm>
#include <cmath>
#include <limits>
#include <unordered_map>
#include <vector>

#include "cpu/kernels.h"

namespace eapo::cpu {
namespace {

using Center = AdvantageArgs::Center;
using Scale = AdvantageArgs::Scale;

// Statistics of rewards minus `origin`, their minimum, so that equal rewards give exact zeros.
struct Group {
  double origin = std::numeric_limits<double>::infinity();
  int64_t count = 0;
  double sum = 0, weight = 0, weighted_sum = 0, squares = 0;

  double mean() const { return sum / static_cast<double>(count); }
  double weighted_mean() const { return weight > 0 ? weighted_sum / weight : mean(); }
  double deviation(int64_t ddof) const {
    if (count == 1) return 1.0;
    return std::sqrt(squares / static_cast<double>(std::max<int64_t>(count - ddof, 1)));
  }
};

// Groups of the valid rollouts; every loop runs in the order of the rollouts.
class Groups {
 public:
  Groups(const AdvantageArgs& args, bool whole_batch) : args_(args) {
    std::unordered_map<int64_t, int32_t> index_of;
    index_.assign(static_cast<size_t>(args.rollouts), -1);
    for (int64_t i = 0; i < args.rollouts; ++i) {
      if (args.valid != nullptr && !args.valid[i]) continue;
      const int64_t id = whole_batch ? 0 : args.group_ids[i];
      const auto found = index_of.emplace(id, static_cast<int32_t>(groups_.size()));
      if (found.second) groups_.emplace_back();
      index_[i] = found.first->second;
    }
    accumulate();
  }

  bool contains(int64_t rollout) const { return index_[rollout] >= 0; }
  const Group& of(int64_t rollout) const { return groups_[index_[rollout]]; }

 private:
  template <typename Fn>
  void for_each(Fn fn) {
    for (int64_t i = 0; i < args_.rollouts; ++i)
      if (contains(i)) fn(groups_[index_[i]], i);
  }

  void accumulate() {
    for_each([&](Group& group, int64_t i) {
      group.origin = std::min<double>(group.origin, args_.rewards[i]);
      ++group.count;
    });
    for_each([&](Group& group, int64_t i) {
      const double excess = args_.rewards[i] - group.origin;
      const double weight = args_.lengths ? static_cast<double>(args_.lengths[i]) : 0.0;
      group.sum += excess;
      group.weight += weight;
      group.weighted_sum += weight * excess;
    });
    for_each([&](Group& group, int64_t i) {
      const double distance = args_.rewards[i] - group.origin - group.mean();
      group.squares += distance * distance;
    });
  }

  const AdvantageArgs& args_;
  std::vector<Group> groups_;
  std::vector<int32_t> index_;
};

double centered(const Group& group, double reward, Center center) {
  if (center == Center::kNone || group.count == 1) return reward;
  const double excess = reward - group.origin;
  if (center == Center::kLength) return excess - group.weighted_mean();
  const double distance = excess - group.mean();
  if (center == Center::kMean) return distance;
  return distance * static_cast<double>(group.count) / static_cast<double>(group.count - 1);
}

}  // namespace

void group_advantages(const AdvantageArgs& args) {
  const Groups groups(args, false);
  const bool by_batch = args.scale == Scale::kBatchStd;
  const Groups scales(args, by_batch);
  for (int64_t i = 0; i < args.rollouts; ++i) {
    double advantage = 0;
    if (groups.contains(i)) {
      advantage = centered(groups.of(i), args.rewards[i], args.center);
      if (args.scale != Scale::kNone && advantage != 0) advantage /= scales.of(i).deviation(args.ddof) + args.eps;
    }
    args.out[i] = static_cast<float>(advantage);
  }
}

}  // namespace eapo::cpu
