// The thread pool of the CPU kernels, run under the thread sanitizer.

#include <atomic>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/parallel.h"

using namespace eapo::cpu;

namespace {

// Every item is visited once, and what was written is visible behind the call.
void count_visits(std::int64_t count, std::int64_t grain) {
  std::vector<int> visits(static_cast<std::size_t>(count), 0);
  parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t at = begin; at < end; ++at) ++visits[at];
  });
  EXPECT(std::accumulate(visits.begin(), visits.end(), std::int64_t{0}) == count);
}

void visits_every_item_once() {
  for (int threads = 1; threads <= 4; ++threads) {
    set_num_threads(threads);
    for (const std::int64_t grain : {1, 3, 100}) {
      for (const std::int64_t count : {0, 1, 7, 250}) count_visits(count, grain);
    }
  }
}

void short_jobs_follow_each_other() {
  set_num_threads(4);
  std::vector<int> shared(8, 0);
  for (int job = 0; job < 2000; ++job) {
    parallel_for(8, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t at = begin; at < end; ++at) ++shared[at];
    });
  }
  EXPECT(shared == std::vector<int>(8, 2000));
}

void callers_take_turns() {
  set_num_threads(3);
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([] {
      for (int job = 0; job < 200; ++job) count_visits(20, 2);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void the_number_of_threads_may_change_meanwhile() {
  std::atomic<bool> stop = false;
  std::thread changer([&] {
    for (int i = 0; !stop; ++i) set_num_threads(1 + i % 4);
  });
  for (int job = 0; job < 200; ++job) count_visits(30, 1);
  stop = true;
  changer.join();
}

void a_failure_reaches_the_caller() {
  set_num_threads(3);
  for (int job = 0; job < 200; ++job) {
    THROWS(std::runtime_error, "body", parallel_for(50, 1, [](std::int64_t begin, std::int64_t) {
             if (begin % 7 == 3) throw std::runtime_error("body");
           }));
    count_visits(50, 1);
  }
}

// Stands for GOMP_parallel: every thread of the team runs the body once.
void team(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

void an_openmp_team_does_the_same() {
  EXPECT(!shares_openmp());
  share_openmp(team);
  EXPECT(shares_openmp());
  visits_every_item_once();
  callers_take_turns();
  a_failure_reaches_the_caller();
  share_openmp(nullptr);
  visits_every_item_once();
}

}  // namespace

int main() {
  return eapo_test::run(visits_every_item_once, short_jobs_follow_each_other, callers_take_turns,
                        the_number_of_threads_may_change_meanwhile, a_failure_reaches_the_caller,
                        an_openmp_team_does_the_same);
}
