// cpu/delta.c: a layer of Gated DeltaNet, arXiv 2412.06464: products, a short convolution, the gates, the delta rule token
// by token, and a gated norm. A sequence's tokens come in order, from the state in its slot; which unit of work computes a
// column of the state changes no bit. Includes cpu.h, numeric.h; the arithmetic is in kernels/delta.inc.
#include "cpu/cpu.h"
#include "numeric.h"
#include <string.h>

#define BLOCKS     4          // of 16 columns or channels that a unit takes: rows of tokens lie far apart
#define AT_ONCE    16         // tokens, before the next of them
#define MOST_STATE (256 * 16) // numbers of 16 columns, by check.c
#define L2_EPS     1e-6f      // that q and k are normed with

// A stretch of a sequence: tokens [first, end), AT_ONCE at most, up to the next state that is kept, whose slot is `keep`
// or -1.
typedef struct stretch {
    int first, end, keep;
} stretch;

static stretch next_stretch(const tl_batch *b, int first, int *save) {
    stretch s = {first, first, -1};
    while (*save < b->n_saves && b->saves[*save].token < first) ++*save;
    const int kept = *save < b->n_saves ? b->saves[*save].token : b->n;
    while (s.end < b->n && b->sequences[s.end] == b->sequences[first] && s.end <= kept && s.end - first < AT_ONCE)
        s.end++;
    if (s.end == kept + 1) s.keep = b->saves[*save].slot;
    return s;
}

static int begins(const tl_batch *b, int t) { return t == 0 || b->sequences[t] != b->sequences[t - 1]; }

// What a layer of the sequence that begins with token t kept before it; NULL: it begins with it.
static const float *kept_before(const tl_cpu_run *r, int t) {
    const tl_batch *b = r->base.batch;
    const int place = r->base.model->layers[r->layer].state;
    return b->positions[t] ? tl_states_at(b->states, b->states_in[b->sequences[t]], place) : NULL;
}

// Channels [64 unit, 64 unit + 64) of all tokens, as far as there are any.
static void convolve(void *data, int unit, int thread) {
    (void)thread;
    tl_cpu_run *r = data;
    const tl_batch *b = r->base.batch;
    const tl_delta_sizes *d = &r->base.model->config.delta;
    const tl_layer *layer = &r->base.model->layers[r->layer];
    const int n_past = d->kernel - 1, n_blocks = tl_min(BLOCKS, tl_delta_channels(d) / 16 - unit * BLOCKS);
    const size_t channels = (size_t)tl_delta_channels(d);
    float pasts[BLOCKS][7 * 16]; // of the sequence, [n_past][16]
    for (int t = 0, save = 0; t < b->n;) {
        const stretch s = next_stretch(b, t, &save);
        const float *kept = begins(b, t) ? kept_before(r, t) : NULL;
        float *keep = s.keep >= 0 ? tl_states_at(b->states, s.keep, layer->state) : NULL;
        for (int i = 0; i < n_blocks; i++) {
            const size_t at = ((size_t)unit * BLOCKS + (size_t)i) * 16;
            float *past = pasts[i];
            const float *in = r->mixed + (size_t)t * channels + at;
            if (begins(b, t)) memset(past, 0, sizeof pasts[i]);
            for (int j = 0; kept && j < n_past; j++)
                memcpy(past + j * 16, kept + (size_t)j * channels + at, 16 * sizeof(float));
            tl_isa()->conv(r->convolved + (size_t)t * channels + at, in, channels, past,
                           layer->delta.conv + at * (size_t)d->kernel, d->kernel, s.end - t);
            for (int j = 0; j < n_past; j++) { // the last of past and these, in place: ascending
                const int from = s.end - t - n_past + j;
                memmove(past + j * 16, from < 0 ? past + (n_past + from) * 16 : in + (size_t)from * channels,
                        16 * sizeof(float));
            }
            for (int j = 0; keep && j < n_past; j++)
                memcpy(keep + (size_t)j * channels + at, past + j * 16, 16 * sizeof(float));
        }
        t = s.end;
    }
}

// A token's q and k of length 1, q by 1 / sqrt(k_dim) shorter; its gates.
static void prepare(void *data, int t, int thread) {
    (void)thread;
    tl_cpu_run *r = data;
    const tl_delta_sizes *d = &r->base.model->config.delta;
    const tl_delta *w = &r->base.model->layers[r->layer].delta;
    float *heads = r->convolved + (size_t)t * (size_t)tl_delta_channels(d);
    float scales[2][256]; // RMSNorm's weight that makes a length of it
    for (int i = 0; i < d->k_dim; i++) {
        scales[0][i] = 1.0f / (float)d->k_dim;
        scales[1][i] = (float)tl_pow(d->k_dim, -0.5);
    }
    for (int h = 0; h < 2 * d->k_heads; h++)
        tl_isa()->rmsnorm(heads + h * d->k_dim, heads + h * d->k_dim, scales[h / d->k_heads], L2_EPS / (float)d->k_dim,
                          d->k_dim);
    float *decay = r->gates + (size_t)t * 2 * (size_t)d->v_heads, *beta = decay + d->v_heads;
    for (int h = 0; h < d->v_heads; h++) {
        const double x = (double)decay[h] + (double)w->dt_bias[h], b = (double)beta[h];
        const double softplus = (x > 0 ? x : 0) + tl_log(1 + tl_exp(x > 0 ? -x : x));
        decay[h] = (float)tl_exp((double)w->a[h] * softplus);
        beta[h] = (float)(1 / (1 + tl_exp(b < -700 ? 700 : -b)));
    }
}

static int groups(const tl_delta_sizes *d) { return (d->v_dim / 16 + BLOCKS - 1) / BLOCKS; } // of a head

// 64 columns of a head of every sequence, as far as there are any.
static void recur(void *data, int unit, int thread) {
    (void)thread;
    tl_cpu_run *r = data;
    const tl_batch *b = r->base.batch;
    const tl_delta_sizes *d = &r->base.model->config.delta;
    const int head = unit / groups(d), first = unit % groups(d) * BLOCKS, of_k = d->v_heads / d->k_heads;
    const int n_blocks = tl_min(BLOCKS, d->v_dim / 16 - first), place = r->base.model->layers[r->layer].state;
    const int k_head = d->tiled ? head % d->k_heads : head / of_k, column = head * d->v_dim + first * 16;
    const size_t channels = (size_t)tl_delta_channels(d), size = (size_t)d->k_dim * 16;
    const size_t at = (size_t)(d->kernel - 1) * channels + (size_t)column * (size_t)d->k_dim; // in what the layer keeps
    const size_t v = (size_t)(2 * d->k_heads * d->k_dim + column);
    float states[BLOCKS * MOST_STATE];
    for (int t = 0, save = 0; t < b->n;) {
        const stretch s = next_stretch(b, t, &save);
        const size_t n_bytes = (size_t)n_blocks * size * sizeof(float);
        const float *kept = begins(b, t) ? kept_before(r, t) : NULL;
        if (kept)
            memcpy(states, kept + at, n_bytes);
        else if (begins(b, t))
            memset(states, 0, n_bytes);
        const float *row = r->convolved + (size_t)t * channels;
        const float *gates = r->gates + (size_t)t * 2 * (size_t)d->v_heads;
        for (int i = 0; i < n_blocks; i++) {
            const tl_delta_rule rule = {.state = states + (size_t)i * size,
                                        .q = row + k_head * d->k_dim,
                                        .k = row + (d->k_heads + k_head) * d->k_dim,
                                        .v = row + v + i * 16,
                                        .out = r->mixed + (size_t)t * channels + v + i * 16, // read before
                                        .stride = channels,
                                        .decay = gates + head,
                                        .beta = gates + d->v_heads + head,
                                        .gate_stride = 2 * (size_t)d->v_heads,
                                        .n = s.end - t,
                                        .k_dim = d->k_dim};
            tl_isa()->delta_rule(&rule);
        }
        if (s.keep >= 0) memcpy(tl_states_at(b->states, s.keep, place) + at, states, n_bytes);
        t = s.end;
    }
}

// attended, which holds z, becomes silu(z) * norm(out), head by head.
static void gate(void *data, int t, int thread) {
    (void)thread;
    tl_cpu_run *r = data;
    const tl_delta_sizes *d = &r->base.model->config.delta;
    const tl_norm *norm = &r->base.model->layers[r->layer].delta.norm;
    const size_t width = (size_t)d->v_heads * (size_t)d->v_dim;
    float *out = r->mixed + (size_t)t * (size_t)tl_delta_channels(d) + 2 * d->k_heads * d->k_dim;
    for (int h = 0; h < d->v_heads; h++) tl_cpu_norm(norm, out + h * d->v_dim, out + h * d->v_dim, d->v_dim);
    tl_isa()->glu[TL_SILU](r->base.attended + (size_t)t * width, out, (int)width);
}

void tl_cpu_delta_net(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_layer *w = &run->model->layers[layer];
    const tl_delta_sizes *d = &run->model->config.delta;
    const int n = run->batch->n, threads = run->batch->threads, few = n < TL_FEW_TOKENS ? 1 : threads;
    const size_t channels = (size_t)tl_delta_channels(d), v_heads = (size_t)d->v_heads;
    tl_product products[] = {{.w = &w->delta.w_qkv, .out = r->mixed, .stride = channels},
                             {.w = &w->delta.w_z, .out = run->attended, .stride = v_heads * (size_t)d->v_dim},
                             {.w = &w->delta.w_a, .out = r->gates, .stride = 2 * v_heads},
                             {.w = &w->delta.w_b, .out = r->gates + v_heads, .stride = 2 * v_heads}};
    r->layer = layer;
    tl_cpu_products(r, run->x, NULL, n, &w->attention_norm, products, 4);
    tl_parallel(threads, ((int)channels / 16 + BLOCKS - 1) / BLOCKS, convolve, r);
    tl_parallel(few, n, prepare, r);
    tl_parallel(threads, d->v_heads * groups(d), recur, r);
    tl_parallel(few, n, gate, r);
}
