#pragma once

#include <cstdint>
#include <functional>

namespace eapo::cpu {

// Threads that parallel_for uses, the calling one included.
int num_threads();

// Throws std::invalid_argument unless 1 <= count <= 1024.
void set_num_threads(int count);

// GOMP_parallel of an OpenMP runtime: calls body(data) on `threads` threads at once.
using OpenMpParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// From now on parallel_for runs on the threads of that runtime; nullptr: on threads of its own.
// Sharing the threads of the program's other operators keeps two sets of them from fighting for
// the cores: idle OpenMP threads spin for a while before they sleep.
void share_openmp(OpenMpParallel parallel);
bool shares_openmp();

// Calls body(begin, end) over disjoint ranges that cover [0, count): of at most `grain` items on
// several threads, one range on one thread. Ranges go to whichever thread is free, so body must not
// depend on who runs it. The first exception thrown by a body is rethrown here. Calls from several
// threads at once take turns.
void parallel_for(int64_t count, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body);

}  // namespace eapo::cpu
