#include "cpu/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace eapo::cpu {
namespace {

struct Job {
  int64_t count, grain;
  const std::function<void(int64_t, int64_t)>& body;
  std::atomic<int64_t> next{0};
  std::mutex failure_mutex;
  std::exception_ptr failure;

  void run() noexcept {
    try {
      for (int64_t begin; (begin = next.fetch_add(grain)) < count;)
        body(begin, std::min(begin + grain, count));
    } catch (...) {
      next.store(count);
      std::lock_guard lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  }
};

class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; ++i) threads_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int workers() const { return static_cast<int>(threads_.size()); }

  // The caller works too; workers that wake after the last range has been taken find nothing to do.
  void run(Job& job) {
    {
      std::lock_guard lock(mutex_);
      job_ = &job;
      ++generation_;
    }
    wake_.notify_all();
    job.run();
    std::unique_lock lock(mutex_);
    job_ = nullptr;
    idle_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work() {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return stopping_ || (job_ != nullptr && generation_ != seen); });
      if (stopping_) return;
      seen = generation_;
      Job* job = job_;
      ++busy_;
      lock.unlock();
      job->run();
      lock.lock();
      if (--busy_ == 0) idle_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int busy_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

// Never destroyed: joining threads while the process exits can hang.
struct State {
  std::mutex turn;
  std::atomic<int> threads{std::max(1, static_cast<int>(std::thread::hardware_concurrency()))};
  std::atomic<OpenMpParallel> openmp{nullptr};
  std::unique_ptr<Pool> pool;
};
State* state = nullptr;

// A forked child has the memory of the pool (ours or OpenMP's) but none of its threads: start afresh
// with our own, keep the count.
void after_fork_in_child() {
  const int threads = state->threads;
  state = new State;
  state->threads = threads;
}

State& shared() {
  static const bool once = [] {
    state = new State;
    pthread_atfork(nullptr, nullptr, after_fork_in_child);
    return true;
  }();
  (void)once;
  return *state;
}

void run_on_own_pool(State& pool_state, int threads, Job& job) {
  if (!pool_state.pool || pool_state.pool->workers() != threads - 1) {
    pool_state.pool.reset();
    pool_state.pool = std::make_unique<Pool>(threads - 1);
  }
  pool_state.pool->run(job);
}

}  // namespace

int num_threads() { return shared().threads; }

void set_num_threads(int count) {
  if (count < 1 || count > 1024)
    throw std::invalid_argument("num_threads must be in 1..1024, got " + std::to_string(count));
  shared().threads = count;
}

void share_openmp(OpenMpParallel parallel) { shared().openmp = parallel; }

bool shares_openmp() { return shared().openmp != nullptr; }

void parallel_for(int64_t count, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  State& pool_state = shared();
  const int wanted = pool_state.threads;
  if (wanted == 1 || count <= grain) return body(0, count);
  std::lock_guard turn(pool_state.turn);
  Job job{.count = count, .grain = grain, .body = body, .failure_mutex = {}, .failure = {}};
  if (const OpenMpParallel openmp = pool_state.openmp)
    openmp([](void* work) { static_cast<Job*>(work)->run(); }, &job,
           static_cast<unsigned>(wanted), 0);
  else
    run_on_own_pool(pool_state, wanted, job);
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace eapo::cpu
