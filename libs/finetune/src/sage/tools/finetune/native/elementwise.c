/* What lies between the products of a step, in as few passes over memory as there can be.
   Arrays are (rows, width) without gaps, in float or, where is_half, bfloat16; width is a multiple of 16. */
#include <math.h>

#include "gating.h"

#define ROWS_IN_PARALLEL _Pragma("omp parallel for num_threads(threads)") for (long row = 0; row < rows; row++)
/* A row at a time, with the number format known to the compiler. */
#define EACH_ROW(function, ...)                                              \
  ROWS_IN_PARALLEL {                                                         \
    if (is_half) function(row, __VA_ARGS__, 1); else function(row, __VA_ARGS__, 0); \
  }

INLINE void norm_row(long row, const void *x, const void *weight, void *out, long width, float epsilon, int is_half) {
  long start = row * width;
  vec squares = all(0);
  for (long i = 0; i < width; i += LANES) {
    vec v = get(x, start + i, is_half);
    squares += v * v;
  }
  float scale = 1 / sqrtf(sum_of(squares) / width + epsilon);
  for (long i = 0; i < width; i += LANES)
    put(out, start + i, get(x, start + i, is_half) * scale * get(weight, i, is_half), is_half);
}

/* out = x / root of its mean square * weight */
void sage_norm(const void *x, const void *weight, void *out, long rows, long width, float epsilon, int is_half, int threads) {
  EACH_ROW(norm_row, x, weight, out, width, epsilon)
}

INLINE void norm_backward_row(long row, const void *of_out, const void *x, const void *weight, const void *added,
                              void *of_x, long width, float epsilon, int is_half) {
  long start = row * width;
  vec squares = all(0), products = all(0);
  for (long i = 0; i < width; i += LANES) {
    vec v = get(x, start + i, is_half);
    squares += v * v;
    products += v * get(of_out, start + i, is_half) * get(weight, i, is_half);
  }
  float scale = 1 / sqrtf(sum_of(squares) / width + epsilon);
  float along = sum_of(products) * scale * scale * scale / width;
  for (long i = 0; i < width; i += LANES) {
    vec gradient = get(of_out, start + i, is_half) * get(weight, i, is_half);
    vec found = gradient * scale - get(x, start + i, is_half) * along;
    put(of_x, start + i, get(added, start + i, is_half) + found, is_half);
  }
}

/* of_x = added + the gradient of x by way of sage_norm; of_x may be of_out. */
void sage_norm_backward(const void *of_out, const void *x, const void *weight, const void *added, void *of_x, long rows,
                        long width, float epsilon, int is_half, int threads) {
  EACH_ROW(norm_backward_row, of_out, x, weight, added, of_x, width, epsilon)
}

/* A row's heads: the first `turning` of them turned by the row's angles times sign, the rest as they are.
   Halves of a head are real and imaginary parts. */
INLINE void rotate_row(long row, const void *from, void *to, const float *cos, const float *sin, float sign, long heads,
                       long turning, long dim, int from_half, int to_half) {
  long half = dim / 2;
  cos += row * half, sin += row * half;
  for (long head = 0; head < heads; head++) {
    long start = (row * heads + head) * dim;
    for (long i = 0; i < half; i += LANES) {
      vec left = get(from, start + i, from_half), right = get(from, start + half + i, from_half);
      if (head < turning) {
        vec c = load(cos + i), s = load(sin + i) * sign, turned = left * c - right * s;
        right = right * c + left * s;
        left = turned;
      }
      put(to, start + i, left, to_half);
      put(to, start + half + i, right, to_half);
    }
  }
}

/* from and to (rows, heads, dim), each in its own number format; they may be one. cos and sin (rows, dim / 2). */
void sage_rotate(const void *from, void *to, const float *cos, const float *sin, float sign, long rows, long heads,
                 long turning, long dim, int from_half, int to_half, int threads) {
  ROWS_IN_PARALLEL {
    if (from_half && to_half) rotate_row(row, from, to, cos, sin, sign, heads, turning, dim, 1, 1);
    else if (to_half) rotate_row(row, from, to, cos, sin, sign, heads, turning, dim, 0, 1);
    else rotate_row(row, from, to, cos, sin, sign, heads, turning, dim, 0, 0);
  }
}

INLINE void gate_row(long row, const void *gate_up, void *out, long width, int is_half) {
  long gates = row * 2 * width, ups = gates + width;
  for (long i = 0; i < width; i += LANES) {
    vec gate = get(gate_up, gates + i, is_half);
    put(out, row * width + i, gated(gate, get(gate_up, ups + i, is_half)), is_half);
  }
}

/* out (rows, width) = silu(gate) * up; gate_up (rows, 2 * width), gates first */
void sage_gate(const void *gate_up, void *out, long rows, long width, int is_half, int threads) {
  EACH_ROW(gate_row, gate_up, out, width)
}

INLINE void gate_backward_row(long row, const void *of_out, const void *gate_up, void *of_gate_up, long width, int is_half) {
  long gates = row * 2 * width, ups = gates + width;
  for (long i = 0; i < width; i += LANES) {
    vec gate = get(gate_up, gates + i, is_half), up = get(gate_up, ups + i, is_half);
    gate_gradients found = gated_backward(get(of_out, row * width + i, is_half), gate, up);
    put(of_gate_up, ups + i, found.of_up, is_half);
    put(of_gate_up, gates + i, found.of_gate, is_half);
  }
}

/* The gradient of gate_up. */
void sage_gate_backward(const void *of_out, const void *gate_up, void *of_gate_up, long rows, long width,
                        int is_half, int threads) {
  EACH_ROW(gate_backward_row, of_out, gate_up, of_gate_up, width)
}

/* Whether no logit of the row is larger than the label's, and none before it as large. */
INLINE int is_first_choice(const void *logits, long start, long label, long width, int is_half) {
  long block = label / LANES * LANES, place = label % LANES;
  vec own = get(logits, start + block, is_half), wanted = all(own[place]);
  ivec better = own > wanted, as_good = own == wanted;
  for (int lane = 0; lane < place; lane++) better[lane] |= as_good[lane];
  for (long i = 0; i < block; i += LANES) better |= get(logits, start + i, is_half) >= wanted;
  for (long i = block + LANES; i < width; i += LANES) better |= get(logits, start + i, is_half) > wanted;
  int is_beaten = 0;
  for (int lane = 0; lane < LANES; lane++) is_beaten |= better[lane];
  return !is_beaten;
}

INLINE float largest_of(const void *x, long start, long width, int is_half) {
  vec top = get(x, start, is_half);
  for (long i = LANES; i < width; i += LANES) top = at_least(get(x, start + i, is_half), top);
  float largest = top[0];
  for (int lane = 1; lane < LANES; lane++) largest = top[lane] > largest ? top[lane] : largest;
  return largest;
}

/* Where wants_gradient, the row becomes softmax - one-hot, and zeros without a label. */
INLINE void cross_entropy_row(long row, void *logits, const int64_t *labels, float *losses, uint8_t *hits, long width,
                              int wants_gradient, int is_half) {
  long start = row * width, label = labels[row], block = label / LANES * LANES;
  losses[row] = 0, hits[row] = 0;
  if (label < 0) {
    for (long i = 0; wants_gradient && i < width; i += LANES) put(logits, start + i, all(0), is_half);
    return;
  }
  hits[row] = is_first_choice(logits, start, label, width, is_half);
  float largest = largest_of(logits, start, width, is_half);
  vec sums = all(0);
  for (long i = 0; i < width; i += LANES) sums += vexp(get(logits, start + i, is_half) - largest);
  float sum = sum_of(sums);
  losses[row] = logf(sum) + largest - get(logits, start + block, is_half)[label - block];
  for (long i = 0; wants_gradient && i < width; i += LANES) {
    vec share = vexp(get(logits, start + i, is_half) - largest) / sum;
    if (i == block) share[label - block] -= 1;
    put(logits, start + i, share, is_half);
  }
}

/* logits (rows, width); labels, losses and hits (rows), a hit where the label is the first of the largest; a label below 0 is none. */
void sage_cross_entropy(void *logits, const int64_t *labels, float *losses, uint8_t *hits, long rows, long width,
                        int wants_gradient, int is_half, int threads) {
  EACH_ROW(cross_entropy_row, logits, labels, losses, hits, width, wants_gradient)
}

/* seen (count) = whether 16 random bits are no less than `least`: each quarter of a number of splitmix64, whose place in
   the sequence that `seed` begins decides, and not who computes it. Source: Steele, Lea, Flood, "Fast splittable
   pseudorandom number generators", 2014. */
void sage_draw(uint64_t seed, int least, uint8_t *seen, long count, int threads) {
#pragma omp parallel for num_threads(threads)
  for (long first = 0; first < count; first += 4) {
    uint64_t z = seed + (first / 4 + 1) * 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    z ^= z >> 31;
    for (int part = 0; part < smaller(4, count - first); part++) seen[first + part] = (int)(z >> 16 * part & 0xffff) >= least;
  }
}
