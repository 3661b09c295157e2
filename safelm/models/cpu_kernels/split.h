// Splits work over XLA's own threads.

#ifndef SAFELM_MODELS_CPU_KERNELS_SPLIT_H_
#define SAFELM_MODELS_CPU_KERNELS_SPLIT_H_

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace safelm {

constexpr int64_t kWorthSharing = 128 << 10;  // bytes read: below, waking a thread takes longer than the work
constexpr int kSpins = 20000;  // before the caller lets other threads run

// Calls `work(piece)` for every piece, in the caller's thread and in those of the pool that come in time, and waits.
// Pieces are taken one by one: a thread that wakes late finds none left, and nobody waits for it.
template <typename Work>
void Split(xla::ffi::ThreadPool pool, int64_t num_pieces, int64_t num_bytes, const Work& work) {
  const int64_t others = num_bytes < kWorthSharing ? 0 : std::min(pool.num_threads(), num_pieces) - 1;
  if (others <= 0) {
    for (int64_t piece = 0; piece < num_pieces; ++piece) work(piece);
    return;
  }
  struct Progress {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  const auto progress = std::make_shared<Progress>();
  const auto take = [progress, num_pieces, &work] {  // `work` is only touched with a piece, for which the caller waits
    int64_t piece, done = 0;
    while ((piece = progress->next.fetch_add(1, std::memory_order_relaxed)) < num_pieces) {
      work(piece);
      ++done;
    }
    if (done) progress->done.fetch_add(done, std::memory_order_release);
  };
  for (int64_t i = 0; i < others; ++i) pool.Schedule(std::decay_t<decltype(take)>(take));
  take();
  for (int spins = 0; progress->done.load(std::memory_order_acquire) < num_pieces;) {
    if (++spins < kSpins) {
      _mm_pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_SPLIT_H_
