// The instructions that multiply: a few inputs, repeated, with as many weights of every output of a vector.

#ifndef SAFELM_MODELS_CPU_KERNELS_DOTS_H_
#define SAFELM_MODELS_CPU_KERNELS_DOTS_H_

#include <immintrin.h>

#include <cstdint>

#include "vectors.h"

namespace safelm {
namespace {

// The dot products in assembly: GCC 12 moves the sums from register to register around the intrinsic.
#if defined(__AVX512VNNI__)
constexpr int kMostRows = 8;  // of a tile
constexpr int kBias = 128;  // what is added to inputs, which the instruction takes without a sign
inline Register Repeat(int32_t four) { return _mm512_set1_epi32(four); }
inline Register Dot(Register sums, Register inputs, Register weights) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(inputs), "vm"(weights));
  return sums;
}
#elif defined(__AVXVNNI__)
constexpr int kMostRows = 4;
constexpr int kBias = 128;
inline Register Repeat(int32_t four) { return _mm256_set1_epi32(four); }
inline Register Dot(Register sums, Register inputs, Register weights) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(inputs), "xm"(weights));
  return sums;
}
#elif defined(__AVX2__)
constexpr int kMostRows = 4;
constexpr int kBias = 0;
inline Register Repeat(int32_t four) { return _mm256_set1_epi32(four); }
// |x| * sign(x) * w: two products of at most 127 * 127 fit into 16 bits, so nothing saturates.
inline Register Dot(Register sums, Register inputs, Register weights) {
  const Register pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(inputs), _mm256_sign_epi8(weights, inputs));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
#error "no vectors of bytes"
#endif

// Adds the products of a pair of bfloat16 inputs with a pair of every output's weights, in float32.
#if defined(__AVX512BF16__)
struct Pair {
  Register both;
  explicit Pair(uint32_t bits) : both(Repeat(static_cast<int32_t>(bits))) {}
};
using PairsOfWeights = Register;
inline PairsOfWeights LoadPairs(const char* from) { return Load<Register>(from); }
inline Floats AddPair(Floats sums, const Pair& inputs, const PairsOfWeights& weights) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(inputs.both), "vm"(weights));
  return sums;
}
#else
struct Pair {
  float first, second;
  explicit Pair(uint32_t bits) {
    const uint32_t halves[2] = {bits << 16, bits & 0xffff0000u};
    first = Load<float>(&halves[0]), second = Load<float>(&halves[1]);
  }
};
struct PairsOfWeights {
  Floats first, second;
};
inline PairsOfWeights LoadPairs(const char* from) {
  const Ints both = Load<Ints>(from);
  return {(Floats)(both << 16), (Floats)(both & static_cast<int32_t>(0xffff0000u))};
}
inline Floats AddPair(Floats sums, const Pair& inputs, const PairsOfWeights& weights) {
  sums += inputs.first * weights.first;
  return sums + inputs.second * weights.second;
}
#endif

}  // namespace
}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_DOTS_H_
