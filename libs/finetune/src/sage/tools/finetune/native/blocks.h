/* Products of the blocks that attention is cut into: QUERIES queries against up to KEYS keys. */
#ifndef SAGE_BLOCKS_H
#define SAGE_BLOCKS_H

#include "mixing.h"
#include "tiles.h"
#include "turning.h"

#ifdef __AVX512F__
enum { KEY_ROWS = 8, MIX_ROWS = 4, MIX_WIDE = 4 }; /* sums that stay in the 32 registers */
#else
enum { KEY_ROWS = 4, MIX_ROWS = 4, MIX_WIDE = 2 }; /* in 16 */
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
  if (HAS_TILES && keys >= TILE) {
    for (; k < keys; k += TILE) {
      int at = smaller(k, keys - TILE); /* the last ones together with some of those before, once more */
      multiply_tiles(0, words(x + at * stride), stride / PACK, turned, QUERIES, dim / PACK, out + at * QUERIES, QUERIES);
    }
    return;
  }
  for (; k + KEY_ROWS <= keys; k += KEY_ROWS)
    score_rows(KEY_ROWS, words(x + k * stride), stride / PACK, turned, dim / PACK, out + k * QUERIES);
  for (; k < keys; k++) score_rows(1, words(x + k * stride), stride / PACK, turned, dim / PACK, out + k * QUERIES);
}

/* turned (dim / PACK, QUERIES) = words of x (rows, dim), and zeros behind the last row */
static void turn(const number *x, long stride, int rows, int dim, word *turned) {
  turn_rows((const float *)x, stride / PACK, rows, QUERIES, dim / PACK, (float *)turned, QUERIES);
}

/* Rows that are summed up, PACK to a line, and scores as what they are weighed with. Where a word holds two numbers,
   they are of two rows behind each other, and a last row that is alone goes with zeros, as do those that fill a tile. */
typedef struct { const word *at; long stride; } lines;
typedef struct { word at[KEYS / 2 * QUERIES]; } packed_scores;

#ifdef HALF
static lines line_up(const number *x, long stride, int rows, int dim, word *room) {
  for (int line = 0; line < whole_tiles((rows + 1) / 2); line++)
    for (int d = 0; d < dim; d += LANES) {
      const number *at = x + 2 * line * stride + d;
      vec first = 2 * line < rows ? get(at, 0, 1) : all(0), second = 2 * line + 1 < rows ? get(at, stride, 1) : all(0);
      store_words(room + line * dim + d, (vec)((uvec)first >> 16 | (uvec)second));
    }
  return (lines){room, dim};
}

/* Scores of keys 2 * line and the next for LANES queries. */
INLINE vec pair_of(const float *scores, int line, int keys) {
  const float *at = scores + 2 * line * QUERIES;
  return pairs(2 * line < keys ? load(at) : all(0), 2 * line + 1 < keys ? load(at + QUERIES) : all(0));
}

static weights by_query(const float *scores, int keys, packed_scores *room) {
  if (!HAS_TILES) {
    for (int line = 0; line < (keys + 1) / 2; line++)
      for (int i = 0; i < QUERIES; i += LANES) store_words(room->at + line * QUERIES + i, pair_of(scores + i, line, keys));
    return (weights){room->at, 1, QUERIES};
  }
  for (int first = 0; first < (keys + 1) / 2; first += LANES)
    for (int i = 0; i < QUERIES; i += LANES) {
      vec square[LANES];
#pragma GCC unroll 16
      for (int line = 0; line < LANES; line++) square[line] = pair_of(scores + i, first + line, keys);
      transpose(square);
#pragma GCC unroll 16
      for (int q = 0; q < LANES; q++) store_words(room->at + (i + q) * KEYS / 2 + first, square[q]);
    }
  return (weights){room->at, KEYS / 2, 1};
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
  int words = (count + PACK - 1) / PACK, r = 0;
  for (; HAS_TILES && r + TILE <= rows; r += TILE)
    for (int d = 0; d < dim; d += 2 * TILE)
      multiply_tiles(1, w.at + r * w.row, w.row, x.at + d, x.stride, whole_tiles(words), out + r * out_stride + d, out_stride);
  weights rest = {w.at + r * w.row, w.row, w.column};
  mix_by(MIX_ROWS, MIX_WIDE, 0, out + r * out_stride, out_stride, rows - r, rest, x.at, x.stride, words, dim);
}

#endif
