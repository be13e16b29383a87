// test_model.c: the forward pass through the C ABI alone, on tiny random models from memory: the same bits
// whatever the threads, the batch, the chunks, the copied pages, the split of the layers and the caller's
// floating-point mode; batches that do not fit are refused; nothing is left allocated.
#include "check.h"
#include "tinyllm.h"
#include <fenv.h>
#include <math.h>
#include <string.h>

#define COUNT(a)  ((int)(sizeof(a) / sizeof(a)[0]))
#define N_TOKENS  530 // crosses pages of 64 and, twice, segments of 256
#define N_PAGES   40
#define MAX_PAGES 11 // of a sequence: its context is 700
#define VOCAB     105

// ---- models

typedef struct shape {
    const char *name;
    tl_config config;
    int formats[9]; // ids: embedding, output, wq, wk, wv, wo, w_gate, w_up, w_down
    int bias, tied, sinks;
} shape;

static const int32_t windows[] = {70, 0, 300}, ropes[] = {TL_ROPE_LOCAL, TL_ROPE, TL_ROPE_NONE}; // of three layers

static const float xielu[] = {0.7f, 0.4f, 0.5f, -1e-6f, 1.2f, 0.1f, 0.4f, -0.3f};

static const shape shapes[] = {
    {"float, odd sizes, partial rotation",
     {.n_layers = 3, .dim = 50, .n_heads = 4, .n_kv_heads = 2, .head_dim = 12, .ff_dim = 43, .rope_dim = 6},
     {0, 1, 0, 1, 30, 0, 1, 30, 0},
     1,
     0,
     0},
    {"quantized, mixed",
     {.n_layers = 2, .dim = 64, .n_heads = 3, .n_kv_heads = 1, .head_dim = 32, .ff_dim = 172, .rope_dim = 32},
     {8, 8, 8, 2, 1, 2, 8, 0, 1},
     0,
     1,
     0},
    {"parallel, LayerNorm, scales",
     {.n_layers = 3,
      .dim = 50,
      .n_heads = 4,
      .n_kv_heads = 2,
      .head_dim = 12,
      .ff_dim = 43,
      .rope_dim = 12,
      .norm_kind = TL_LAYER_NORM,
      .qk_norm = TL_QK_HEADS,
      .parallel = 1,
      .residual_scale = 0.5f,
      .logit_scale = 0.25f,
      .windows = windows},
     {0, 1, 0, 1, 30, 0, 1, 30, 0},
     0,
     0,
     0},
    {"windows, two kinds of RoPE and none, caps, norms on both sides",
     {.n_layers = 3,
      .dim = 64,
      .n_heads = 4,
      .n_kv_heads = 2,
      .head_dim = 32,
      .ff_dim = 96,
      .rope_dim = 32,
      .norm_place = TL_NORM_BOTH,
      .activation = TL_GELU,
      .qk_norm = TL_QK_HEAD,
      .attention_cap = 5,
      .logit_cap = 4,
      .embedding_scale = 8,
      .local_rope_theta = 100,
      .windows = windows,
      .ropes = ropes},
     {8, 8, 8, 8, 8, 8, 2, 2, 8},
     0,
     1,
     1},
    {"norms after, of queries and keys as a whole",
     {.n_layers = 2,
      .dim = 48,
      .n_heads = 6,
      .n_kv_heads = 3,
      .head_dim = 8,
      .ff_dim = 43,
      .rope_dim = 8,
      .norm_place = TL_NORM_AFTER,
      .qk_norm = TL_QK_ALL},
     {0, 0, 0, 0, 0, 0, 0, 0, 0},
     0,
     0,
     0},
    {"no gate: xIELU; norms of queries and keys after RoPE, kept within a limit",
     {.n_layers = 2,
      .dim = 64,
      .n_heads = 4,
      .n_kv_heads = 2,
      .head_dim = 24,
      .ff_dim = 83,
      .rope_dim = 16,
      .activation = TL_XIELU,
      .qk_norm = TL_QK_HEAD,
      .qk_norm_late = 1,
      .qkv_limit = 1.5f,
      .xielu = xielu},
     {8, 8, 8, 2, 1, 2, 8, 8, 0},
     0,
     0,
     0},
    {"no gate: ReLU squared; LayerNorm with a bias",
     {.n_layers = 2,
      .dim = 48,
      .n_heads = 4,
      .n_kv_heads = 4,
      .head_dim = 12,
      .ff_dim = 83,
      .rope_dim = 12,
      .norm_kind = TL_LAYER_NORM,
      .activation = TL_RELU_SQUARED},
     {0, 1, 0, 1, 30, 0, 1, 30, 0},
     1,
     0,
     0},
    {"LayerNorm without weights",
     {.n_layers = 2,
      .dim = 50,
      .n_heads = 4,
      .n_kv_heads = 2,
      .head_dim = 12,
      .ff_dim = 83,
      .rope_dim = 12,
      .norm_kind = TL_PLAIN_LAYER_NORM},
     {0, 1, 0, 1, 30, 0, 1, 30, 0},
     0,
     1,
     0},
    {"experts, mixed",
     {.n_layers = 2,
      .dim = 64,
      .n_heads = 2,
      .n_kv_heads = 1,
      .head_dim = 12,
      .ff_dim = 96,
      .rope_dim = 12,
      .n_experts = 9,
      .n_experts_used = 3,
      .norm_topk_prob = 1},
     {1, 8, 8, 8, 2, 1, 8, 0, 2},
     1,
     0,
     0},
};

static int size_of_matrix(const tl_config *c, int i, int *k) {
    const int width = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    const int sizes[9][2] = {
        {c->vocab_size, c->dim}, {c->vocab_size, c->dim}, {width, c->dim},     {kv, c->dim},       {kv, c->dim},
        {c->dim, width},         {c->ff_dim, c->dim},     {c->ff_dim, c->dim}, {c->dim, c->ff_dim}};
    *k = sizes[i][1];
    return sizes[i][0];
}

static void upload(tl_model *model, const char *name, int layer, int id, int rows, int k, float size, float mean) {
    const tl_format *f = tl_format_of(id);
    const size_t n = (size_t)rows * (size_t)k;
    float *x = random_floats(n, size);
    for (size_t i = 0; i < n; i++) x[i] += mean;
    uint8_t *file = exactly(n / (size_t)f->block * (size_t)f->block_bytes);
    f->quantize(file, x, n, NULL);
    const tl_source source = {.format = f, .fd = -1, .memory = file};
    tl_message message;
    const tl_status status = tl_model_upload(model, name, layer, &source, f, 2, &message);
    CHECK(status == TL_OK, "%s: %s", name, message.text);
    free(file);
    free(x);
}

static tl_model *make_model(const shape *s) {
    static const char *const names[] = {"embedding", "output", "wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"};
    static const char *const biases[] = {"bq", "bk", "bv", "bo", "b_gate", "b_up", "b_down"};
    tl_config c = s->config;
    c.vocab_size = VOCAB;
    c.context = 700;
    c.norm_eps = 1e-5f;
    c.attention_scale = 1 / sqrtf((float)c.head_dim);
    c.rope_theta = 10000;
    c.rope_scale = 1;
    tl_model *model;
    tl_message message;
    CHECK(tl_model_create(&model, &c, &tl_backend_cpu, &message) == TL_OK, "%s", message.text);
    CHECK(tl_model_check(model, &message) == TL_ARGUMENT, "a model without weights is complete");
    for (int layer = 0; layer < c.n_layers; layer++) {
        for (int i = 2, k; i < 9; i++) {
            const int rows = size_of_matrix(&c, i, &k), n_experts = i < 6 ? 0 : c.n_experts;
            if (i == 6 && c.activation >= TL_RELU_SQUARED) continue;
            if (!n_experts) upload(model, names[i], layer, s->formats[i], rows, k, 3 / sqrtf((float)k), 0);
            if (!n_experts && s->bias) upload(model, biases[i - 2], layer, 0, rows, 1, 0.5f, 0);
            for (int e = 0; e < n_experts; e++) {
                char name[32], bias[32];
                snprintf(name, sizeof name, "%s.%d", names[i], e);
                snprintf(bias, sizeof bias, "%s.%d", biases[i - 2], e);
                upload(model, name, layer, s->formats[i], rows, k, 3 / sqrtf((float)k), 0);
                if (s->bias) upload(model, bias, layer, 0, rows, 1, 0.5f, 0);
            }
        }
        if (c.n_experts) upload(model, "router", layer, 0, c.n_experts, c.dim, 3 / sqrtf((float)c.dim), 0);
        if (c.n_experts && s->bias) upload(model, "b_router", layer, 0, c.n_experts, 1, 0.5f, 0);
        if (c.norm_place != TL_NORM_AFTER && c.norm_kind != TL_PLAIN_LAYER_NORM) {
            upload(model, "attention_norm", layer, 0, c.dim, 1, 0.5f, 1);
            upload(model, "ffn_norm", layer, 1, c.dim, 1, 0.5f, 1);
        }
        if (c.norm_kind == TL_LAYER_NORM && s->bias) {
            upload(model, "attention_norm_bias", layer, 0, c.dim, 1, 0.5f, 0);
            upload(model, "ffn_norm_bias", layer, 0, c.dim, 1, 0.5f, 0);
        }
        if (c.norm_place != TL_NORM_BEFORE) {
            upload(model, "attention_post_norm", layer, 0, c.dim, 1, 0.5f, 1);
            CHECK(tl_model_check(model, &message) == TL_ARGUMENT, "a model without its norms is complete");
            upload(model, "ffn_post_norm", layer, 1, c.dim, 1, 0.5f, 1);
        }
        const int per_head = c.qk_norm == TL_QK_HEAD;
        if (c.qk_norm != TL_QK_NONE) {
            upload(model, "q_norm", layer, 0, per_head ? c.head_dim : c.n_heads * c.head_dim, 1, 0.5f, 1);
            upload(model, "k_norm", layer, 0, per_head ? c.head_dim : c.n_kv_heads * c.head_dim, 1, 0.5f, 1);
        }
        if (s->sinks) upload(model, "sinks", layer, 0, c.n_heads, 1, 2, 0);
    }
    int k, rows = size_of_matrix(&c, 0, &k);
    upload(model, "embedding", -1, s->formats[0], rows, k, 1, 0);
    if (s->tied)
        tl_model_tie(model);
    else
        upload(model, "output", -1, s->formats[1], rows, k, 3 / sqrtf((float)k), 0);
    if (c.norm_kind != TL_PLAIN_LAYER_NORM) upload(model, "output_norm", -1, 30, c.dim, 1, 0.5f, 1);
    if (c.norm_kind == TL_LAYER_NORM && s->bias) upload(model, "output_norm_bias", -1, 0, c.dim, 1, 0.5f, 0);
    CHECK(tl_model_check(model, &message) == TL_OK, "%s", message.text);
    return model;
}

static tl_cache *make_cache(const tl_model *model, int type) {
    tl_cache *cache;
    tl_message message;
    CHECK(tl_cache_create(&cache, model, type, N_PAGES, &message) == TL_OK, "%s", message.text);
    CHECK(tl_cache_grow(cache, N_PAGES, &message) == TL_OK, "%s", message.text);
    return cache;
}

// ---- calls

typedef struct test { // a model, its prompt, and the logits of the prompt at once on one thread
    const shape *shape;
    tl_model *model;
    tl_cache *cache;
    int32_t tokens[N_TOKENS];
    float *expected; // [N_TOKENS, VOCAB]
} test;

// Page tables of three sequences: pages 0.., 13.., 26..
static int32_t tables[3][MAX_PAGES];
static void default_tables(void) {
    for (int s = 0; s < 3; s++)
        for (int i = 0; i < MAX_PAGES; i++) tables[s][i] = s * 13 + i;
}

// Tokens [first, first + n) of the prompt, at their positions in a sequence.
typedef struct piece {
    int sequence, first, n;
} piece;

typedef struct call {
    tl_batch batch;
    int32_t tokens[3 * N_TOKENS], positions[3 * N_TOKENS], sequences[3 * N_TOKENS], rows[3 * N_TOKENS];
} call;

static void fill_call(call *c, const test *t, const piece *pieces, int n_pieces, int threads) {
    int n = 0;
    for (int p = 0; p < n_pieces; p++)
        for (int i = 0; i < pieces[p].n; i++, n++) {
            c->tokens[n] = t->tokens[pieces[p].first + i];
            c->positions[n] = pieces[p].first + i;
            c->sequences[n] = pieces[p].sequence;
            c->rows[n] = n;
        }
    c->batch = (tl_batch){.n = n,
                          .tokens = c->tokens,
                          .positions = c->positions,
                          .sequences = c->sequences,
                          .n_sequences = 3,
                          .max_pages = MAX_PAGES,
                          .page_tables = tables[0],
                          .last_layer = t->model->config.n_layers,
                          .n_rows = n,
                          .rows = c->rows,
                          .threads = threads};
}

static float *no_logits(size_t n) { // numbers that no model gives, so that a row left out shows
    float *x = exactly(n * VOCAB * sizeof(float));
    for (size_t i = 0; i < n * VOCAB; i++) x[i] = -12345;
    return x;
}

static void forward(const test *t, const tl_batch *batch) {
    tl_message message = {"no message"};
    const tl_status status = tl_forward(t->model, t->cache, batch, &message);
    CHECK(status == TL_OK, "%s: status %d, %s", t->shape->name, status, message.text);
}

// Runs pieces as one batch and compares every logit with the prompt's at once.
static void run(const test *t, const piece *pieces, int n_pieces, int threads, const char *what) {
    static call c;
    fill_call(&c, t, pieces, n_pieces, threads);
    float *logits = c.batch.logits = no_logits((size_t)c.batch.n);
    forward(t, &c.batch);
    for (int i = 0; i < c.batch.n; i++)
        CHECK(!memcmp(logits + (size_t)i * VOCAB, t->expected + (size_t)c.positions[i] * VOCAB, VOCAB * sizeof(float)),
              "%s, cache type %d: %s: position %d of sequence %d differs", t->shape->name, t->cache->type, what,
              c.positions[i], c.sequences[i]);
    free(logits);
}

static void make_expected(test *t) {
    static call c;
    const piece whole = {0, 0, N_TOKENS};
    for (int i = 0; i < N_TOKENS; i++) t->tokens[i] = random_below(VOCAB);
    fill_call(&c, t, &whole, 1, 1);
    c.batch.logits = t->expected = no_logits(N_TOKENS);
    forward(t, &c.batch);
    for (int i = 0; i < N_TOKENS; i++) { // neither empty nor the same everywhere
        const float *row = t->expected + (size_t)i * VOCAB;
        float largest = 0;
        for (int j = 0; j < VOCAB; j++) {
            CHECK(isfinite(row[j]), "%s: logit %d of position %d is %g", t->shape->name, j, i, (double)row[j]);
            largest = fmaxf(largest, fabsf(row[j]));
        }
        CHECK(largest > 0.1f && largest < 1e3f, "%s: logits up to %g", t->shape->name, (double)largest);
        CHECK(i == 0 || memcmp(row, row - VOCAB, VOCAB * sizeof(float)), "%s: position %d equals the one before",
              t->shape->name, i);
    }
}

// ---- the invariances

static void check_threads(const test *t) {
    static const int threads[] = {1, 2, 3, 7};
    for (int i = 0; i < COUNT(threads); i++) {
        const piece whole = {0, 0, N_TOKENS}, last = {0, N_TOKENS - 1, 1};
        run(t, &whole, 1, threads[i], "threads, prompt");
        run(t, &last, 1, threads[i], "threads, one token");
    }
}

// The smallest chunks only around the borders of segments; the positions between are there from larger ones.
static void check_chunks(const test *t) {
    static const int sizes[] = {100, 64, 16, 3, 1};
    for (int i = 0; i < COUNT(sizes); i++)
        for (int first = 0; first < N_TOKENS; first += sizes[i]) {
            if (sizes[i] < 16 && first % TL_SEGMENT > 70 && first % TL_SEGMENT < 240) continue;
            const int left = N_TOKENS - first;
            const piece chunk = {1, first, left < sizes[i] ? left : sizes[i]};
            run(t, &chunk, 1, 1 + i % 3, "chunks");
        }
}

static void check_batches(const test *t) {
    int at[3] = {0, 0, 0}; // three sequences of the same tokens, each at its own pace
    while (at[0] < N_TOKENS || at[1] < N_TOKENS || at[2] < N_TOKENS) {
        piece pieces[3];
        int n_pieces = 0;
        for (int s = 0; s < 3; s++) {
            int n = random_below(4) == 0 ? random_below(150) : random_below(s + 2);
            if (n > N_TOKENS - at[s]) n = N_TOKENS - at[s];
            if (n > 0) pieces[n_pieces++] = (piece){s, at[s], n};
            at[s] += n;
        }
        run(t, pieces, n_pieces, 1 + random_below(4), "batches");
    }
}

// A second sequence shares the first one's full pages and gets a copy of the next one's first tokens, in a page
// where keys and values of other positions still stand.
static void check_copied_page(const test *t) {
    static const int prefixes[] = {0, 1, 15, 16, 37, 64, 65, 256, 293, N_TOKENS - 1};
    tl_message message;
    const piece both[] = {{0, 0, N_TOKENS}, {2, 0, N_TOKENS}};
    run(t, both, 2, 2, "two sequences");
    for (int i = 0; i < COUNT(prefixes); i++) {
        const int full = prefixes[i] / TL_PAGE, rest = prefixes[i] % TL_PAGE, left = N_TOKENS - prefixes[i];
        const piece more = {1, prefixes[i], left < 70 ? left : 70};
        for (int page = 0; page < full; page++) tables[1][page] = tables[0][page];
        for (int page = full; page < MAX_PAGES; page++) tables[1][page] = tables[2][(page + 3 + i) % MAX_PAGES];
        if (rest) {
            const tl_status status = tl_cache_copy_page(t->cache, tables[1][full], tables[0][full], rest, &message);
            CHECK(status == TL_OK, "%s", message.text);
        }
        run(t, &more, 1, 2, "after a copied page");
        default_tables();
    }
}

static void check_layer_ranges(const test *t) {
    static call c;
    const int n_layers = t->model->config.n_layers, dim = t->model->config.dim, n = 270;
    for (int middle = 0; middle <= n_layers; middle++) {
        const piece part = {1, 0, n};
        float *between = exactly((size_t)n * (size_t)dim * sizeof(float)), *logits = no_logits((size_t)n);
        fill_call(&c, t, &part, 1, 2);
        c.batch.last_layer = middle;
        c.batch.activations = between;
        c.batch.n_rows = 0;
        forward(t, &c.batch);
        fill_call(&c, t, &part, 1, 3);
        c.batch.first_layer = middle;
        c.batch.tokens = NULL;
        c.batch.x = between;
        c.batch.logits = logits;
        forward(t, &c.batch);
        CHECK(!memcmp(logits, t->expected, (size_t)n * VOCAB * sizeof(float)), "%s: layers cut at %d", t->shape->name,
              middle);
        free(between);
        free(logits);
    }
}

static void check_rows(const test *t) { // any of the tokens, in any order, repeated or none
    static call c;
    static const int32_t rows[] = {N_TOKENS - 1, 0, 7, 7, 300};
    const piece whole = {0, 0, N_TOKENS};
    fill_call(&c, t, &whole, 1, 2);
    memcpy(c.rows, rows, sizeof rows);
    c.batch.n_rows = COUNT(rows);
    float *logits = c.batch.logits = no_logits(COUNT(rows));
    forward(t, &c.batch);
    for (int i = 0; i < COUNT(rows); i++)
        CHECK(!memcmp(logits + i * VOCAB, t->expected + (size_t)rows[i] * VOCAB, VOCAB * sizeof(float)), "row %d", i);
    c.batch.n_rows = 0;
    forward(t, &c.batch);
    free(logits);
}

static void check_mode(const test *t) { // what the caller's rounding and flushing to zero are must not matter
    const piece last = {0, N_TOKENS - 40, 40};
    fesetround(FE_UPWARD);
#ifdef __x86_64__
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
#endif
    run(t, &last, 1, 2, "another floating-point mode");
    CHECK(fegetround() == FE_UPWARD, "the caller's rounding is not restored");
    fesetenv(FE_DFL_ENV);
}

typedef struct stopper {
    int asked, stop_at;
} stopper;

static int stop(void *data) {
    stopper *s = data;
    return ++s->asked == s->stop_at;
}

static void check_stop(const test *t) {
    static call c;
    const int n_layers = t->model->config.n_layers;
    const piece last = {0, N_TOKENS - 40, 40};
    for (int at = 1; at <= n_layers + 1; at++) { // n_layers + 1: never
        stopper s = {0, at};
        tl_message message = {""};
        fill_call(&c, t, &last, 1, 2);
        float *logits = c.batch.logits = no_logits((size_t)c.batch.n);
        c.batch.stop = stop;
        c.batch.stop_data = &s;
        const tl_status status = tl_forward(t->model, t->cache, &c.batch, &message);
        CHECK(status == (at <= n_layers ? TL_CANCELLED : TL_OK), "stop at %d: status %d", at, status);
        CHECK(s.asked == (at <= n_layers ? at : n_layers), "stop at %d: asked %d times", at, s.asked);
        CHECK(at > n_layers || message.text[0], "cancelled without a message");
        free(logits);
        run(t, &last, 1, 2, "after a cancelled call");
    }
}

// ---- what is refused

static const int32_t many_rows[100] = {0};
static float numbers[4096];

#define BAD(what, change)                                                                                              \
    static void bad_##what(tl_batch *b, call *c) {                                                                     \
        (void)b;                                                                                                       \
        (void)c;                                                                                                       \
        change;                                                                                                        \
    }
#define BAD_BATCHES(X)                                                                                                 \
    X(n, b->n = -1)                                                                                                    \
    X(n_sequences, b->n_sequences = -1)                                                                                \
    X(max_pages, b->max_pages = -1)                                                                                    \
    X(n_rows, b->n_rows = -1)                                                                                          \
    X(token_low, c->tokens[3] = -1)                                                                                    \
    X(token_high, c->tokens[3] = VOCAB)                                                                                \
    X(no_input, b->tokens = NULL)                                                                                      \
    X(two_inputs, b->x = numbers)                                                                                      \
    X(sequence_low, c->sequences[0] = -1)                                                                              \
    X(sequence_high, c->sequences[4] = 3)                                                                              \
    X(sequence_back, (c->sequences[0] = 2, c->sequences[1] = 2))                                                       \
    X(position_low, c->positions[0] = -1)                                                                              \
    X(position_gap, c->positions[4] = 5)                                                                               \
    X(position_again, c->positions[4] = 3)                                                                             \
    X(position_past_context, (b->n = b->n_rows = 1, c->positions[0] = 700))                                            \
    X(position_past_table, (b->n = b->n_rows = 1, b->max_pages = 1, c->positions[0] = 64))                             \
    X(no_table, b->max_pages = 0)                                                                                      \
    X(page_low, tables[1][0] = -1)                                                                                     \
    X(page_high, tables[1][0] = N_PAGES)                                                                               \
    X(earlier_page, (b->n = b->n_rows = 1, c->positions[0] = 130, tables[1][1] = 1 << 30))                             \
    X(row_low, c->rows[2] = -1)                                                                                        \
    X(row_high, c->rows[2] = 5)                                                                                        \
    X(more_rows_than_tokens, (b->n = 1, b->n_rows = 100, b->rows = many_rows))                                         \
    X(no_threads, b->threads = 0)                                                                                      \
    X(too_many_threads, b->threads = TL_MAX_THREADS + 1)                                                               \
    X(first_layer, b->first_layer = -1)                                                                                \
    X(last_layer, b->last_layer++)                                                                                     \
    X(layers_back, (b->logits = NULL, b->first_layer = 2, b->last_layer = 1))                                          \
    X(logits_too_early, b->last_layer--)

#define X(what, change) BAD(what, change)
BAD_BATCHES(X)
#undef X
static const struct {
    const char *what;
    void (*change)(tl_batch *b, call *c);
} bad_batches[] = {
#define X(what, change) {#what, bad_##what},
    BAD_BATCHES(X)
#undef X
};

static void check_refused(const test *t) {
    static call c;
    const piece five = {1, 0, 5};
    float *logits = no_logits(100);
    for (int i = -1; i < COUNT(bad_batches); i++) { // -1: nothing is wrong
        tl_message message = {""};
        fill_call(&c, t, &five, 1, 2);
        c.batch.logits = logits;
        if (i >= 0) bad_batches[i].change(&c.batch, &c);
        const tl_status status = tl_forward(t->model, t->cache, &c.batch, &message);
        const char *what = i < 0 ? "the good batch" : bad_batches[i].what;
        CHECK(status == (i < 0 ? TL_OK : TL_ARGUMENT), "%s: status %d, \"%s\"", what, status, message.text);
        CHECK(i < 0 || strlen(message.text) > 10, "%s: no message", what);
        default_tables();
    }
    free(logits);
    fill_call(&c, t, &five, 1, 1);
    c.batch.n = c.batch.n_rows = 0; // nothing to do is well
    forward(t, &c.batch);
}

static void check_refused_cache(const test *t, const tl_model *other) {
    static call c;
    tl_message message = {""};
    tl_cache *cache = make_cache(other, 1), *none = NULL;
    const piece one = {0, 0, 1};
    fill_call(&c, t, &one, 1, 1);
    CHECK(tl_forward(t->model, cache, &c.batch, &message) == TL_ARGUMENT && message.text[0], "another model's cache");
    CHECK(tl_cache_grow(cache, N_PAGES + 1, &message) == TL_ARGUMENT, "more pages than the most");
    CHECK(tl_cache_clear_page(cache, -1, &message) == TL_ARGUMENT, "page -1");
    CHECK(tl_cache_clear_page(cache, N_PAGES, &message) == TL_ARGUMENT, "a page past the last");
    CHECK(tl_cache_copy_page(cache, 0, N_PAGES, 1, &message) == TL_ARGUMENT, "a copy of no page");
    CHECK(tl_cache_copy_page(cache, N_PAGES, 0, 1, &message) == TL_ARGUMENT, "a copy to no page");
    CHECK(tl_cache_copy_page(cache, 0, 1, 65, &message) == TL_ARGUMENT, "65 tokens of a page");
    CHECK(tl_cache_copy_page(cache, 0, 1, -1, &message) == TL_ARGUMENT, "-1 tokens of a page");
    CHECK(tl_cache_create(&none, other, 2, 1, &message) == TL_ARGUMENT, "a cache of an unknown type");
    const tl_model *odd = other->config.head_dim % 32 ? other : t->model; // one of the two shapes
    CHECK(tl_cache_create(&none, odd, 8, 1, &message) == TL_ARGUMENT, "a Q8_0 cache for odd heads");
    CHECK(tl_cache_create(&none, other, 1, 0, &message) == TL_ARGUMENT, "a cache of no pages");
    tl_cache_free(cache);
}

static void check_refused_uploads(tl_model *model) {
    const uint8_t file[4096] = {0};
    const tl_source floats = {.format = tl_format_of(0), .fd = -1, .memory = file},
                    q4_1 = {.format = tl_format_of(3), .fd = -1, .memory = file};
    const int32_t one[] = {0}, wild[1024] = {1 << 30};
    tl_source short_order = floats, wild_order = floats;
    short_order.row_order = one, short_order.n_row_order = 1;
    wild_order.row_order = wild, wild_order.n_row_order = model->config.n_kv_heads * model->config.head_dim;
    tl_message message = {""};
    const struct {
        const char *name;
        int layer;
        const tl_source *source;
        int format;
        tl_status status;
    } cases[] = {{"wx", 0, &floats, 0, TL_ARGUMENT},           {"wq", -1, &floats, 0, TL_ARGUMENT},
                 {"wq", 99, &floats, 0, TL_ARGUMENT},          {"wq", 0, &floats, 0, TL_ARGUMENT}, // there already
                 {"output_norm", -1, &floats, 0, TL_ARGUMENT}, {"bq", 0, &q4_1, 3, TL_ARGUMENT},
                 {"bk", 0, &short_order, 0, TL_ARGUMENT},      {"bv", 0, &wild_order, 0, TL_ARGUMENT},
                 {"wq.0", 0, &floats, 0, TL_ARGUMENT},         {"w_up.99", 0, &floats, 0, TL_ARGUMENT},
                 {"w_up.-1", 0, &floats, 0, TL_ARGUMENT},      {"w_up.", 0, &floats, 0, TL_ARGUMENT},
                 {"w_up.0x", 0, &floats, 0, TL_ARGUMENT}};
    for (int i = 0; i < COUNT(cases); i++) {
        const tl_status status = tl_model_upload(model, cases[i].name, cases[i].layer, cases[i].source,
                                                 tl_format_of(cases[i].format), 1, &message);
        CHECK(status == cases[i].status && message.text[0], "upload of %s in layer %d: status %d", cases[i].name,
              cases[i].layer, status);
    }
}

static void check_refused_configs(const tl_config *good) {
    tl_model *model = NULL;
    tl_message message;
    const float bad_factors[] = {1, -1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
#define BAD_CONFIG(change)                                                                                             \
    do {                                                                                                               \
        tl_config c = *good;                                                                                           \
        c.change;                                                                                                      \
        message.text[0] = 0;                                                                                           \
        const tl_status status = tl_model_create(&model, &c, &tl_backend_cpu, &message);                               \
        CHECK(status == TL_ARGUMENT && message.text[0] && !model, "a config with %s: status %d", #change, status);     \
    } while (0)
    BAD_CONFIG(n_layers = 0);
    BAD_CONFIG(n_layers = 1 << 30);
    BAD_CONFIG(dim = -1);
    BAD_CONFIG(n_heads = 0);
    BAD_CONFIG(n_kv_heads = 5);
    BAD_CONFIG(n_kv_heads = 0);
    BAD_CONFIG(head_dim = 1 << 20);
    BAD_CONFIG(ff_dim = 0);
    BAD_CONFIG(vocab_size = 0);
    BAD_CONFIG(context = 0);
    BAD_CONFIG(rope_dim = 3);
    BAD_CONFIG(rope_dim = 128);
    BAD_CONFIG(rope_dim = -2);
    BAD_CONFIG(rope_theta = 0);
    BAD_CONFIG(rope_theta = NAN);
    BAD_CONFIG(norm_eps = -1);
    BAD_CONFIG(norm_eps = INFINITY);
    BAD_CONFIG(rope_scale = NAN);
    BAD_CONFIG(attention_scale = INFINITY);
    BAD_CONFIG(rope_factors = bad_factors);
    const float bad_xielu[] = {1, 1, 1, 0.5f};
    const int32_t bad_places[] = {0, 1 << 24, 1};
    const int32_t bad_windows[] = {0, -1, 0}, bad_ropes[] = {TL_ROPE, 3, TL_ROPE}, unknown[] = {TL_ROPE_LOCAL, 0, 0};
    BAD_CONFIG(norm_kind = 3);
    BAD_CONFIG(qk_norm_late = 2);
    BAD_CONFIG(qkv_limit = -1);
    BAD_CONFIG(qkv_limit = NAN);
    BAD_CONFIG(xielu = (c.activation = TL_XIELU, bad_xielu));
    BAD_CONFIG(xielu = (c.activation = TL_XIELU, NULL));
    BAD_CONFIG(norm_place = 3);
    BAD_CONFIG(activation = 5);
    BAD_CONFIG(qk_norm = 4);
    BAD_CONFIG(parallel = 2);
    BAD_CONFIG(bidirectional = -1);
    BAD_CONFIG(attention_cap = -1);
    BAD_CONFIG(logit_cap = NAN);
    BAD_CONFIG(embedding_scale = INFINITY);
    BAD_CONFIG(residual_scale = -1);
    BAD_CONFIG(logit_scale = NAN);
    BAD_CONFIG(local_rope_theta = -1);
    BAD_CONFIG(windows = bad_windows);
    BAD_CONFIG(query_growth = -1);
    BAD_CONFIG(query_growth = 0.1); // without query_span
    BAD_CONFIG(page_layers = -1);
    BAD_CONFIG(page_layers = good->n_layers + 1);
    BAD_CONFIG(places = bad_windows); // without page_layers
    BAD_CONFIG(page_layers = (c.places = bad_windows, 1));
    BAD_CONFIG(page_layers = (c.places = bad_places, 1));
    BAD_CONFIG(ropes = bad_ropes);
    if (good->local_rope_theta == 0) BAD_CONFIG(ropes = unknown); // no angles for it
    BAD_CONFIG(n_experts = -1);
    BAD_CONFIG(n_experts = 1 << 20);
    BAD_CONFIG(n_experts_used = -1);
    BAD_CONFIG(n_experts_used = c.n_experts + 1);
    BAD_CONFIG(n_experts_used = c.n_experts ? 0 : 1);
#undef BAD_CONFIG
}

// Tokens that attend to those behind them: a text comes whole, and neither threads nor neighbours change its bits. The
// values are compared with sentence-transformers' in test_embed.py.
static void check_bidirectional(void) {
    shape s = shapes[3];
    s.config.bidirectional = 1;
    tl_model *model = make_model(&s);
    static const int types[] = {0, 1, 8}, threads[] = {1, 2, 3, 7};
    for (int k = 0; k < COUNT(types); k++) {
        test t = {.shape = &s, .model = model, .cache = make_cache(model, types[k])};
        static call c;
        make_expected(&t);
        const piece beside[] = {{0, 0, N_TOKENS}, {1, 0, 3}, {2, 0, N_TOKENS}}, late = {0, 5, 3};
        for (int i = 0; i < COUNT(threads); i++) {
            const piece whole = {i % 3, 0, N_TOKENS}, both[] = {beside[0], beside[2]};
            run(&t, &whole, 1, threads[i], "both sides, threads");
            run(&t, both, 2, threads[i], "both sides, two texts");
        }
        fill_call(&c, &t, beside, 3, 3);
        float *logits = c.batch.logits = no_logits((size_t)c.batch.n), *alone = no_logits(3);
        forward(&t, &c.batch);
        for (int i = 0; i < c.batch.n; i++) {
            const float *expected = t.expected + (size_t)c.positions[i] * VOCAB;
            const int same = !memcmp(logits + (size_t)i * VOCAB, expected, VOCAB * sizeof(float));
            CHECK(same == (c.sequences[i] != 1), "both sides: position %d of sequence %d", c.positions[i],
                  c.sequences[i]);
        }
        const float *short_text = logits + (size_t)N_TOKENS * VOCAB;
        fill_call(&c, &t, &beside[1], 1, 1);
        c.batch.logits = alone;
        forward(&t, &c.batch);
        CHECK(!memcmp(alone, short_text, 3 * VOCAB * sizeof(float)), "both sides: a short text alone differs");
        fill_call(&c, &t, &late, 1, 1);
        tl_message message;
        CHECK(tl_forward(model, t.cache, &c.batch, &message) == TL_ARGUMENT, "both sides: a text in pieces");
        free(alone);
        free(logits);
        tl_cache_free(t.cache);
        free(t.expected);
    }
    tl_model_free(model);
}

int main(void) {
    size_t n_blocks, n_bytes;
    default_tables();
    for (int i = 0; i < COUNT(shapes); i++) {
        tl_model *model = make_model(&shapes[i]), *other = make_model(&shapes[(i + 1) % COUNT(shapes)]);
        static const int types[] = {0, 1, 8}; // Q8_0 for heads of whole groups of 32 only
        for (int k = i < 2 ? 0 : 1; k < (shapes[i].config.head_dim % 32 ? 2 : 3); k++) { // F32 with the first two
            test t = {.shape = &shapes[i], .model = model, .cache = make_cache(model, types[k])};
            make_expected(&t);
            check_threads(&t);
            check_chunks(&t);
            check_batches(&t);
            check_copied_page(&t);
            check_layer_ranges(&t);
            check_rows(&t);
            check_mode(&t);
            check_stop(&t);
            check_refused(&t);
            check_refused_cache(&t, other);
            tl_cache_free(t.cache);
            free(t.expected);
        }
        check_refused_uploads(model);
        check_refused_configs(&model->config);
        tl_model_free(model);
        tl_model_free(other);
    }
    check_bidirectional();
    tl_memory_live(&n_blocks, &n_bytes);
    CHECK(n_blocks == 0 && n_bytes == 0, "%zu blocks of %zu bytes are still allocated", n_blocks, n_bytes);
    return 0;
}
