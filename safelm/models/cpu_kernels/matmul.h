// Products of two large matrices in bfloat16, those of training, as a custom call of XLA on the CPU.
//
// Both are first laid out in tiles of 16 x 16 pairs of numbers that are neighbours along the summed axis: a register of
// AMX, whole vectors otherwise. Sums are in float32, in an order that depends on nothing but the summed axis's length.
//
// M rows and N columns of the result, K summed.

#ifndef SAFELM_MODELS_CPU_KERNELS_MATMUL_H_
#define SAFELM_MODELS_CPU_KERNELS_MATMUL_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dots.h"
#include "split.h"
#include "tiles.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace safelm {
namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512BF16__)

constexpr int64_t kSide = 16;  // of a tile
constexpr int64_t kTilePairs = kSide * kSide;
constexpr int64_t kBand = 2 * kSide;  // rows or columns that stand together: two tiles
constexpr int64_t kBandPairs = 2 * kTilePairs;
constexpr int64_t kDepth = 16;  // tiles along the summed axis that are multiplied while one side of them stays in L1
constexpr int64_t kMostSide = 256;  // of a piece of work: its parts of both matrices and its sums stay in L2
constexpr int64_t kLeastSide = 64;

// A matrix as it stands in memory: [others, summed], or the other way round.
struct Operand {
  const char* values;
  bool is_bfloat16;
  bool is_summed_last;
  int64_t num_others, num_summed;
};

inline __mmask16 First(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// 16 numbers as bfloat16, of which `mask` are there.
inline __m256i LoadHalves(const Operand& from, int64_t at, __mmask16 mask) {
  if (from.is_bfloat16) return _mm256_maskz_loadu_epi16(mask, from.values + 2 * at);
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from.values + 4 * at));
}

// 16 pairs of one row or column from `pair` on: of a matrix whose summed axis is the last.
inline __m512i PairsOf(const Operand& from, int64_t other, int64_t pair) {
  if (other >= from.num_others) return _mm512_setzero_si512();
  const int64_t left = from.num_summed - 2 * pair, at = other * from.num_summed + 2 * pair;
  const __m256i first = LoadHalves(from, at, First(left)), second = LoadHalves(from, at + 16, First(left - 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// One pair of 16 rows or columns from `other` on: of a matrix whose summed axis is the first.
inline __m512i PairOf(const Operand& from, int64_t pair, int64_t other) {
  const __mmask16 mask = First(from.num_others - other);
  const int64_t at = 2 * pair;
  if (at >= from.num_summed) return _mm512_setzero_si512();
  const __m512i low = _mm512_cvtepu16_epi32(LoadHalves(from, at * from.num_others + other, mask));
  if (at + 1 == from.num_summed) return low;
  const __m512i high = _mm512_cvtepu16_epi32(LoadHalves(from, (at + 1) * from.num_others + other, mask));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

inline void Transpose(__m512i* rows) {
  __m512i halves[16];
  for (int i = 0; i < 16; i += 2) {
    halves[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    halves[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(halves[i], halves[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(halves[i], halves[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(halves[i + 1], halves[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(halves[i + 1], halves[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    halves[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    halves[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    halves[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    halves[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(halves[i], halves[i + 8], 0xdd);
  }
}

// Lays out two tiles' rows or columns: [tiles along the summed axis][2][16][16]. A tile of the left matrix has the
// summed axis last, one of the right matrix has it first.
void LayOut(const Operand& from, bool is_right, int64_t other, int64_t num_tiles, uint32_t* to) {
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int half = 0; half < 2; ++half, to += kTilePairs) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        rows[i] = from.is_summed_last ? PairsOf(from, other + half * kSide + i, tile * kSide)
                                      : PairOf(from, tile * kSide + i, other + half * kSide);
      }
      if (from.is_summed_last == is_right) Transpose(rows);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * kSide, rows[i]);
    }
  }
}

// Adds the products of 32 rows with 32 columns over some tiles to `sums`, [32][32].
inline void AddByVectors(const uint32_t* left, const uint32_t* right, int64_t num_tiles, float* sums) {
  constexpr int kRows = 8;
  for (int row = 0; row < kBand; row += kRows, sums += kRows * kBand) {
    Floats of[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < 2; ++v) of[r][v] = Load<Floats>(sums + r * kBand + v * kSide);
    }
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const uint32_t* x = left + tile * kBandPairs + row * kSide;
      const uint32_t* y = right + tile * kBandPairs;
      for (int64_t pair = 0; pair < kSide; ++pair) {
        const Register columns[2] = {Load<Register>(y + pair * kSide), Load<Register>(y + kTilePairs + pair * kSide)};
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < 2; ++v) {
            of[r][v] = AddPair(of[r][v], Pair(x[r * kSide + pair]), columns[v]);
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < 2; ++v) Store(sums + r * kBand + v * kSide, of[r][v]);
    }
  }
}

// Where a result goes.
struct Result {
  char* values;  // [M, N]
  bool is_bfloat16;
  int64_t num_rows, num_columns;

  void Put(const float* sums, int64_t row, int64_t column) const {
    for (int64_t r = 0; r < kBand && row + r < num_rows; ++r) {
      for (int64_t v = 0; v < kBand; v += 16) {
        const __mmask16 mask = First(num_columns - column - v);
        const __m512 from = _mm512_load_ps(sums + r * kBand + v);
        const int64_t at = (row + r) * num_columns + column + v;
        if (is_bfloat16) {
          _mm256_mask_storeu_epi16(values + 2 * at, mask, (__m256i)_mm512_cvtneps_pbh(from));
        } else {
          _mm512_mask_storeu_ps(values + 4 * at, mask, from);
        }
      }
    }
  }
};

// Memory that stays for the next product of this thread, whole lines of it.
class Scratch {
 public:
  template <typename T>
  T* Get(int64_t count) {
    const size_t bytes = count * sizeof(T) + 64;
    if (memory_.size() < bytes) memory_ = std::vector<char>(bytes);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<char> memory_;
};

void MultiplyMatrices(ffi::ThreadPool pool, const Operand& left, const Operand& right, const Result& result) {
  static thread_local Scratch of_left, of_right;
  const int64_t num_tiles = (left.num_summed + 2 * kSide - 1) / (2 * kSide);
  const int64_t row_bands = (left.num_others + kBand - 1) / kBand;
  const int64_t column_bands = (right.num_others + kBand - 1) / kBand;
  const int64_t a_band = num_tiles * kBandPairs;
  uint32_t* rows = of_left.Get<uint32_t>(row_bands * a_band);
  uint32_t* columns = of_right.Get<uint32_t>(column_bands * a_band);
  Split(pool, row_bands + column_bands, (row_bands + column_bands) * a_band * 4, [&](int64_t index) {
    if (index < row_bands) {
      LayOut(left, false, index * kBand, num_tiles, rows + index * a_band);
    } else {
      LayOut(right, true, (index - row_bands) * kBand, num_tiles, columns + (index - row_bands) * a_band);
    }
  });
  int64_t side = kMostSide;
  const auto pieces = [&](int64_t bands) { return (bands * kBand + side - 1) / side; };
  while (side > kLeastSide && pieces(row_bands) * pieces(column_bands) < 4 * pool.num_threads()) side /= 2;
  const int64_t across = pieces(column_bands), bands = side / kBand;
  Split(pool, pieces(row_bands) * across, row_bands * column_bands * a_band * 4, [&](int64_t index) {
    static thread_local Scratch of_sums;
    const int64_t first_row = index / across * bands, first_column = index % across * bands;
    const int64_t last_row = std::min(first_row + bands, row_bands);
    const int64_t last_column = std::min(first_column + bands, column_bands);
    float* all_sums = of_sums.Get<float>(side * side);
    Tiles tiles;
    for (int64_t tile = 0; tile < num_tiles || tile == 0; tile += kDepth) {
      const int64_t depth = std::min(kDepth, num_tiles - tile);
      float* sums = all_sums;
      for (int64_t column = first_column; column < last_column; ++column) {
        for (int64_t row = first_row; row < last_row; ++row, sums += kBand * kBand) {
          if (tile == 0) std::memset(sums, 0, kBand * kBand * sizeof(float));
          const uint32_t* of_row = rows + row * a_band + tile * kBandPairs;
          const uint32_t* of_column = columns + column * a_band + tile * kBandPairs;
          if (!tiles.Add(of_row, of_column, depth, sums)) {
            AddByVectors(of_row, of_column, depth, sums);
          }
          if (tile + kDepth >= num_tiles) result.Put(sums, row * kBand, column * kBand);
        }
      }
    }
  });
}

bool IsBfloat16(ffi::AnyBuffer buffer) { return buffer.element_type() == ffi::DataType::BF16; }

ffi::Error Matmul(ffi::ThreadPool pool, bool transpose_left, bool transpose_right,
                  ffi::AnyBuffer left, ffi::AnyBuffer right, ffi::Result<ffi::AnyBuffer> out) {
  for (const ffi::AnyBuffer& each : {left, right, *out}) {
    if (each.dimensions().size() != 2) return ffi::Error::InvalidArgument("not a matrix");
    if (!IsBfloat16(each) && each.element_type() != ffi::DataType::F32) return ffi::Error::InvalidArgument("its dtype");
  }
  const auto x = left.dimensions(), y = right.dimensions(), of_out = out->dimensions();
  const Operand of_left{static_cast<const char*>(left.untyped_data()), IsBfloat16(left), !transpose_left,
                        x[transpose_left ? 1 : 0], x[transpose_left ? 0 : 1]};
  const Operand of_right{static_cast<const char*>(right.untyped_data()), IsBfloat16(right), transpose_right,
                         y[transpose_right ? 0 : 1], y[transpose_right ? 1 : 0]};
  if (of_left.num_summed != of_right.num_summed || of_out[0] != of_left.num_others ||
      of_out[1] != of_right.num_others) {
    return ffi::Error::InvalidArgument("matrices and their product have different sizes");
  }
  const Result result{static_cast<char*>(out->untyped_data()), IsBfloat16(*out), of_out[0], of_out[1]};
  MultiplyMatrices(pool, of_left, of_right, result);
  return ffi::Error::Success();
}

#else

ffi::Error Matmul(ffi::ThreadPool, bool, bool, ffi::AnyBuffer, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer>) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "built without AVX-512 BF16");
}

#endif

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MatmulHandler, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                      .Attr<bool>("transpose_left")
                                  .Attr<bool>("transpose_right")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_MATMUL_H_
