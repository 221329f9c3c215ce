/* Words of 32 bits that are multiplied and summed in floats: a float each or, where HALF is defined, two bfloat16s
   that lie behind each other, whose two products the chip adds to the sum at once. */
#ifndef SAGE_WORDS_H
#define SAGE_WORDS_H

#include "vectors.h"

#ifdef HALF
#include <immintrin.h>

enum { PACK = 2 }; /* numbers in a word */
typedef uint16_t number;
typedef uint32_t word __attribute__((may_alias));

INLINE vec every(word w) { return (vec)((uvec){} + w); }
INLINE vec add_product(vec sum, vec a, vec b) { return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

/* Words of which each holds a number of the first and then one of the second, rounded to nearest. */
INLINE vec pairs(vec first, vec second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (vec)_mm512_permutexvar_epi16(order, both);
}

/* The numbers of the first and then those of the second, rounded to nearest. */
INLINE void store_row(word *to, vec first, vec second) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
#else
enum { PACK = 1 };
typedef float number;
typedef float word;

INLINE vec every(word w) { return all(w); }
INLINE vec add_product(vec sum, vec a, vec b) { return sum + a * b; }
#endif

INLINE vec load_words(const word *from) { return *(const vec *)from; }
INLINE void store_words(word *to, vec x) { *(vec *)to = x; }

#endif
