/* Rows side by side: products of what is wider than the caches, a PANEL of rows and a DEPTH of their numbers at a time. */
#ifndef SAGE_PANELS_H
#define SAGE_PANELS_H

#include "mixing.h"
#include "turning.h"

#ifdef __AVX512F__
enum { TILE_ROWS = 8, TILE_WIDE = 3 }; /* sums that stay in the 32 registers */
#else
enum { TILE_ROWS = 4, TILE_WIDE = 3 }; /* in 16 */
#endif
enum {
  PANEL = 48,  /* rows that lie side by side */
  DEPTH = 192, /* numbers of each that are summed over before the next */
};

/* turned (width, PANEL) = x (rows, width), and zeros behind the last row. */
static void turn_panel(const float *x, long stride, int rows, int width, float *turned) {
  turn_rows(x, stride, rows, rows, width, turned, PANEL);
}

#endif
