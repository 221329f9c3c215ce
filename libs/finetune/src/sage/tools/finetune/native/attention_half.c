/* Attention over bfloat16s, for chips with units for their products: see attention.c. */
#ifdef __AVX512BF16__
#define HALF
#include "attention.c"
#endif
