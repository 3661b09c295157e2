// Caches that follow their beams and that tokens are written to, in place, as custom calls of XLA.
//
// The beams of a prompt share its tokens: only what was generated since differs, and only that moves. A token is a few
// bytes in every head: XLA scatters bfloat16 through float32, and turns the whole cache around for it.
//
// R rows, K key heads, S cached positions, M tokens, H numbers a head.

#ifndef SAFELM_MODELS_CPU_KERNELS_CACHES_H_
#define SAFELM_MODELS_CPU_KERNELS_CACHES_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "split.h"
#include "xla/ffi/api/ffi.h"

namespace safelm {
namespace {

namespace ffi = xla::ffi;

// Caches [R, K, S, H] of one size that are written to.
struct Caches {
  std::vector<char*> data;
  int64_t R = 0, K = 0, S = 0, head_bytes = 0;  // of one token's numbers in a head
};

// The results as what they begin with, the arguments from `first` on: XLA has put them in the same place or not.
inline ffi::Error Open(ffi::RemainingArgs arguments, size_t first, ffi::RemainingRets results, Caches* caches) {
  if (results.size() == 0) return ffi::Error::InvalidArgument("no caches");
  for (size_t i = 0; i < results.size(); ++i) {
    const auto cache = arguments.get<ffi::AnyBuffer>(first + i);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!cache || !result || cache->dimensions().size() != 4 || (*result)->size_bytes() != cache->size_bytes()) {
      return ffi::Error::InvalidArgument("caches have four axes and stay of their size");
    }
    const auto sizes = cache->dimensions();
    if (i == 0) {
      caches->R = sizes[0], caches->K = sizes[1], caches->S = sizes[2];
      const int64_t tokens = sizes[0] * sizes[1] * sizes[2];
      caches->head_bytes = tokens > 0 ? static_cast<int64_t>(cache->size_bytes()) / tokens : 0;
    } else if (sizes[0] != caches->R || sizes[1] != caches->K || sizes[2] != caches->S ||
               static_cast<int64_t>(cache->size_bytes()) != caches->R * caches->K * caches->S * caches->head_bytes) {
      return ffi::Error::InvalidArgument("caches are not of one size");
    }
    if ((*result)->untyped_data() != cache->untyped_data()) {
      std::memcpy((*result)->untyped_data(), cache->untyped_data(), cache->size_bytes());
    }
    caches->data.push_back(static_cast<char*>((*result)->untyped_data()));
  }
  return ffi::Error::Success();
}

// Row r becomes what row `parents[r]` was, from position `starts[r]` to `ends[r]`, in every head of every cache.
ffi::Error FollowBeams(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> parents, ffi::Buffer<ffi::S32> starts,
                       ffi::Buffer<ffi::S32> ends, ffi::RemainingArgs caches, ffi::RemainingRets results) {
  const int64_t R = parents.element_count();
  if (caches.size() != results.size() || starts.element_count() != parents.element_count() ||
      ends.element_count() != parents.element_count()) {
    return ffi::Error::InvalidArgument("caches, results and rows have different numbers");
  }
  Caches found;
  if (ffi::Error error = Open(caches, 0, results, &found); error.failure()) return error;
  if (found.R != R) return ffi::Error::InvalidArgument("caches and rows have different numbers");
  const std::vector<char*>& data = found.data;
  const int64_t K = found.K, S = found.S, row_bytes = found.head_bytes;
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

// Writes M tokens, each [K, H] of every array, to a row and a position of its cache; one past an end is dropped. The
// arguments are all caches and then as many arrays of tokens.
ffi::Error PutTokens(ffi::Buffer<ffi::S32> rows, ffi::Buffer<ffi::S32> places, ffi::RemainingArgs arguments,
                     ffi::RemainingRets results) {
  const int64_t M = rows.element_count();
  if (arguments.size() != 2 * results.size() || places.element_count() != rows.element_count()) {
    return ffi::Error::InvalidArgument("caches, tokens, rows and positions have different numbers");
  }
  Caches caches;
  if (ffi::Error error = Open(arguments, 0, results, &caches); error.failure()) return error;
  const int64_t K = caches.K, S = caches.S, bytes = caches.head_bytes;
  for (size_t i = 0; i < caches.data.size(); ++i) {
    const auto tokens = arguments.get<ffi::AnyBuffer>(results.size() + i);
    if (!tokens || static_cast<int64_t>(tokens->size_bytes()) != M * K * bytes) {
      return ffi::Error::InvalidArgument("tokens don't fit their cache");
    }
    const char* token = static_cast<const char*>(tokens->untyped_data());
    for (int64_t m = 0; m < M; ++m) {
      const int64_t row = rows.typed_data()[m], place = places.typed_data()[m];
      if (row < 0 || row >= caches.R || place < 0 || place >= S) {
        token += K * bytes;
        continue;
      }
      for (int64_t head = 0; head < K; ++head, token += bytes) {
        std::memcpy(caches.data[i] + ((row * K + head) * S + place) * bytes, token, bytes);
      }
    }
  }
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(PutTokensHandler, PutTokens,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_CACHES_H_
