// Logit gradients from the exponentials that are left of logits, and sums of weight gradients.

// The numbers of one row of the gradient, and of one block of it.
struct Slope {
  float a, b;            // coefficients
  float bracket;         // a + b H
  float scale;           // 1 / temperature
  float cap_scale;       // temperature / softcap; 0: no cap
  double max, log_mass;  // ln p = y - max - log_mass
};

EAPO_INLINE Slope slope_of(const LogitGradientArgs& args, int64_t k) {
  const LossRow& row = args.state[args.source[k]];
  const double log_mass = std::log(row.mass);
  const double entropy = log_mass - row.moment / row.mass;
  Slope slope{.a = args.a[k],
              .b = args.b ? args.b[k] : 0.0f,
              .scale = 1.0f / args.temperature,
              .cap_scale = args.softcap > 0 ? args.temperature / args.softcap : 0.0f,
              .max = row.max,
              .log_mass = log_mass};
  slope.bracket = static_cast<float>(slope.a + slope.b * entropy);
  return slope;
}

// map(exponential) for every entry of a block, written to `to`.
template <typename T, typename Map>
EAPO_INLINE void rewrite(const T* from, T* to, int64_t count, const Map& map) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Pair e = load_pair(from + i);
    put(to + i, Pair{map(e.first), map(e.second)});
  }
  for (; i + kLanes <= count; i += kLanes) put(to + i, map(load(from + i)));
  if (i < count) store_first(to + i, count - i, map(load_first(from + i, count - i, T{})));
}

template <typename T>
EAPO_INLINE void gradient_block(const Slope& slope, float reference, const T* from, T* to,
                                int64_t count) {
  const double offset = reference - slope.max - slope.log_mass;  // ln p = ln e + offset
  const float factor = static_cast<float>(std::exp(offset));
  if (slope.b == 0 && slope.cap_scale == 0) {
    const float scaled = -slope.a * slope.scale * factor;
    return rewrite(from, to, count, [&](F e) { return e * scaled; });
  }
  const float log_factor = static_cast<float>(offset);
  rewrite(from, to, count, [&](F e) {
    const F log_e = max(broadcast(-1000.0f), log_positive(e));
    const F p = e * factor;
    F dy = p * (slope.b * (log_e + log_factor) + slope.bracket) * -slope.scale;
    const F t = (log_e + reference) * slope.cap_scale;
    if (slope.cap_scale != 0) dy *= 1.0f - t * t;
    return e > 0.0f ? dy : F{};
  });
}

// The entry of the target from its own y, which has not been rounded to the storage type.
inline float target_gradient(const Slope& slope, double y) {
  if (y == -kInf) return 0.0f;
  const double log_p = y - slope.max - slope.log_mass, p = std::exp(log_p);
  const double t = y * slope.cap_scale;
  const double dy = slope.a - p * (slope.bracket + slope.b * log_p);
  return static_cast<float>(dy * slope.scale * (1 - t * t));
}

template <typename T>
void gradient_rows(const LogitGradientArgs& args, int64_t first, int64_t last) {
  const int64_t blocks = loss_blocks(args.width);
  for (int64_t k = first; k < last; ++k) {
    const Slope slope = slope_of(args, k);
    const int64_t row = args.source[k];
    const T* from = static_cast<const T*>(args.tile) + row * args.width;
    T* to = static_cast<T*>(args.tile) + args.target[k] * args.width;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kLossBlock, count = std::min(kLossBlock, args.width - begin);
      gradient_block(slope, args.references[row * blocks + block], from + begin, to + begin, count);
    }
    const int64_t place = args.targets[row] - args.column;
    if (place >= 0 && place < args.width)
      store_first(to + place, 1, broadcast(target_gradient(slope, args.state[row].target)));
  }
}

inline void gradient_any(const LogitGradientArgs& args, int64_t first, int64_t last) {
  if (args.storage == Storage::kFloat32)
    gradient_rows<float>(args, first, last);
  else
    gradient_rows<BFloat16>(args, first, last);
}

inline void logit_gradient(const LogitGradientArgs& args) {
  parallel_for(args.count, loss_grain(args.width),
               [&](int64_t first, int64_t last) { gradient_any(args, first, last); });
}

inline void fill_rows(uint16_t* out, const float* values, int64_t rows, int64_t width) {
  parallel_for(rows, loss_grain(width), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      BFloat16 value;
      store_first(&value, 1, broadcast(values[row]));
      std::fill_n(out + row * width, width, value.bits);
    }
  });
}

inline void add_to_planes(uint16_t* high, uint16_t* low, const uint16_t* addend, int64_t count) {
  parallel_for(count, 1 << 16, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const uint32_t bits = (static_cast<uint32_t>(high[i]) << 16) | low[i];
      const uint32_t more = static_cast<uint32_t>(addend[i]) << 16;
      const uint32_t sum =
          std::bit_cast<uint32_t>(std::bit_cast<float>(bits) + std::bit_cast<float>(more));
      high[i] = static_cast<uint16_t>(sum >> 16);
      low[i] = static_cast<uint16_t>(sum);
    }
  });
}

inline void round_planes(uint16_t* high, const uint16_t* low, int64_t count) {
  parallel_for(count, 1 << 16, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const uint32_t bits = (static_cast<uint32_t>(high[i]) << 16) | low[i];
      const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
      const uint32_t rounded = (bits + ((bits >> 16) & 1u) + 0x7fffu) >> 16;
      high[i] = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
    }
  });
}

// One block of kLanes x kLanes: to[r][c] = from[c][r], or the sum of both.
EAPO_INLINE void transposed_block(float* to, int64_t to_stride, const float* from,
                                  int64_t from_stride, bool add) {
  F rows[kLanes];
  unrolled<kLanes>([&](auto i) { rows[i] = load(from + i * from_stride); });
  transpose(rows);
  unrolled<kLanes>([&](auto i) {
    float* p = to + i * to_stride;
    store(p, add ? load(p) + rows[i] : rows[i]);
  });
}

inline void take_transposed(float* to, const float* from, int64_t rows, int64_t width, bool add) {
  const auto edge = [&](int64_t r, int64_t last_row, int64_t c, int64_t last_column) {
    for (; r < last_row; ++r)
      for (int64_t at = c; at < last_column; ++at)
        to[r * width + at] = from[at * rows + r] + (add ? to[r * width + at] : 0.0f);
  };
  const int64_t whole = width / kLanes * kLanes, blocks = (rows + kLanes - 1) / kLanes;
  parallel_for(blocks, 4, [&](int64_t first, int64_t last) {
    for (int64_t r = first * kLanes; r < std::min(last * kLanes, rows); r += kLanes) {
      if (r + kLanes > rows) return edge(r, rows, 0, width);
      for (int64_t c = 0; c < whole; c += kLanes)
        transposed_block(to + r * width + c, width, from + c * rows + r, rows, add);
      edge(r, r + kLanes, whole, width);
    }
  });
}
