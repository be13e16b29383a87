// cpu/experts.c: the feed-forward of a mixture of experts. A router scores the experts and a token visits those it scores
// highest; visits are grouped by expert, so that a batch reads an expert's weights once; what they give is added to x in
// ascending expert index, so that a token's bits do not depend on the batch. Includes cpu.h, numeric.h.
#include "cpu/cpu.h"
#include "numeric.h"
#include <string.h>

typedef struct job {
    tl_cpu_run *run;
    tl_routing *routing;
    const tl_config *config;
    const tl_layer *layer;
    float *x;     // [rows, in.k] what the matrices read
    int gathered; // x is still to be copied from the tokens' normed rows
    tl_expert_half half;
    int quantize; // a matrix wants int8
    int block;    // panels a unit
} job;

// The experts that a token's scores put first (of equal ones the lower index), in ascending index, and their weights:
// a softmax over all scores, divided by the sum of the chosen where norm_topk_prob. That quotient is the softmax over
// the chosen alone, which is how Mixtral (arXiv 2401.04088) puts it. A score that is NaN or infinite makes all weights NaN.
static void choose(void *data, int t, int thread) {
    (void)thread;
    const job *j = data;
    const int n = j->config->n_experts, n_used = j->config->n_experts_used;
    const float *scores = j->routing->scores + (size_t)t * (size_t)n;
    int *experts = j->routing->experts + (size_t)t * (size_t)n_used, found = 0;
    float *weights = j->routing->weights + (size_t)t * (size_t)n_used, largest = scores[0];
    for (int e = 0; e < n && found < n_used; e++) {
        int better = 0;
        for (int i = 0; i < n; i++) better += (scores[i] > scores[e]) | ((scores[i] == scores[e]) & (i < e));
        if (better < n_used) experts[found++] = e;
    }
    double sum = 0;
    for (int e = 0; e < n; e++) {
        largest = scores[e] > largest ? scores[e] : largest;
        sum += (double)(scores[e] - scores[e]);
    }
    for (int i = 0; i < (j->config->norm_topk_prob ? n_used : n); i++)
        sum += tl_exp((double)scores[j->config->norm_topk_prob ? experts[i] : i] - (double)largest);
    for (int i = 0; i < n_used; i++) weights[i] = (float)(tl_exp((double)scores[experts[i]] - (double)largest) / sum);
}

void tl_cpu_route(tl_routing *r, const tl_config *config, int n, int threads) {
    const int n_used = config->n_experts_used, n_rows = n * n_used;
    job j = {.routing = r, .config = config};
    tl_parallel(n < TL_FEW_TOKENS ? 1 : threads, n, choose, &j);
    memset(r->first_row, 0, ((size_t)config->n_experts + 1) * sizeof(int));
    for (int i = 0; i < n_rows; i++) r->first_row[r->experts[i] + 1]++;
    r->n_active = 0;
    for (int e = 0; e < config->n_experts; e++) {
        if (r->first_row[e + 1]) r->active[r->n_active++] = e;
        r->first_row[e + 1] += r->first_row[e];
    }
    for (int i = 0; i < n_rows; i++) { // first_row[e] counts up to what first_row[e + 1] was
        r->rows[i] = r->first_row[r->experts[i]]++;
        r->tokens[r->rows[i]] = i / n_used;
    }
    memmove(r->first_row + 1, r->first_row, (size_t)config->n_experts * sizeof(int));
    r->first_row[0] = 0;
}

static void prepare_row(void *data, int row, int thread) {
    (void)thread;
    const job *j = data;
    tl_activations *in = &j->run->in;
    const size_t k = (size_t)in->k, at = (size_t)row * k;
    const float *x = j->gathered ? j->run->normed + (size_t)j->routing->tokens[row] * k : j->x + at;
    if (j->quantize) {
        tl_isa()->quantize(in->q + at, in->groups + at / TL_Q, x, in->k);
        if (in->tiles) tl_isa()->arrange(in, row);
    }
    if (j->gathered) memcpy(j->x + at, x, k * sizeof(float));
}

tl_expert_unit tl_cpu_expert_unit(const tl_routing *r, int n_panels, int block, int unit) {
    const int n_blocks = (n_panels + block - 1) / block, expert = r->active[unit / n_blocks];
    const int first = unit % n_blocks * block;
    return (tl_expert_unit){expert, first, tl_min(first + block, n_panels), r->first_row[expert],
                            r->first_row[expert + 1]};
}

static void expert_unit(void *data, int unit, int thread) {
    (void)thread;
    const job *j = data;
    tl_cpu_run *r = j->run;
    const tl_expert *any = &j->layer->experts[0];
    const int n_panels = tl_panels(j->half == TL_DOWN ? &any->w_down : &any->w_gate);
    const tl_expert_unit u = tl_cpu_expert_unit(j->routing, n_panels, j->block, unit);
    const tl_expert *expert = &j->layer->experts[u.expert];
    const size_t ff = (size_t)j->config->ff_dim, dim = (size_t)j->config->dim;
    tl_product up = {.w = &expert->w_up, .in = &r->in, .out = r->up, .stride = ff};
    const tl_product gate = {.w = &expert->w_gate,
                             .in = &r->in,
                             .out = r->base.hidden,
                             .stride = ff,
                             .up = j->half == TL_GATED ? &up : NULL,
                             .activation = j->config->activation};
    const tl_product down = {.w = &expert->w_down, .in = &r->in, .out = r->visits, .stride = dim};
    tl_cpu_multiply(j->half == TL_DOWN ? &down : &gate, u.first, u.last, u.from, u.to);
    if (j->half == TL_GATE_AND_UP) tl_cpu_multiply(&up, u.first, u.last, u.from, u.to);
}

static void observe(const job *j) {
    for (int i = 0; i < j->routing->n_active; i++) {
        const int e = j->routing->active[i], *row = &j->routing->first_row[e], n = row[1] - row[0];
        const tl_expert *expert = &j->layer->experts[e];
        const float *x = j->x + (size_t)row[0] * (size_t)j->run->in.k;
        if (j->half != TL_DOWN) tl_cpu_observe(&expert->w_gate, x, n);
        tl_cpu_observe(j->half == TL_DOWN ? &expert->w_down : &expert->w_up, x, n);
    }
}

// Rows of activations readied, then every active expert's matrices, in blocks that stay in L2, smaller where that leaves too
// few units for the threads.
void tl_cpu_experts(tl_cpu_run *r, const tl_layer *layer, tl_expert_half half) {
    const tl_config *c = &r->base.model->config;
    const int n_rows = r->base.batch->n * c->n_experts_used, down = half == TL_DOWN;
    job j = {.run = r, .routing = &r->routing, .config = c, .layer = layer, .half = half, .gathered = !down};
    j.x = down ? r->base.hidden : r->visits;
    for (int e = 0; e < c->n_experts; e++) {
        const tl_expert *expert = &layer->experts[e];
        j.quantize |= down ? !expert->w_down.format->is_float
                           : !expert->w_gate.format->is_float || !expert->w_up.format->is_float;
    }
    const tl_matrix *w = down ? &layer->experts[0].w_down : &layer->experts[0].w_gate;
    const int threads = r->base.batch->threads, n_panels = tl_panels(w), wanted = TL_UNITS_THREAD * threads;
    j.block = tl_cpu_block(w, r->routing.n_active * n_panels / wanted);
    r->in.x = j.x;
    r->in.k = w->k;
    r->in.n_rows = n_rows;
    if (j.quantize || j.gathered) tl_parallel(n_rows < TL_FEW_TOKENS ? 1 : threads, n_rows, prepare_row, &j);
    observe(&j);
    tl_parallel(threads, r->routing.n_active * ((n_panels + j.block - 1) / j.block), expert_unit, &j);
}

static void add_visits(void *data, int t, int thread) {
    (void)thread;
    const tl_cpu_run *r = data;
    const tl_config *c = &r->base.model->config;
    const size_t dim = (size_t)c->dim;
    float *x = r->base.x + (size_t)t * dim;
    for (int i = 0; i < c->n_experts_used; i++) {
        const int visit = t * c->n_experts_used + i;
        const float *out = r->visits + (size_t)r->routing.rows[visit] * dim, weight = r->routing.weights[visit];
        for (size_t d = 0; d < dim; d++) x[d] += weight * out[d];
    }
}

void tl_cpu_add_visits(tl_cpu_run *r) {
    const int n = r->base.batch->n;
    tl_parallel(n < TL_FEW_TOKENS ? 1 : r->base.batch->threads, n, add_visits, r);
}

void tl_cpu_moe(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_layer *w = &run->model->layers[layer];
    const tl_config *c = &run->model->config;
    tl_product router = {.w = &w->router, .out = r->routing.scores, .stride = (size_t)c->n_experts};
    tl_cpu_products(r, run->x, NULL, run->batch->n, &w->ffn_norm, &router, 1);
    tl_cpu_route(&r->routing, c, run->batch->n, run->batch->threads);
    tl_cpu_experts(r, w, TL_GATED);
    tl_cpu_experts(r, w, TL_DOWN);
    tl_cpu_add_visits(r);
}
