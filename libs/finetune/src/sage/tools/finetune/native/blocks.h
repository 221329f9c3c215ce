/* Products of the blocks that attention is cut into: QUERIES queries against up to KEYS keys. */
#ifndef SAGE_BLOCKS_H
#define SAGE_BLOCKS_H

#include "mixing.h"

#ifdef __AVX512F__
enum { KEY_ROWS = 8, MIX_ROWS = 4, MIX_WIDE = 4 }; /* sums that stay in the 32 registers */
#else
enum { KEY_ROWS = 4, MIX_ROWS = 2, MIX_WIDE = 4 }; /* in 16 */
#endif
enum { QUERIES = 2 * LANES, KEYS = 64, MAX_DIM = 256 };

/* Numbers as words. Sizes and strides of both are even. */
static const word *words(const number *x) { return (const word *)x; }

INLINE void score_rows(int rows, const word *x, long stride, const word *turned, int count, float *out) {
  vec sums[KEY_ROWS][2];
  for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = all(0);
  for (int d = 0; d < count; d++) {
    vec left = load_words(turned + d * QUERIES), right = load_words(turned + d * QUERIES + LANES);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      vec factor = every(x[r * stride + d]);
      sums[r][0] = add_product(sums[r][0], factor, left);
      sums[r][1] = add_product(sums[r][1], factor, right);
    }
  }
  for (int r = 0; r < rows; r++) {
    store(out + r * QUERIES, sums[r][0]);
    store(out + r * QUERIES + LANES, sums[r][1]);
  }
}

/* out (keys, QUERIES) = x (keys, dim) times what was turned of QUERIES rows */
static void score(const number *x, long stride, int keys, const word *turned, int dim, float *out) {
  int k = 0;
  for (; k + KEY_ROWS <= keys; k += KEY_ROWS)
    score_rows(KEY_ROWS, words(x + k * stride), stride / PACK, turned, dim / PACK, out + k * QUERIES);
  for (; k < keys; k++) score_rows(1, words(x + k * stride), stride / PACK, turned, dim / PACK, out + k * QUERIES);
}

/* turned (dim / PACK, QUERIES) = words of x (rows, dim), and zeros behind the last row */
static void turn(const number *x, long stride, int rows, int dim, word *turned) {
  for (int d = 0; d < dim / PACK; d++) {
    word *line = turned + d * QUERIES;
    for (int i = 0; i < rows; i++) line[i] = words(x + i * stride)[d];
    for (int i = rows; i < QUERIES; i++) line[i] = 0;
  }
}

/* Rows that are summed up, PACK to a line, and scores as what they are weighed with. Where a word holds two numbers,
   they are of two rows behind each other, and a last row that is alone goes with zeros. */
typedef struct { const word *at; long stride; } lines;
typedef struct { word at[KEYS / 2 * QUERIES]; } packed_scores;

#ifdef HALF
static lines line_up(const number *x, long stride, int rows, int dim, word *room) {
  for (int r = 0; r < rows; r += 2)
    for (int d = 0; d < dim; d += LANES) {
      const number *at = x + r * stride + d;
      vec first = get(at, 0, 1), second = r + 1 < rows ? get(at, stride, 1) : all(0);
      *(vec *)(room + r / 2 * dim + d) = (vec)((uvec)first >> 16 | (uvec)second);
    }
  return (lines){room, dim};
}

static weights by_query(const float *scores, int keys, packed_scores *room) {
  for (int k = 0; k < keys; k += 2)
    for (int i = 0; i < QUERIES; i += LANES) {
      const float *at = scores + k * QUERIES + i;
      store_pairs(room->at + k / 2 * QUERIES + i, load(at), k + 1 < keys ? load(at + QUERIES) : all(0));
    }
  return (weights){room->at, 1, QUERIES};
}

static weights by_key(const float *scores, int keys, packed_scores *room) {
  for (int k = 0; k < keys; k++)
    store_row(room->at + k * QUERIES / 2, load(scores + k * QUERIES), load(scores + k * QUERIES + LANES));
  return (weights){room->at, QUERIES / 2, 1};
}
#else
static lines line_up(const number *x, long stride, int rows, int dim, word *room) { return (lines){x, stride}; }
static weights by_query(const float *scores, int keys, packed_scores *room) { return (weights){scores, 1, QUERIES}; }
static weights by_key(const float *scores, int keys, packed_scores *room) { return (weights){scores, QUERIES, 1}; }
#endif

/* out (rows, dim) += w (rows, count) times the count rows that were lined up */
static void mix(float *out, long out_stride, int rows, weights w, lines x, int count, int dim) {
  mix_by(MIX_ROWS, MIX_WIDE, 0, out, out_stride, rows, w, x.at, x.stride, (count + PACK - 1) / PACK, dim);
}

#endif
