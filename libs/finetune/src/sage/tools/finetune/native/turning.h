/* Rows that come to lie side by side, by vectors. */
#ifndef SAGE_TURNING_H
#define SAGE_TURNING_H

#include "vectors.h"

#ifdef __AVX512F__
#define LANES_OF(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#else
#define LANES_OF(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#endif

/* Of lines `apart` from each other, blocks of that width change places. */
INLINE void exchange(vec *square, int apart) {
/* Written out: of what it knows the compiler makes one or two cheap instructions, of what it finds in a loop four
   dear ones. */
#define UPPER(lane) ((lane) & apart ? LANES + (lane) - apart : (lane))
#define LOWER(lane) ((lane) & apart ? LANES + (lane) : (lane) + apart)
  const ivec upper = {LANES_OF(UPPER)}, lower = {LANES_OF(LOWER)};
#pragma GCC unroll 16
  for (int line = 0; line < LANES; line++) {
    if (line & apart) continue;
    vec above = square[line], below = square[line + apart];
    square[line] = __builtin_shuffle(above, below, upper);
    square[line + apart] = __builtin_shuffle(above, below, lower);
  }
#undef UPPER
#undef LOWER
}

/* The lines of a square become its columns. */
INLINE void transpose(vec *square) {
#pragma GCC unroll 4
  for (int apart = 1; apart < LANES; apart *= 2) exchange(square, apart);
}

enum { LINE = 16 }; /* floats that memory moves at once */

/* turned (width, apart) = x (rows, width), of floats or other words; zeros for rows behind the last one, up to the
   end of the vector that row `filled` - 1 is in. */
INLINE void turn_rows(const float *x, long stride, int rows, int filled, int width, float *turned, long apart) {
  for (int line = 0; line < width; line += LINE) /* whole, before others take its place in the cache */
    for (int first = 0; first < filled; first += LANES)
      for (int k = line; k < smaller(width, line + LINE); k += LANES) {
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
