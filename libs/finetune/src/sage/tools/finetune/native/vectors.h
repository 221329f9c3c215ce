/* Vectors of floats as wide as the chip's, in GCC's own terms: the same source for AVX-512 and AVX2. */
#ifndef SAGE_VECTORS_H
#define SAGE_VECTORS_H

#include <stdint.h>

#ifdef __AVX512F__
#include <immintrin.h>

enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE vec all(float x) { return x - (vec){}; }
INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec x) { *(vec *)to = x; }
INLINE vec pick(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
#ifdef __AVX512F__
INLINE vec at_least(vec x, vec least) { return (vec)_mm512_max_ps((__m512)least, (__m512)x); } /* NaN stays NaN */
#else
INLINE vec at_least(vec x, vec least) { return pick(x < least, least, x); }
#endif
INLINE int smaller(int a, int b) { return a < b ? a : b; }

INLINE float sum_of(vec x) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += x[lane];
  return total;
}

/* Elements `at` and on of an array of floats or, where is_half, of bfloat16. */
INLINE vec get(const void *from, long at, int is_half) {
  if (!is_half) return load((const float *)from + at);
  return (vec)(__builtin_convertvector(*(const hvec *)((const uint16_t *)from + at), uvec) << 16);
}

INLINE float get_one(const void *from, long at, int is_half) {
  if (!is_half) return ((const float *)from)[at];
  union { uint32_t bits; float value; } x = {(uint32_t)((const uint16_t *)from)[at] << 16};
  return x.value;
}

/* Rounded to nearest, ties to even. */
INLINE void put(void *to, long at, vec x, int is_half) {
  if (!is_half) {
    store((float *)to + at, x);
    return;
  }
  uvec bits = (uvec)x;
  uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  ivec is_nan = x != x;
  rounded = ((uvec)is_nan & 0x7fc0) | (~(uvec)is_nan & rounded);
  *(hvec *)((uint16_t *)to + at) = __builtin_convertvector(rounded, hvec);
}

/* To 2 units in the last place; 0 below e^-87, no more than e^88; NaN stays NaN.
   2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], as in Cephes' expf. */
INLINE vec vexp(vec x) {
#ifdef __AVX512F__
  __mmask16 is_seen = _mm512_cmp_ps_mask((__m512)x, (__m512)all(-87), _CMP_NLT_UQ);
  vec in = (vec)_mm512_min_ps((__m512)all(88), (__m512)x); /* the second where one is NaN */
  vec n = (vec)_mm512_roundscale_ps((__m512)(in * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vec in = pick(x > 88.0f, all(88.0f), at_least(x, all(-87.0f)));
  vec shifted = in * 1.44269504f + 12582912.0f; /* its lowest bits are n */
  vec n = shifted - 12582912.0f;
#endif
  vec r = in - n * 0.693359375f + n * 2.12194440e-4f;
  vec y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
#ifdef __AVX512F__
  return (vec)_mm512_maskz_scalef_ps(is_seen, (__m512)y, (__m512)n);
#else
  y = (vec)((ivec)y + ((ivec)shifted << 23));
  return pick(x == x, pick(x < -87.0f, all(0), y), x);
#endif
}

#endif
