// Attention of alternatives for the next token over their row's cache and, each, itself, as a custom call of XLA.
//
// Only cached tokens are read, not the room behind them. A row's result depends on no other row.
//
// R rows, C alternatives, N query heads, K key heads, S cached positions, H numbers a head.

#ifndef SAFELM_INFERENCE_CPU_KERNELS_ATTENTION_H_
#define SAFELM_INFERENCE_CPU_KERNELS_ATTENTION_H_

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

// e^x for x <= 0, within 2 units of the last place; 0 below -87. No number stays none.
inline Floats Exp(Floats x) {
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats bounded = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats shifted = bounded * 1.44269504f + magic;
  const Floats whole = shifted - magic;
  const Floats rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats series = Floats{} + 1.9875691500e-4f;
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * rest * rest + rest + 1.0f;
  const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;
  const Floats result = series * (Floats)power;
  return x < -87.0f ? Floats{} : result;
}

inline float Dot(const float* a, const float* b, int64_t count) {
  Floats sum = {};
  for (int64_t i = 0; i < count; i += kLanes) sum += Load<Floats>(a + i) * Load<Floats>(b + i);
  return Sum(sum);
}

// One query over `count` cached keys and values and its own.
void Attend(const float* query, const float* keys, const float* values, int64_t count, const float* own_key,
            const float* own_value, int64_t head_dim, float* scores, float* out) {
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  const float own_score = Dot(query, own_key, head_dim) * scale;
  float peak = own_score;
  for (int64_t s = 0; s < count; ++s) {
    scores[s] = Dot(query, keys + s * head_dim, head_dim) * scale;
    peak = std::max(peak, scores[s]);
  }
  Floats sums = {};
  std::fill(scores + count, scores + (count + kLanes - 1) / kLanes * kLanes, -INFINITY);
  for (int64_t s = 0; s < count; s += kLanes) {
    const Floats weights = Exp(Load<Floats>(scores + s) - peak);
    Store(scores + s, weights);
    sums += weights;
  }
  const float own = std::exp(own_score - peak);
  const float norm = 1 / (Sum(sums) + own);
  for (int64_t h = 0; h < head_dim; h += kLanes) {
    Floats sum = own * Load<Floats>(own_value + h);
    for (int64_t s = 0; s < count; ++s) sum += scores[s] * Load<Floats>(values + s * head_dim + h);
    Store(out + h, sum * norm);
  }
}

ffi::Error AttendNext(ffi::ThreadPool pool, int64_t window, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                      ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::F32> keys, ffi::Buffer<ffi::F32> values,
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
  const float *key_data = keys.typed_data(), *value_data = values.typed_data();
  const int32_t* length_data = lengths.typed_data();
  float* out_data = out->typed_data();
  const int64_t per_key = N / K;
  Split(pool, R * K, R * K * C * per_key * S * H * 8, [=](int64_t piece) {
    static thread_local std::vector<float> scores;
    scores.resize(S + kLanes);
    const int64_t row = piece / K, head = piece % K;
    const int64_t end = std::clamp<int64_t>(length_data[row], 0, S);
    const int64_t begin = window ? std::clamp<int64_t>(length_data[row] - window + 1, 0, end) : 0;
    const int64_t cached = (piece * S + begin) * H;
    for (int64_t c = 0; c < C; ++c) {
      const int64_t own = ((row * C + c) * K + head) * H;
      for (int64_t n = head * per_key; n < (head + 1) * per_key; ++n) {
        const int64_t at = ((row * C + c) * N + n) * H;
        Attend(q_data + at, key_data + cached, value_data + cached, end - begin, k_data + own, v_data + own, H,
               scores.data(), out_data + at);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AttendNextHandler, AttendNext,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("window")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

}  // namespace safelm

#endif  // SAFELM_INFERENCE_CPU_KERNELS_ATTENTION_H_
