/* Products of small blocks that stay in the fast caches: sums are kept in registers, a tile of them at a time. */
#ifndef SAGE_MIXING_H
#define SAGE_MIXING_H

#include "words.h"

enum { MOST_ROWS = 8, MOST_WIDE = 4 }; /* of a tile */
enum { DEPTH = 192 };                 /* of what is wider, so many numbers are summed over before the next */

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

/* mix_tile for so many rows as there are */
INLINE void mix_strip(int high, int wide, int ahead, float *out, long out_stride, int rows, weights w, const word *x, long stride,
                      int count) {
  int r = 0;
  for (; r + high <= rows; r += high)
    mix_tile(high, wide, ahead, out + r * out_stride, out_stride, (weights){w.at + r * w.row, w.row, w.column}, x, stride, count);
  for (; r < rows; r++)
    mix_tile(1, wide, ahead, out + r * out_stride, out_stride, (weights){w.at + r * w.row, w.row, w.column}, x, stride, count);
}

/* out (rows, width) += w (rows, count) times x (count, width), in tiles of `high` rows by `broad` vectors; what is
   left of the width by two and then by one. */
INLINE void mix_by(int high, int broad, int ahead, float *out, long out_stride, int rows, weights w, const word *x, long stride,
                   int count, int width) {
  int d = 0;
  for (; d + broad * LANES <= width; d += broad * LANES)
    mix_strip(high, broad, ahead, out + d, out_stride, rows, w, x + d, stride, count);
  for (; d + 2 * LANES <= width; d += 2 * LANES)
    mix_strip(high, 2, ahead, out + d, out_stride, rows, w, x + d, stride, count);
  if (d < width) mix_strip(high, 1, ahead, out + d, out_stride, rows, w, x + d, stride, count);
}

#endif
