#include "cpu/attention_plan.h"

#include <algorithm>

namespace eapo::cpu {
namespace {

constexpr int64_t kItemRows = 64;       // rows of a work item aimed at
constexpr int64_t kItemsPerThread = 2;  // at least, where the work can be cut that far
constexpr int64_t kLeastCost = 1 << 19; // multiply-adds that are not worth another item

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

class Planner {
 public:
  Planner(const AttentionArgs& args, int threads)
      : args_(args), group_(args.q_heads / args.kv_heads), threads_(threads) {}

  AttentionPlan plan() {
    for (int64_t s = 0, span = 0; s < args_.segments;) {
      while (span < args_.spans && args_.shared_spans[2 * span] < s) ++span;
      if (span < args_.spans && args_.shared_spans[2 * span] == s)
        s = add_span(s, args_.shared_spans[2 * span + 1], args_.shared_lens[span]);
      else
        s = queries_of(s) == 1 ? add_decodes(s, span) : add_queries(s);
    }
    cut_units();
    std::sort(plan_.items.begin(), plan_.items.end(),
              [](const AttentionItem& a, const AttentionItem& b) { return a.cost > b.cost; });
    return std::move(plan_);
  }

 private:
  int64_t queries_of(int64_t s) const { return int64_t{args_.cu_q[s + 1]} - args_.cu_q[s]; }

  // Keys times query rows of a unit.
  int64_t pairs(const AttentionItem& unit) const {
    int64_t keys = 0;
    for (int64_t s = unit.segment; s < unit.segment + unit.members; ++s) keys += args_.kv_lens[s];
    return keys * unit.queries * group_;
  }

  void add_unit(AttentionItem unit) {
    unit.heads = std::min(args_.kv_heads,
                          std::max<int64_t>(1, kItemRows / (unit.members * unit.queries * group_)));
    units_.push_back(unit);
  }

  // Groups share their prefix among as many members as may go together, at the expense of heads.
  int64_t add_span(int64_t first, int64_t count, int64_t shared) {
    const int64_t parts = ceil_div(count, std::clamp<int64_t>(kItemRows / group_, 1, kMaxMembers));
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = first + count * part / parts;
      const int64_t end = first + count * (part + 1) / parts;
      add_unit({.segment = begin,
                .members = end - begin,
                .shared = shared / kKeyAlign * kKeyAlign});
    }
    return first + count;
  }

  int64_t add_decodes(int64_t first, int64_t span) {
    const int64_t stop = span < args_.spans ? args_.shared_spans[2 * span] : args_.segments;
    const int64_t most = std::clamp<int64_t>(kItemRows / args_.q_heads, 1, kMaxMembers);
    int64_t end = first + 1;
    while (end < stop && end < first + most && queries_of(end) == 1) ++end;
    add_unit({.segment = first, .members = end - first});
    return end;
  }

  int64_t add_queries(int64_t segment) {
    const int64_t count = queries_of(segment);
    const int64_t tile = std::max<int64_t>(1, kItemRows / group_);
    for (int64_t query = 0; query < count; query += tile)
      add_unit({.segment = segment,
                .query = query,
                .queries = std::min(tile, count - query)});
    return segment + 1;
  }

  void cut_units() {
    int64_t total = 0;
    for (const AttentionItem& unit : units_) total += pairs(unit) * args_.kv_heads * args_.dim;
    const int64_t most = threads_ == 1 ? total
                                       : std::max(total / (kItemsPerThread * threads_), kLeastCost);
    for (const AttentionItem& unit : units_) cut(unit, most);
  }

  // Heads first: their keys are disjoint. Then rows, then chunks of keys.
  void cut(AttentionItem unit, int64_t most) {
    const auto cost = [&](const AttentionItem& u) { return pairs(u) * u.heads * args_.dim; };
    while (cost(unit) > most && unit.heads > 1) unit.heads = ceil_div(unit.heads, 2);
    int64_t members = unit.members, queries = unit.queries;
    for (int64_t left = cost(unit); left > most && members * queries > 1; left /= 2) {
      members = ceil_div(members, 2);
      queries = ceil_div(queries, 2);
    }
    for (int64_t head = 0; head < args_.kv_heads; head += unit.heads)
      for (int64_t member = 0; member < unit.members; member += members)
        for (int64_t query = 0; query < unit.queries; query += queries) {
          AttentionItem item = unit;
          item.head = head;
          item.heads = std::min(unit.heads, args_.kv_heads - head);
          item.segment += member;
          item.members = std::min(members, unit.members - member);
          item.query += query;
          item.queries = std::min(queries, unit.queries - query);
          item.cost = cost(item);
          add_item(item, most);
        }
  }

  void add_item(AttentionItem item, int64_t most) {
    int64_t longest = 0;
    for (int64_t s = item.segment; s < item.segment + item.members; ++s)
      longest = std::max<int64_t>(longest, args_.kv_lens[s]);
    item.chunks = ceil_div(longest, kKeyChunk);
    if (item.cost <= most || item.chunks < 2) return plan_.items.push_back(item);
    item.partial = plan_.partial_rows;
    plan_.merges.push_back(item);
    const int64_t rows = item.heads * item.members * item.queries * group_;
    const int64_t parts = std::min(item.chunks, ceil_div(item.cost, most));
    for (int64_t part = 0; part < parts; ++part) {
      AttentionItem piece = item;
      piece.chunk = item.chunks * part / parts;
      piece.chunks = item.chunks * (part + 1) / parts - piece.chunk;
      piece.cost = item.cost * piece.chunks / item.chunks;
      piece.partial = plan_.partial_rows + piece.chunk * rows;
      plan_.items.push_back(piece);
    }
    plan_.partial_rows += item.chunks * rows;
  }

  const AttentionArgs& args_;
  const int64_t group_;
  const int threads_;
  std::vector<AttentionItem> units_;
  AttentionPlan plan_;
};

}  // namespace

AttentionPlan plan_attention(const AttentionArgs& args, int threads) {
  return Planner(args, threads).plan();
}

}  // namespace eapo::cpu
