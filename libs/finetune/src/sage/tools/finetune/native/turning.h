/* Rows that come to lie side by side, by vectors. */
#ifndef SAGE_TURNING_H
#define SAGE_TURNING_H

#include "vectors.h"

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

/* turned (width, apart) = x (rows, width), of floats or other words; zeros for rows behind the last one, up to the
   end of the vector that row `filled` - 1 is in. */
INLINE void turn_rows(const float *x, long stride, int rows, int filled, int width, float *turned, long apart) {
  for (int first = 0; first < filled; first += LANES)
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
      for (int d = 0; d < LANES; d++) store(turned + (k + d) * apart + first, square[d]);
    }
}

#endif
