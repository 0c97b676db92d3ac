// Paged attention of one target. A work item goes through its keys in chunks at fixed positions:
// all scores of a chunk, their softmax, then the weighted values. Every sum of a row has its own
// fixed order, so its bits do not depend on batch, chunking, block size, threads or sharing.

#include "cpu/attention_units-inl.h"
#include "cpu/attention_scores-inl.h"
#include "cpu/attention_softmax-inl.h"
#include "cpu/attention_values-inl.h"
#include "cpu/attention_work-inl.h"

// Sets work.chunk to the sums over the keys [begin, end).
template <typename T>
inline void attend_chunk(const Work<T>& work, int64_t begin, int64_t end) {
  const AttentionArgs& args = work.args;
  Tile tiles[kMaxTiles];
  const int64_t count = list_tiles(work, begin, end, tiles);
  Fetcher fetcher(args, work.item, tiles, count);
  walk(work, args.k_cache, tiles, count, fetcher,
       [&](const Tile& tile, int64_t head, const T* const* rows, int64_t offset) {
         pack_keys(rows, offset, tile.keys, args.dim, work.packed, fetcher);
         const Range range = rows_of(work, tile, head);
         score_rows(work.queries, range.begin, range.end, args.dim, work.packed, tile.keys,
                    work.scores + tile.first - begin, work.score_stride, fetcher);
       });
  int64_t first = end;
  for (int64_t i = 0; i < count; ++i) first = std::min(first, tiles[i].first);
  for_rows(work, [&](int64_t row, int64_t member, int64_t query, int64_t, int64_t) {
    const Range seen = work.seen(work.position(member) + query);
    const int64_t stop = std::min(work.member_seen(member).end, end);
    work.chunk.mass[row] = softmax_row(
        args, work.scores + row * work.score_stride, {first - begin, stop - begin},
        {std::max(seen.begin, begin) - begin, std::min(seen.end, end) - begin});
  });
  std::fill_n(work.chunk.values, work.rows * work.width, 0.0f);
  walk(work, args.v_cache, tiles, count, fetcher,
       [&](const Tile& tile, int64_t head, const T* const* rows, int64_t offset) {
         const Range range = rows_of(work, tile, head);
         add_values(rows, offset, tile.keys, range.begin, range.end, args.dim,
                    work.scores + tile.first - begin, work.score_stride, work.chunk.values,
                    work.width, fetcher);
       });
}

// What a row's values are multiplied by in the end; the sink of its head takes its share.
EAPO_INLINE float normaliser(const AttentionArgs& args, int64_t head, Mass mass) {
  if (args.sinks == nullptr) return 1.0f / mass.sum;
  const float sink = args.sinks[head], shift = finite_or_zero(std::max(mass.max, sink));
  const float kept = exp_nonpositive(mass.max - shift);
  return kept / (mass.sum * kept + exp_nonpositive(sink - shift));
}

template <typename T>
inline void store_output(const Work<T>& work) {
  const AttentionArgs& args = work.args;
  for_rows(work, [&](int64_t row, int64_t member, int64_t, int64_t token, int64_t head) {
    T* to = static_cast<T*>(args.out) + (token * args.q_heads + head) * args.dim;
    if (args.kv_lens[work.item.segment + member] == 0) {
      std::fill_n(to, args.dim, T{});
      return;
    }
    const float factor = normaliser(args, head, work.total.mass[row]);
    const float* values = work.total.values + row * work.width;
    for (int64_t d = 0; d < args.dim; d += kVectorElements<T>) {
      F planes[kPlanes<T>];
      for (int p = 0; p < kPlanes<T>; ++p) planes[p] = load(values + d + p * kLanes) * factor;
      store_row_units(to, d, args.dim, joined<T>(planes));
    }
  });
}

// Floats of a row of a partial result: largest score, sum, values.
template <typename T>
EAPO_INLINE int64_t partial_floats(int64_t dim) {
  return 2 + rounded_up(dim, kVectorElements<T>);
}

template <typename T>
inline void store_partial(const Work<T>& work, float* partial) {
  for (int64_t row = 0; row < work.rows; ++row, partial += partial_floats<T>(work.args.dim)) {
    partial[0] = work.chunk.mass[row].max;
    partial[1] = work.chunk.mass[row].sum;
    std::copy_n(work.chunk.values + row * work.width, work.width, partial + 2);
  }
}

template <typename T>
void attend(const AttentionArgs& args, const AttentionItem& item, float* partials) {
  const Work<T> work = make_work<T>(args, item);
  load_queries(work);
  for (int64_t chunk = 0; chunk < item.chunks; ++chunk) {
    const int64_t begin = (item.chunk + chunk) * kKeyChunk;
    attend_chunk(work, begin, begin + kKeyChunk);
    if (item.partial >= 0)
      store_partial(work, partials + (item.partial + chunk * work.rows) *
                                         partial_floats<T>(args.dim));
    else if (item.chunks > 1)
      for (int64_t row = 0; row < work.rows; ++row)
        add_chunk(work.total, row, work.chunk.mass[row], work.chunk.values + row * work.width,
                  work.width);
  }
  if (item.partial < 0) store_output(work);
}

// Adds up the partial results of an item that was cut by chunks.
template <typename T>
void merge(const AttentionArgs& args, const AttentionItem& item, const float* partials) {
  const Work<T> work = make_work<T>(args, item);
  const float* partial = partials + item.partial * partial_floats<T>(args.dim);
  for (int64_t chunk = 0; chunk < item.chunks; ++chunk)
    for (int64_t row = 0; row < work.rows; ++row, partial += partial_floats<T>(args.dim))
      add_chunk(work.total, row, {partial[0], partial[1]}, partial + 2, work.width);
  store_output(work);
}

// All writes are done before anybody attends.
template <typename T>
void attend_all(const AttentionArgs& args) {
  constexpr int64_t kWrite = 64;  // tokens
  const AttentionPlan plan = plan_attention(args, num_threads());
  std::vector<float> partials(
      static_cast<size_t>(plan.partial_rows * partial_floats<T>(args.dim)));
  parallel_for(args.tokens, kWrite,
               [&](int64_t begin, int64_t end) { write_kv(args, begin, end); });
  parallel_for(static_cast<int64_t>(plan.items.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index)
      attend<T>(args, plan.items[index], partials.data());
  });
  for (const AttentionItem& item : plan.merges) merge<T>(args, item, partials.data());
}

inline void paged_attention(const AttentionArgs& args) {
  if (args.storage == Storage::kFloat32)
    attend_all<float>(args);
  else
    attend_all<BFloat16>(args);
}
