// Caches that follow their beams, in place, as a custom call of XLA.
//
// The beams of a prompt share its tokens: only what was generated since differs, and only that moves.
//
// R rows, K key heads, S cached positions.

#ifndef SAFELM_MODELS_CPU_KERNELS_BEAMS_H_
#define SAFELM_MODELS_CPU_KERNELS_BEAMS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "split.h"
#include "xla/ffi/api/ffi.h"

namespace safelm {
namespace {

namespace ffi = xla::ffi;

// Row r becomes what row `parents[r]` was, from position `starts[r]` to `ends[r]`, in every head of every cache.
ffi::Error FollowBeams(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> parents, ffi::Buffer<ffi::S32> starts,
                       ffi::Buffer<ffi::S32> ends, ffi::RemainingArgs caches, ffi::RemainingRets results) {
  const int64_t R = parents.element_count();
  if (caches.size() != results.size() || caches.size() == 0 || starts.element_count() != parents.element_count() ||
      ends.element_count() != parents.element_count()) {
    return ffi::Error::InvalidArgument("caches, results and rows have different numbers");
  }
  std::vector<char*> data;
  int64_t K = 0, S = 0, row_bytes = 0;
  for (size_t i = 0; i < caches.size(); ++i) {
    const auto cache = caches.get<ffi::AnyBuffer>(i);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!cache || !result || cache->dimensions().size() != 4 || cache->dimensions()[0] != R ||
        (*result)->size_bytes() != cache->size_bytes() ||
        (i > 0 && cache->size_bytes() != static_cast<size_t>(R * K * S * row_bytes))) {
      return ffi::Error::InvalidArgument("caches are not of one size");
    }
    K = cache->dimensions()[1], S = cache->dimensions()[2];
    row_bytes = R * K * S > 0 ? static_cast<int64_t>(cache->size_bytes()) / (R * K * S) : 0;
    if ((*result)->untyped_data() != cache->untyped_data()) {
      std::memcpy((*result)->untyped_data(), cache->untyped_data(), cache->size_bytes());
    }
    data.push_back(static_cast<char*>((*result)->untyped_data()));
  }
  struct Move {
    int64_t from, to, begin, count;  // rows, positions
  };
  std::vector<Move> moves;
  int64_t num_moved = 0;
  for (int64_t row = 0; row < R; ++row) {
    const int64_t parent = parents.typed_data()[row];
    const int64_t end = std::clamp<int64_t>(ends.typed_data()[row], 0, S);
    const int64_t begin = std::clamp<int64_t>(starts.typed_data()[row], 0, end);
    if (parent < 0 || parent >= R || parent == row || begin == end) continue;
    moves.push_back({parent, row, begin, end - begin});
    num_moved += end - begin;
  }
  if (moves.empty()) return ffi::Error::Success();
  const int64_t num_pieces = static_cast<int64_t>(data.size()) * K;
  Split(pool, num_pieces, num_pieces * num_moved * row_bytes * 2, [&](int64_t piece) {
    static thread_local std::vector<char> held;
    held.resize(num_moved * row_bytes);
    char* cache = data[piece / K];
    const int64_t head = piece % K;
    char* at = held.data();
    for (const Move& move : moves) {
      std::memcpy(at, cache + ((move.from * K + head) * S + move.begin) * row_bytes, move.count * row_bytes);
      at += move.count * row_bytes;
    }
    at = held.data();
    for (const Move& move : moves) {
      std::memcpy(cache + ((move.to * K + head) * S + move.begin) * row_bytes, at, move.count * row_bytes);
      at += move.count * row_bytes;
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FollowBeamsHandler, FollowBeams,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_BEAMS_H_
