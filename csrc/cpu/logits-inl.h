// A row of logits as the sampler of one target sees it: fp32 blocks with bans applied, and weights.

constexpr int64_t kBlock = 256;  // entries that are read, and summed in fp32, together

inline int64_t block_count(int64_t size) { return (size + kBlock - 1) / kBlock; }

// Logits as they are stored; the entries listed in [ban, ban_end), ascending, count as -inf.
template <typename T>
struct Source {
  const T* logits;
  int64_t size;
  const int32_t *ban, *ban_end;
};

// Reads blocks as fp32; past the end they are -inf.
template <typename T>
class BlockReader {
 public:
  explicit BlockReader(const Source<T>& source) : source_(source), ban_(source.ban) {}

  // Valid until the next call. Cheapest when blocks are visited in order.
  EAPO_INLINE const float* at(int64_t block) {
    const int64_t begin = block * kBlock, end = std::min(begin + kBlock, source_.size);
    while (ban_ != source_.ban_end && *ban_ < begin) ++ban_;
    const bool banned = ban_ != source_.ban_end && *ban_ < end;
    if constexpr (std::is_same_v<T, float>)
      if (!banned && end - begin == kBlock) return source_.logits + begin;
    copy(begin, end - begin);
    for (; ban_ != source_.ban_end && *ban_ < end; ++ban_) copy_[*ban_ - begin] = -kInf;
    return copy_;
  }

 private:
  EAPO_INLINE void copy(int64_t begin, int64_t count) {
    const T* from = source_.logits + begin;
    if (count == kBlock) {
      for (int64_t i = 0; i < kBlock; i += kLanes) store(copy_ + i, load(from + i));
      return;
    }
    std::fill_n(copy_, kBlock, -kInf);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(copy_ + i, load(from + i));
    if (i < count) store_first(copy_ + i, count - i, load_first(from + i, count - i, T{}));
  }

  const Source<T>& source_;
  const int32_t* ban_;
  alignas(64) float copy_[kBlock];
};

// What is known of a row; truncation keeps the entries that are not below `threshold`.
struct Row {
  double* masses = nullptr;  // [blocks] sums of weights
  float* maxima = nullptr;   // [blocks] largest logits
  float max = -kInf;
  int64_t max_block = 0;  // the first that holds `max`
  float inverse_temperature = 1;
  float threshold = -kInf;

  // exp((x - max) / temperature), not normalised; NaN stays NaN. Before any finite logit was seen
  // `max` is -inf and stands for 0.
  EAPO_INLINE F weight(F x) const {
    const float shift = max == -kInf ? 0.0f : max;
    return exp_nonpositive((x - shift) * inverse_temperature);
  }

  EAPO_INLINE F kept_weight(F x) const { return x < threshold ? F{} : weight(x); }
};

EAPO_INLINE float block_max(const float* block) {
  F best[2] = {broadcast(-kInf), broadcast(-kInf)};
  for (int64_t i = 0; i < kBlock; i += 2 * kLanes)
    for (int v = 0; v < 2; ++v) best[v] = max(best[v], load(block + i + v * kLanes));
  return reduce_max(max(best[0], best[1]));
}

// The sum of weight(x) over a block.
template <typename Weight>
EAPO_INLINE double block_mass(const float* block, const Weight& weight) {
  F sum = {};
  for (int64_t i = 0; i < kBlock; i += kLanes) sum += weight(load(block + i));
  return reduce_sum(sum);
}
