/* Products of tiles of bfloat16s, on chips with units for them (AMX). */
#ifndef SAGE_TILES_H
#define SAGE_TILES_H

#include "words.h"

enum { TILE = 16 }; /* rows of a tile, and words or floats in each */

#if defined HALF && defined __AMX_BF16__
enum { HAS_TILES = 1 };

/* The compiler does not know what the instructions for tiles read and write. */
#define MEMORY_IS_SEEN() __asm__ volatile("" ::: "memory")
enum { WORD_BYTES = 4 };

/* For a thread, before its first product. Whoever multiplied before it has released the tiles. */
INLINE void begin_tiles(void) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shapes = {.palette = 1};
  for (int t = 0; t < 8; t++) shapes.row_bytes[t] = TILE * WORD_BYTES, shapes.rows[t] = TILE;
  MEMORY_IS_SEEN();
  _tile_loadconfig(&shapes);
}

INLINE void end_tiles(void) { _tile_release(); }

/* out (TILE, 2 * TILE) (+)= x (TILE, count) times y (count, 2 * TILE), of words; count is a multiple of TILE. */
INLINE void multiply_tiles(int is_added, const word *x, long x_stride, const word *y, long y_stride, int count, float *out,
                           long out_stride) {
  MEMORY_IS_SEEN();
  if (is_added) {
    _tile_loadd(0, out, out_stride * WORD_BYTES);
    _tile_loadd(1, out + TILE, out_stride * WORD_BYTES);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int n = 0; n < count; n += TILE) {
    _tile_loadd(2, x + n, x_stride * WORD_BYTES);
    _tile_loadd(3, y + n * y_stride, y_stride * WORD_BYTES);
    _tile_dpbf16ps(0, 2, 3);
    _tile_loadd(4, y + n * y_stride + TILE, y_stride * WORD_BYTES);
    _tile_dpbf16ps(1, 2, 4);
  }
  _tile_stored(0, out, out_stride * WORD_BYTES);
  _tile_stored(1, out + TILE, out_stride * WORD_BYTES);
  MEMORY_IS_SEEN();
}
#else
enum { HAS_TILES = 0 };

INLINE void begin_tiles(void) {}
INLINE void end_tiles(void) {}
INLINE void multiply_tiles(int is_added, const word *x, long x_stride, const word *y, long y_stride, int count, float *out,
                           long out_stride) {}
#endif

/* Up to where words that are multiplied with must be filled. */
INLINE int whole_tiles(int words) { return HAS_TILES ? (words + TILE - 1) / TILE * TILE : words; }

#endif
