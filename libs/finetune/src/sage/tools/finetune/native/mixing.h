/* Products of small blocks that stay in the fast caches: sums are kept in registers, a tile of them at a time. */
#ifndef SAGE_MIXING_H
#define SAGE_MIXING_H

#include "words.h"

enum { MOST_ROWS = 8, MOST_WIDE = 4 }; /* of a tile */

/* A matrix of weights, read as it lies or turned. */
typedef struct { const word *at; long row, column; } weights;

INLINE void mix_tile(int rows, int wide, int ahead, float *out, long out_stride, weights w, const word *x, long stride, int count) {
  vec sums[MOST_ROWS][MOST_WIDE];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int c = 0; c < wide; c++) sums[r][c] = load(out + r * out_stride + c * LANES);
  for (int n = 0; n < count; n++) {
    if (ahead) __builtin_prefetch(w.at + (n + ahead) * w.column);
    vec part[MOST_WIDE];
#pragma GCC unroll 4
    for (int c = 0; c < wide; c++) part[c] = load_words(x + n * stride + c * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      vec factor = every(w.at[r * w.row + n * w.column]);
#pragma GCC unroll 4
      for (int c = 0; c < wide; c++) sums[r][c] = add_product(sums[r][c], factor, part[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int c = 0; c < wide; c++) store(out + r * out_stride + c * LANES, sums[r][c]);
}

/* out (rows, width) += w (rows, count) times x (count, width), in tiles of `high` rows by `broad` vectors. */
INLINE void mix_by(int high, int broad, int ahead, float *out, long out_stride, int rows, weights w, const word *x, long stride,
                   int count, int width) {
  for (int d = 0; d < width;) {
    int wide = d + broad * LANES <= width ? broad : 1;
    for (int r = 0; r < rows;) {
      int tall = r + high <= rows ? high : 1;
      float *to = out + r * out_stride + d;
      weights here = {w.at + r * w.row, w.row, w.column};
      if (tall == high && wide == broad) mix_tile(high, broad, ahead, to, out_stride, here, x + d, stride, count);
      else if (wide == broad) mix_tile(1, broad, ahead, to, out_stride, here, x + d, stride, count);
      else if (tall == high) mix_tile(high, 1, ahead, to, out_stride, here, x + d, stride, count);
      else mix_tile(1, 1, ahead, to, out_stride, here, x + d, stride, count);
      r += tall;
    }
    d += wide * LANES;
  }
}

#endif
