// A work item in scratch memory: its rows, and the tiles of keys that they read.

EAPO_INLINE int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
EAPO_INLINE int64_t rounded_down(int64_t n, int64_t step) { return n / step * step; }

constexpr int64_t kMaxTiles = (kMaxMembers + 1) * (kKeyChunk / kKeyTile + 1);

// Rows of an item: [head][member][query][head of the group].
template <typename T>
struct Work {
  const AttentionArgs& args;
  const AttentionItem& item;
  int64_t group;         // query heads of a kv head
  int64_t rows;          // of the item
  int64_t member_rows;   // of a member and head
  int64_t width;         // floats of an output row, whole vectors
  int64_t score_stride;  // floats of a row of scores
  Queries<T> queries;
  float *scores, *packed;
  RowSums chunk, total;  // of the chunk at hand and of all; the same where there is only one

  // Position of the member's first row of this item.
  EAPO_INLINE int64_t position(int64_t member) const {
    const int64_t s = item.segment + member;
    return args.kv_lens[s] - (args.cu_q[s + 1] - args.cu_q[s]) + item.query;
  }
  // Keys that a row at the position sees.
  EAPO_INLINE Range seen(int64_t position) const {
    return {args.window > 0 ? std::max<int64_t>(0, position - args.window + 1) : 0, position + 1};
  }
  // Keys that any row of the member sees.
  EAPO_INLINE Range member_seen(int64_t member) const {
    const int64_t first = position(member);
    return {seen(first).begin, seen(first + item.queries - 1).end};
  }
  EAPO_INLINE int64_t row(int64_t head, int64_t member) const {
    return (head * item.members + member) * member_rows;
  }
};

template <typename T>
inline Work<T> make_work(const AttentionArgs& args, const AttentionItem& item) {
  const int64_t group = args.q_heads / args.kv_heads, member_rows = item.queries * group;
  const int64_t rows = item.heads * item.members * member_rows;
  const int64_t units = rounded_up((args.dim + kPlanes<T> - 1) / kPlanes<T>, kLanes);
  const int64_t width = units * kPlanes<T>;
  int64_t longest = 0;
  for (int64_t s = item.segment; s < item.segment + item.members; ++s)
    longest = std::max<int64_t>(longest, args.kv_lens[s]);
  // An odd number of cache lines, so that rows spread over the sets of the cache.
  const int64_t stride = (rounded_up(std::min(longest, kKeyChunk), 16) / 16 | 1) * 16;
  const int64_t totals = item.chunks > 1 ? rows : 0;
  const int64_t sizes[] = {rows * kQueryPlanes<T> * units, rows * stride,  units * kKeyTile,
                           rows * 2, rows * width, totals * 2, totals * width};
  int64_t total = 0;
  for (int64_t size : sizes) total += rounded_up(size, 16);
  float* next = workspace(total);
  float* parts[std::size(sizes)];
  for (size_t i = 0; i < std::size(sizes); ++i) {
    parts[i] = next;
    next += rounded_up(sizes[i], 16);
  }
  Work<T> work{.args = args,
               .item = item,
               .group = group,
               .rows = rows,
               .member_rows = member_rows,
               .width = width,
               .score_stride = stride,
               .queries = {parts[0], units},
               .scores = parts[1],
               .packed = parts[2],
               .chunk = {reinterpret_cast<Mass*>(parts[3]), parts[4]},
               .total = {reinterpret_cast<Mass*>(parts[5]), parts[6]}};
  if (totals == 0) work.total = work.chunk;
  std::fill_n(work.total.mass, rows, Mass{-kInf, 0.0f});
  std::fill_n(work.total.values, totals * width, 0.0f);
  return work;
}

// fn(row, member, query, token, query head) for every row.
template <typename T, typename Fn>
EAPO_INLINE void for_rows(const Work<T>& work, Fn&& fn) {
  const AttentionItem& item = work.item;
  int64_t row = 0;
  for (int64_t head = item.head; head < item.head + item.heads; ++head)
    for (int64_t member = 0; member < item.members; ++member)
      for (int64_t query = 0; query < item.queries; ++query)
        for (int64_t h = head * work.group; h < (head + 1) * work.group; ++h)
          fn(row++, member, query, work.args.cu_q[item.segment + member] + item.query + query, h);
}

template <typename T>
inline void load_queries(const Work<T>& work) {
  const T* q = static_cast<const T*>(work.args.q);
  for_rows(work, [&](int64_t row, int64_t, int64_t, int64_t token, int64_t head) {
    load_query(q + token * work.args.q_stride + head * work.args.q_head_stride, work.args.dim,
               work.queries, row);
  });
}

// Tiles of the chunk [begin, end): what the members share, then each member's own.
template <typename T>
inline int64_t list_tiles(const Work<T>& work, int64_t begin, int64_t end, Tile* tiles) {
  const AttentionItem& item = work.item;
  const int64_t shared = item.members > 1 ? item.shared : 0;
  int64_t count = 0;
  const auto add = [&](Range keys, int64_t member, int64_t members) {
    for (int64_t first = rounded_down(std::max(keys.begin, begin), kKeyAlign);
         first < std::min(keys.end, end); first += kKeyTile)
      tiles[count++] = {.segment = item.segment + member,
                        .first = first,
                        .keys = std::min(kKeyTile, std::min(keys.end, end) - first),
                        .member = member,
                        .members = members};
  };
  int64_t earliest = shared;
  for (int64_t m = 0; m < item.members; ++m)
    earliest = std::min(earliest, work.member_seen(m).begin);
  add({earliest, shared}, 0, item.members);
  for (int64_t m = 0; m < item.members; ++m) {
    const Range keys = work.member_seen(m);
    add({std::max(keys.begin, shared), keys.end}, m, 1);
  }
  return count;
}

// The tile's rows of a cache for the item's first head; the last one also past the end, up to whole
// vectors.
template <typename T>
EAPO_INLINE void find_rows(const Work<T>& work, const void* cache, const Tile& tile,
                           const T** rows) {
  const AttentionArgs& args = work.args;
  const int32_t* table = args.block_tables + tile.segment * args.table_stride;
  const T* base = static_cast<const T*>(cache) + work.item.head * args.dim;
  const int64_t row_size = args.kv_heads * args.dim;
  int64_t column = tile.first / args.block_size, inside = tile.first % args.block_size;
  for (int64_t i = 0; i < tile.keys; ++column, inside = 0) {
    const T* row = base + (table[column] * args.block_size + inside) * row_size;
    const int64_t stop = std::min(tile.keys, i + args.block_size - inside);
    for (; i < stop; ++i, row += row_size) rows[i] = row;
  }
  for (int64_t i = tile.keys; i < rounded_up(tile.keys, kLanes); ++i) rows[i] = rows[tile.keys - 1];
}

// fn(head of the item, rows of the tile, offset of the head in them) for every tile and head.
template <typename T, typename Fn>
EAPO_INLINE void walk(const Work<T>& work, const void* cache, const Tile* tiles, int64_t count,
                      Fetcher& fetcher, Fn&& fn) {
  const T* rows[kKeyTile];
  for (int64_t i = 0; i < count; ++i) {
    fetcher.pass_tile();
    find_rows(work, cache, tiles[i], rows);
    for (int64_t head = 0; head < work.item.heads; ++head)
      fn(tiles[i], head, rows, head * work.args.dim);
  }
}

// Rows of the tile's members that see any of its keys.
template <typename T>
EAPO_INLINE Range rows_of(const Work<T>& work, const Tile& tile, int64_t head) {
  const int64_t row = work.row(head, tile.member);
  if (tile.members > 1) return {row, row + tile.members * work.member_rows};
  const int64_t position = work.position(tile.member), queries = work.item.queries;
  const int64_t last = tile.first + tile.keys - 1;
  const int64_t begin = std::clamp<int64_t>(tile.first - position, 0, queries);
  const int64_t end = work.args.window > 0
                          ? std::clamp<int64_t>(last + work.args.window - position, 0, queries)
                          : queries;
  return {row + begin * work.group, row + end * work.group};
}

