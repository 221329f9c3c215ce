/* Products with frozen matrices. What a matrix is multiplied with is turned, a SLAB of its width at a time; of the matrix
   itself a block that fits into the second cache meets a whole run of rows before the next. */
#include <string.h>

#include "mixing.h"
#include "turning.h"

#ifdef __AVX512F__
enum { SUM_ROWS = 8, SUM_WIDE = 3 }; /* sums that stay in the 32 registers */
#else
enum { SUM_ROWS = 6, SUM_WIDE = 2 }; /* in 16 */
#endif
enum {
  STRIP = SUM_WIDE * LANES, /* rows that lie side by side: DEPTH numbers of each fit into the first cache */
  RUN = 288,                /* the most rows that are done together, whole strips */
  SHARES = 4,               /* the fewest for a thread, so that nobody waits long for the last */
  CHUNK = 96,               /* outputs that are found together */
  AHEAD = 24,               /* inputs whose weights are fetched before they are needed */
  SLAB = 4096,              /* inputs that are turned at once: see sage_product */
};

INLINE void store_sum(float *to, vec x, const float *added, long at) {
  if (added) x += load(added + at);
  store(to, x);
}

/* y (rows, outs) = the transpose of sums (outs, STRIP), + added */
static void turn_back(const float *sums, int rows, int outs, const float *added, long added_stride, float *y, long y_stride) {
  int whole = outs / LANES * LANES;
  for (int first = 0; first < rows; first += LANES)
    for (int n = 0; n < whole; n += LANES) {
      vec square[LANES];
      int lines = smaller(LANES, rows - first);
#pragma GCC unroll 16
      for (int d = 0; d < LANES; d++) square[d] = load(sums + (n + d) * STRIP + first);
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
      y[i * y_stride + n] = sums[n * STRIP + i] + (added ? added[i * added_stride + n] : 0);
}

/* y (rows, outs) = turned, strips of x, times w, + added. */
static void fill(const float *turned, int rows, int width, weights w, int outs, const float *added, long added_stride,
                 float *y, long y_stride) {
  float sums[RUN / STRIP][CHUNK * STRIP], block[DEPTH * CHUNK];
  memset(sums, 0, sizeof sums);
  for (int k = 0; k < width; k += DEPTH) {
    int depth = smaller(DEPTH, width - k);
    weights here = {w.at + k * w.column, w.row, w.column};
    if (w.row == 1) {
      /* Lines of memory that lie a whole matrix's width apart would push each other out of the caches. */
      for (int n = 0; n < depth; n++) memcpy(block + n * CHUNK, here.at + n * w.column, outs * sizeof *block);
      here = (weights){block, 1, CHUNK};
    }
    for (int first = 0; first < rows; first += STRIP) {
      int filled = (smaller(STRIP, rows - first) + LANES - 1) / LANES * LANES;
      mix_by(SUM_ROWS, SUM_WIDE, AHEAD, sums[first / STRIP], STRIP, outs, here, turned + first * width + k * STRIP, STRIP,
             depth, filled);
    }
  }
  for (int first = 0; first < rows; first += STRIP)
    turn_back(sums[first / STRIP], smaller(STRIP, rows - first), outs, added ? added + first * added_stride : 0,
              added_stride, y + first * y_stride, y_stride);
}

/* How many floats sage_product wants room for. */
long sage_product_scratch(long rows, long width) {
  return (rows + STRIP - 1) / STRIP * STRIP * (width < SLAB ? width : SLAB);
}

/* y (rows, outs) = x (rows, width) times the transpose of a matrix (outs, width) whose elements lie `row` and `column`
   apart, + added, whose rows lie added_stride apart, or NULL. Inputs are gone through SLAB by SLAB, so that
   turned, room of that size, stays small where they are a vocabulary. width is a multiple of 16. */
void sage_product(const float *x, const float *matrix, long row, long column, const float *added, long added_stride,
                  float *y, float *turned, long rows, long width, long outs, int threads) {
  if (!rows) return;
  int strips = (rows + STRIP - 1) / STRIP, chunks = (outs + CHUNK - 1) / CHUNK;
  int fit = (rows + RUN - 1) / RUN, shared = (SHARES * threads + chunks - 1) / chunks, fewest = fit > shared ? fit : shared;
  int run = (strips + fewest - 1) / fewest * STRIP; /* of one length: a short one would not be worth its blocks */
  int runs = (rows + run - 1) / run;
#pragma omp parallel num_threads(threads)
  for (long k = 0; k < width; k += SLAB) {
    int deep = smaller(SLAB, width - k);
#pragma omp for
    for (int s = 0; s < strips; s++) {
      long first = (long)s * STRIP;
      int there = smaller(STRIP, rows - first);
      turn_rows(x + first * width + k, width, there, there, deep, turned + first * deep, STRIP);
    }
#pragma omp for collapse(2) schedule(dynamic)
    for (int c = 0; c < chunks; c++)
      for (int r = 0; r < runs; r++) {
        long first = (long)r * run, out = (long)c * CHUNK;
        weights w = {matrix + out * row + k * column, row, column};
        float *to = y + first * outs + out;
        const float *from = k ? to : added ? added + first * added_stride + out : 0;
        fill(turned + first * deep, smaller(run, rows - first), deep, w, smaller(CHUNK, outs - out), from,
             k ? outs : added_stride, to, outs);
      }
  }
}
