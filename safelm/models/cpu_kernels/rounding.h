// Rounds inputs to what the weights are in.

#ifndef SAFELM_MODELS_CPU_KERNELS_ROUNDING_H_
#define SAFELM_MODELS_CPU_KERNELS_ROUNDING_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "dots.h"
#include "vectors.h"

namespace safelm {
namespace {

// A row of float32 as int8 with one scale, |x| / 127 at most, to the nearest and of two the even one. Returns the
// scale, which is no number where one of the inputs is none.
template <int kTerms>
float Round(const float* x, int64_t num_inputs, int64_t stride, uint8_t* rounded) {
  int32_t most = 0;  // the bits of sizes are ordered as the sizes are, with what is no number above all
  for (int64_t k = 0; k < num_inputs; ++k) most = std::max(most, Load<int32_t>(x + k) & 0x7fffffff);
  const float scale = std::max(Load<float>(&most), 1e-30f) / 127;
  for (int64_t k = 0; k < num_inputs; ++k) {
    const float value = x[k] / scale;
    const float first = std::nearbyint(value);
    rounded[k] = static_cast<uint8_t>(static_cast<int32_t>(first) + kBias);
    if (kTerms == 2) {
      rounded[stride + k] = static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint((value - first) * 254)) + kBias);
    }
  }
  for (int64_t term = 0; term < kTerms; ++term) {
    std::fill(rounded + term * stride + num_inputs, rounded + (term + 1) * stride, static_cast<uint8_t>(kBias));
  }
  return most > 0x7f800000 ? std::numeric_limits<float>::quiet_NaN() : scale;
}

// The bits of a number in bfloat16, to the nearest and of two the even one.
inline uint32_t ToBfloat16(float value) {
  const uint32_t bits = Load<uint32_t>(&value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded;  // what is no number stays none
}

}  // namespace
}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_ROUNDING_H_
