/* Causal attention over a tree of segments, with its gradient: see tree_attention.py for what is computed.
   A block of scores lies in the fast caches with its queries side by side in the lanes of vectors, so that the
   softmax over keys is plain arithmetic; a softmax is gone through once, as in https://arxiv.org/abs/2205.14135.
   This is compiled twice, for floats and, see attention_half.c, for bfloat16s: scores and all sums are floats, and
   shares are rounded for the product with what they are shares of. */
#include <math.h>
#include <string.h>

#include "blocks.h"

#ifdef HALF
#define ENTRY(name) name##_half
#else
#define ENTRY(name) name
#endif

typedef struct { int start, stop, end; } segment;

/* What both passes know of a layer. Heads of a token lie one behind the other, tokens `stride` numbers apart. */
typedef struct {
  const number *query, *key, *value;
  long stride;
  int heads, kv_heads, dim;
  float scaling;
} layer;

/* Keys from k on are behind the queries from q on. */
static void hide_later(float *scores, int k, int keys, int q) {
  for (int j = 0; j < keys; j++)
    for (int i = 0; i < smaller(QUERIES, k + j - q); i++) scores[j * QUERIES + i] = -INFINITY;
}

/* A block of queries on its way through its keys. */
typedef struct {
  vec top[2], sum[2];
  float out[QUERIES * MAX_DIM], scores[KEYS * QUERIES];
} softmax;

/* Scores, before they are scaled, become shares of what was seen so far; what was summed before is made to match. */
static void renew(softmax *s, int keys, int dim, float scaling) {
  vec top[2] = {s->top[0], s->top[1]}, total[2] = {all(0), all(0)};
  for (int j = 0; j < keys; j++)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) top[half] = at_least(top[half], load(s->scores + j * QUERIES + half * LANES));
  for (int j = 0; j < keys; j++)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      float *at = s->scores + j * QUERIES + half * LANES;
      vec share = vexp((load(at) - top[half]) * scaling);
      total[half] += share;
      store(at, share);
    }
  for (int half = 0; half < 2; half++) {
    vec shrink = vexp((s->top[half] - top[half]) * scaling);
    s->top[half] = top[half];
    s->sum[half] = s->sum[half] * shrink + total[half];
    for (int i = 0; i < LANES; i++)
      if (shrink[i] != 1)
        for (int d = 0; d < dim; d += LANES) {
          float *at = s->out + (half * LANES + i) * dim + d;
          store(at, load(at) * shrink[i]);
        }
  }
}

/* Queries q..q+rows of segment `own`, one head. Writes out (tokens, heads, dim) and log_sums (tokens, heads). */
static void attend(const layer *l, int head, const segment *tree, int own, int q, int rows, number *out, float *log_sums) {
  softmax s;
  packed_scores packed;
  word turned[MAX_DIM / PACK * QUERIES], room[KEYS / 2 * MAX_DIM];
  long at_head = (long)head * l->dim, at_kv = (long)(head / (l->heads / l->kv_heads)) * l->dim;
  memset(s.out, 0, sizeof(float) * QUERIES * l->dim);
  for (int half = 0; half < 2; half++) s.top[half] = all(-INFINITY), s.sum[half] = all(0);
  turn(l->query + q * l->stride + at_head, l->stride, rows, l->dim, turned);
  for (int a = 0; a <= own; a++) {
    if (a < own && tree[a].end <= q) continue; /* no beginning of this one */
    int to = a < own ? tree[a].stop : q + rows;
    for (int k = tree[a].start; k < to; k += KEYS) {
      int keys = smaller(KEYS, to - k);
      score(l->key + k * l->stride + at_kv, l->stride, keys, turned, l->dim, s.scores);
      if (a == own) hide_later(s.scores, k, keys, q);
      renew(&s, keys, l->dim, l->scaling);
      lines values = line_up(l->value + k * l->stride + at_kv, l->stride, keys, l->dim, room);
      mix(s.out, l->dim, HAS_TILES ? QUERIES : rows, by_query(s.scores, keys, &packed), values, keys, l->dim);
    }
  }
  for (int i = 0; i < rows; i++) {
    float sum = s.sum[i / LANES][i % LANES];
    long token = q + i, to = token * l->heads * l->dim + at_head;
    log_sums[token * l->heads + head] = s.top[i / LANES][i % LANES] * l->scaling + logf(sum);
    for (int d = 0; d < l->dim; d += LANES) put(out, to + d, load(s.out + i * l->dim + d) / sum, PACK == 2);
  }
}

static int blocks_of(segment s) { return (s.stop - s.start + QUERIES - 1) / QUERIES; }

void ENTRY(sage_attention)(const number *query, const number *key, const number *value, long stride, int heads,
                           int kv_heads, int dim, float scaling, const segment *tree, int segments, number *out,
                           float *log_sums, int threads) {
  layer l = {query, key, value, stride, heads, kv_heads, dim, scaling};
  int blocks = 0;
  for (int s = 0; s < segments; s++) blocks += blocks_of(tree[s]);
#pragma omp parallel num_threads(threads)
  {
    begin_tiles();
#pragma omp for collapse(2) schedule(dynamic)
    for (int block = 0; block < blocks; block++)
      for (int head = 0; head < heads; head++) {
        int own = 0, left = block;
        while (left >= blocks_of(tree[own])) left -= blocks_of(tree[own++]);
        int q = tree[own].start + left * QUERIES;
        attend(&l, head, tree, own, q, smaller(QUERIES, tree[own].stop - q), out, log_sums);
      }
    end_tiles();
  }
}

/* The way back. Gradients of keys and values lie apart for every head, as do queries and what is given. */
typedef struct {
  layer l;
  const number *of_out;
  const float *log_sums;
  float *dots; /* (tokens, heads): what came out times its gradient */
  float *of_query, *of_key, *of_value;
  long of_query_stride;
} way_back;

/* A block of queries of one head, turned and lined up; padding counts for nothing. */
typedef struct {
  int q, rows;
  lines query_lines, of_out_lines;
  word query[MAX_DIM / PACK * QUERIES], of_out[MAX_DIM / PACK * QUERIES];
  word rooms[2][QUERIES / 2 * MAX_DIM];
  float log_sums[QUERIES], dots[QUERIES];
} block;

static void take(block *b, const way_back *w, int head, int q, int rows) {
  const layer *l = &w->l;
  long width = (long)l->heads * l->dim, at_head = (long)head * l->dim;
  const number *query = l->query + q * l->stride + at_head, *of_out = w->of_out + q * width + at_head;
  b->q = q, b->rows = rows;
  turn(query, l->stride, rows, l->dim, b->query);
  turn(of_out, width, rows, l->dim, b->of_out);
  b->query_lines = line_up(query, l->stride, rows, l->dim, b->rooms[0]);
  b->of_out_lines = line_up(of_out, width, rows, l->dim, b->rooms[1]);
  for (int i = 0; i < QUERIES; i++) {
    b->log_sums[i] = i < rows ? w->log_sums[(long)(q + i) * l->heads + head] : INFINITY;
    b->dots[i] = i < rows ? w->dots[(long)(q + i) * l->heads + head] : 0;
  }
}

/* Add what a block of queries and keys k..k+keys owe each other. */
static void give_back(const way_back *w, int head, const block *b, int k, int keys, int is_own) {
  const layer *l = &w->l;
  long width = (long)l->heads * l->dim, at_head = (long)head * l->dim;
  long at_kv = (long)(head / (l->heads / l->kv_heads)) * l->dim;
  const number *key = l->key + k * l->stride + at_kv, *value = l->value + k * l->stride + at_kv;
  float shares[KEYS * QUERIES], of_scores[KEYS * QUERIES];
  packed_scores packed;
  word room[KEYS / 2 * MAX_DIM];
  score(key, l->stride, keys, b->query, l->dim, shares);
  score(value, l->stride, keys, b->of_out, l->dim, of_scores);
  if (is_own) hide_later(shares, k, keys, b->q);
  for (int j = 0; j < keys; j++)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      long at = j * QUERIES + half * LANES;
      vec share = vexp(load(shares + at) * l->scaling - load(b->log_sums + half * LANES));
      store(shares + at, share);
      store(of_scores + at, share * (load(of_scores + at) - load(b->dots + half * LANES)) * l->scaling);
    }
  mix(w->of_value + k * width + at_head, width, keys, by_key(shares, keys, &packed), b->of_out_lines, b->rows, l->dim);
  mix(w->of_key + k * width + at_head, width, keys, by_key(of_scores, keys, &packed), b->query_lines, b->rows, l->dim);
  mix(w->of_query + b->q * w->of_query_stride + at_head, w->of_query_stride, b->rows, by_query(of_scores, keys, &packed),
      line_up(key, l->stride, keys, l->dim, room), keys, l->dim);
}

/* Queries q..end against keys start..stop, or against those up to themselves where is_own. */
static void give_all_back(const way_back *w, int head, int q, int end, int start, int stop, int is_own) {
  block b;
  for (; q < end; q += QUERIES) {
    take(&b, w, head, q, smaller(QUERIES, end - q));
    int to = is_own ? q + b.rows : stop;
    for (int k = start; k < to; k += KEYS) give_back(w, head, &b, k, smaller(KEYS, to - k), is_own);
  }
}

static void prepare_token(const way_back *w, const number *given, long token) {
  const layer *l = &w->l;
  long width = (long)l->heads * l->dim;
  for (int head = 0; head < l->heads; head++) {
    long at = token * width + (long)head * l->dim;
    vec products = all(0);
    for (int d = 0; d < l->dim; d += LANES) products += get(w->of_out, at + d, PACK == 2) * get(given, at + d, PACK == 2);
    w->dots[token * l->heads + head] = sum_of(products);
  }
  memset(w->of_query + token * w->of_query_stride, 0, sizeof(float) * width);
  memset(w->of_key + token * width, 0, sizeof(float) * width);
  memset(w->of_value + token * width, 0, sizeof(float) * width);
}

/* Sum what the heads that share keys gave. */
static void gather_token(const layer *l, long token, const float *each, float *to) {
  int group = l->heads / l->kv_heads;
  for (int kv = 0; kv < l->kv_heads; kv++)
    for (int d = 0; d < l->dim; d += LANES) {
      vec sum = all(0);
      for (int head = kv * group; head < (kv + 1) * group; head++)
        sum += load(each + (token * l->heads + head) * l->dim + d);
      store(to + kv * l->dim + d, sum);
    }
}

/* given and of_out (tokens, heads, dim) are what sage_attention gave and its gradient. scratch holds
   tokens * heads * (2 * dim + 1) floats. Gradients are laid down as query, key and value lie. */
void ENTRY(sage_attention_backward)(const number *query, const number *key, const number *value, long stride, int heads,
                                    int kv_heads, int dim, float scaling, const segment *tree, int segments,
                                    const number *of_out, const number *given, const float *log_sums, long tokens,
                                    float *scratch, float *of_query, float *of_key, float *of_value, long of_stride,
                                    int threads) {
  long size = tokens * heads * dim;
  way_back w = {
      .l = {query, key, value, stride, heads, kv_heads, dim, scaling}, .of_out = of_out, .log_sums = log_sums,
      .dots = scratch + 2 * size, .of_query = of_query, .of_key = scratch, .of_value = scratch + size,
      .of_query_stride = of_stride,
  };
#pragma omp parallel num_threads(threads)
  {
    begin_tiles();
#pragma omp for
    for (long token = 0; token < tokens; token++) prepare_token(&w, given, token);
#pragma omp for collapse(2) schedule(dynamic)
    for (int s = 0; s < segments; s++)
      for (int head = 0; head < heads; head++)
        give_all_back(&w, head, tree[s].start, tree[s].stop, tree[s].start, tree[s].stop, 1);
    /* Segments that go on from the same one add to its keys: one after the other, heads beside each other. */
#pragma omp for schedule(dynamic)
    for (int head = 0; head < heads; head++)
      for (int s = 0; s < segments; s++) give_all_back(&w, head, tree[s].stop, tree[s].end, tree[s].start, tree[s].stop, 0);
#pragma omp for
    for (long token = 0; token < tokens; token++) {
      gather_token(&w.l, token, w.of_key, of_key + token * of_stride);
      gather_token(&w.l, token, w.of_value, of_value + token * of_stride);
    }
    end_tiles();
  }
}
