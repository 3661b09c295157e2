// The logarithm of a sum of exponentials, row by row, as a custom call of XLA, which reads wide rows three times and adds
// them up in a tree.
//
// R rows, V numbers a row.

#ifndef SAFELM_MODELS_CPU_KERNELS_LOGITS_H_
#define SAFELM_MODELS_CPU_KERNELS_LOGITS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "split.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace safelm {
namespace {

namespace ffi = xla::ffi;

constexpr int kSums = 4;  // vectors that are added up side by side

// Of numbers among which is one that is none: none.
inline float LogSumExpOfRow(const float* row, int64_t count) {
  constexpr int64_t kStep = kSums * kLanes;
  const int64_t whole = count / kStep * kStep;
  Floats peaks[kSums];
  for (auto& peak : peaks) peak = Floats{} - INFINITY;
  for (int64_t i = 0; i < whole; i += kStep) {
    for (int s = 0; s < kSums; ++s) {
      const Floats value = Load<Floats>(row + i + s * kLanes);
      peaks[s] = value > peaks[s] ? value : peaks[s];
    }
  }
  float peak = -INFINITY;
  for (const auto& each : peaks) {
    for (int lane = 0; lane < kLanes; ++lane) peak = std::max(peak, each[lane]);
  }
  for (int64_t i = whole; i < count; ++i) peak = std::max(peak, row[i]);
  if (std::isinf(peak)) {  // one is infinite, or all are minus infinity; unless one is no number
    for (int64_t i = 0; i < count; ++i) {
      if (std::isnan(row[i])) return row[i];
    }
    return peak;
  }
  Floats sums[kSums] = {};
  for (int64_t i = 0; i < whole; i += kStep) {
    for (int s = 0; s < kSums; ++s) sums[s] += Exp(Load<Floats>(row + i + s * kLanes) - peak);
  }
  float sum = Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int64_t i = whole; i < count; ++i) sum += std::exp(row[i] - peak);
  return peak + std::log(sum);
}

ffi::Error LogSumExp(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> values, ffi::ResultBuffer<ffi::F32> out) {
  const auto sizes = values.dimensions();
  if (sizes.size() != 2 || out->element_count() != static_cast<size_t>(sizes[0])) {
    return ffi::Error::InvalidArgument("want rows of numbers, and one result for each");
  }
  const int64_t R = sizes[0], V = sizes[1];
  const float* data = values.typed_data();
  float* result = out->typed_data();
  Split(pool, R, R * V * 2 * static_cast<int64_t>(sizeof(float)),
        [=](int64_t row) { result[row] = LogSumExpOfRow(data + row * V, V); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LogSumExpHandler, LogSumExp,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());

}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_LOGITS_H_
