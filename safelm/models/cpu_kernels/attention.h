// Attention as custom calls of XLA: of alternatives for the next token over their row's cache and, each, itself; and of
// the tokens of prompts that stand end to end in a row.
//
// Only tokens that are seen are read, not the room behind them nor other prompts. A row's result depends on no other
// row, and a prompt's on no other prompt and not on where it was cut.
//
// Everything is in float32 but the cache, which may be in bfloat16. R rows, C alternatives, T tokens, N query heads, K
// key heads, S cached positions, H numbers a head.

#ifndef SAFELM_MODELS_CPU_KERNELS_ATTENTION_H_
#define SAFELM_MODELS_CPU_KERNELS_ATTENTION_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "split.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace safelm {
namespace {

namespace ffi = xla::ffi;

inline float Dot(const float* a, const float* b, int64_t count) {
  Floats sum = {};
  for (int64_t i = 0; i < count; i += kLanes) sum += Load<Floats>(a + i) * Load<Floats>(b + i);
  return Sum(sum);
}

constexpr int kKeys = 4;  // whose scores are added up together
constexpr int64_t kAhead = 16, kLine = 64;  // keys asked for before their use; bytes that come at once
constexpr int kChunks = 4;  // vectors of a head's values that are summed side by side
constexpr int64_t kTokens = 16;  // of a chunk, in a piece of work
#if defined(__AVX512VNNI__)
constexpr int kMostQueries = 4;  // that read a cache together: their sums fill the registers
#else
constexpr int kMostQueries = 2;
#endif

// Keys and values of one head, one after the other, `stride` numbers apart.
template <typename Number>
struct Span {
  const Number *keys, *values;
  int64_t count, stride;
};

template <typename Number>
Span(const Number*, const Number*, int64_t, int64_t) -> Span<Number>;

// What some queries see: cached tokens, and then new ones.
template <typename Cached>
struct Seen {
  Span<Cached> cached;
  Span<float> fresh;
  int64_t Count() const { return cached.count + fresh.count; }
};
template <typename Cached>
Seen(Span<Cached>, Span<float>) -> Seen<Cached>;

// A query and what it gives.
struct Query {
  const float* query;
  float* out;
  const float *own_key, *own_value;  // seen behind all spans by it alone; or none
  int64_t num_unseen;  // of the last keys, which others beside it see
};

// Asks for a token's numbers ahead of their use: a cache is larger than the processor's own memory, and keys and values
// take turns, so that it would wait for one while it has time for the other.
template <typename Number>
inline void Ask(const Number* from, int64_t head_dim) {
  const char* line = reinterpret_cast<const char*>(from);
  const char* end = line + head_dim * static_cast<int64_t>(sizeof(Number));
  for (; line < end; line += kLine) _mm_prefetch(line, _MM_HINT_T1);
}

// The scores of some queries over a span, [queries][stride]. Up to 3 numbers behind them are written too.
template <int kQueries, typename Number>
inline void Score(const Query* queries, const Span<Number>& span, int64_t head_dim, float scale, float* scores,
                  int64_t stride) {
  for (int64_t s = 0; s < span.count; s += kKeys) {
    for (int64_t k = s; k < s + kKeys; ++k) {
      Ask(span.values + k * span.stride, head_dim);
      Ask(span.keys + (k + kAhead) * span.stride, head_dim);
    }
    Floats sums[kQueries][kKeys] = {};
    for (int64_t h = 0; h < head_dim; h += kLanes) {
      Floats query[kQueries];
      for (int q = 0; q < kQueries; ++q) query[q] = Load<Floats>(queries[q].query + h);
      for (int k = 0; k < kKeys; ++k) {
        const Floats key = LoadNumbers(span.keys + std::min(s + k, span.count - 1) * span.stride + h);
        for (int q = 0; q < kQueries; ++q) sums[q][k] += query[q] * key;
      }
    }
    for (int q = 0; q < kQueries; ++q) {
      _mm_storeu_ps(scores + q * stride + s,
                    _mm_mul_ps(Sums(sums[q][0], sums[q][1], sums[q][2], sums[q][3]), _mm_set1_ps(scale)));
    }
  }
}

// Adds a span's values from number `h` of a head on, weighted by each query's weights.
template <int kQueries, int kWide, typename Number>
inline void AddSpan(const Span<Number>& span, int64_t h, const float* weights, int64_t stride,
                    Floats (&sums)[kQueries][kWide]) {
  for (int64_t s = 0; s < span.count; ++s) {
    Floats value[kWide];
    for (int v = 0; v < kWide; ++v) value[v] = LoadNumbers(span.values + s * span.stride + h + v * kLanes);
    for (int q = 0; q < kQueries; ++q) {
      const float weight = weights[q * stride + s];
      for (int v = 0; v < kWide; ++v) sums[q][v] += weight * value[v];
    }
  }
}

// The sums of values from number `h` of a head on, weighted by each query's weights and `owns`, times `norms`.
template <int kQueries, int kWide, typename Cached>
inline void AddValues(const Query* queries, const Seen<Cached>& seen, int64_t h, const float* weights, int64_t stride,
                      const float* owns, const float* norms) {
  Floats sums[kQueries][kWide] = {};
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; queries[q].own_value && v < kWide; ++v) {
      sums[q][v] = owns[q] * Load<Floats>(queries[q].own_value + h + v * kLanes);
    }
  }
  AddSpan<kQueries, kWide>(seen.cached, h, weights, stride, sums);
  AddSpan<kQueries, kWide>(seen.fresh, h, weights + seen.cached.count, stride, sums);
  for (int q = 0; q < kQueries; ++q) {
    for (int v = 0; v < kWide; ++v) Store(queries[q].out + h + v * kLanes, sums[q][v] * norms[q]);
  }
}

// Some queries over what they see. A query's numbers are added up in the same order however many stand beside it, and
// however its keys are split into spans.
template <int kQueries, typename Cached>
void Attend(const Query* queries, const Seen<Cached>& seen, int64_t head_dim, float* scores, int64_t stride) {
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  float owns[kQueries], norms[kQueries];
  Score<kQueries>(queries, seen.cached, head_dim, scale, scores, stride);
  Score<kQueries>(queries, seen.fresh, head_dim, scale, scores + seen.cached.count, stride);
  for (int q = 0; q < kQueries; ++q) {
    float* of_query = scores + q * stride;
    const int64_t count = seen.Count() - queries[q].num_unseen;
    const float* own_key = queries[q].own_key;
    const float own_score = own_key ? Dot(queries[q].query, own_key, head_dim) * scale : -INFINITY;
    float peak = own_score;
    for (int64_t s = 0; s < count; ++s) peak = std::max(peak, of_query[s]);
    Floats sums = {};
    std::fill(of_query + count, of_query + (seen.Count() + kLanes - 1) / kLanes * kLanes, -INFINITY);
    for (int64_t s = 0; s < seen.Count(); s += kLanes) {
      const Floats weights = Exp(Load<Floats>(of_query + s) - peak);
      Store(of_query + s, weights);
      sums += weights;
    }
    owns[q] = std::exp(own_score - peak);
    norms[q] = 1 / (Sum(sums) + owns[q]);
  }
  int64_t h = 0;
  for (; h + kChunks * kLanes <= head_dim; h += kChunks * kLanes) {
    AddValues<kQueries, kChunks>(queries, seen, h, scores, stride, owns, norms);
  }
  for (; h < head_dim; h += kLanes) AddValues<kQueries, 1>(queries, seen, h, scores, stride, owns, norms);
}

// All queries over what they see, in groups.
template <typename Cached>
void AttendAll(const std::vector<Query>& queries, const Seen<Cached>& seen, int64_t head_dim) {
  static thread_local std::vector<float> scores;
  const int64_t stride = seen.Count() + kLanes;
  if (scores.size() < static_cast<size_t>(kMostQueries * stride)) scores.resize(kMostQueries * stride);
  const Query* next = queries.data();
  int64_t left = static_cast<int64_t>(queries.size());
  for (; left >= kMostQueries; left -= kMostQueries, next += kMostQueries) {
    Attend<kMostQueries>(next, seen, head_dim, scores.data(), stride);
  }
  if (left == 3) {
    Attend<3>(next, seen, head_dim, scores.data(), stride);
  } else if (left == 2) {
    Attend<2>(next, seen, head_dim, scores.data(), stride);
  } else if (left == 1) {
    Attend<1>(next, seen, head_dim, scores.data(), stride);
  }
}

// Calls `attend` with the cached keys and values, in float32 or as the bits of bfloat16.
template <typename Attend>
ffi::Error WithCached(ffi::AnyBuffer keys, ffi::AnyBuffer values, const Attend& attend) {
  if (keys.element_type() != values.element_type()) return ffi::Error::InvalidArgument("keys and values differ");
  if (keys.element_type() == ffi::DataType::F32) {
    attend(static_cast<const float*>(keys.untyped_data()), static_cast<const float*>(values.untyped_data()));
  } else if (keys.element_type() == ffi::DataType::BF16) {
    attend(static_cast<const uint16_t*>(keys.untyped_data()), static_cast<const uint16_t*>(values.untyped_data()));
  } else {
    return ffi::Error::InvalidArgument("the cache is neither in float32 nor in bfloat16");
  }
  return ffi::Error::Success();
}

ffi::Error AttendNext(ffi::ThreadPool pool, int64_t window, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                      ffi::Buffer<ffi::F32> v, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                      ffi::Buffer<ffi::S32> lengths, ffi::ResultBuffer<ffi::F32> out) {
  const auto of_q = q.dimensions(), of_k = k.dimensions(), of_cache = keys.dimensions();
  if (of_q.size() != 4 || of_k.size() != 4 || of_cache.size() != 4) return ffi::Error::InvalidArgument("axes");
  const int64_t R = of_q[0], C = of_q[1], N = of_q[2], H = of_q[3], K = of_k[2], S = of_cache[2];
  if (H % kLanes || K < 1 || N % K || of_k[0] != R || of_k[1] != C || of_k[3] != H || of_cache[0] != R ||
      of_cache[1] != K || of_cache[3] != H || values.element_count() != keys.element_count() ||
      v.element_count() != k.element_count() || out->element_count() != q.element_count() ||
      lengths.element_count() != static_cast<size_t>(R)) {
    return ffi::Error::InvalidArgument("queries, keys, values and cache have sizes that don't fit");
  }
  const float *q_data = q.typed_data(), *k_data = k.typed_data(), *v_data = v.typed_data();
  const int32_t* length_data = lengths.typed_data();
  float* out_data = out->typed_data();
  const int64_t per_key = N / K;
  return WithCached(keys, values, [=](const auto* key_data, const auto* value_data) {
    Split(pool, R * K, R * K * C * per_key * S * H * 2 * sizeof(*key_data), [=](int64_t piece) {
      static thread_local std::vector<Query> queries;
      queries.clear();
      const int64_t row = piece / K, head = piece % K;
      const int64_t end = std::clamp<int64_t>(length_data[row], 0, S);
      const int64_t begin = window ? std::clamp<int64_t>(length_data[row] - window + 1, 0, end) : 0;
      const int64_t cached = (piece * S + begin) * H;
      for (int64_t c = 0; c < C; ++c) {
        const int64_t own = ((row * C + c) * K + head) * H;
        for (int64_t n = head * per_key; n < (head + 1) * per_key; ++n) {
          const int64_t at = ((row * C + c) * N + n) * H;
          queries.push_back({q_data + at, out_data + at, k_data + own, v_data + own, 0});
        }
      }
      AttendAll(queries, Seen{Span{key_data + cached, value_data + cached, end - begin, H}, Span<float>{}}, H);
    });
  });
}

// Each token sees the tokens of its prompt up to itself, from `starts` on, and `behind` cached ones before those.
ffi::Error AttendChunk(ffi::ThreadPool pool, int64_t window, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                       ffi::Buffer<ffi::F32> v, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                       ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> behind, ffi::ResultBuffer<ffi::F32> out) {
  const auto of_q = q.dimensions(), of_k = k.dimensions(), of_cache = keys.dimensions();
  if (of_q.size() != 4 || of_k.size() != 4 || of_cache.size() != 4) return ffi::Error::InvalidArgument("axes");
  const int64_t T = of_q[1], N = of_q[2], H = of_q[3], K = of_k[2], S = of_cache[2];
  if (H % kLanes || K < 1 || N % K || of_q[0] != 1 || of_k[0] != 1 || of_k[1] != T || of_k[3] != H ||
      of_cache[0] != 1 || of_cache[1] != K || of_cache[3] != H || values.element_count() != keys.element_count() ||
      v.element_count() != k.element_count() || out->element_count() != q.element_count() ||
      starts.element_count() != static_cast<size_t>(T) || behind.element_count() != static_cast<size_t>(T)) {
    return ffi::Error::InvalidArgument("queries, keys, values and cache have sizes that don't fit");
  }
  const float *q_data = q.typed_data(), *k_data = k.typed_data(), *v_data = v.typed_data();
  const int32_t *start_data = starts.typed_data(), *behind_data = behind.typed_data();
  float* out_data = out->typed_data();
  const int64_t per_key = N / K, a_head = (T + kTokens - 1) / kTokens;
  return WithCached(keys, values, [=](const auto* key_data, const auto* value_data) {
    Split(pool, K * a_head, T * N * H * 4 * kTokens, [=](int64_t piece) {
      static thread_local std::vector<Query> queries;
      const int64_t head = piece / a_head, last = std::min(T, (piece % a_head + 1) * kTokens);
      const int64_t together = window ? 1 : std::max<int64_t>(1, kMostQueries / per_key);
      for (int64_t t = piece % a_head * kTokens; t < last;) {
        const int64_t start = std::clamp<int64_t>(start_data[t], 0, t);
        int64_t end = t + 1;
        while (end < std::min(t + together, last) && start_data[end] == start_data[t]) ++end;
        const int64_t cached = std::clamp<int64_t>(behind_data[t], 0, S), place = cached + t - start;
        const int64_t hidden = window ? std::clamp<int64_t>(place - window + 1, 0, place) : 0;  // of the first tokens
        const int64_t old = std::min(hidden, cached), own = start + hidden - old;
        const int64_t at_cache = (head * S + old) * H, at_own = (own * K + head) * H;
        queries.clear();
        for (int64_t token = t; token < end; ++token) {
          for (int64_t n = head * per_key; n < (head + 1) * per_key; ++n) {
            const int64_t at = (token * N + n) * H;
            queries.push_back({q_data + at, out_data + at, nullptr, nullptr, end - 1 - token});
          }
        }
        const Span before{key_data + at_cache, value_data + at_cache, cached - old, H};
        AttendAll(queries, Seen{before, Span<float>{k_data + at_own, v_data + at_own, end - own, K * H}}, H);
        t = end;
      }
    });
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AttendChunkHandler, AttendChunk,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("window")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(AttendNextHandler, AttendNext,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("window")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_ATTENTION_H_
