/* Products with frozen matrices. What a matrix is multiplied with is turned, a SLAB of its width at a time; of the matrix
   itself a block that fits into the second cache meets a whole run of rows before the next. Both lie in the order in
   which they are gone through: lines of memory that lie a row's width apart push each other out of the caches. */
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
  CHUNK = 96,               /* outputs that are found together, whole tiles */
  AHEAD = 24,               /* inputs whose weights are fetched before they are needed */
  SLAB = 21 * DEPTH,        /* inputs that are turned at once: see sage_product */
  FEW = 4,                  /* rows that are not worth turning: of text that is written token by token */
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

/* y (rows, outs) = turned, strips of x, times m, + added. Parts of DEPTH inputs lie `part` apart. */
static void fill(const float *turned, long part, int rows, int width, frozen m, int outs, const float *added,
                 long added_stride, float *y, long y_stride) {
  float sums[RUN * CHUNK] __attribute__((aligned(64))), block[CHUNK / SUM_ROWS * APART] __attribute__((aligned(64)));
  int strips = (rows + STRIP - 1) / STRIP;
  memset(sums, 0, sizeof *sums * CHUNK * STRIP * strips);
  for (int k = 0; k < width; k += DEPTH, turned += part) {
    int depth = smaller(DEPTH, width - k);
    tiles here = block_of(from_there(m, 0, k), depth, outs, block);
    for (int s = 0; s < strips; s++) {
      int filled = (smaller(STRIP, rows - s * STRIP) + LANES - 1) / LANES * LANES;
      meet(here, outs, turned + s * DEPTH * STRIP, depth, filled, sums + s * CHUNK * STRIP);
    }
  }
  for (int s = 0; s < strips; s++) {
    int first = s * STRIP;
    turn_back(sums + s * CHUNK * STRIP, smaller(STRIP, rows - first), outs, added ? added + first * added_stride : 0,
              added_stride, y + first * y_stride, y_stride);
  }
}

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
long sage_product_scratch(long rows, long width) {
  long parts = ((width < SLAB ? width : SLAB) + DEPTH - 1) / DEPTH;
  return (rows + STRIP - 1) / STRIP * STRIP * parts * DEPTH;
}

/* y (rows, outs) = x (rows, width) times the transpose of a matrix (outs, width) whose elements lie `row` and `column`
   apart, + added, whose rows lie added_stride apart, or NULL. Inputs are gone through SLAB by SLAB, so that
   turned, room of that size, stays small where they are a vocabulary. width is a multiple of 16. */
void sage_product(const float *x, const void *matrix, int is_half, long row, long column, const float *added,
                  long added_stride, float *y, float *turned, long rows, long width, long outs, int threads) {
  if (!rows) return;
  if (rows <= FEW && column == 1) {
    dot_rows(x, (frozen){matrix, row, column, is_half}, added, added_stride, y, rows, width, outs, threads);
    return;
  }
  int strips = (rows + STRIP - 1) / STRIP, chunks = (outs + CHUNK - 1) / CHUNK;
  int fit = (rows + RUN - 1) / RUN, shared = (SHARES * threads + chunks - 1) / chunks, fewest = fit > shared ? fit : shared;
  int run = (strips + fewest - 1) / fewest * STRIP; /* of one length: a short one would not be worth its blocks */
  int runs = (rows + run - 1) / run;
  long part = (long)strips * STRIP * DEPTH; /* numbers of DEPTH inputs */
#pragma omp parallel num_threads(threads)
  for (long k = 0; k < width; k += SLAB) {
    int deep = smaller(SLAB, width - k);
#pragma omp for
    for (int s = 0; s < strips; s++) {
      long first = (long)s * STRIP;
      int there = smaller(STRIP, rows - first);
      for (int j = 0; j < deep; j += DEPTH)
        turn_rows(x + first * width + k + j, width, there, there, smaller(DEPTH, deep - j),
                  turned + j / DEPTH * part + first * DEPTH, STRIP);
    }
#pragma omp for collapse(2) schedule(dynamic)
    for (int c = 0; c < chunks; c++)
      for (int r = 0; r < runs; r++) {
        long first = (long)r * run, out = (long)c * CHUNK;
        frozen m = from_there((frozen){matrix, row, column, is_half}, out, k);
        float *to = y + first * outs + out;
        const float *from = k ? to : added ? added + first * added_stride + out : 0;
        fill(turned + first * DEPTH, part, smaller(run, rows - first), deep, m, smaller(CHUNK, outs - out), from,
             k ? outs : added_stride, to, outs);
      }
  }
}
