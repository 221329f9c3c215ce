/* Products with frozen matrices, of rows that lie as torch's do: see panels.h. */
#include "panels.h"

enum {
  SLAB = 21 * DEPTH, /* inputs that are turned at once */
  FEW = 4,           /* rows that are not worth turning: of text that is written token by token */
};

/* Of few rows: every element of a matrix is read once, and none is worth a copy. */
static void dot_rows(const float *x, frozen m, const float *added, long added_stride, float *y, long rows, long width, long outs,
                     int threads) {
#pragma omp parallel for num_threads(threads)
  for (long o = 0; o < outs; o++)
    for (long i = 0; i < rows; i++) {
      vec sum = all(0);
      for (long n = 0; n < width; n += LANES) sum += load(x + i * width + n) * get(m.at, o * m.row + n, m.is_half);
      y[i * outs + o] = sum_of(sum) + (added ? added[i * added_stride + o] : 0);
    }
}

/* How many floats sage_product wants room for. */
long sage_product_scratch(long rows, long width) { return panels_size(rows, width < SLAB ? width : SLAB); }

/* y (rows, outs) = x (rows, width) times the transpose of a matrix (outs, width) whose elements lie `row` and `column`
   apart, + added, whose rows lie added_stride apart, or NULL. Inputs are gone through SLAB by SLAB, so that
   turned, room of that size, stays small where they are a vocabulary. width is a multiple of 16. */
void sage_product(const float *x, const void *matrix, int is_half, long row, long column, const float *added,
                  long added_stride, float *y, float *turned, long rows, long width, long outs, int threads) {
  if (!rows) return;
  frozen m = {matrix, row, column, is_half};
  if (rows <= FEW && column == 1) {
    dot_rows(x, m, added, added_stride, y, rows, width, outs, threads);
    return;
  }
  panels in = {turned, strips_of(rows)};
  shares by = dealt(rows, outs, threads);
#pragma omp parallel num_threads(threads)
  for (long k = 0; k < width; k += SLAB) {
    long deep = smaller(SLAB, width - k);
    into_panels(x + k, width, rows, deep, in);
    product_in_rows(in, rows, deep, from_there(m, 0, k), k ? y : added, k ? outs : added_stride, y, outs, by);
  }
}
