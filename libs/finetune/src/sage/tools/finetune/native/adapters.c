/* Low-rank adapters on frozen matrices, y += scale (x A^T) B^T, and their gradients: a PANEL of rows at a time from one
   end to the other, so that threads are woken once and what a panel needs stays in the fast caches. */
#include <string.h>

#include "mixing.h"
#include "turning.h"

#ifdef __AVX512F__
enum { TILE_ROWS = 8, TILE_WIDE = 3 }; /* sums that stay in the 32 registers */
#else
enum { TILE_ROWS = 4, TILE_WIDE = 3 }; /* in 16: two tiles for the usual rank */
#endif
enum { PANEL = 48 }; /* rows that lie side by side */

/* turned (width, PANEL) = x (rows, width), and zeros behind the last row. */
static void turn_panel(const float *x, long stride, int rows, int width, float *turned) {
  turn_rows(x, stride, rows, rows, width, turned, PANEL);
}

/* One of those that read the same x. What it trains is in floats, a (rank, width) and b (outs, rank), and so are the
   gradients. */
typedef struct {
  const float *a, *b;
  float *of_a, *of_b;
  long rank, first, outs; /* its outputs: those of y from `first` on */
  float scale;
} adapter;

/* A matrix of floats or, where is_half, bfloat16, whose rows are `width` apart. Of x those that are not seen (bytes, or
   NULL) count as zeros. */
typedef struct {
  void *at;
  long width;
  const uint8_t *seen;
  int is_half;
} numbers;

static void mix(float *out, long out_stride, int rows, weights w, const float *x, long stride, int count, int width) {
  mix_by(TILE_ROWS, TILE_WIDE, 0, out, out_stride, rows, w, x, stride, count, width);
}

INLINE vec only_seen(numbers x, long at, vec v) {
  typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
  if (!x.seen) return v;
  return pick(__builtin_convertvector(*(const bytes *)(x.seen + at), ivec) != 0, v, all(0));
}

/* block (rows, DEPTH) = `count` numbers from k on of `rows` rows from `row` on */
static void take(numbers x, long row, int rows, long k, int count, float *block) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < count; j += LANES) {
      long at = (row + i) * x.width + k + j;
      store(block + i * DEPTH + j, only_seen(x, at, get(x.at, at, x.is_half)));
    }
}

/* The same numbers, for `count` from k on, are the block, or zeros where that is NULL. */
static void lay(numbers x, long row, int rows, long k, long count, const float *block) {
  for (int i = 0; i < rows; i++)
    for (long j = 0; j < count; j += LANES)
      put(x.at, (row + i) * x.width + k + j, block ? load(block + i * DEPTH + j) : all(0), x.is_half);
}

/* The same numbers += the block. */
static void add(numbers x, long row, int rows, long k, int count, const float *block) {
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < count; j += LANES) {
      long at = (row + i) * x.width + k + j;
      put(x.at, at, get(x.at, at, x.is_half) + only_seen(x, at, load(block + i * DEPTH + j)), x.is_half);
    }
}

static long ranks_of(const adapter *adapters, int count) {
  long ranks = 0;
  for (int i = 0; i < count; i++) ranks += adapters[i].rank;
  return ranks;
}

static long ups_of(const adapter *adapters, int count) {
  long ups = 0;
  for (int i = 0; i < count; i++) ups += adapters[i].rank * adapters[i].outs;
  return ups;
}

/* Floats that both functions want room for. */
long sage_adapt_room(const adapter *adapters, int count, long width, int threads) {
  return threads * (ranks_of(adapters, count) * (width + PANEL) + ups_of(adapters, count));
}

/* narrow (ranks, stride), x A^T turned: its columns of a panel; then y, what comes of them by way of ups, each B turned
   and scaled. */
static void adapt_panel(const adapter *adapters, int count, numbers x, numbers y, float *narrow, long stride,
                        const float *ups, long row, int rows) {
  float block[PANEL * DEPTH], turned[DEPTH * PANEL];
  int filled = (rows + LANES - 1) / LANES * LANES;
  for (long r = 0; r < ranks_of(adapters, count); r++) memset(narrow + r * stride, 0, filled * sizeof *narrow);
  for (long k = 0; k < x.width; k += DEPTH) {
    int depth = smaller(DEPTH, x.width - k);
    take(x, row, rows, k, depth, block);
    turn_panel(block, DEPTH, rows, depth, turned);
    float *to = narrow;
    for (const adapter *own = adapters; own < adapters + count; to += own++->rank * stride)
      mix(to, stride, own->rank, (weights){own->a + k, x.width, 1}, turned, PANEL, depth, filled);
  }
  long done = 0;
  for (const adapter *own = adapters; own < adapters + count; own++) {
    lay(y, row, rows, done, own->first - done, 0);
    for (long o = 0; o < own->outs; o += DEPTH) {
      int depth = smaller(DEPTH, own->outs - o);
      memset(block, 0, sizeof block);
      mix(block, DEPTH, rows, (weights){narrow, 1, stride}, ups + o, own->outs, own->rank, depth);
      lay(y, row, rows, own->first + o, depth, block);
    }
    done = own->first + own->outs;
    narrow += own->rank * stride;
    ups += own->rank * own->outs;
  }
  lay(y, row, rows, done, y.width - done, 0);
}

/* y (rows, outs) = every adapter's part, and zeros between them; x (rows, width). The adapters' outputs follow each other. narrow (ranks, stride), with a stride of rows rounded up to 16,
   is for sage_adapt_backward. Widths and outputs are multiples of 16. */
void sage_adapt(const adapter *adapters, int count, const void *x, const uint8_t *seen, void *y, float *narrow, long stride,
                float *room, long rows, long width, long outs, int is_half, int threads) {
  float *up = room;
  for (const adapter *own = adapters; own < adapters + count; own++)
    for (long k = 0; k < own->rank; k++)
      for (long o = 0; o < own->outs; o++) *up++ = own->scale * own->b[o * own->rank + k];
  numbers from = {(void *)x, width, seen, is_half}, to = {y, outs, 0, is_half};
#pragma omp parallel for num_threads(threads)
  for (long row = 0; row < rows; row += PANEL)
    adapt_panel(adapters, count, from, to, narrow + row, stride, room, row, smaller(PANEL, rows - row));
}

/* Adds a panel's share to of_as (ranks, width) and of_ups, each B's gradient turned and not yet scaled, and to of_x unless
   that is NULL. of_narrow (ranks, PANEL) is room. */
static void adapt_backward_panel(const adapter *adapters, int count, numbers of_y, numbers x, const float *narrow, long stride,
                                 numbers of_x, float *of_as, float *of_ups, float *of_narrow, long row, int rows) {
  float block[PANEL * DEPTH], turned[DEPTH * PANEL];
  int filled = (rows + LANES - 1) / LANES * LANES;
  float *of_own = of_narrow;
  for (const adapter *own = adapters; own < adapters + count; own++) {
    memset(of_own, 0, own->rank * PANEL * sizeof *of_own);
    for (long o = 0; o < own->outs; o += DEPTH) {
      int depth = smaller(DEPTH, own->outs - o);
      take(of_y, row, rows, own->first + o, depth, block);
      turn_panel(block, DEPTH, rows, depth, turned);
      mix(of_own, PANEL, own->rank, (weights){own->b + o * own->rank, 1, own->rank}, turned, PANEL, depth, filled);
      mix(of_ups + o, own->outs, own->rank, (weights){narrow, stride, 1}, block, DEPTH, rows, depth);
    }
    for (long i = 0; i < own->rank * PANEL; i++) of_own[i] *= own->scale;
    of_own += own->rank * PANEL;
    narrow += own->rank * stride;
    of_ups += own->rank * own->outs;
  }
  for (long k = 0; k < x.width; k += DEPTH) {
    int depth = smaller(DEPTH, x.width - k);
    take(x, row, rows, k, depth, block);
    mix(of_as + k, x.width, ranks_of(adapters, count), (weights){of_narrow, PANEL, 1}, block, DEPTH, rows, depth);
    if (!of_x.at) continue;
    memset(block, 0, sizeof block);
    of_own = of_narrow;
    for (const adapter *own = adapters; own < adapters + count; of_own += own++->rank * PANEL)
      mix(block, DEPTH, rows, (weights){of_own, 1, PANEL}, own->a + k, x.width, own->rank, depth);
    add(of_x, row, rows, k, depth, block);
  }
}

/* Gradients of all adapters from of_y (rows, outs), and of_x += that of x unless it is NULL; x, seen and narrow as
   sage_adapt had them. Sums of threads are added in their order: the same work gives the same bits. */
void sage_adapt_backward(const adapter *adapters, int count, const void *of_y, const void *x, const uint8_t *seen,
                         const float *narrow, long stride, void *of_x, float *room, long rows, long width, long outs,
                         int is_half, int threads) {
  long ranks = ranks_of(adapters, count), sums = ranks * width + ups_of(adapters, count);
  numbers upstream = {(void *)of_y, outs, 0, is_half}, from = {(void *)x, width, seen, is_half}, to = {of_x, width, seen, is_half};
  memset(room, 0, threads * sums * sizeof *room);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; thread++) {
    float *own = room + thread * sums, *of_narrow = room + threads * sums + thread * ranks * PANEL;
    for (long row = (long)thread * PANEL; row < rows; row += (long)threads * PANEL)
      adapt_backward_panel(adapters, count, upstream, from, narrow + row, stride, to, own, own + ranks * width, of_narrow, row,
                           smaller(PANEL, rows - row));
  }
  for (int thread = 1; thread < threads; thread++)
    for (long i = 0; i < sums; i++) room[i] += room[thread * sums + i];
  const float *of_a = room, *of_up = room + ranks * width;
  for (const adapter *own = adapters; own < adapters + count; own++) {
    memcpy(own->of_a, of_a, own->rank * width * sizeof *of_a);
    of_a += own->rank * width;
    for (long k = 0; k < own->rank; k++)
      for (long o = 0; o < own->outs; o++) own->of_b[o * own->rank + k] = own->scale * *of_up++;
  }
}
