// Threads that wait for work: starting one takes longer than the searches of a beam.
#pragma once

#include <cstdint>

namespace geoengine::cpu {

// Something to do that any number of threads can do together, each with a number of its own.
class Job {
 public:
  virtual void work(std::int64_t worker) noexcept = 0;

 protected:
  ~Job() = default;
};

// Calls job.work(0) here and job.work(1), … on up to `helpers` other threads, as far as the system has them to give
// and they come before the work is done. Calls from several threads share the helpers. `brief` is 0, or the number of
// steps of work so short that waking a thread takes about as long: then others help only where calls follow each other
// closely and help has been found to pay.
void run_together(Job& job, std::int64_t helpers, double brief);

}  // namespace geoengine::cpu
