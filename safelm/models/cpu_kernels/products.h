// Products of few rows with prepacked weights, as custom calls of XLA on the CPU.
//
// Weights stand in blocks of 32 outputs, so that a product reads them once, from first to last. A step of a block is
// 128 bytes: 4 inputs x 32 outputs in int8, [N/32, K/4, 32, 4], 2 inputs in bfloat16, [N/32, K/2, 32, 2], or 1 in
// float32, [N/32, K, 32]. The sum of an output runs over the inputs in order, whatever the number of rows: a row's
// result does not depend on its batch.
//
// R rows, K inputs, N outputs.

#ifndef SAFELM_MODELS_CPU_KERNELS_PRODUCTS_H_
#define SAFELM_MODELS_CPU_KERNELS_PRODUCTS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "dots.h"
#include "rounding.h"
#include "split.h"
#include "tiles.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace safelm {
namespace {

namespace ffi = xla::ffi;

constexpr int kBlock = 32;  // outputs
constexpr int kStep = 128;  // bytes of a block
constexpr int kVectors = 2;  // of a tile, side by side
constexpr int kTile = kVectors * kLanes;  // outputs
constexpr int64_t kPanel = 128;  // rows that pass over a block while it is in the cache
constexpr int64_t kLeastTileRows = 9;  // for AMX: fewer wait for memory either way
constexpr int kPage = 4096;  // bytes
constexpr int64_t kPieceBytes = 32 << 10;  // of weights, in a piece of work

// One matrix and where its products go.
struct Matrix {
  const char* weights;
  const float* scales;  // of int8, one an output, as many as the blocks have
  const int32_t* sums;  // of int8, over an output's weights
  float* out;  // [R, N]
  int64_t num_outputs;
  int64_t num_blocks;
};

// The inputs of all rows as the tiles read them.
template <typename Input>
struct Inputs {
  const Input* values;
  int64_t stride;  // from row to row
  int64_t num_rows;
  int64_t num_steps;  // of a block
  const float* scales;  // of int8, one a row
};

inline void StoreTile(const Matrix& matrix, int64_t row, int64_t output, const Floats* vectors) {
  float* to = matrix.out + row * matrix.num_outputs + output;
  const int64_t left = matrix.num_outputs - output;
  for (int v = 0; v < kVectors; ++v) {
    if (left >= (v + 1) * kLanes) {
      Store(to + v * kLanes, vectors[v]);
    } else if (left > v * kLanes) {
      std::memcpy(to + v * kLanes, &vectors[v], (left - v * kLanes) * sizeof(float));
    }
  }
}

// Asks for the weights a page ahead, where the processor's own fetching ends; many rows wait for products, not memory.
template <int kRows>
inline void FetchAhead(const char* block) {
  if (kRows > 4) return;
  for (int line = 0; line < kTile * 4; line += 64) __builtin_prefetch(block + kPage + line);
}

// A tile of float32.
template <int kRows, int kTerms>
inline void Tile(const Inputs<float>& inputs, const Matrix& matrix, const char* block, int64_t row, int64_t output) {
  static_assert(kTerms == 1);
  Floats sums[kRows][kVectors] = {};
  const float* x = inputs.values + row * inputs.stride;
  for (int64_t k = 0; k < inputs.num_steps; ++k, block += kStep) {
    FetchAhead<kRows>(block);
    Floats weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = Load<Floats>(block + v * sizeof(Floats));
    for (int r = 0; r < kRows; ++r) {
      const float input = x[r * inputs.stride + k];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += input * weights[v];
    }
  }
  for (int r = 0; r < kRows; ++r) StoreTile(matrix, row + r, output, sums[r]);
}

// A tile of bfloat16: an input is a pair.
template <int kRows, int kTerms>
inline void Tile(const Inputs<uint32_t>& inputs, const Matrix& matrix, const char* block, int64_t row, int64_t output) {
  static_assert(kTerms == 1);
  Floats sums[kRows][kVectors] = {};
  const uint32_t* x = inputs.values + row * inputs.stride;
  for (int64_t step = 0; step < inputs.num_steps; ++step, block += kStep) {
    FetchAhead<kRows>(block);
    PairsOfWeights weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = LoadPairs(block + v * sizeof(Floats));
    for (int r = 0; r < kRows; ++r) {
      const Pair pair(x[r * inputs.stride + step]);
      for (int v = 0; v < kVectors; ++v) sums[r][v] = AddPair(sums[r][v], pair, weights[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) StoreTile(matrix, row + r, output, sums[r]);
}

// A row's products from its sums, and with two terms from the sums of what rounding left, 254 times as fine.
template <int kTerms>
inline void StoreSums(const Inputs<uint8_t>& inputs, const Matrix& matrix, int64_t row, int64_t output,
                      const Ints* first, const Ints* rest) {
  Floats products[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = output + v * kLanes;
    const Ints too_much = kBias * Load<Ints>(matrix.sums + at);
    Floats product = __builtin_convertvector(first[v] - too_much, Floats);
    if (kTerms == 2) product += __builtin_convertvector(rest[v] - too_much, Floats) / 254.0f;
    products[v] = product * (inputs.scales[row] * Load<Floats>(matrix.scales + at));
  }
  StoreTile(matrix, row, output, products);
}

// A tile of int8. With two terms a row stands twice.
template <int kRows, int kTerms>
inline void Tile(const Inputs<uint8_t>& inputs, const Matrix& matrix, const char* block, int64_t row, int64_t output) {
  Register sums[kRows * kTerms][kVectors];
  for (auto& of_row : sums) {
    for (auto& sum : of_row) sum = Register{};
  }
  const uint8_t* x = inputs.values + row * kTerms * inputs.stride;
  for (int64_t step = 0; step < inputs.num_steps; ++step, block += kStep) {
    FetchAhead<kRows * kTerms>(block);
    Register weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = Load<Register>(block + v * sizeof(Register));
    for (int r = 0; r < kRows * kTerms; ++r) {
      const Register four = Repeat(Load<int32_t>(x + r * inputs.stride + 4 * step));
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Dot(sums[r][v], four, weights[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    Ints terms[kTerms][kVectors];
    for (int term = 0; term < kTerms; ++term) {
      for (int v = 0; v < kVectors; ++v) terms[term][v] = (Ints)sums[r * kTerms + term][v];
    }
    StoreSums<kTerms>(inputs, matrix, row + r, output, terms[0], terms[kTerms - 1]);
  }
}

// Rows of a block by AMX; false where it can't.
template <int kTerms>
bool BlockByTiles(Tiles&, const Inputs<float>&, const Matrix&, int64_t, int64_t, int64_t) {
  return false;
}

// Any number of rows: sums of tiles are in another order than those of vectors, and a row must not depend on others.
template <int kTerms>
bool BlockByTiles(Tiles& tiles, const Inputs<uint32_t>& inputs, const Matrix& matrix, int64_t index, int64_t begin,
                  int64_t end) {
  if (inputs.num_steps % kTileSteps || !HasTiles()) return false;
  constexpr int64_t kMost = 2 * kTileRows;
  const char* block = matrix.weights + index * inputs.num_steps * kStep;
  alignas(64) float sums[kMost][kBlock];
  for (int64_t row = begin; row < end; row += kMost) {
    const int64_t num_rows = std::min(kMost, end - row);
    tiles.Multiply<true>(inputs.values + row * inputs.stride, 4 * inputs.stride, num_rows, block, kStep,
                         inputs.num_steps, sums[0]);
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t part = 0; part < kBlock; part += kTile) {
        Floats products[kVectors];
        for (int v = 0; v < kVectors; ++v) products[v] = Load<Floats>(&sums[r][part + v * kLanes]);
        StoreTile(matrix, row + r, index * kBlock + part, products);
      }
    }
  }
  return true;
}

template <int kTerms>
bool BlockByTiles(Tiles& tiles, const Inputs<uint8_t>& inputs, const Matrix& matrix, int64_t index, int64_t begin,
                  int64_t end) {
  if ((end - begin) * kTerms < kLeastTileRows || inputs.num_steps % kTileSteps || !HasTiles()) return false;
  constexpr int64_t kMost = 2 * kTileRows / kTerms;
  const char* block = matrix.weights + index * inputs.num_steps * kStep;
  alignas(64) int32_t sums[2 * kTileRows][kBlock];
  for (int64_t row = begin; row < end; row += kMost) {
    const int64_t num_rows = std::min(kMost, end - row);
    tiles.Multiply<false>(inputs.values + row * kTerms * inputs.stride, inputs.stride, num_rows * kTerms, block, kStep,
                   inputs.num_steps, sums[0]);
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t part = 0; part < kBlock; part += kTile) {
        Ints terms[kTerms][kVectors];
        for (int term = 0; term < kTerms; ++term) {
          for (int v = 0; v < kVectors; ++v) terms[term][v] = Load<Ints>(&sums[r * kTerms + term][part + v * kLanes]);
        }
        StoreSums<kTerms>(inputs, matrix, row + r, index * kBlock + part, terms[0], terms[kTerms - 1]);
      }
    }
  }
  return true;
}

// All tiles of a block over some rows.
template <int kTerms, typename Input>
void Block(const Inputs<Input>& inputs, const Matrix& matrix, int64_t index, int64_t begin, int64_t end) {
  constexpr int kMost = kMostRows / kTerms;
  const char* block = matrix.weights + index * inputs.num_steps * kStep;
  for (int part = 0; part < kBlock / kTile; ++part) {
    const char* from = block + part * kVectors * sizeof(Floats);
    const int64_t output = index * kBlock + part * kTile;
    int64_t row = begin;
    for (; row + kMost <= end; row += kMost) Tile<kMost, kTerms>(inputs, matrix, from, row, output);
    if (kMost > 4) {
      for (; row + 4 <= end; row += 4) Tile<4, kTerms>(inputs, matrix, from, row, output);
    }
    if (kMost > 2) {
      for (; row + 2 <= end; row += 2) Tile<2, kTerms>(inputs, matrix, from, row, output);
    }
    for (; row < end; ++row) Tile<1, kTerms>(inputs, matrix, from, row, output);
  }
}

// The products of all rows with all matrices, split over the pool's threads.
template <int kTerms, typename Input>
void Multiply(ffi::ThreadPool pool, const Inputs<Input>& inputs, const std::vector<Matrix>& matrices) {
  int64_t num_blocks = 0;
  for (const Matrix& matrix : matrices) num_blocks += matrix.num_blocks;
  const int64_t num_panels = (inputs.num_rows + kPanel - 1) / kPanel;
  const int64_t block_bytes = std::max<int64_t>(inputs.num_steps * kStep, 1);
  const int64_t at_once = inputs.num_rows > kMostRows ? 1 : std::max<int64_t>(kPieceBytes / block_bytes, 1);
  const int64_t a_panel = (num_blocks + at_once - 1) / at_once;
  const auto piece = [&](int64_t index) {
    const int64_t panel = index / a_panel;
    const int64_t begin = panel * kPanel, end = std::min(begin + kPanel, inputs.num_rows);
    Tiles tiles;
    int64_t block = index % a_panel * at_once;
    const int64_t last = std::min(block + at_once, num_blocks);
    size_t of = 0;
    int64_t before = 0;
    for (; block < last; ++block) {
      while (block >= before + matrices[of].num_blocks) before += matrices[of++].num_blocks;
      if (!BlockByTiles<kTerms>(tiles, inputs, matrices[of], block - before, begin, end)) {
        Block<kTerms>(inputs, matrices[of], block - before, begin, end);
      }
    }
  };
  Split(pool, num_panels * a_panel, num_blocks * block_bytes * inputs.num_rows, piece);
}

template <int kTerms>
void MultiplyInt8(ffi::ThreadPool pool, const float* x, int64_t num_rows, int64_t num_inputs,
                  const std::vector<Matrix>& matrices) {
  static thread_local std::vector<uint8_t> rounded;
  static thread_local std::vector<float> scales;
  const int64_t num_steps = (num_inputs + 3) / 4, stride = 4 * num_steps;
  rounded.resize(num_rows * kTerms * stride);
  scales.resize(num_rows);
  uint8_t* to = rounded.data();
  float* scale = scales.data();
  Split(pool, num_rows, num_rows * num_inputs * 16, [=](int64_t row) {
    scale[row] = Round<kTerms>(x + row * num_inputs, num_inputs, stride, to + row * kTerms * stride);
  });
  Multiply<kTerms>(pool, Inputs<uint8_t>{to, stride, num_rows, num_steps, scale}, matrices);
}

void MultiplyBfloat16(ffi::ThreadPool pool, const float* x, int64_t num_rows, int64_t num_inputs,
                      const std::vector<Matrix>& matrices) {
  static thread_local std::vector<uint32_t> rounded;
  const int64_t num_steps = (num_inputs + 1) / 2;
  rounded.resize(num_rows * num_steps);
  uint32_t* to = rounded.data();
  Split(pool, num_rows, num_rows * num_inputs * 8, [=](int64_t row) {
    const float* from = x + row * num_inputs;
    uint32_t* pairs = to + row * num_steps;
    for (int64_t k = 0; k < num_inputs / 2; ++k) pairs[k] = ToBfloat16(from[2 * k]) | ToBfloat16(from[2 * k + 1]) << 16;
    if (num_inputs % 2) pairs[num_steps - 1] = ToBfloat16(from[num_inputs - 1]);
  });
  Multiply<1>(pool, Inputs<uint32_t>{to, num_steps, num_rows, num_steps, nullptr}, matrices);
}

// Reads a call's matrices: `per_matrix` arguments and one result each.
ffi::ErrorOr<std::vector<Matrix>> ReadMatrices(ffi::RemainingArgs args, ffi::RemainingRets rets, size_t per_matrix,
                                               int64_t num_rows, int64_t num_steps) {
  if (args.size() != per_matrix * rets.size()) return ffi::Unexpected(ffi::Error::InvalidArgument("matrices, results"));
  std::vector<Matrix> matrices;
  for (size_t i = 0; i < rets.size(); ++i) {
    const auto weights = args.get<ffi::AnyBuffer>(per_matrix * i);
    auto out = rets.get<ffi::AnyBuffer>(i);
    if (!weights || !out) return ffi::Unexpected(ffi::Error::InvalidArgument("no buffer"));
    const auto sizes = weights->dimensions(), of_out = (*out)->dimensions();
    if (sizes.size() < 3 || sizes[1] != num_steps || of_out.size() != 2 || of_out[0] != num_rows ||
        sizes[0] != (of_out[1] + kBlock - 1) / kBlock) {
      return ffi::Unexpected(ffi::Error::InvalidArgument("weights, inputs and results have different sizes"));
    }
    Matrix matrix{static_cast<const char*>(weights->untyped_data()), nullptr, nullptr,
                  static_cast<float*>((*out)->untyped_data()), of_out[1], sizes[0]};
    if (per_matrix == 3) {
      const auto scales = args.get<ffi::Buffer<ffi::F32>>(3 * i + 1);
      const auto sums = args.get<ffi::Buffer<ffi::S32>>(3 * i + 2);
      const size_t want = sizes[0] * kBlock;
      if (!scales || !sums || scales->element_count() != want || sums->element_count() != want) {
        return ffi::Unexpected(ffi::Error::InvalidArgument("scales and sums are not one an output"));
      }
      matrix.scales = scales->typed_data();
      matrix.sums = sums->typed_data();
    }
    matrices.push_back(matrix);
  }
  return matrices;
}

ffi::Error Int8Products(ffi::ThreadPool pool, int64_t num_terms, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args,
                        ffi::RemainingRets rets) {
  const int64_t num_rows = x.dimensions()[0], num_inputs = x.dimensions()[1];
  const auto matrices = ReadMatrices(args, rets, 3, num_rows, (num_inputs + 3) / 4);
  if (!matrices) return matrices.error();
  const auto multiply = num_terms == 2 ? MultiplyInt8<2> : MultiplyInt8<1>;
  multiply(pool, x.typed_data(), num_rows, num_inputs, *matrices);
  return ffi::Error::Success();
}

ffi::Error Bfloat16Products(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args,
                            ffi::RemainingRets rets) {
  const int64_t num_rows = x.dimensions()[0], num_inputs = x.dimensions()[1];
  const auto matrices = ReadMatrices(args, rets, 1, num_rows, (num_inputs + 1) / 2);
  if (!matrices) return matrices.error();
  MultiplyBfloat16(pool, x.typed_data(), num_rows, num_inputs, *matrices);
  return ffi::Error::Success();
}

ffi::Error Float32Products(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args,
                           ffi::RemainingRets rets) {
  const int64_t num_rows = x.dimensions()[0], num_inputs = x.dimensions()[1];
  const auto matrices = ReadMatrices(args, rets, 1, num_rows, num_inputs);
  if (!matrices) return matrices.error();
  Multiply<1>(pool, Inputs<float>{x.typed_data(), num_inputs, num_rows, num_inputs, nullptr}, *matrices);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Int8ProductsHandler, Int8Products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("num_terms")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Bfloat16ProductsHandler, Bfloat16Products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Float32ProductsHandler, Float32Products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_PRODUCTS_H_
