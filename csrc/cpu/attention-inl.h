// Paged attention of one target. A work item is (segment, query tile, kv head); its rows are the
// query heads that share the kv head, for each query of the tile. Keys are visited in tiles at
// fixed absolute positions and every row has its own arithmetic in a fixed order, so the bits of a
// row do not depend on batch, chunking, block size or thread count.

constexpr int64_t kKeyTile = 32;
constexpr int64_t kRowTile = 32;   // aimed-at rows of a work item
constexpr int kRowBlock = 4;       // rows in registers
constexpr int kKeyVectors = 2;     // key vectors in registers

struct Tile {  // scratch of one work item; all fp32
  int64_t rows, dim, padded_dim;
  float* query;        // [rows, dim]
  float* keys;         // [padded_dim, kKeyTile], transposed
  float* values;       // [kKeyTile, padded_dim]
  float* weights;      // [rows, kKeyTile] scores, then probabilities (not normalised)
  float* output;       // [rows, padded_dim] weighted values so far
  float* sums;         // [rows, kLanes] probability mass so far, by lane
  float* maxima;       // [rows] largest score so far
  float* zeros;        // [padded_dim] stands for the rows of keys past the end
};

EAPO_INLINE int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline Tile make_tile(int64_t rows, int64_t dim) {
  const int64_t padded = rounded_up(dim, kLanes);
  const int64_t sizes[] = {rows * dim,    padded * kKeyTile, kKeyTile * padded, rows * kKeyTile,
                           rows * padded, rows * kLanes,     rows,              padded};
  int64_t total = 0;
  for (int64_t size : sizes) total += rounded_up(size, 16);
  float* next = workspace(total);
  float* parts[std::size(sizes)];
  for (size_t i = 0; i < std::size(sizes); ++i) {
    parts[i] = next;
    next += rounded_up(sizes[i], 16);
  }
  std::fill_n(parts[4], rows * padded, 0.0f);
  std::fill_n(parts[5], rows * kLanes, 0.0f);
  std::fill_n(parts[6], rows, -kInf);
  std::fill_n(parts[7], padded, 0.0f);
  return {rows,     dim,      padded,   parts[0], parts[1], parts[2],
          parts[3], parts[4], parts[5], parts[6], parts[7]};
}

template <typename T>
EAPO_INLINE F load_head(const T* row, int64_t d, int64_t dim) {
  if (d + kLanes <= dim) return load(row + d);
  return load_first(row + d, dim - d, T{});
}

// Rows of a cache for the keys of a tile and one kv head; `zeros` past the last key.
template <typename T>
EAPO_INLINE void key_rows(const AttentionArgs& args, const void* cache, const int32_t* table,
                          int64_t head, int64_t first, int64_t kv_len, const T* zeros,
                          const T** rows) {
  const T* base = static_cast<const T*>(cache) + head * args.dim;
  const int64_t row_size = args.kv_heads * args.dim;
  const int64_t count = std::clamp<int64_t>(kv_len - first, 0, kKeyTile);
  for (int64_t i = 0; i < count;) {
    const int64_t column = (first + i) / args.block_size, inside = (first + i) % args.block_size;
    const T* row = base + (table[column] * args.block_size + inside) * row_size;
    const int64_t stop = std::min(count, i + args.block_size - inside);
    for (; i < stop; ++i, row += row_size) rows[i] = row;
  }
  for (int64_t i = count; i < kKeyTile; ++i) rows[i] = zeros;
}

template <typename T>
EAPO_INLINE void pack_keys(const Tile& tile, const T* const* rows, int64_t keys) {
  for (int64_t d = 0; d < tile.dim; d += kLanes)
    for (int64_t key = 0; key < keys; key += kLanes) {
      F square[kLanes];
      if (d + kLanes <= tile.dim)
        unrolled<kLanes>([&](auto i) { square[i] = load(rows[key + i] + d); });
      else
        unrolled<kLanes>([&](auto i) { square[i] = load_head(rows[key + i], d, tile.dim); });
      transpose(square);
      unrolled<kLanes>([&](auto i) { store(tile.keys + (d + i) * kKeyTile + key, square[i]); });
    }
}

// Rows of fp32 values, padded to whole vectors: the cache's own where they are that already.
template <typename T>
EAPO_INLINE void value_rows(const Tile& tile, const T* const* rows, int64_t keys,
                            const float** values) {
  for (int64_t key = 0; key < keys; ++key) {
    if constexpr (std::is_same_v<T, float>)
      if (tile.dim == tile.padded_dim) {
        values[key] = rows[key];
        continue;
      }
    float* copy = tile.values + key * tile.padded_dim;
    values[key] = copy;
    for (int64_t d = 0; d < tile.dim; d += kLanes)
      store(copy + d, load_head(rows[key], d, tile.dim));
  }
}

template <int Rows>
EAPO_INLINE void score_rows(const Tile& tile, int64_t first_row, int64_t keys) {
  for (int64_t key = 0; key < keys; key += kKeyVectors * kLanes) {
    F sums[Rows][kKeyVectors] = {};
    for (int64_t d = 0; d < tile.dim; ++d)
      for (int v = 0; v < kKeyVectors; ++v) {
        const F keys = load(tile.keys + d * kKeyTile + key + v * kLanes);
        for (int r = 0; r < Rows; ++r)
          sums[r][v] += tile.query[(first_row + r) * tile.dim + d] * keys;
      }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kKeyVectors; ++v)
        store(tile.weights + (first_row + r) * kKeyTile + key + v * kLanes, sums[r][v]);
  }
}

template <int Rows, int Vectors>
EAPO_INLINE void add_vectors(const Tile& tile, const float* const* rows, int64_t keys,
                             int64_t first_row, int64_t d) {
  F sums[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v)
      sums[r][v] = load(tile.output + (first_row + r) * tile.padded_dim + d + v * kLanes);
  for (int64_t key = 0; key < keys; ++key)
    for (int v = 0; v < Vectors; ++v) {
      const F values = load(rows[key] + d + v * kLanes);
      for (int r = 0; r < Rows; ++r)
        sums[r][v] += tile.weights[(first_row + r) * kKeyTile + key] * values;
    }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v)
      store(tile.output + (first_row + r) * tile.padded_dim + d + v * kLanes, sums[r][v]);
}

template <int Rows>
EAPO_INLINE void add_values(const Tile& tile, const float* const* rows, int64_t keys,
                            int64_t first_row) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= tile.padded_dim; d += 2 * kLanes)
    add_vectors<Rows, 2>(tile, rows, keys, first_row, d);
  if (d < tile.padded_dim) add_vectors<Rows, 1>(tile, rows, keys, first_row, d);
}

// Keys that a row may see: first <= position <= last.
struct Span {
  int64_t first, last;
};

// Scale, soft cap, mask and online softmax of one row over the tile's keys.
EAPO_INLINE void softmax_row(const AttentionArgs& args, const Tile& tile, int64_t row,
                             int64_t tile_first, Span span) {
  float* weights = tile.weights + row * kKeyTile;
  const I offset = iota();
  const int32_t low = static_cast<int32_t>(std::max<int64_t>(span.first - tile_first, 0));
  const int32_t high = static_cast<int32_t>(std::min(span.last - tile_first, kKeyTile));
  F scores[kKeyTile / kLanes];
  F best = broadcast(-kInf);
  for (int v = 0; v < kKeyTile / kLanes; ++v) {
    F score = load(weights + v * kLanes) * args.scale;
    if (args.softcap > 0) score = tanh(score / args.softcap) * args.softcap;
    const I key = offset + v * kLanes;
    score = (key < low) | (key > high) ? broadcast(-kInf) : score;
    best = max(best, scores[v] = score);
  }
  const float old_max = tile.maxima[row];
  const float new_max = std::max(old_max, reduce_max(best));
  const float shift = new_max == -kInf ? 0.0f : new_max;
  F sum = load(tile.sums + row * kLanes);
  if (new_max != old_max) {
    const float correction = exp_nonpositive(old_max - shift);
    sum *= correction;
    float* output = tile.output + row * tile.padded_dim;
    for (int64_t d = 0; d < tile.padded_dim; d += kLanes)
      store(output + d, load(output + d) * correction);
  }
  for (int v = 0; v < kKeyTile / kLanes; ++v) {
    const F weight = exp_nonpositive(scores[v] - shift);
    sum += weight;
    store(weights + v * kLanes, weight);
  }
  store(tile.sums + row * kLanes, sum);
  tile.maxima[row] = new_max;
}

template <typename Fn>
EAPO_INLINE void for_row_blocks(int64_t rows, Fn&& fn) {
  int64_t row = 0;
  for (; row + kRowBlock <= rows; row += kRowBlock)
    fn(row, std::integral_constant<int, kRowBlock>{});
  for (; row < rows; ++row) fn(row, std::integral_constant<int, 1>{});
}

// Queries [first_query, first_query + queries) of a segment against one kv head.
struct Item {
  int64_t segment, head, first_query, queries;
};

template <typename T>
EAPO_INLINE void load_queries(const AttentionArgs& args, const Item& item, const Tile& tile) {
  const int64_t group = args.q_heads / args.kv_heads;
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t token = args.cu_q[item.segment] + item.first_query + row / group;
    const int64_t head = item.head * group + row % group;
    const T* from = static_cast<const T*>(args.q) + token * args.q_stride + head * args.dim;
    for (int64_t d = 0; d < args.dim; d += kLanes) {
      const F values = load_head(from, d, args.dim);
      if (d + kLanes <= args.dim)
        store(tile.query + row * args.dim + d, values);
      else
        store_first(tile.query + row * args.dim + d, args.dim - d, values);
    }
  }
}

template <typename T>
EAPO_INLINE void store_output(const AttentionArgs& args, const Item& item, const Tile& tile) {
  const int64_t group = args.q_heads / args.kv_heads;
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t token = args.cu_q[item.segment] + item.first_query + row / group;
    const int64_t head = item.head * group + row % group;
    T* to = static_cast<T*>(args.out) + (token * args.q_heads + head) * args.dim;
    const float total = reduce_sum(load(tile.sums + row * kLanes));
    for (int64_t d = 0; d < args.dim; d += kLanes) {
      const F value = load(tile.output + row * tile.padded_dim + d) / total;
      if (d + kLanes <= args.dim)
        store(to + d, value);
      else
        store_first(to + d, args.dim - d, value);
    }
  }
}

template <typename T>
void attend(const AttentionArgs& args, const Item& item) {
  const int64_t group = args.q_heads / args.kv_heads;
  const int64_t kv_len = args.kv_lens[item.segment];
  const int64_t q_len = args.cu_q[item.segment + 1] - args.cu_q[item.segment];
  const int64_t first_position = kv_len - q_len + item.first_query;
  const int64_t last_position = first_position + item.queries - 1;
  const auto first_seen = [&](int64_t position) {
    return args.window > 0 ? std::max<int64_t>(0, position - args.window + 1) : 0;
  };
  const int32_t* table = args.block_tables + item.segment * args.table_stride;
  const Tile tile = make_tile(item.queries * group, args.dim);
  load_queries<T>(args, item, tile);
  const T* zeros = reinterpret_cast<const T*>(tile.zeros);
  const T* cached[kKeyTile];
  const float* values[kKeyTile];
  int64_t first_key = first_seen(first_position) / kKeyTile * kKeyTile;
  for (; first_key <= last_position; first_key += kKeyTile) {
    // Keys past the last position are masked for every row: what the tile holds for them is unused.
    const int64_t keys = std::min(kKeyTile, last_position + 1 - first_key);
    key_rows(args, args.k_cache, table, item.head, first_key, kv_len, zeros, cached);
    pack_keys(tile, cached, keys);
    for_row_blocks(tile.rows,
                   [&](int64_t row, auto count) { score_rows<count()>(tile, row, keys); });
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t position = first_position + row / group;
      softmax_row(args, tile, row, first_key, {first_seen(position), position});
    }
    key_rows(args, args.v_cache, table, item.head, first_key, kv_len, zeros, cached);
    value_rows(tile, cached, keys, values);
    for_row_blocks(tile.rows,
                   [&](int64_t row, auto count) { add_values<count()>(tile, values, keys, row); });
  }
  store_output<T>(args, item, tile);
}

template <typename T>
void write_cache(const AttentionArgs& args) {
  const int64_t row = args.kv_heads * args.dim;
  parallel_for(args.tokens, 256, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = args.slots[token] * row;
      std::memcpy(static_cast<T*>(args.k_cache) + slot,
                  static_cast<const T*>(args.k) + token * args.k_stride, row * sizeof(T));
      std::memcpy(static_cast<T*>(args.v_cache) + slot,
                  static_cast<const T*>(args.v) + token * args.v_stride, row * sizeof(T));
    }
  });
}

template <typename T>
void attend_all(const AttentionArgs& args) {
  const int64_t group = args.q_heads / args.kv_heads;
  const int64_t query_tile = std::max<int64_t>(1, kRowTile / group);
  std::vector<int64_t> starts = {0};  // first (segment, query tile) pair of each segment
  for (int64_t s = 0; s < args.segments; ++s) {
    const int64_t q_len = args.cu_q[s + 1] - args.cu_q[s];
    starts.push_back(starts.back() + (q_len + query_tile - 1) / query_tile);
  }
  const int64_t pairs = starts.back();
  const int64_t grain = pairs >= 8 * num_threads() ? args.kv_heads : 1;
  parallel_for(pairs * args.kv_heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t pair = index / args.kv_heads;
      const int64_t segment =
          std::upper_bound(starts.begin(), starts.end(), pair) - starts.begin() - 1;
      const int64_t q_len = args.cu_q[segment + 1] - args.cu_q[segment];
      const int64_t first = (pair - starts[segment]) * query_tile;
      attend<T>(args, {.segment = segment,
                       .head = index % args.kv_heads,
                       .first_query = first,
                       .queries = std::min(query_tile, q_len - first)});
    }
  });
}

inline void paged_attention(const AttentionArgs& args) {
  if (args.storage == Storage::kFloat32) {
    write_cache<float>(args);
    attend_all<float>(args);
  } else {
    write_cache<BFloat16>(args);
    attend_all<BFloat16>(args);
  }
}
