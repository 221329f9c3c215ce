/* Rows side by side: products of what is wider than the caches, a PANEL of rows and a DEPTH of their numbers at a time. */
#ifndef SAGE_PANELS_H
#define SAGE_PANELS_H

#include "mixing.h"

#ifdef __AVX512F__
enum { TILE_ROWS = 8, TILE_WIDE = 3 }; /* sums that stay in the 32 registers */
#else
enum { TILE_ROWS = 4, TILE_WIDE = 3 }; /* in 16 */
#endif
enum {
  PANEL = 48,  /* rows that lie side by side */
  DEPTH = 192, /* numbers of each that are summed over before the next */
};

/* The lines of a square become its columns: of lines `apart` from each other, blocks of that width change places. */
INLINE void transpose(vec *square) {
#pragma GCC unroll 4
  for (int apart = 1; apart < LANES; apart *= 2) {
    ivec upper, lower;
    for (int lane = 0; lane < LANES; lane++) {
      upper[lane] = lane & apart ? LANES + lane - apart : lane;
      lower[lane] = lane & apart ? LANES + lane : lane + apart;
    }
#pragma GCC unroll 16
    for (int line = 0; line < LANES; line++) {
      if (line & apart) continue;
      vec above = square[line], below = square[line + apart];
      square[line] = __builtin_shuffle(above, below, upper);
      square[line + apart] = __builtin_shuffle(above, below, lower);
    }
  }
}

/* turned (width, PANEL) = x (rows, width), and zeros behind the last row. */
static void turn_panel(const float *x, long stride, int rows, int width, float *turned) {
  for (int first = 0; first < rows; first += LANES)
    for (int k = 0; k < width; k += LANES) {
      vec square[LANES];
      int lines = rows - first;
      if (lines >= LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) square[i] = load(x + (first + i) * stride + k);
      } else {
        for (int i = 0; i < LANES; i++) square[i] = i < lines ? load(x + (first + i) * stride + k) : all(0);
      }
      transpose(square);
#pragma GCC unroll 16
      for (int d = 0; d < LANES; d++) store(turned + (k + d) * PANEL + first, square[d]);
    }
}

#endif
