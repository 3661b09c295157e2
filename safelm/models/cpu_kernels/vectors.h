// Vectors of 4-byte numbers, as wide as the machine has them.

#ifndef SAFELM_MODELS_CPU_KERNELS_VECTORS_H_
#define SAFELM_MODELS_CPU_KERNELS_VECTORS_H_

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace safelm {

#if defined(__AVX512VNNI__)
constexpr int kLanes = 16;
using Register = __m512i;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
using Register = __m256i;
#else
#error "neither AVX-512 nor AVX2"
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

template <typename To, typename From>
inline To Load(const From* from) {
  To value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// A vector of numbers in float32, or in bfloat16, which is the first half of one.
inline Floats LoadNumbers(const float* from) { return Load<Floats>(from); }
inline Floats LoadNumbers(const uint16_t* from) {
#if defined(__AVX512VNNI__)
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(Load<__m256i>(from)), 16);
#else
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(Load<__m128i>(from)), 16);
#endif
}

inline void Store(float* to, const Floats& value) { std::memcpy(to, &value, sizeof(value)); }

inline float Sum(Floats vector) {
#if defined(__AVX512VNNI__)
  return _mm512_reduce_add_ps((__m512)vector);
#else
  const __m128 halves = _mm_add_ps(_mm256_castps256_ps128((__m256)vector), _mm256_extractf128_ps((__m256)vector, 1));
  const __m128 pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
#endif
}

// The sums of four vectors.
inline __m128 Sums(Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX512VNNI__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 lanes = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 pairs = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
#else
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b), _mm256_unpackhi_ps((__m256)a, (__m256)b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d), _mm256_unpackhi_ps((__m256)c, (__m256)d));
  const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#endif
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

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

}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_VECTORS_H_
