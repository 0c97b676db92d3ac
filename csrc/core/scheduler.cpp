#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "error.h"

namespace eapo {

namespace {

const SchedulerConfig& validated(const SchedulerConfig& config) {
  require(config.max_batch >= 1, "max_batch must be >= 1, got ", config.max_batch);
  require(config.max_step_tokens >= 1, "max_step_tokens must be >= 1, got ",
          config.max_step_tokens);
  require(config.max_context >= 2, "max_context must be >= 2, got ", config.max_context);
  return config;
}

void require_token_ids(std::span<const TokenId> ids) {
  for (const TokenId id : ids) require(id >= 0, "token ids must be >= 0, got ", id);
}

}  // namespace

Scheduler::Scheduler(std::shared_ptr<KvPool> pool, std::shared_ptr<const Vocabulary> vocabulary,
                     const SchedulerConfig& config)
    : config_(validated(config)),
      max_batch_(std::min(config.max_batch, config.max_step_tokens)),
      max_context_(static_cast<int>(std::min<std::int64_t>(config.max_context, pool->capacity()))),
      vocabulary_(std::move(vocabulary)),
      kv_(std::move(pool), config.prefix_cache),
      evictions_before_(kv_.pool().evictions()) {
  const int used = kv_.pool().num_blocks() - kv_.pool().num_free();
  ensure(used == 0, used, " of ", kv_.pool().num_blocks(),
         " blocks of the pool are in use; clear() the scheduler that holds them first");
  batch_.reserve(max_batch_);
}

Scheduler::~Scheduler() { clear(); }

int Scheduler::add_rules(RulesSpec spec) {
  const auto same = [&](const auto& rules) { return rules->spec() == spec; };
  const auto found = std::ranges::find_if(rules_, same);
  if (found != rules_.end()) return static_cast<int>(found - rules_.begin());
  rules_.push_back(std::make_unique<Rules>(std::move(spec), vocabulary_));
  return static_cast<int>(rules_.size()) - 1;
}

std::vector<SeqId> Scheduler::add_group(std::span<const TokenId> prompt, int n, int rules,
                                        const SamplingSpec& sampling) {
  validate(sampling);
  const Rules& group_rules = rules_at(rules);
  require(n >= 1, "n must be >= 1, got ", n);
  require(!prompt.empty(), "the prompt is empty; it needs at least one token");
  require_token_ids(prompt);
  require(prompt.size() + 1 <= static_cast<std::size_t>(max_context_), "a prompt of ",
          prompt.size(), " tokens and one more do not fit ", max_context_,
          " tokens (the smaller of max_context=", config_.max_context, " and the pool of ",
          kv_.pool().num_blocks(), " blocks of ", kv_.pool().block_size(), ")");

  const auto group = std::make_shared<Group>(Group{.sampling = sampling});
  std::vector<SeqId> ids;
  for (int sample = 0; sample < n; ++sample) {
    ids.push_back(add_row(group, sample, group_rules, prompt).id);
  }
  enter(*group->leader(), Place::kWaiting, State::kWaiting);
  return ids;
}

Sequence& Scheduler::add_row(const std::shared_ptr<Group>& group, int sample, const Rules& rules,
                             std::span<const TokenId> prompt) {
  auto row = std::make_unique<Sequence>();
  row->id = next_id_++;
  row->sample = sample;
  row->group = group;
  row->rules = &rules;
  row->prompt_length = row->segment_start = static_cast<int>(prompt.size());
  row->tokens.assign(prompt.begin(), prompt.end());
  group->members.push_back(row.get());
  ++unfinished_;
  return *rows_.emplace(row->id, std::move(row)).first->second;
}

bool Scheduler::inject(SeqId seq, std::span<const TokenId> ids) {
  Sequence& row = editable(seq, "inject into");
  require(row.state == State::kParked, "cannot inject into sequence ", seq, ": it is not parked");
  require_token_ids(ids);
  const std::size_t length = row.tokens.size() + ids.size();
  if (row.out_of_policy_tokens() || length + 1 > static_cast<std::size_t>(max_context_)) {
    lengths_.add(row);
    retire(row, "length");
    return false;
  }
  row.append_injected(ids);
  leave(row);
  enter(row, Place::kInjected, State::kInjected);
  return true;
}

void Scheduler::finish(SeqId seq, std::string_view reason) {
  require(!reason.empty(), "the finish reason is empty");
  retire(editable(seq, "finish"), reason);
}

void Scheduler::set_rules(SeqId seq, int rules) {
  editable(seq, "set the rules of").set_rules(rules_at(rules));
}

void Scheduler::release(SeqId seq) {
  if (!find(seq).done()) retire(editable(seq, "release"), "released");
  rows_.erase(seq);
}

void Scheduler::clear() {
  for (const auto& [id, row] : rows_) kv_.drop(*row);
  kv_.end_plan();
  rows_.clear();
  for (Queue* const queue : {&injected_, &ready_, &waiting_}) queue->clear();
  batch_.clear();
  parked_.clear();
  parked_sharing_.clear();
  groups_.clear();
  planned_.clear();
  samples_.clear();
  num_parked_ = unfinished_ = 0;
  pending_ = false;
}

void Scheduler::expect_wait(SeqId seq, double seconds) {
  Sequence& row = editable(seq, "expect a wait of");
  require(row.state == State::kParked, "cannot expect a wait of sequence ", seq,
          ": it is not parked");
  require(seconds >= 0, "seconds must be >= 0 (infinity: unknown), got ", seconds);
  remove_parked(row);
  row.expected_wait = seconds;
  file_parked(row);
}

void Scheduler::set_prefill_rate(double tokens_per_second) {
  require(tokens_per_second > 0 && std::isfinite(tokens_per_second),
          "tokens_per_second must be finite and > 0, got ", tokens_per_second);
  prefill_rate_ = tokens_per_second;
}

const Sequence& Scheduler::sequence(SeqId seq) const { return find(seq); }

SchedulerStats Scheduler::stats() const {
  const int running = static_cast<int>(batch_.size());
  return {.free_blocks = kv_.pool().num_free(),
          .free_host_blocks = kv_.pool().num_host_free(),
          .running = running,
          .waiting = unfinished_ - running - num_parked_,
          .parked = num_parked_,
          .preemptions = preemptions_,
          .prefill_tokens = prefill_tokens_,
          .decode_tokens = decode_tokens_,
          .blocks = kv_.totals(),
          .evicted_blocks = kv_.pool().evictions() - evictions_before_};
}

Sequence& Scheduler::find(SeqId seq) const {
  const auto found = rows_.find(seq);
  require(found != rows_.end(), "sequence ", seq, " is unknown or was released");
  return *found->second;
}

// A row that is neither finished nor part of the pending step.
Sequence& Scheduler::editable(SeqId seq, const char* action) const {
  Sequence& row = find(seq);
  require(!row.done(), "cannot ", action, " sequence ", seq, ": it finished as '",
          row.finish_reason, "'");
  const Sequence& computing = row.group->forked ? row : *row.group->leader();
  ensure(computing.planned == 0, "cannot ", action, " sequence ", seq,
         ": it is in the planned step; commit() first");
  return row;
}

const Rules& Scheduler::rules_at(int rules) const {
  require(rules >= 0 && rules < static_cast<int>(rules_.size()), "rules ", rules,
          " are unknown; add_rules() gave ids in [0, ", rules_.size(), ")");
  return *rules_[rules];
}

void Scheduler::enter(Sequence& row, Place place, State state) {
  row.place = place;
  row.state = state;
  switch (place) {
    case Place::kBatch:
      batch_.insert(std::ranges::upper_bound(batch_, &row, ById{}), &row);
      break;
    case Place::kInjected: injected_.insert(&row); break;
    case Place::kReady: ready_.insert(&row); break;
    case Place::kWaiting: waiting_.insert(&row); break;
    case Place::kParked:
      ++num_parked_;
      file_parked(row);
      break;
    case Place::kNone: break;
  }
}

void Scheduler::leave(Sequence& row) {
  switch (row.place) {
    case Place::kBatch: batch_.erase(std::ranges::lower_bound(batch_, &row, ById{})); break;
    case Place::kInjected: injected_.erase(&row); break;
    case Place::kReady: ready_.erase(&row); break;
    case Place::kWaiting: waiting_.erase(&row); break;
    case Place::kParked:
      --num_parked_;
      remove_parked(row);
      break;
    case Place::kNone: break;
  }
  row.place = Place::kNone;
}

void Scheduler::retire(Sequence& row, std::string_view reason) {
  const bool leads = !row.group->forked && row.group->leader() == &row;
  if (leads && row.group->members.size() > 1) hand_over(row);
  leave(row);
  kv_.drop(row);
  std::erase(row.group->members, &row);
  if (row.group->members.empty()) std::erase(groups_, row.group.get());
  row.state = State::kDone;
  row.finish_reason = reason;
  --unfinished_;
}

// The next member goes on with the prompt where the leader was.
void Scheduler::hand_over(Sequence& leader) {
  Sequence& heir = *leader.group->members[1];
  heir.blocks.swap(leader.blocks);
  std::swap(heir.computed, leader.computed);
  std::swap(heir.published, leader.published);
  heir.epoch = leader.epoch;
  const Place place = leader.place;
  leave(leader);
  enter(heir, place, leader.state);
}

}  // namespace eapo
