/* Products with frozen matrices. The matrix is read as it lies, once for a chunk of what comes out, and never copied:
   only what it is multiplied with is turned, a SLAB of its width at a time. */
#include <string.h>

#include "panels.h"

enum {
  CHUNK = 96,  /* outputs that are found together */
  AHEAD = 24,  /* inputs whose weights are fetched before they are needed */
  SLAB = 4096, /* inputs that are turned at once: see sage_product */
};

INLINE void store_sum(float *to, vec x, const float *added, long at) {
  if (added) x += load(added + at);
  store(to, x);
}

/* y (rows, outs) = the transpose of sums (outs, PANEL), + added */
static void turn_back(const float *sums, int rows, int outs, const float *added, long added_stride, float *y, long y_stride) {
  int whole = outs / LANES * LANES;
  for (int first = 0; first < rows; first += LANES)
    for (int n = 0; n < whole; n += LANES) {
      vec square[LANES];
      int lines = smaller(LANES, rows - first);
#pragma GCC unroll 16
      for (int d = 0; d < LANES; d++) square[d] = load(sums + (n + d) * PANEL + first);
      transpose(square);
      float *to = y + first * y_stride + n;
      const float *more = added ? added + first * added_stride + n : 0;
      if (lines == LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store_sum(to + i * y_stride, square[i], more, i * added_stride);
      } else {
        for (int i = 0; i < lines; i++) store_sum(to + i * y_stride, square[i], more, i * added_stride);
      }
    }
  for (int i = 0; i < rows; i++)
    for (int n = whole; n < outs; n++)
      y[i * y_stride + n] = sums[n * PANEL + i] + (added ? added[i * added_stride + n] : 0);
}

/* y (rows, outs) = turned, one panel of x, times w, + added. */
static void fill(const float *turned, int rows, int width, weights w, int outs, const float *added, long added_stride,
                 float *y, long y_stride) {
  float sums[CHUNK * PANEL];
  int filled = (rows + LANES - 1) / LANES * LANES;
  memset(sums, 0, sizeof sums);
  for (int k = 0; k < width; k += DEPTH) {
    int depth = smaller(DEPTH, width - k);
    weights here = {w.at + k * w.column, w.row, w.column};
    mix_by(TILE_ROWS, TILE_WIDE, AHEAD, sums, PANEL, outs, here, turned + k * PANEL, PANEL, depth, filled);
  }
  turn_back(sums, rows, outs, added, added_stride, y, y_stride);
}

/* How many floats sage_product wants room for. */
long sage_product_scratch(long rows, long width) {
  return (rows + PANEL - 1) / PANEL * PANEL * (width < SLAB ? width : SLAB);
}

/* y (rows, outs) = x (rows, width) times the transpose of a matrix (outs, width) whose elements lie `row` and `column`
   apart, + added, whose rows lie added_stride apart, or NULL. Inputs are gone through SLAB by SLAB, so that
   turned, room of that size, stays small where they are a vocabulary. width is a multiple of 16. */
void sage_product(const float *x, const float *matrix, long row, long column, const float *added, long added_stride,
                  float *y, float *turned, long rows, long width, long outs, int threads) {
  int panels = (rows + PANEL - 1) / PANEL, chunks = (outs + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads)
  for (long k = 0; k < width; k += SLAB) {
    int deep = smaller(SLAB, width - k);
#pragma omp for
    for (int p = 0; p < panels; p++) {
      long first = (long)p * PANEL;
      turn_panel(x + first * width + k, width, smaller(PANEL, rows - first), deep, turned + first * deep);
    }
#pragma omp for collapse(2) schedule(dynamic)
    for (int c = 0; c < chunks; c++)
      for (int p = 0; p < panels; p++) {
        long first = (long)p * PANEL, out = (long)c * CHUNK;
        weights w = {matrix + out * row + k * column, row, column};
        float *to = y + first * outs + out;
        const float *from = k ? to : added ? added + first * added_stride + out : 0;
        fill(turned + first * deep, smaller(PANEL, rows - first), deep, w, smaller(CHUNK, outs - out), from,
             k ? outs : added_stride, to, outs);
      }
  }
}
