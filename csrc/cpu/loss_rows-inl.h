// Rows of logits, whose blocks are taken into their statistics.

inline void merge(LossRow& row, const BlockSums& block) {
  if (std::isnan(block.mass)) row.mass = block.mass;
  if (block.reference == -kInf) return;
  if (block.reference > row.max) {
    const double gap = row.max - block.reference;
    const double factor = std::exp(gap);
    row.moment = row.mass > 0 ? factor * (row.moment + gap * row.mass) : 0.0;
    row.mass *= factor;
    row.mass2 *= factor * factor;
    row.mass3 *= factor * factor * factor;
    row.max = block.reference;
  }
  const double gap = block.reference - row.max;
  const double factor = gap == 0 ? 1.0 : std::exp(gap);
  row.moment += factor * (block.moment + gap * block.mass);
  row.mass += factor * block.mass;
  row.mass2 += factor * factor * block.mass2;
  row.mass3 += factor * factor * factor * block.mass3;
}

// A block whose logits need more than a shift and a scale, or are not all finite.
template <typename T>
void read_mapped(const AbsorbArgs& args, int64_t row, int64_t begin, int64_t count, int64_t place,
                 T* out, BlockSums& sums, double& target) {
  Block block;
  block.count = count;
  block.padded = (count + kLanes - 1) / kLanes * kLanes;
  const float reference = read_block<T>(args, row, begin, block);
  if (place >= 0 && place < count) target = block.y[place];
  sums = reference == -kInf ? empty_block(block, out)
                            : sum_block(block, reference, args.powers, out);
}

template <typename T>
EAPO_INLINE void absorb_block(const AbsorbArgs& args, bool plain, int64_t row, int64_t begin) {
  const int64_t count = std::min(kLossBlock, args.width - begin);
  const int64_t place = args.targets[row] - args.column - begin;
  T* out = args.out ? static_cast<T*>(args.out) + row * args.width + begin : nullptr;
  double unused, &target = args.state ? args.state[row].target : unused;
  BlockSums sums;
  bool done = false;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const T* logits = static_cast<const T*>(args.logits) + row * args.width + begin;
    done = plain && read_plain(args, row, logits, count, place, out, sums, target);
  }
  if (!done) read_mapped(args, row, begin, count, place, out, sums, target);
  if (args.references != nullptr)
    args.references[row * loss_blocks(args.width) + begin / kLossBlock] = sums.reference;
  if (args.state != nullptr) merge(args.state[row], sums);
}

template <typename T>
void absorb_rows(const AbsorbArgs& args, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const bool simple = plain<T>(args, row);
    for (int64_t begin = 0; begin < args.width; begin += kLossBlock)
      absorb_block<T>(args, simple, row, begin);
  }
}

inline void absorb_any(const AbsorbArgs& args, int64_t first, int64_t last) {
  if (args.storage == Storage::kFloat32)
    absorb_rows<float>(args, first, last);
  else
    absorb_rows<BFloat16>(args, first, last);
}

inline void absorb_logits(const AbsorbArgs& args) {
  parallel_for(args.rows, loss_grain(args.width),
               [&](int64_t first, int64_t last) { absorb_any(args, first, last); });
}
