#include "pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace geoengine::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// A helper without work looks for more this long before it sleeps; waking it takes about as long.
constexpr auto kAwake = std::chrono::microseconds(50);

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks every now and then until `done` or until the time is over; returns whether it is done.
template <class Done>
bool spin(const Done& done) {
  const Clock::time_point end = Clock::now() + kAwake;
  while (Clock::now() < end) {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
  }
  return done();
}

// Whether helpers speed brief jobs up depends on what else the machine does: both ways are timed, the better one is
// taken, and the other one tried again now and then.
class BriefJobs {
 public:
  bool help_pays() {
    const bool better = together_ <= alone_;
    return calls_.fetch_add(1) % kTrial == kTrial - 1 ? !better : better;
  }

  void count(bool together, double seconds_per_step) {
    std::atomic<double>& mean = together ? together_ : alone_;
    mean = mean + (seconds_per_step - mean) / kMemory;
  }

 private:
  static constexpr std::uint32_t kTrial = 256;
  static constexpr double kMemory = 8.0;
  std::atomic<std::uint32_t> calls_{0};
  std::atomic<double> together_{0.0};
  std::atomic<double> alone_{0.0};
};

struct Posted {
  Job& job;
  std::int64_t places;  // helpers still wanted, guarded by Pool::mutex_
  std::int64_t next = 1;
  std::atomic<std::int64_t> active{0};
};

class Pool {
 public:
  void run(Job& job, std::int64_t helpers, double brief) {
    const Clock::time_point begin = Clock::now();
    const bool close_by = begin.time_since_epoch().count() - last_end_ < Clock::duration(kAwake).count();
    const bool together = brief == 0.0 || (close_by && brief_jobs_.help_pays());
    Posted posted{job, helpers};
    const bool is_posted = together && post(posted);
    job.work(0);
    if (is_posted) withdraw(posted);
    const Clock::time_point end = Clock::now();
    if (brief > 0.0 && close_by) {
      brief_jobs_.count(together, std::chrono::duration<double>(end - begin).count() / brief);
    }
    last_end_ = end.time_since_epoch().count();
  }

 private:
  bool post(Posted& posted) {
    const std::lock_guard<std::mutex> lock(mutex_);
    start(posted.places);
    posted.places = std::min<std::int64_t>(posted.places, threads_);
    if (posted.places == 0) return false;
    open_.push_back(&posted);
    waiting_jobs_.fetch_add(1);
    if (asleep_ > 0) wake_.notify_all();
    return true;
  }

  // Closes the job to helpers and waits for those that have begun.
  void withdraw(Posted& posted) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      close(posted);
    }
    if (spin([&] { return posted.active == 0; })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return posted.active == 0; });
  }

  void close(Posted& posted) {
    const auto place = std::find(open_.begin(), open_.end(), &posted);
    if (place == open_.end()) return;
    open_.erase(place);
    waiting_jobs_.fetch_sub(1);
  }

  void start(std::int64_t wanted) {
    // More threads than processors, and more than this, would only wait for each other.
    const std::int64_t most = std::max<std::int64_t>(15, std::thread::hardware_concurrency());
    try {
      for (; threads_ < std::min(wanted, most); ++threads_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: those that run take all the work.
    }
  }

  [[noreturn]] void help() {
    while (true) {
      spin([&] { return waiting_jobs_ > 0; });
      std::unique_lock<std::mutex> lock(mutex_);
      ++asleep_;
      wake_.wait(lock, [&] { return !open_.empty(); });
      --asleep_;
      Posted& posted = *open_.front();
      const std::int64_t worker = posted.next++;
      ++posted.active;
      if (--posted.places == 0) close(posted);
      lock.unlock();
      posted.job.work(worker);
      // Once `active` is 0 its owner may be gone: the lock keeps the owner from missing the notice, if it sleeps.
      lock.lock();
      --posted.active;
      done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::deque<Posted*> open_;
  std::int64_t threads_ = 0;
  std::int64_t asleep_ = 0;
  std::atomic<std::int64_t> waiting_jobs_{0};
  std::atomic<Clock::rep> last_end_{0};
  BriefJobs brief_jobs_;
};

// Never destroyed, since its threads end with the process. A fork has none of them, hence begins with a pool anew.
std::atomic<Pool*> pool{nullptr};

Pool& shared_pool() {
  static const bool made = [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return true;
  }();
  static_cast<void>(made);
  return *pool;
}

}  // namespace

void run_together(Job& job, std::int64_t helpers, double brief) {
  if (helpers < 1) {
    job.work(0);
  } else {
    shared_pool().run(job, helpers, brief);
  }
}

}  // namespace geoengine::cpu
