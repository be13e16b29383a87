// test_delta.c: the kernels of Gated DeltaNet on every instruction set that this machine can run, bit for bit against
// their slow truth: one number at a time, in the order that kernels/delta.inc names; and cut anywhere.
#include "check.h"
#include "isa/isa.h"
#include <math.h>
#include <string.h>

#define K_DIM    24 // a multiple of 4: more than one round of the four sums
#define N        9
#define STRIDE   80
#define CHANNELS 16

static float truth_of_silu(float x) { // by the plain C target, whose SiLU test_kernels.c holds to float64
    float gate[16] = {x}, ones[16];
    for (int i = 0; i < 16; i++) ones[i] = 1;
    CHECK(tl_isa_select("scalar") == 0, "there is no scalar target");
    tl_isa()->glu[TL_SILU](gate, ones, 16);
    return gate[0];
}

static void check_conv(const char *isa, int kernel) {
    float *in = random_floats(N * STRIDE, 2), *past = random_floats((size_t)(kernel - 1) * CHANNELS, 2);
    float *w = random_floats((size_t)kernel * CHANNELS, 1), out[N * STRIDE], parts[N * STRIDE], truth[N][CHANNELS];
    for (int t = 0; t < N; t++)
        for (int c = 0; c < CHANNELS; c++) {
            float sum = 0;
            for (int j = 0; j < kernel; j++) {
                const int from = t - kernel + 1 + j;
                const float x = from < 0 ? past[(from + kernel - 1) * CHANNELS + c] : in[from * STRIDE + c];
                sum = j == 0 ? w[c * kernel] * x : fmaf(w[c * kernel + j], x, sum);
            }
            truth[t][c] = truth_of_silu(sum);
        }
    CHECK(tl_isa_select(isa) == 0, "%s cannot be selected", isa);
    tl_isa()->conv(out, in, STRIDE, past, w, kernel, N);
    for (int t = 0; t < N; t++)
        CHECK(!memcmp(out + t * STRIDE, truth[t], sizeof truth[t]), "%s: convolution of %d, token %d", isa, kernel, t);
    float *before = exactly((size_t)(kernel - 1) * CHANNELS * sizeof(float)); // token by token
    for (int t = 0; t < N; t++) {
        for (int j = 0; j < kernel - 1; j++) {
            const int from = t - kernel + 1 + j;
            memcpy(before + j * CHANNELS, from < 0 ? past + (from + kernel - 1) * CHANNELS : in + from * STRIDE,
                   CHANNELS * sizeof(float));
        }
        tl_isa()->conv(parts + t * STRIDE, in + t * STRIDE, STRIDE, before, w, kernel, 1);
        CHECK(!memcmp(parts + t * STRIDE, truth[t], sizeof truth[t]), "%s: alone, token %d", isa, t);
    }
    free(in), free(past), free(w), free(before);
}

// Column c of the state alone.
static void slow_rule(float s[K_DIM], float out[N], const float *q, const float *k, const float *v, const float *decay,
                      const float *beta) {
    for (int t = 0; t < N; t++) {
        float known[4] = {0}, sums[4] = {0};
        for (int i = 0; i < K_DIM; i++) known[i % 4] = fmaf(s[i], k[t * STRIDE + i], known[i % 4]);
        const float recalled = decay[2 * t] * ((known[0] + known[1]) + (known[2] + known[3]));
        const float change = beta[2 * t] * (v[t * STRIDE] - recalled);
        for (int i = 0; i < K_DIM; i++) {
            const float old = decay[2 * t] * s[i];
            s[i] = fmaf(k[t * STRIDE + i], change, old);
            sums[i % 4] = fmaf(s[i], q[t * STRIDE + i], sums[i % 4]);
        }
        out[t] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
}

static void check_rule(const char *isa) {
    float *x = random_floats(N * STRIDE, 1), *gates = random_floats(2 * N, 1), *start = random_floats(K_DIM * 16, 1);
    float state[K_DIM * 16], parts[K_DIM * 16], out[N * STRIDE] = {0}, alone[N * STRIDE] = {0};
    for (int i = 0; i < 2 * N; i++) gates[i] = fabsf(gates[i]);
    memcpy(state, start, sizeof state);
    memcpy(parts, start, sizeof parts);
    tl_delta_rule rule = {.q = x,
                          .k = x + K_DIM,
                          .v = x + 2 * K_DIM,
                          .decay = gates,
                          .beta = gates + 1,
                          .stride = STRIDE,
                          .gate_stride = 2,
                          .k_dim = K_DIM};
    CHECK(tl_isa_select(isa) == 0, "%s cannot be selected", isa);
    tl_delta_rule whole = rule;
    whole.state = state, whole.out = out, whole.n = N;
    tl_isa()->delta_rule(&whole);
    for (int t = 0, n; t < N; t += n) { // cut
        n = 1 + random_below(N - t);
        tl_delta_rule part = rule;
        part.q += t * STRIDE, part.k += t * STRIDE, part.v += t * STRIDE, part.decay += 2 * t, part.beta += 2 * t;
        part.state = parts, part.out = alone + t * STRIDE, part.n = n;
        tl_isa()->delta_rule(&part);
    }
    CHECK(!memcmp(state, parts, sizeof state) && !memcmp(out, alone, sizeof out), "%s: a cut changes bits", isa);
    for (int c = 0; c < 16; c++) {
        float s[K_DIM], truth[N];
        for (int i = 0; i < K_DIM; i++) s[i] = start[i * 16 + c];
        slow_rule(s, truth, x, x + K_DIM, x + 2 * K_DIM + c, gates, gates + 1);
        for (int i = 0; i < K_DIM; i++)
            CHECK(!memcmp(&s[i], &state[i * 16 + c], 4), "%s: row %d, column %d of the state", isa, i, c);
        for (int t = 0; t < N; t++)
            CHECK(!memcmp(&truth[t], &out[t * STRIDE + c], 4), "%s: token %d, column %d", isa, t, c);
    }
    free(x), free(gates), free(start);
}

static void check_gate(const char *isa) {
    float *x = random_floats(37, 3), *gate = random_floats(37, 20), out[37], plain[37];
    memcpy(out, x, sizeof out);
    memcpy(plain, x, sizeof plain);
    CHECK(tl_isa_select(isa) == 0, "%s cannot be selected", isa);
    tl_isa()->sigmoid_mul(out, gate, 37);
    CHECK(tl_isa_select("scalar") == 0, "there is no scalar target");
    tl_isa()->sigmoid_mul(plain, gate, 37);
    CHECK(!memcmp(out, plain, sizeof out), "%s: the gate differs from plain C's", isa);
    for (int i = 0; i < 37; i++) {
        const double truth = (double)x[i] / (1 + exp(-(double)gate[i]));
        CHECK(fabs((double)out[i] - truth) <= 1e-6 * fabs(truth), "%s: gate %d: %g, not %g", isa, i, (double)out[i],
              truth);
    }
    free(x), free(gate);
}

int main(void) {
    for (const char *const *isa = tl_isa_names(); *isa; isa++)
        for (int round = 0; round < 8; round++) {
            for (int kernel = 2; kernel <= 8; kernel++) check_conv(*isa, kernel);
            check_rule(*isa);
            check_gate(*isa);
        }
    return 0;
}
