// An update of AdamW in one pass over memory, and the norm before it, as custom calls of XLA on the CPU.
//
// XLA makes a pass of each part of it: with more parameters than caches hold, the update waits for memory.

#ifndef SAFELM_MODELS_CPU_KERNELS_ADAMW_H_
#define SAFELM_MODELS_CPU_KERNELS_ADAMW_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "split.h"
#include "xla/ffi/api/ffi.h"

namespace safelm {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kNumbers = 32 << 10;  // in a piece of work, which has all sums of the norm in one order

// Where pieces of several arrays begin.
struct Pieces {
  std::vector<int64_t> first{0};  // of each array, and behind the last

  void Add(int64_t count) { first.push_back(first.back() + (count + kNumbers - 1) / kNumbers); }
  int64_t ArrayOf(int64_t piece) const {
    return std::upper_bound(first.begin(), first.end(), piece) - first.begin() - 1;
  }
};

ffi::Error SquaredNorm(ffi::ThreadPool pool, ffi::RemainingArgs arrays, ffi::ResultBuffer<ffi::F32> out) {
  Pieces pieces;
  std::vector<ffi::Buffer<ffi::F32>> found;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const auto array = arrays.get<ffi::Buffer<ffi::F32>>(i);
    if (!array) return ffi::Error::InvalidArgument("an array is not in float32");
    found.push_back(*array);
    pieces.Add(array->element_count());
  }
  std::vector<double> sums(pieces.first.back());
  Split(pool, sums.size(), sums.size() * kNumbers * 4, [&](int64_t piece) {
    const int64_t array = pieces.ArrayOf(piece), begin = (piece - pieces.first[array]) * kNumbers;
    const int64_t end = std::min<int64_t>(begin + kNumbers, found[array].element_count());
    const float* values = found[array].typed_data();
    double some[8] = {};
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) {
      for (int lane = 0; lane < 8; ++lane) some[lane] += static_cast<double>(values[i + lane]) * values[i + lane];
    }
    for (; i < end; ++i) some[0] += static_cast<double>(values[i]) * values[i];
    double sum = 0;
    for (const double each : some) sum += each;
    sums[piece] = sum;
  });
  double sum = 0;
  for (const double each : sums) sum += each;
  *out->typed_data() = static_cast<float>(sum);
  return ffi::Error::Success();
}

// `arguments`: all parameters, then all first moments, second moments and gradients; `results`: the first three again.
// `numbers`: what gradients are multiplied by, the learning rate, the moments' corrections 1 - b^t, and whether to
// update at all (not 0).
ffi::Error AdamW(ffi::ThreadPool pool, float b1, float b2, float eps, ffi::Span<const float> decays,
                 ffi::Buffer<ffi::F32> numbers, ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  const size_t count = decays.size();
  if (numbers.element_count() != 5 || arguments.size() != 4 * count || results.size() != 3 * count) {
    return ffi::Error::InvalidArgument("parameters, moments and gradients have different numbers");
  }
  struct Array {
    const float *param, *first, *second, *gradient;
    float *new_param, *new_first, *new_second;
    int64_t size;
    float decay;
  };
  Pieces pieces;
  std::vector<Array> arrays;
  for (size_t i = 0; i < count; ++i) {
    const float* in[4];
    float* out[3];
    int64_t size = 0;
    for (size_t part = 0; part < 4; ++part) {
      const auto argument = arguments.get<ffi::Buffer<ffi::F32>>(part * count + i);
      if (!argument || (part > 0 && static_cast<int64_t>(argument->element_count()) != size)) {
        return ffi::Error::InvalidArgument("parameters, moments and gradients differ in size, or are not in float32");
      }
      in[part] = argument->typed_data(), size = argument->element_count();
      if (part == 3) continue;
      auto result = results.get<ffi::Buffer<ffi::F32>>(part * count + i);
      if (!result || static_cast<int64_t>((*result)->element_count()) != size) {
        return ffi::Error::InvalidArgument("a result has another size, or is not in float32");
      }
      out[part] = (*result)->typed_data();
    }
    arrays.push_back({in[0], in[1], in[2], in[3], out[0], out[1], out[2], size, decays.begin()[i]});
    pieces.Add(size);
  }
  const float* of = numbers.typed_data();
  const float scale = of[0], rate = of[1], first_correction = of[2], second_correction = of[3];
  const bool is_applied = of[4] != 0;
  Split(pool, pieces.first.back(), pieces.first.back() * kNumbers * 28, [&](int64_t piece) {
    const int64_t index = pieces.ArrayOf(piece), begin = (piece - pieces.first[index]) * kNumbers;
    const Array& array = arrays[index];
    const int64_t end = std::min(begin + kNumbers, array.size);
    if (!is_applied) {
      const size_t bytes = (end - begin) * sizeof(float);
      if (array.new_param != array.param) std::memcpy(array.new_param + begin, array.param + begin, bytes);
      if (array.new_first != array.first) std::memcpy(array.new_first + begin, array.first + begin, bytes);
      if (array.new_second != array.second) std::memcpy(array.new_second + begin, array.second + begin, bytes);
      return;
    }
    const float decay = array.decay;
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      const float gradient = array.gradient[i] * scale, param = array.param[i];
      const float first = b1 * array.first[i] + (1 - b1) * gradient;
      const float second = b2 * array.second[i] + (1 - b2) * gradient * gradient;
      const float direction = first / first_correction / (std::sqrt(second / second_correction) + eps);
      array.new_first[i] = first;
      array.new_second[i] = second;
      array.new_param[i] = param - rate * (direction + decay * param);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SquaredNormHandler, SquaredNorm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(AdamWHandler, AdamW,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("b1")
                                  .Attr<float>("b2")
                                  .Attr<float>("eps")
                                  .Attr<ffi::Span<const float>>("decays")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_ADAMW_H_
