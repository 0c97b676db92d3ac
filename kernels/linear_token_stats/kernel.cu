// The losses' rows: statistics, token program and gradient, each row read once and written once.
//
// A row lies in the shared memory of a cluster of blocks, and a cluster takes row after row. While
// it turns a row into its gradient, every vector that is done makes room for the same vector of the
// next row, which is on its way (cp.async) while this one is summed up: loads, sums and stores of
// one block overlap, and a multiprocessor has three blocks. Threads of a row meet once, for its
// sums. Each then knows them and runs the token program for itself. The order of additions depends
// on the vocabulary and the dtype alone.

#include "cuda/launch.cuh"
#include "linear_token_stats/coefficients.cuh"
#include "linear_token_stats/launch.h"
#include "linear_token_stats/row.cuh"

namespace eapo::cuda {
namespace {

constexpr int64_t kComfort = 228 * 1024 / kResident - 1024;  // of shared memory; 1 KiB is CUDA's
constexpr int64_t kLine = 8;  // vectors
static_assert(sizeof(Meeting) % 16 == 0);

template <typename T>
__device__ Sums sums_of(const Part<T>& part, float scale, int64_t target) {
  Sums sums = Sums::none();
  const int size = part.stage_size();
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) {
    wait_for_stage(stage);
    const int stop = min(part.count, (stage + 1) * size);
    for (int i = stage * size + static_cast<int>(threadIdx.x); i < stop;
         i += kChunk<T> * kThreads) {
      float x[kChunk<T> * kWide<T>];
#pragma unroll
      for (int c = 0; c < kChunk<T>; ++c)
        open_vector<T>(part.vector(i + c * kThreads, stop), x + c * kWide<T>);
      sums.add(x, scale);
    }
  }
  if (part.owns(target)) sums.hit = part.at(target);
  return sums;
}

// The next row of a cluster, if there is one.
template <typename T>
struct Row {
  bool there;
  int64_t source, place;
  const T* z;
};

template <typename T>
__device__ bool is_aligned(const T* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<unsigned>(bytes) == 0;
}

template <typename T>
__device__ Row<T> row_of(const RunRowsArgs& args, int64_t place, int64_t start, int64_t stop) {
  if (start + place >= stop) return {};
  const int64_t source = args.rows[start + place];
  const T* z = static_cast<const T*>(args.z) + (args.given ? source : place) * args.z_stride;
  return {true, source, place, z};
}

// Writes value(x) for every logit x of the part, and fetches the next row in its place.
template <bool kStore, typename T, typename Out, typename Value>
__device__ void stream(Part<T>& part, Out* row, const Row<T>& next, Value value) {
  constexpr int kPair = 2;  // vectors of a thread at once
  Out* const out = kStore ? row + part.first : nullptr;
  const T* const z = next.there ? next.z + part.first : nullptr;
  const bool fast = is_aligned(z, 16) && is_aligned(out, kWide<T> * int{sizeof(Out)});
  const int size = part.stage_size();
  float x[kPair][kWide<T>];
#pragma unroll 1
  for (int stage = 0; stage < kStages; ++stage) {
    const int stop = min(part.count, (stage + 1) * size), whole = fast ? min(stop, part.whole) : 0;
    int i = stage * size + static_cast<int>(threadIdx.x);
    for (; i + (kPair - 1) * kThreads < whole; i += kPair * kThreads) {
      if constexpr (kStore) {
#pragma unroll
        for (int c = 0; c < kPair; ++c) open_vector<T>(part.kept[i + c * kThreads], x[c]);
#pragma unroll
        for (int c = 0; c < kPair; ++c) {
#pragma unroll
          for (float& entry : x[c]) entry = value(entry);
          part.store_fast(out, i + c * kThreads, x[c]);
        }
      }
      if (next.there) {
#pragma unroll
        for (int c = 0; c < kPair; ++c) part.fetch_fast(z, i + c * kThreads);
      }
    }
    for (; i < stop; i += kThreads) {
      if constexpr (kStore) {
        open_vector<T>(part.kept[i], x[0]);
#pragma unroll
        for (float& entry : x[0]) entry = value(entry);
        if (i < whole) {
          part.store_fast(out, i, x[0]);
        } else {
          part.store(out, i, x[0]);
        }
      }
      if (!next.there) continue;
      if (i < whole) {
        part.fetch_fast(z, i);
      } else {
        part.fetch(z, i);
      }
    }
    commit_copies();
  }
}

template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads, kResident)
    rows(const __grid_constant__ RunRowsArgs args) {
  Meeting& meeting = *static_cast<Meeting*>(dynamic_shared());
  const int blocks = args.cluster, rank = static_cast<int>(blockIdx.x) % blocks;
  Part<T> part(&meeting + 1, args.vocab, rank * args.part * kWide<T>, args.part);
  const float scale = args.inverse * kLog2e;
  const int64_t start = args.span[0], stop = min(args.span[1], start + args.size);
  const int64_t clusters = gridDim.x / static_cast<unsigned>(blocks);
  Row<T> row = row_of<T>(args, blockIdx.x / static_cast<unsigned>(blocks), start, stop);
  if (!row.there) return;
  if (threadIdx.x < 2) meeting.boxes[threadIdx.x].open();
  Out* const nowhere = nullptr;
  const auto zero = [](float) { return 0.0f; };
  stream<false>(part, nowhere, row, zero);
  cluster_sync();
  for (int turn = 0; row.there; ++turn) {
    const Row<T> next = row_of<T>(args, row.place + clusters, start, stop);
    const Token token = token_of(args, row.source);
    const Sums own = sums_of(part, scale, token.target);
    Sums sums = meeting.of_cluster(own, scale, blocks, rank, turn);
    if (!(sums.mass > 0.0f)) sums.mass = NAN;
    const Found found = evaluate(args, row.source, token, sums, scale);
    if (rank == 0 && threadIdx.x == 0) publish(args, row.source, sums, found);

    const Bend bend(args, sums, found, scale);
    const bool flat = found.a == 0.0f && found.b == 0.0f;
    Out* const out = static_cast<Out*>(args.out) +
                     (args.given ? row.source : row.place) * args.out_stride;
    if (!args.gradient || (flat && !args.zeros)) {
      stream<false>(part, nowhere, next, zero);
    } else if (flat) {
      stream<true>(part, out, next, zero);
    } else {
      if (found.b == 0.0f) {
        stream<true>(part, out, next, [&](float x) { return bend.template of<false>(x); });
      } else {
        stream<true>(part, out, next, [&](float x) { return bend.template of<true>(x); });
      }
      if (part.owns(token.target)) {  // the one-hot term, by who wrote the entry
        const float step = found.logprob > minus_infinity() ? found.a * args.inverse : 0.0f;
        out[token.target] = from_float<Out>(step + bend.template of<true>(sums.hit));
      }
    }
    row = next;
  }
}

// What a device can hold of a row.
struct Limits {
  int multiprocessors = 0, clusters = 0, shared = 0;

  explicit Limits(int device) {
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  int most_blocks() const { return clusters != 0 ? Meeting::kMostBlocks : 1; }
  int64_t row_bytes() const {
    const int64_t lines = (shared - int64_t{sizeof(Meeting)}) / (16 * kLine);
    return shared == 0 ? 0 : most_blocks() * lines * 16 * kLine;
  }
};

// Vectors of a block: whole lines of memory.
int64_t part_of(int64_t vectors, int blocks) {
  return ceil_div(ceil_div(vectors, blocks), kLine) * kLine;
}
int64_t shared_bytes(int64_t part) { return int64_t{sizeof(Meeting)} + 16 * part; }

// As few blocks as leave room for others on their multiprocessors.
int cluster_of(int64_t vectors, int most) {
  int blocks = 1;
  while (blocks < most && shared_bytes(part_of(vectors, blocks)) > kComfort) blocks *= 2;
  return blocks;
}

// Clusters that run at once.
template <typename Kernel>
cudaError_t resident(Kernel kernel, const Shape& shape, const Limits& limits, const Target& target,
                     int* count) {
  if (shape.cluster > 1)
    return cudaOccupancyMaxActiveClusters(count, kernel, LaunchConfig(shape, target).get());
  const cudaError_t status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      count, kernel, shape.threads, shape.shared);
  *count *= limits.multiprocessors;
  return status;
}

template <typename T, typename Out>
const char* start(RunRowsArgs args, const Target& target) {
  const DeviceScope scope(target.device);
  if (scope.status() != cudaSuccess) return cudaGetErrorString(scope.status());
  const Limits limits(target.device);
  const int64_t vectors = ceil_div(args.vocab, kWide<T>);
  if (args.cluster == 0) args.cluster = cluster_of(vectors, limits.most_blocks());
  args.part = static_cast<int32_t>(part_of(vectors, args.cluster));
  const int64_t shared = shared_bytes(args.part);
  if (args.cluster > limits.most_blocks()) return "this device has no clusters of blocks";
  if (shared > limits.shared) return "a row does not fit the shared memory of its blocks";
  const auto kernel = rows<T, Out>;
  Shape shape{dim3(static_cast<unsigned>(args.cluster)), kThreads, static_cast<size_t>(shared),
              args.cluster};
  int count = 0;
  const cudaError_t steps[] = {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared),
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                           cudaSharedmemCarveoutMaxShared),
      resident(kernel, shape, limits, target, &count),
  };
  for (cudaError_t status : steps)
    if (status != cudaSuccess) return cudaGetErrorString(status);
  if (count == 0) return "no cluster of blocks finds room on this device";
  const int64_t clusters = args.size < count ? args.size : count;
  shape.grid = dim3(static_cast<unsigned>(clusters * args.cluster));
  return launch(kernel, shape, target, args);
}

}  // namespace

const char* run_rows(RunRowsArgs args, const Target& target) {
  if (args.size == 0) return nullptr;
  return with_type(args.storage, [&](auto type) {
    using T = decltype(type);
    if (!args.gradient || args.out_type == args.storage) return start<T, T>(args, target);
    if constexpr (std::is_same_v<T, float>) {
      if (args.out_type == Storage::kBFloat16) return start<T, __nv_bfloat16>(args, target);
    }
    return "gradients are of the logits' dtype, or bfloat16 of float32 logits";
  });
}

int64_t longest_row(int device) { return Limits(device).row_bytes(); }

}  // namespace eapo::cuda
