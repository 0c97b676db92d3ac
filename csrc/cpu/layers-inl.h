// Pieces of a transformer layer between its matrix products, for one target. Arithmetic is fp32;
// where the unfused torch ops would store an intermediate, it is rounded to the storage type here.

constexpr int64_t kLayerGrain = 1 << 15;  // entries worth a thread of their own

// fn(i, lanes) for every vector of `size` entries from i on; fewer than kLanes only in the last.
template <typename Fn>
EAPO_INLINE void for_vectors(int64_t size, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) fn(i, std::integral_constant<int64_t, kLanes>{});
  if (i < size) fn(i, size - i);
}

template <typename T>
EAPO_INLINE F load_part(const T* p, std::integral_constant<int64_t, kLanes>) {
  return load(p);
}

template <typename T>
EAPO_INLINE F load_part(const T* p, int64_t lanes) {
  return load_first(p, lanes, T{});
}

template <typename T>
EAPO_INLINE void store_part(T* p, std::integral_constant<int64_t, kLanes>, F v) {
  store(p, v);
}

template <typename T>
EAPO_INLINE void store_part(T* p, int64_t lanes, F v) {
  store_first(p, lanes, v);
}

// body(begin, end) over rows of `size` entries.
template <typename Body>
EAPO_INLINE void for_row_ranges(int64_t rows, int64_t size, const Body& body) {
  parallel_for(rows, kLayerGrain / std::max<int64_t>(size, 1), body);
}

template <typename T>
void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    T* out = static_cast<T*>(args.out) + row * args.size;
    F sum = {};
    for_vectors(args.size, [&](int64_t i, auto lanes) {
      const F v = load_part(x + i, lanes);
      sum += v * v;
    });
    const float scale = 1.0f / std::sqrt(reduce_sum(sum) / args.size + args.eps);
    for_vectors(args.size, [&](int64_t i, auto lanes) {
      F normal = load_part(x + i, lanes) * scale;
      if (args.cast_before_weight) normal = rounded<T>(normal);
      const F factor = load_part(weight + i, lanes) + (args.unit_offset ? 1.0f : 0.0f);
      store_part(out + i, lanes, normal * factor);
    });
  }
}

inline void rms_norm(const RmsNormArgs& args) {
  for_row_ranges(args.rows, args.size, [&](int64_t begin, int64_t end) {
    if (args.storage == Storage::kFloat32)
      rms_norm_rows<float>(args, begin, end);
    else
      rms_norm_rows<BFloat16>(args, begin, end);
  });
}

EAPO_INLINE F sigmoid(F x) {
  const F e = exp_nonpositive((F)((U)x | 0x80000000u));  // of -|x|
  return (x < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

EAPO_INLINE F silu(F x) { return x * sigmoid(x); }

// x / 2 * (1 + tanh(y)) = x * sigmoid(2 y), which does not cancel.
EAPO_INLINE F gelu_tanh(F x) {
  constexpr float kTwiceSqrtTwoOverPi = 1.5957691216057308f;
  return x * sigmoid((x + x * x * x * 0.044715f) * kTwiceSqrtTwoOverPi);
}

template <typename T, typename Function>
EAPO_INLINE void gated_rows(const GatedActivationArgs& args, int64_t begin, int64_t end,
                            const Function& function) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride;
    const T* up = static_cast<const T*>(args.up) + row * args.up_stride;
    T* out = static_cast<T*>(args.out) + row * args.size;
    for_vectors(args.size, [&](int64_t i, auto lanes) {
      const F activated = rounded<T>(function(load_part(gate + i, lanes)));
      store_part(out + i, lanes, activated * load_part(up + i, lanes));
    });
  }
}

template <typename T>
void gated_activation_rows(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  if (args.activation == Activation::kSilu)
    gated_rows<T>(args, begin, end, [](F x) { return silu(x); });
  else
    gated_rows<T>(args, begin, end, [](F x) { return gelu_tanh(x); });
}

inline void gated_activation(const GatedActivationArgs& args) {
  for_row_ranges(args.rows, args.size, [&](int64_t begin, int64_t end) {
    if (args.storage == Storage::kFloat32)
      gated_activation_rows<float>(args, begin, end);
    else
      gated_activation_rows<BFloat16>(args, begin, end);
  });
}

// One head: the first `rotated` entries turn in pairs (i, i + rotated / 2), the others are copied.
// `R` is the type that the two products are rounded to.
template <typename R, typename T, typename Angle>
EAPO_INLINE void rotate_head(const RotaryArgs& args, const T* x, const Angle* cos, const Angle* sin,
                             T* out) {
  const int64_t half = args.rotated / 2;
  for_vectors(half, [&](int64_t i, auto lanes) {
    const int64_t j = i + half;
    const F a = load_part(x + i, lanes), b = load_part(x + j, lanes);
    const F turned_a =
        rounded<R>(a * load_part(cos + i, lanes)) - rounded<R>(b * load_part(sin + i, lanes));
    const F turned_b =
        rounded<R>(b * load_part(cos + j, lanes)) + rounded<R>(a * load_part(sin + j, lanes));
    store_part(out + i, lanes, turned_a);
    store_part(out + j, lanes, turned_b);
  });
  std::memcpy(out + args.rotated, x + args.rotated, (args.dim - args.rotated) * sizeof(T));
}

template <typename T, typename Angle>
void rotary_tokens(const RotaryArgs& args, int64_t begin, int64_t end) {
  using Rounding = std::conditional_t<std::is_same_v<Angle, float>, float, T>;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / args.tokens, position = token % args.tokens;
    const T* x =
        static_cast<const T*>(args.x) + batch * args.batch_stride + position * args.token_stride;
    const int64_t angle_row = args.angle_batches == 1 ? position : token;
    const int64_t angle = angle_row * args.rotated;
    for (int64_t head = 0; head < args.heads; ++head)
      rotate_head<Rounding>(args, x + head * args.head_stride,
                            static_cast<const Angle*>(args.cos) + angle,
                            static_cast<const Angle*>(args.sin) + angle,
                            static_cast<T*>(args.out) + (token * args.heads + head) * args.dim);
  }
}

inline void rotary(const RotaryArgs& args) {
  for_row_ranges(args.batches * args.tokens, args.heads * args.dim,
                 [&](int64_t begin, int64_t end) {
                   if (args.storage == Storage::kFloat32)
                     rotary_tokens<float, float>(args, begin, end);
                   else if (args.angle_storage == Storage::kFloat32)
                     rotary_tokens<BFloat16, float>(args, begin, end);
                   else
                     rotary_tokens<BFloat16, BFloat16>(args, begin, end);
                 });
}
