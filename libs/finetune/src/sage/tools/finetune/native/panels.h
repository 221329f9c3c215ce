/* Products with frozen matrices. What a matrix is multiplied with lies in panels; of the matrix itself a block that fits
   into the second cache meets a whole run of rows before the next. Both lie in the order in which they are gone through:
   lines of memory that lie a row's width apart push each other out of the caches. */
#ifndef SAGE_PANELS_H
#define SAGE_PANELS_H

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
  RUN = 576,                /* the most rows that are done together, whole strips */
  SHARES = 4,               /* the fewest for a thread, so that nobody waits long for the last */
  CHUNK = 96,               /* outputs that are found together, whole tiles; DEPTH is a multiple */
  AHEAD = 24,               /* inputs whose weights are fetched before they are needed */
};

/* A matrix (rows, columns) of which a STRIP of rows lies side by side: DEPTH columns of the first strip, of the second and
   so on; then the next columns. What fills up the last strip counts for nothing. */
typedef struct { float *at; int strips; } panels;

enum { NEXT_STRIP = DEPTH * STRIP };

static int strips_of(long rows) { return (rows + STRIP - 1) / STRIP; }

/* Floats of it. */
static long panels_size(long rows, long columns) {
  return (columns + DEPTH - 1) / DEPTH * strips_of(rows) * DEPTH * STRIP;
}

/* Where a column of a strip lies, STRIP floats; the next column of the same DEPTH is behind it. */
INLINE float *panel(panels p, int strip, long column) {
  return p.at + ((column / DEPTH * p.strips + strip) * DEPTH + column % DEPTH) * STRIP;
}

/* A frozen matrix whose elements lie `row` and `column` apart, of floats or of bfloat16. */
typedef struct { const void *at; long row, column; int is_half; } frozen;

static frozen from_there(frozen m, long out, long input) {
  long at = out * m.row + input * m.column;
  return (frozen){(const char *)m.at + at * (m.is_half ? 2 : 4), m.row, m.column, m.is_half};
}

/* A block of weights, and how far its tiles of SUM_ROWS outputs lie apart. */
typedef struct { weights first; long apart; } tiles;

enum { APART = SUM_ROWS * DEPTH + LANES }; /* of copied tiles: behind each is room for the rest of a vector */

/* A turned matrix, copied tile by tile. */
INLINE tiles copied_turned(frozen m, int is_half, int depth, int outs, float *block) {
  for (int n = 0; n < depth; n++) {
    long from = n * m.column;
    float *to = block + n * SUM_ROWS;
    int r = 0;
    /* What a vector brings too much is written over by the next input. */
    for (; r + LANES <= outs; r += SUM_ROWS, to += APART) store(to, get(m.at, from + r, is_half));
    for (; r < outs; r += SUM_ROWS, to += APART)
      for (int i = 0; i < smaller(SUM_ROWS, outs - r); i++) to[i] = get_one(m.at, from + r + i, is_half);
  }
  return (tiles){{block, 1, SUM_ROWS}, APART};
}

/* A matrix of halves, row by row. */
static tiles copied_rows(frozen m, int depth, int outs, float *block) {
  for (int r = 0; r < outs; r++)
    for (int n = 0; n < depth; n += LANES) store(block + r * DEPTH + n, get(m.at, r * m.row + n, 1));
  return (tiles){{block, DEPTH, 1}, SUM_ROWS * DEPTH};
}

/* The first of a matrix, as floats: in `block` if they have to be copied. */
static tiles block_of(frozen m, int depth, int outs, float *block) {
  if (m.row == 1) return m.is_half ? copied_turned(m, 1, depth, outs, block) : copied_turned(m, 0, depth, outs, block);
  return m.is_half ? copied_rows(m, depth, outs, block) : (tiles){{m.at, m.row, m.column}, SUM_ROWS * m.row};
}

/* sums (outs, STRIP) += a block times a strip (depth, STRIP) of which `filled` are there. Meanwhile the next strip is
   fetched: else each would be waited for. */
INLINE void meet(tiles block, int outs, const float *strip, int depth, int filled, float *sums) {
  const float *next = strip + DEPTH * STRIP;
  int share = (depth * SUM_ROWS / outs + 1) * STRIP;
  for (int r = 0; r < outs; r += SUM_ROWS, block.first.at += block.apart, next += share) {
    for (int i = 0; i < share; i += LINE) __builtin_prefetch(next + i, 0, 2);
    mix_by(SUM_ROWS, SUM_WIDE, AHEAD, sums + r * STRIP, STRIP, smaller(SUM_ROWS, outs - r), block.first, strip, STRIP, depth,
           filled);
  }
}

/* How a product is dealt out to threads: CHUNK outputs of `run` strips at a time. */
typedef struct { int strips, run, runs, count; long outs; } shares;

static shares dealt(long rows, long outs, int threads) {
  int strips = strips_of(rows), chunks = (outs + CHUNK - 1) / CHUNK;
  int fit = (rows + RUN - 1) / RUN, shared = (SHARES * threads + chunks - 1) / chunks, fewest = fit > shared ? fit : shared;
  int run = (strips + fewest - 1) / fewest; /* of one length: a short one would not be worth its blocks */
  int runs = (strips + run - 1) / run;
  return (shares){strips, run, runs, chunks * runs, outs};
}

/* Strips first..first+count and outputs out..out+outs. */
typedef struct { int first, count, outs; long out; } share;

static share share_of(shares all, int number) {
  int first = number % all.runs * all.run;
  long out = (long)(number / all.runs) * CHUNK;
  return (share){first, smaller(all.run, all.strips - first), smaller(CHUNK, all.outs - out), out};
}

/* sums = a share of x (rows, width) times the transpose of a matrix (all outs, width). Those of a strip, (outs, STRIP), lie
   `apart` from those of the next. */
static void multiply(panels x, share own, long rows, long width, frozen m, float *sums, long apart) {
  float block[CHUNK / SUM_ROWS * APART] __attribute__((aligned(64)));
  for (int s = 0; s < own.count; s++) memset(sums + s * apart, 0, sizeof *sums * own.outs * STRIP);
  for (long k = 0; k < width; k += DEPTH) {
    int depth = smaller(DEPTH, width - k);
    tiles here = block_of(from_there(m, own.out, k), depth, own.outs, block);
    for (int s = 0; s < own.count; s++) {
      int filled = (smaller(STRIP, rows - (long)(own.first + s) * STRIP) + LANES - 1) / LANES * LANES;
      meet(here, own.outs, panel(x, own.first + s, k), depth, filled, sums + s * apart);
    }
  }
}

/* The rest is called by all threads of a team together. Strides say how far rows lie apart. */

/* to = x (rows, width) */
static void into_panels(const float *x, long stride, long rows, long width, panels to) {
#pragma omp for
  for (int s = 0; s < to.strips; s++) {
    int there = smaller(STRIP, rows - (long)s * STRIP);
    for (long k = 0; k < width; k += DEPTH)
      turn_rows(x + (long)s * STRIP * stride + k, stride, there, there, smaller(DEPTH, width - k), panel(to, s, k), STRIP);
  }
}

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

/* y (rows, outs) = x (rows, width) times the transpose of m, + added or NULL. */
static void product_in_rows(panels x, long rows, long width, frozen m, const float *added, long added_stride, float *y,
                            long y_stride, shares by) {
#pragma omp for schedule(dynamic)
  for (int n = 0; n < by.count; n++) {
    float sums[RUN * CHUNK] __attribute__((aligned(64)));
    share own = share_of(by, n);
    multiply(x, own, rows, width, m, sums, CHUNK * STRIP);
    for (int s = 0; s < own.count; s++) {
      long row = (long)(own.first + s) * STRIP;
      const float *more = added ? added + row * added_stride + own.out : 0;
      turn_back(sums + s * CHUNK * STRIP, smaller(STRIP, rows - row), own.outs, more, added_stride,
                y + row * y_stride + own.out, y_stride);
    }
  }
}

#endif
