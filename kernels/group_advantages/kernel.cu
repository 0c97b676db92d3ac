// One thread a rollout, which walks over all rollouts in their order: S is a few thousand at most,
// nothing has to be sorted, and sums are those of the CPU kernel, in double and in the same order.

#include <cuda_runtime.h>

#include "group_advantages/launch.h"

namespace eapo::cuda {
namespace {

using Center = AdvantageArgs::Center;
using Scale = AdvantageArgs::Scale;

// Statistics of the valid rollouts of one group, or of all, over rewards minus their minimum.
struct Statistics {
  double origin = 0;
  int64_t count = 0;
  double sum = 0, weight = 0, weighted_sum = 0, squares = 0;

  __device__ double mean() const { return sum / count; }
  __device__ double deviation(int64_t ddof) const {
    if (count == 1) return 1.0;
    return sqrt(squares / (count > ddof ? count - ddof : 1));
  }
};

__device__ bool is_valid(const AdvantageArgs& args, int64_t i) {
  return args.valid == nullptr || args.valid[i];
}

template <typename Fn>
__device__ void for_each_peer(const AdvantageArgs& args, int64_t rollout, bool whole_batch, Fn fn) {
  const int64_t group = args.group_ids[rollout];
  for (int64_t i = 0; i < args.rollouts; ++i)
    if ((whole_batch || args.group_ids[i] == group) && is_valid(args, i)) fn(i);
}

__device__ Statistics statistics(const AdvantageArgs& args, int64_t rollout, bool whole_batch) {
  Statistics result;
  result.origin = args.rewards[rollout];
  for_each_peer(args, rollout, whole_batch, [&](int64_t i) {
    result.origin = min(result.origin, static_cast<double>(args.rewards[i]));
    ++result.count;
  });
  for_each_peer(args, rollout, whole_batch, [&](int64_t i) {
    const double excess = args.rewards[i] - result.origin;
    const double weight = args.lengths != nullptr ? static_cast<double>(args.lengths[i]) : 0.0;
    result.sum += excess;
    result.weight += weight;
    result.weighted_sum += weight * excess;
  });
  for_each_peer(args, rollout, whole_batch, [&](int64_t i) {
    const double distance = args.rewards[i] - result.origin - result.mean();
    result.squares += distance * distance;
  });
  return result;
}

__device__ double centered(const Statistics& group, double reward, Center center) {
  if (center == Center::kNone || group.count == 1) return reward;
  const double excess = reward - group.origin;
  if (center == Center::kLength && group.weight > 0)
    return excess - group.weighted_sum / group.weight;
  const double distance = excess - group.mean();
  return center == Center::kLeaveOneOut ? distance * group.count / (group.count - 1) : distance;
}

__global__ void advantages(AdvantageArgs args) {
  const int64_t rollout = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (rollout >= args.rollouts) return;
  if (!is_valid(args, rollout)) {
    args.out[rollout] = 0;
    return;
  }
  const Statistics group = statistics(args, rollout, false);
  double advantage = centered(group, args.rewards[rollout], args.center);
  if (advantage == 0) {  // also where the deviation and eps are
    args.out[rollout] = 0;
    return;
  }
  if (args.scale == Scale::kGroupStd) advantage /= group.deviation(args.ddof) + args.eps;
  if (args.scale == Scale::kBatchStd)
    advantage /= statistics(args, rollout, true).deviation(args.ddof) + args.eps;
  args.out[rollout] = static_cast<float>(advantage);
}

}  // namespace

const char* group_advantages(const AdvantageArgs& args, int device, void* stream) {
  if (args.rollouts == 0) return nullptr;
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(device);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  constexpr int kThreads = 64;
  const auto blocks = static_cast<unsigned>((args.rollouts + kThreads - 1) / kThreads);
  advantages<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  status = cudaGetLastError();
  cudaSetDevice(before);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace eapo::cuda
