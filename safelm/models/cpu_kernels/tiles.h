// Products of 16 rows at once by the tile registers of AMX, where the build and the system have them.
//
// A block's 16 steps are one tile of weights for 16 outputs: 16 rows of 4 inputs in int8, or 2 in bfloat16, x 16
// outputs.

#ifndef SAFELM_MODELS_CPU_KERNELS_TILES_H_
#define SAFELM_MODELS_CPU_KERNELS_TILES_H_

#include <cstdint>

#if defined(__AMX_TILE__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace safelm {

constexpr int kTileRows = 16;
constexpr int kTileSteps = 16;  // of a block

#if defined(__AMX_TILE__)

// Whether this process may use them: Linux wants to be asked once.
inline bool HasTiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool has = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return has;
}

// This thread's tiles while a piece of work lasts: 0 to 3 are sums, 4 and 5 inputs, 6 and 7 weights.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() {
    if (first_ > 0) _tile_release();
  }

  // The sums of products of up to 32 rows with the 32 outputs of a block, [rows][32]: int32 of int8, float of bfloat16.
  template <bool kIsBfloat16, typename Sum>
  void Multiply(const void* inputs, int64_t stride, int64_t num_rows, const char* block, int64_t block_step,
                int64_t num_steps, Sum* sums) {
    const int first = num_rows < kTileRows ? num_rows : kTileRows, second = num_rows - first;
    Configure(first, second);
    const char* rows = static_cast<const char*>(inputs);
    const char* others = rows + kTileRows * stride;
    constexpr int64_t kRow = 2 * 16 * sizeof(Sum);
    _tile_zero(0);
    _tile_zero(1);
    if (second == 0) {
      for (int64_t step = 0; step < num_steps; step += kTileSteps) {
        _tile_loadd(4, rows + 4 * step, stride);
        _tile_loadd(6, block + step * block_step, block_step);
        _tile_loadd(7, block + step * block_step + 64, block_step);
        if (kIsBfloat16) {
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
        } else {
          _tile_dpbusd(0, 4, 6);
          _tile_dpbusd(1, 4, 7);
        }
      }
    } else {
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t step = 0; step < num_steps; step += kTileSteps) {
        _tile_loadd(4, rows + 4 * step, stride);
        _tile_loadd(6, block + step * block_step, block_step);
        _tile_loadd(7, block + step * block_step + 64, block_step);
        _tile_loadd(5, others + 4 * step, stride);
        Multiply<kIsBfloat16>();
      }
      _tile_stored(2, sums + 32 * kTileRows, kRow);
      _tile_stored(3, sums + 32 * kTileRows + 16, kRow);
    }
    _tile_stored(0, sums, kRow);
    _tile_stored(1, sums + 16, kRow);
  }

  // Adds the products of 32 rows with 32 columns, pairs of bfloat16 in tiles [num_tiles][2][16][16], to sums [32][32].
  // False where it can't.
  bool Add(const uint32_t* left, const uint32_t* right, int64_t num_tiles, float* sums) {
    if (!HasTiles()) return false;
    Configure(kTileRows, kTileRows);
    constexpr int64_t kRow = 2 * 16 * sizeof(float), kTileRow = 16 * sizeof(uint32_t), kTile = 16 * 16;
    float* lower = sums + 32 * kTileRows;
    _tile_loadd(0, sums, kRow);
    _tile_loadd(1, sums + 16, kRow);
    _tile_loadd(2, lower, kRow);
    _tile_loadd(3, lower + 16, kRow);
    for (int64_t tile = 0; tile < num_tiles; ++tile, left += 2 * kTile, right += 2 * kTile) {
      _tile_loadd(4, left, kTileRow);
      _tile_loadd(6, right, kTileRow);
      _tile_loadd(7, right + kTile, kTileRow);
      _tile_loadd(5, left + kTile, kTileRow);
      Multiply<true>();
    }
    _tile_stored(0, sums, kRow);
    _tile_stored(1, sums + 16, kRow);
    _tile_stored(2, lower, kRow);
    _tile_stored(3, lower + 16, kRow);
    return true;
  }

 private:
  // All four sums; the numbers of registers are parts of the instructions.
  template <bool kIsBfloat16>
  static void Multiply() {
    if (kIsBfloat16) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  }

  void Configure(int first, int second) {
    if (first == first_ && second == second_) return;
    first_ = first, second_ = second;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    const int rows[8] = {first, first, second, second, first, second, kTileRows, kTileRows};
    for (int tile = 0; tile < 8; ++tile) {
      shape.rows[tile] = rows[tile];
      shape.row_bytes[tile] = rows[tile] > 0 ? 64 : 0;
    }
    _tile_loadconfig(&shape);
  }

  int first_ = 0, second_ = 0;  // rows of inputs
};

#else

inline bool HasTiles() { return false; }

struct Tiles {
  template <bool kIsBfloat16, typename Sum>
  void Multiply(const void*, int64_t, int64_t, const char*, int64_t, int64_t, Sum*) {}
  bool Add(const uint32_t*, const uint32_t*, int64_t, float*) { return false; }
};

#endif

}  // namespace safelm

#endif  // SAFELM_MODELS_CPU_KERNELS_TILES_H_
