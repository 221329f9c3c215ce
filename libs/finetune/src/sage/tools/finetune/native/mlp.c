/* The frozen half of a decoder layer of the llama family that mixes no tokens, y = down(silu(gate) * up) + added, and the way
   back. What lies between its products stays in panels: each would turn it, and turn back what it gives. */
#include "gating.h"
#include "panels.h"

/* What the way back needs: both halves of what gate_up gave, (rows, inner) each. */
typedef struct { panels gate, up; } kept_halves;

static kept_halves halves_of(float *kept, long rows, long inner) {
  int strips = strips_of(rows);
  return (kept_halves){{kept, strips}, {kept + panels_size(rows, inner), strips}};
}

/* acted = silu(gate) * up, of a share */
static void gate_share(kept_halves from, panels acted, share own) {
  for (int s = own.first; s < own.first + own.count; s++)
    for (long column = own.out; column < own.out + own.outs; column++) {
      const float *gate = panel(from.gate, s, column), *up = panel(from.up, s, column);
      float *to = panel(acted, s, column);
      for (int i = 0; i < STRIP; i += LANES) store(to + i, gated(load(gate + i), load(up + i)));
    }
}

/* of_gate_up, gates first, from the gradients of a share of acted, a CHUNK of columns for every strip */
static void gate_share_back(const float *of_acted, kept_halves from, panels of_gate_up, long inner, share own) {
  for (int s = own.first; s < own.first + own.count; s++, of_acted += CHUNK * STRIP)
    for (int n = 0; n < own.outs; n++) {
      long column = own.out + n;
      const float *gate = panel(from.gate, s, column), *up = panel(from.up, s, column), *gradient = of_acted + n * STRIP;
      float *of_gate = panel(of_gate_up, s, column), *of_up = panel(of_gate_up, s, inner + column);
      for (int i = 0; i < STRIP; i += LANES) {
        gate_gradients found = gated_backward(load(gradient + i), load(gate + i), load(up + i));
        store(of_gate + i, found.of_gate);
        store(of_up + i, found.of_up);
      }
    }
}

/* Floats that sage_mlp keeps for sage_mlp_backward. */
long sage_mlp_kept(long rows, long inner) { return 2 * panels_size(rows, inner); }

/* Floats that both want room for. */
long sage_mlp_room(long rows, long width, long inner) { return panels_size(rows, width) + panels_size(rows, 2 * inner); }

/* x, added and y (rows, width), gate_up (2 * inner, width) with the gates first, down (width, inner), all without gaps;
   widths are multiples of 16. */
void sage_mlp(const float *x, const void *gate_up, const void *down, int is_half, const float *added, float *y, float *kept,
              float *room, long rows, long width, long inner, int threads) {
  if (!rows) return;
  panels in = {room, strips_of(rows)}, acted = {room + panels_size(rows, width), strips_of(rows)};
  kept_halves to = halves_of(kept, rows, inner);
  frozen gates = {gate_up, width, 1, is_half}, ups = from_there(gates, inner, 0);
  shares widening = dealt(rows, inner, threads), narrowing = dealt(rows, width, threads);
#pragma omp parallel num_threads(threads)
  {
    into_panels(x, width, rows, width, in);
#pragma omp for schedule(dynamic)
    for (int n = 0; n < widening.count; n++) {
      share own = share_of(widening, n);
      multiply(in, own, rows, width, gates, panel(to.gate, own.first, own.out), NEXT_STRIP);
      multiply(in, own, rows, width, ups, panel(to.up, own.first, own.out), NEXT_STRIP);
      gate_share(to, acted, own);
    }
    product_in_rows(acted, rows, inner, (frozen){down, inner, 1, is_half}, added, width, y, width, narrowing);
  }
}

/* of_x, the gradient of x, from of_y, both (rows, width) */
void sage_mlp_backward(const float *of_y, const void *gate_up, const void *down, int is_half, float *kept, float *of_x,
                       float *room, long rows, long width, long inner, int threads) {
  if (!rows) return;
  panels in = {room, strips_of(rows)}, of_gate_up = {room + panels_size(rows, width), strips_of(rows)};
  kept_halves from = halves_of(kept, rows, inner);
  frozen turned = {down, 1, inner, is_half};
  shares widening = dealt(rows, inner, threads), narrowing = dealt(rows, width, threads);
#pragma omp parallel num_threads(threads)
  {
    into_panels(of_y, width, rows, width, in);
#pragma omp for schedule(dynamic)
    for (int n = 0; n < widening.count; n++) {
      float of_acted[RUN * CHUNK] __attribute__((aligned(64)));
      share own = share_of(widening, n);
      multiply(in, own, rows, width, turned, of_acted, CHUNK * STRIP);
      gate_share_back(of_acted, from, of_gate_up, inner, own);
    }
    product_in_rows(of_gate_up, rows, 2 * inner, (frozen){gate_up, 1, width, is_half}, 0, 0, of_x, width, narrowing);
  }
}
