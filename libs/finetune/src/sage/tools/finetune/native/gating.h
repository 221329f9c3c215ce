/* What a gated layer computes of each pair of gate and up: silu(gate) * up. */
#ifndef SAGE_GATING_H
#define SAGE_GATING_H

#include "vectors.h"

INLINE vec gated(vec gate, vec up) { return gate / (1 + vexp(-gate)) * up; }

typedef struct { vec of_gate, of_up; } gate_gradients;

INLINE gate_gradients gated_backward(vec gradient, vec gate, vec up) {
  vec shut = vexp(-gate), open = 1 / (1 + shut);
  return (gate_gradients){gradient * up * open * (1 + gate * (shut * open)), gradient * gate * open};
}

#endif
