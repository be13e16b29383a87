// cpu/adapters.c: the CPU's operations for a batch with adapters: those of backend.c, and beside every matrix its low-rank
// pairs (LoRA, arXiv 2106.09685), out += scale * (in @ a.T) @ b.T in float32. The two thin products are the packed ones of
// kernels/matmul.inc. So that a single row keeps many threads busy, k is cut into pieces by the matrix's shape alone, whose
// sums are added up in order. So a row's bits are its own, whoever shares the call. Includes cpu.h.
#include "cpu/cpu.h"
#include <string.h>

#define PIECE       512        // of k at most, that a unit multiplies
#define PANELS      32         // of b, that a unit multiplies
#define MOST_ROWS   64         // of a part
#define MOST_PARTS  512        // that wait to be computed together
#define MOST_FLOATS (1u << 20) // that they need, unless a single row needs more

// One pair's product with rows that stand together; x, ids and out begin with the first of them.
typedef struct part {
    const tl_pair *pair;
    const float *x;     // [n, k]
    const int32_t *ids; // [n] in place of x, where rows of a are looked up
    float *out;         // [n, rows] a stride apart, which the product is added to
    size_t stride;
    int n;
    float scale;
    float *sums;        // [n, pieces, padded rank]
    float *low;         // [n, b.k] scale * in @ a.T
    int a_unit, b_unit; // the first of its own
} part;

struct tl_low_rank {
    int n_parts, n_rows;
    size_t used, room; // of floats
    part parts[MOST_PARTS + 1];
    float floats[];
};

// ---- loading ------------------------------------------------------------------------------------------------------------

static int pieces_of(int k) {
    int piece = PIECE;
    while (piece > PIECE / 8 && k % piece) piece /= 2;
    return k % piece ? 1 : k / piece;
}

// a [rank, k] becomes its pieces on top of each other, each padded to whole panels: [pieces * padded rank, k / pieces]. Rows
// [n, k] are [n * pieces, k / pieces] as they lie, and every one of these meets its own piece.
static tl_status upload_pair(tl_pair *p, const tl_source *a, const tl_source *b, tl_message *message) {
    tl_source source = *a;
    uint8_t *cut = NULL;
    if (!p->looked_up) {
        const int pieces = pieces_of(p->a.k), height = (p->rank + TL_ROWS - 1) / TL_ROWS * TL_ROWS;
        const size_t width = (size_t)(p->a.k / pieces * a->format->block_bytes), row_bytes = width * (size_t)pieces;
        cut = tl_alloc((size_t)(pieces * height) * width);
        if (!cut) return tl_fail(message, TL_MEMORY, "no memory for a matrix of rank %d", p->rank);
        for (int i = 0; i < pieces; i++)
            for (int row = 0; row < p->rank; row++)
                memcpy(cut + (size_t)(i * height + row) * width,
                       a->memory + (size_t)row * row_bytes + (size_t)i * width, width);
        p->a.rows = pieces * height;
        p->a.k /= pieces;
        source.memory = cut;
    }
    tl_status status = tl_cpu_upload(&p->a, &source, 1, message);
    if (status == TL_OK) status = tl_cpu_upload(&p->b, b, 1, message);
    tl_free(cut);
    return status;
}

// ---- the two products ---------------------------------------------------------------------------------------------------

static int n_pieces(const tl_pair *p) { return p->of->k / p->a.k; }
static int n_sums(const tl_pair *p) { return p->looked_up ? 0 : p->a.rows; }

// The part of a unit, by the units before it.
static const part *find(const struct tl_low_rank *low, int unit, int of_b) {
    int first = 0, end = low->n_parts;
    while (end - first > 1) {
        const int middle = (first + end) / 2;
        if ((of_b ? low->parts[middle].b_unit : low->parts[middle].a_unit) <= unit)
            first = middle;
        else
            end = middle;
    }
    return &low->parts[first];
}

// One panel of one piece of a.
static void multiply_a(void *data, int unit, int thread) {
    (void)thread;
    const part *p = find(data, unit, 0);
    const tl_matrix *a = &p->pair->a;
    const int panel = unit - p->a_unit, pieces = n_pieces(p->pair),
              piece = panel / (n_sums(p->pair) / pieces / TL_ROWS);
    const tl_activations in = {.x = p->x, .k = a->k};
    for (int row = 0; row < p->n; row++) {
        const tl_product product = {.w = a, .in = &in, .out = p->sums + (size_t)row * (size_t)n_sums(p->pair)};
        const int at = row * pieces + piece;
        tl_isa()->matmul[a->format - tl_formats](&product, panel, panel + 1, at, at + 1);
    }
}

static void add_up(void *data, int unit, int thread) {
    (void)thread;
    const part *p = &((struct tl_low_rank *)data)->parts[unit];
    const tl_pair *pair = p->pair;
    const int rank = pair->rank, pieces = pair->looked_up ? 0 : n_pieces(pair),
              height = pieces ? n_sums(pair) / pieces : 0;
    for (int row = 0; row < p->n; row++) {
        float *low = p->low + (size_t)row * (size_t)pair->b.k;
        const float *sums = p->sums + (size_t)row * (size_t)n_sums(pair);
        if (pair->looked_up)
            tl_cpu_unpack_row(&pair->a, p->ids[row], low);
        else
            memcpy(low, sums, (size_t)rank * sizeof(float));
        for (int piece = 1; piece < pieces; piece++)
            for (int i = 0; i < rank; i++) low[i] += sums[piece * height + i];
        for (int i = 0; i < rank; i++) low[i] *= p->scale;
        if (pair->b.k > rank) low[rank] = p->scale; // times the bias
    }
}

static void multiply_b(void *data, int unit, int thread) {
    (void)thread;
    const part *p = find(data, unit, 1);
    const tl_matrix *b = &p->pair->b;
    const int first = (unit - p->b_unit) * PANELS, last = tl_min(first + PANELS, tl_panels(b));
    const tl_activations in = {.x = p->low, .k = b->k};
    const tl_product product = {.w = b, .in = &in, .out = p->out, .stride = p->stride, .add = 1};
    tl_isa()->matmul[b->format - tl_formats](&product, first, last, 0, p->n);
}

// Computes the parts that wait.
static void flush(tl_cpu_run *r) {
    struct tl_low_rank *low = r->low;
    const int threads = r->base.batch->threads, last = low->n_parts;
    if (last == 0) return;
    if (low->parts[last].a_unit) tl_parallel(threads, low->parts[last].a_unit, multiply_a, low);
    tl_parallel(low->n_rows < TL_FEW_TOKENS ? 1 : threads, last, add_up, low);
    tl_parallel(threads, low->parts[last].b_unit, multiply_b, low);
    low->n_parts = low->n_rows = 0;
    low->used = 0;
}

// ---- what is to be added ------------------------------------------------------------------------------------------------

static size_t row_floats(const tl_pair *p) { return (size_t)n_sums(p) + (size_t)p->b.k; }

// Puts a pair's product with n rows to those that wait.
static void put(tl_cpu_run *r, part p) {
    const size_t each = row_floats(p.pair), k = (size_t)p.pair->of->k;
    for (int left = p.n; left > 0; left -= p.n) {
        if (r->low->n_parts == MOST_PARTS || r->low->used + each > r->low->room) flush(r);
        struct tl_low_rank *low = r->low;
        const size_t fit = (low->room - low->used) / each;
        p.n = tl_min(left, fit < MOST_ROWS ? (int)fit : MOST_ROWS);
        p.low = low->floats + low->used;
        p.sums = p.low + (size_t)p.n * (size_t)p.pair->b.k;
        part *at = &low->parts[low->n_parts++], *next = at + 1;
        p.a_unit = low->n_parts == 1 ? 0 : at->a_unit;
        p.b_unit = low->n_parts == 1 ? 0 : at->b_unit;
        *at = p;
        next->a_unit = p.a_unit + n_sums(p.pair) / TL_ROWS;
        next->b_unit = p.b_unit + (tl_panels(&p.pair->b) + PANELS - 1) / PANELS;
        low->used += (size_t)p.n * each;
        low->n_rows += p.n;
        if (p.ids)
            p.ids += p.n;
        else
            p.x += (size_t)p.n * k;
        p.out += (size_t)p.n * p.stride;
    }
}

typedef struct use_list {
    const tl_use *first;
    int n;
} use_list;

static use_list uses_of(const tl_batch *b, int token) {
    const int s = b->sequences[token], from = s ? b->use_ends[s - 1] : 0;
    return (use_list){b->uses + from, b->use_ends[s] - from};
}

static int same(use_list a, use_list b) {
    int i = 0;
    while (i < a.n && i < b.n && a.first[i].adapter == b.first[i].adapter && a.first[i].scale == b.first[i].scale) i++;
    return i == a.n && i == b.n;
}

// Rows that read x (or ids), row i being of tokens[i] (NULL: of token i), and what the matrices make of them.
typedef struct target {
    const tl_matrix *w;
    float *out;
    size_t stride;
} target;
typedef struct rows {
    const float *x;
    const int32_t *ids, *tokens;
    int n;
    target targets[TL_MAX_PRODUCTS];
    int n_targets;
    float scale; // beside the pairs'
} rows;

// The u-th adapter of every row; whether any row has more.
static int put_use(tl_cpu_run *r, const rows *rows, int u) {
    const tl_batch *b = r->base.batch;
    int more = 0;
    for (int from = 0, to; from < rows->n; from = to) {
        const use_list uses = uses_of(b, rows->tokens ? rows->tokens[from] : from);
        for (to = from + 1; to < rows->n; to++)
            if (!same(uses, uses_of(b, rows->tokens ? rows->tokens[to] : to))) break;
        more |= u + 1 < uses.n;
        for (int i = 0; u < uses.n && i < rows->n_targets; i++) {
            const target *t = &rows->targets[i];
            const tl_pair *pair = tl_adapter_pair(uses.first[u].adapter, t->w);
            if (!pair) continue;
            put(r, (part){.pair = pair,
                          .x = rows->x ? rows->x + (size_t)from * (size_t)t->w->k : NULL,
                          .ids = rows->ids ? rows->ids + from : NULL,
                          .out = t->out + (size_t)from * t->stride,
                          .stride = t->stride,
                          .n = to - from,
                          .scale = rows->scale * uses.first[u].scale * pair->scale});
        }
    }
    return more;
}

// Adds all adapters' pairs, a sequence's one after another.
static void add_pairs(tl_cpu_run *r, const rows *rows) {
    for (int u = 0, more = 1; more; u++) {
        more = put_use(r, rows, u);
        flush(r);
    }
}

// ---- the operations -----------------------------------------------------------------------------------------------------

static tl_status begin(tl_run **run, tl_model *model, tl_cache *cache, const tl_batch *b, tl_message *message) {
    tl_status status = tl_cpu_begin(run, model, cache, b, message);
    if (status != TL_OK) return status;
    tl_cpu_run *r = (tl_cpu_run *)*run;
    size_t room = MOST_FLOATS;
    for (int u = 0; b->n_sequences && u < b->use_ends[b->n_sequences - 1]; u++)
        for (int i = 0; i < b->uses[u].adapter->n_pairs; i++) {
            const size_t each = row_floats(&b->uses[u].adapter->pairs[i]);
            room = each > room ? each : room;
        }
    if (r->low && r->low->room >= room) return TL_OK;
    void *before = r->low;
    r->low = NULL; // first: a process forked in the middle has this memory as it stands
    tl_free(before);
    r->low = tl_alloc(sizeof *r->low + room * sizeof(float));
    if (!r->low) return tl_fail(message, TL_MEMORY, "no memory for the adapters of a call");
    r->low->room = room;
    return TL_OK;
}

static void embed(tl_run *run) {
    const tl_config *c = &run->model->config;
    tl_backend_cpu.embed(run);
    if (run->batch->tokens)
        add_pairs((tl_cpu_run *)run, &(rows){.ids = run->batch->tokens,
                                             .n = run->batch->n,
                                             .targets = {{&run->model->embedding, run->x, (size_t)c->dim}},
                                             .n_targets = 1,
                                             .scale = c->embedding_scale});
}

static void qkv(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_layer *w = &run->model->layers[layer];
    tl_product products[] = {{.w = &w->wq, .out = run->q, .stride = r->q_width},
                             {.w = &w->wk, .out = r->k, .stride = r->kv_width},
                             {.w = &w->wv, .out = r->v, .stride = r->kv_width}};
    tl_cpu_products(r, run->x, NULL, run->batch->n, &w->attention_norm, products, 3);
    add_pairs(
        r, &(rows){.x = r->in.x,
                   .n = run->batch->n,
                   .targets = {{&w->wq, run->q, r->q_width}, {&w->wk, r->k, r->kv_width}, {&w->wv, r->v, r->kv_width}},
                   .n_targets = 3,
                   .scale = 1});
    tl_cpu_rotate_and_store(r, layer);
}

static void linear_add(tl_run *run, const float *in, const tl_matrix *w, const tl_norm *norm) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const int direct = !norm->weight && run->model->config.residual_scale == 1;
    float *out = direct ? run->x : r->normed;
    const size_t stride = (size_t)w->rows;
    tl_product product = {.w = w, .out = out, .stride = stride, .add = direct};
    tl_cpu_products(r, in, NULL, run->batch->n, NULL, &product, 1);
    add_pairs(r, &(rows){.x = in, .n = run->batch->n, .targets = {{w, out, stride}}, .n_targets = 1, .scale = 1});
    if (!direct) tl_cpu_add(r, r->normed, norm);
}

static void gate_row(void *data, int row, int thread) {
    (void)thread;
    tl_cpu_run *r = data;
    const tl_config *c = &r->base.model->config;
    const size_t at = (size_t)row * (size_t)c->ff_dim;
    const float *xielu = r->base.model->layers[r->layer].xielu; // of a unit without a gate
    tl_isa()->glu[c->activation](r->base.hidden + at, c->activation < TL_RELU_SQUARED ? r->up + at : xielu, c->ff_dim);
}

// hidden = activation(hidden) * up, or activation(hidden), of the layer that attention was of
static void gate(tl_cpu_run *r, int n) { tl_parallel(n < TL_FEW_TOKENS ? 1 : r->base.batch->threads, n, gate_row, r); }

static void norm_glu(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_layer *w = &run->model->layers[layer];
    const size_t stride = (size_t)w->w_up.rows;
    const int gated = w->w_gate.data != NULL;
    float *to = gated ? r->up : run->hidden;
    tl_product products[] = {{.w = &w->w_up, .out = to, .stride = stride},
                             {.w = &w->w_gate, .out = run->hidden, .stride = stride}};
    tl_cpu_products(r, run->x, NULL, run->batch->n, &w->ffn_norm, products, 1 + gated);
    add_pairs(r, &(rows){.x = r->in.x,
                         .n = run->batch->n,
                         .targets = {{&w->w_up, to, stride}, {&w->w_gate, run->hidden, stride}},
                         .n_targets = 1 + gated,
                         .scale = 1});
    gate(r, run->batch->n);
}

// Of every active expert's rows, which stand together.
static void add_experts_pairs(tl_cpu_run *r, const tl_layer *w, const float *x, int down) {
    const tl_config *c = &r->base.model->config;
    const size_t dim = (size_t)c->dim, ff = (size_t)c->ff_dim;
    for (int u = 0, more = 1; more; u++, flush(r)) {
        more = 0;
        for (int i = 0; i < r->routing.n_active; i++) {
            const int e = r->routing.active[i], first = r->routing.first_row[e];
            const size_t at = (size_t)first;
            rows of = {.x = x + at * (down ? ff : dim),
                       .tokens = r->routing.tokens + first,
                       .n = r->routing.first_row[e + 1] - first,
                       .n_targets = down ? 1 : 2,
                       .scale = 1};
            of.targets[0] = down ? (target){&w->experts[e].w_down, r->visits + at * dim, dim}
                                 : (target){&w->experts[e].w_gate, r->base.hidden + at * ff, ff};
            of.targets[1] = (target){&w->experts[e].w_up, r->up + at * ff, ff};
            more |= put_use(r, &of, u);
        }
    }
}

static void moe(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_layer *w = &run->model->layers[layer];
    const tl_config *c = &run->model->config;
    const int n = run->batch->n;
    const size_t n_experts = (size_t)c->n_experts;
    tl_product router = {.w = &w->router, .out = r->routing.scores, .stride = n_experts};
    tl_cpu_products(r, run->x, NULL, n, &w->ffn_norm, &router, 1);
    add_pairs(
        r,
        &(rows){
            .x = r->in.x, .n = n, .targets = {{&w->router, r->routing.scores, n_experts}}, .n_targets = 1, .scale = 1});
    tl_cpu_route(&r->routing, c, n, run->batch->threads);
    tl_cpu_experts(r, w, TL_GATE_AND_UP);
    add_experts_pairs(r, w, r->visits, 0);
    gate(r, n * c->n_experts_used);
    tl_cpu_experts(r, w, TL_DOWN);
    add_experts_pairs(r, w, run->hidden, 1);
    tl_cpu_add_visits(r);
}

static void norm_linear(tl_run *run, const tl_norm *norm, const tl_matrix *w) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_batch *b = run->batch;
    if (b->n_rows == 0) return;
    const size_t stride = (size_t)w->rows;
    tl_product product = {.w = w, .out = b->logits, .stride = stride};
    tl_cpu_products(r, run->x, b->rows, b->n_rows, norm, &product, 1);
    add_pairs(r, &(rows){.x = r->in.x, // the chosen rows, since models have an output norm
                         .tokens = b->rows,
                         .n = b->n_rows,
                         .targets = {{w, b->logits, stride}},
                         .n_targets = 1,
                         .scale = 1});
    tl_cpu_finish_logits(r);
}

const tl_backend tl_cpu_adapted = {
    .name = "cpu",
    .begin = begin,
    .embed = embed,
    .qkv = qkv,
    .attend = tl_cpu_attend,
    .linear_add = linear_add,
    .norm_glu = norm_glu,
    .moe = moe,
    .norm_linear = norm_linear,
    .end = tl_cpu_end,
    .upload_pair = upload_pair,
};
