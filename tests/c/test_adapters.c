// test_adapters.c: what an adapter's pair adds to a product, bit for bit against the slow truth below, on every instruction
// set: for float and quantized models, formats, ranks and widths that fill no panel and no piece, biases, several adapters a
// row and none, whatever the threads. And what is refused. Weights are random, through the C ABI alone.
#include "check.h"
#include "tinyllm.h"
#include <math.h>
#include <string.h>

#define VOCAB  37
#define N_SEQ  4
#define N_EACH 3 // tokens of a sequence
#define N      (N_SEQ * N_EACH)
#define MOST_K 1088

static void upload(tl_model *model, const char *name, int layer, int id, int rows, int k, float size) {
    const tl_format *f = tl_format_of(id), *f32 = tl_format_of(0);
    float *x = random_floats((size_t)rows * (size_t)k, size);
    const tl_source source = {.format = f32, .fd = -1, .memory = (const uint8_t *)x};
    tl_message message;
    CHECK(tl_model_upload(model, name, layer, &source, f, 1, &message) == TL_OK, "%s: %s", name, message.text);
    free(x);
}

// One layer, dim numbers a row; matrices of the format id where their rows are whole blocks.
static tl_model *make_model(int dim, int id) {
    const tl_config config = {.n_layers = 1,
                              .dim = dim,
                              .n_heads = 2,
                              .n_kv_heads = 1,
                              .head_dim = 16,
                              .ff_dim = 64,
                              .vocab_size = VOCAB,
                              .context = 64,
                              .norm_eps = 1e-5f,
                              .attention_scale = 0.25f,
                              .rope_theta = 1e4,
                              .rope_dim = 16,
                              .rope_scale = 1};
    tl_model *model;
    tl_message message;
    CHECK(tl_model_create(&model, &config, &tl_backend_cpu, &message) == TL_OK, "%s", message.text);
    const int wide = dim % 32 ? 0 : id;
    const float size = 1 / sqrtf((float)dim);
    upload(model, "embedding", 0, wide, VOCAB, dim, 1);
    upload(model, "output", 0, wide, VOCAB, dim, size);
    upload(model, "output_norm", 0, 0, dim, 1, 1);
    upload(model, "attention_norm", 0, 0, dim, 1, 1);
    upload(model, "ffn_norm", 0, 0, dim, 1, 1);
    upload(model, "wq", 0, wide, 32, dim, size);
    upload(model, "wk", 0, wide, 16, dim, size);
    upload(model, "wv", 0, wide, 16, dim, size);
    upload(model, "wo", 0, id, dim, 32, 0.2f);
    upload(model, "w_gate", 0, wide, 64, dim, size);
    upload(model, "w_up", 0, wide, 64, dim, size);
    upload(model, "w_down", 0, id, dim, 64, 0.2f);
    CHECK(tl_model_check(model, &message) == TL_OK, "%s", message.text);
    return model;
}

// An adapter with one pair, beside the output matrix, and its numbers as floats.
typedef struct subject {
    tl_adapter *adapter;
    int rank, has_bias;
    float scale;
    float *a, *b; // [rank, dim], [VOCAB, rank + has_bias]
} subject;

// n random numbers that the format holds exactly, as floats and as bytes of the format.
static float *random_numbers(uint8_t **bytes, const tl_format *f, size_t n) {
    CHECK(n, "no numbers asked for"); // so the compiler, too, sees that some are written
    float *x = random_floats(n, 0.3f);
    *bytes = exactly(n * (size_t)f->block_bytes);
    f->quantize(*bytes, x, n, NULL);
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, *bytes + 2 * i, 2);
        if (f->id == 30) {
            const uint32_t bits = (uint32_t)half << 16;
            memcpy(&x[i], &bits, 4);
        } else if (f->id == 1) { // half to float: normal numbers and zero
            const int exponent = half >> 10 & 31;
            const float fraction = (float)(half & 1023) / 1024;
            const float size = exponent ? ldexpf(1 + fraction, exponent - 15) : ldexpf(fraction, -14);
            x[i] = half >> 15 ? -size : size;
        }
    }
    return x;
}

static subject make_adapter(const tl_model *model, int rank, int has_bias, int id_a, int id_b, float scale) {
    const size_t dim = (size_t)model->config.dim, k = (size_t)(rank + has_bias);
    subject s = {NULL, rank, has_bias, scale, NULL, NULL};
    uint8_t *a, *b;
    s.a = random_numbers(&a, tl_format_of(id_a), (size_t)rank * dim);
    s.b = random_numbers(&b, tl_format_of(id_b), VOCAB * k);
    const tl_source from_a = {.format = tl_format_of(id_a), .fd = -1, .memory = a};
    const tl_source from_b = {.format = tl_format_of(id_b), .fd = -1, .memory = b};
    tl_message message;
    CHECK(tl_adapter_create(&s.adapter, model, 1, &message) == TL_OK, "%s", message.text);
    CHECK(tl_adapter_add(s.adapter, "output", 0, rank, has_bias, scale, &from_a, &from_b, &message) == TL_OK, "%s",
          message.text);
    free(a);
    free(b);
    return s;
}

static void free_adapter(subject *s) {
    tl_adapter_free(s->adapter);
    free(s->a);
    free(s->b);
}

// Of k numbers: those that are added up before they meet the others. 512, halved until it divides k, at least 64; else k.
static int piece_of(int k) {
    int piece = 512;
    while (piece > 64 && k % piece) piece /= 2;
    return k % piece ? k : piece;
}

// The slow truth: logits [VOCAB] += strength * scale * (b (a x), bias).
static void truth(float *logits, const subject *s, const float *x, int dim, float strength) {
    const int piece = piece_of(dim), k = s->rank + s->has_bias;
    const float scale = strength * s->scale;
    float low[64];
    for (int i = 0; i < s->rank; i++) {
        low[i] = 0;
        for (int first = 0; first < dim; first += piece) {
            float sum = 0;
            for (int j = first; j < first + piece; j++) sum = fmaf(s->a[i * dim + j], x[j], sum);
            low[i] = first ? low[i] + sum : sum;
        }
        low[i] *= scale;
    }
    low[s->rank] = scale;
    for (int row = 0; row < VOCAB; row++) {
        float sum = 0;
        for (int i = 0; i < k; i++) sum = fmaf(s->b[row * k + i], low[i], sum);
        logits[row] += sum;
    }
}

typedef struct call {
    int32_t tokens[N], positions[N], sequences[N], rows[N], tables[N_SEQ];
    float logits[N][VOCAB];
    tl_batch batch;
} call;

static void make_call(call *c) {
    memset(c, 0, sizeof *c);
    for (int t = 0; t < N; t++) {
        c->tokens[t] = t * 7 % VOCAB;
        c->positions[t] = t % N_EACH;
        c->sequences[t] = t / N_EACH;
        c->rows[t] = t;
    }
    for (int s = 0; s < N_SEQ; s++) c->tables[s] = s;
    c->batch = (tl_batch){.n = N,
                          .tokens = c->tokens,
                          .positions = c->positions,
                          .sequences = c->sequences,
                          .n_sequences = N_SEQ,
                          .max_pages = 1,
                          .page_tables = c->tables,
                          .last_layer = 1,
                          .n_rows = N,
                          .rows = c->rows,
                          .logits = c->logits[0],
                          .threads = 1};
}

static void test_bits(tl_model *model, tl_cache *cache, const char *name) {
    static const int ranks[][2] = {{1, 1}, {5, 0}, {16, 1}, {17, 0}, {40, 1}};
    static const int formats[][2] = {{0, 0}, {1, 30}, {30, 30}, {0, 1}};
    const int dim = model->config.dim;
    static call c;
    make_call(&c);
    tl_message message;
    CHECK(tl_forward(model, cache, &c.batch, &message) == TL_OK, "%s", message.text);
    float base[N][VOCAB];
    memcpy(base, c.logits, sizeof base);
    float *x = exactly(N * (size_t)dim * sizeof(float)), *normed = exactly((size_t)dim * sizeof(float));
    tl_batch activations = c.batch;
    activations.logits = NULL;
    activations.activations = x;
    CHECK(tl_forward(model, cache, &activations, &message) == TL_OK, "%s", message.text);
    for (int i = 0; i < 5; i++) {
        subject one = make_adapter(model, ranks[i][0], ranks[i][1], formats[i % 4][0], formats[i % 4][1], 0.75f);
        subject two = make_adapter(model, ranks[4 - i][0], 0, 0, 0, -1.5f);
        // The first sequence has one, the second none, the third both, the last the other, twice.
        const tl_use uses[] = {
            {one.adapter, 1}, {one.adapter, 0.3f}, {two.adapter, 2}, {two.adapter, 1}, {two.adapter, 1}};
        const int32_t ends[] = {1, 1, 3, 5};
        const subject *const subjects[] = {&one, &one, &two, &two, &two};
        c.batch.uses = uses;
        c.batch.use_ends = ends;
        for (int threads = 1; threads <= 3; threads += 2) {
            c.batch.threads = threads;
            memset(c.logits, 0, sizeof c.logits);
            CHECK(tl_forward(model, cache, &c.batch, &message) == TL_OK, "%s", message.text);
            for (int t = 0; t < N; t++) {
                const int s = t / N_EACH;
                float expected[VOCAB];
                memcpy(expected, base[t], sizeof expected);
                // The norm in one fixed shape: 16 strided sums, then a tree; multiplied as the kernels do.
                float sums[16] = {0};
                for (int j = 0; j < dim; j++) sums[j % 16] = fmaf(x[t * dim + j], x[t * dim + j], sums[j % 16]);
                for (int half = 8; half >= 1; half /= 2)
                    for (int j = 0; j < half; j++) sums[j] += sums[j + half];
                const float scale = 1.0f / sqrtf(sums[0] / (float)dim + 1e-5f);
                for (int j = 0; j < dim; j++) normed[j] = x[t * dim + j] * scale * model->output_norm.weight[j];
                for (int u = s ? ends[s - 1] : 0; u < ends[s]; u++)
                    truth(expected, subjects[u], normed, dim, uses[u].scale);
                CHECK(!memcmp(expected, c.logits[t], sizeof expected),
                      "%s, %s: rank %d, %d threads, token %d is not the slow truth", tl_isa_name(), name, one.rank,
                      threads, t);
            }
        }
        c.batch.use_ends = NULL;
        free_adapter(&one);
        free_adapter(&two);
    }
    free(x);
    free(normed);
}

static void test_refusals(tl_model *model, tl_cache *cache) {
    static call c;
    make_call(&c);
    tl_message message;
    subject s = make_adapter(model, 4, 0, 0, 0, 1);
    tl_model *other = make_model(model->config.dim, 0);
    subject foreign = make_adapter(other, 4, 0, 0, 0, 1);
    const float numbers[4 * MOST_K] = {0};
    const tl_source zeros = {.format = tl_format_of(0), .fd = -1, .memory = (const uint8_t *)numbers};
    const tl_source blocks = {.format = tl_format_of(8), .fd = -1, .memory = (const uint8_t *)numbers};
    tl_adapter *a;
    CHECK(tl_adapter_create(&a, model, -1, &message) == TL_ARGUMENT, "a negative number of pairs");
    CHECK(tl_adapter_create(&a, model, 2, &message) == TL_OK, "%s", message.text);
    CHECK(tl_adapter_add(a, "nothing", 0, 4, 0, 1, &zeros, &zeros, &message) == TL_ARGUMENT, "an unknown matrix");
    CHECK(tl_adapter_add(a, "wq", 1, 4, 0, 1, &zeros, &zeros, &message) == TL_ARGUMENT, "a layer that there is not");
    CHECK(tl_adapter_add(a, "output_norm", 0, 4, 0, 1, &zeros, &zeros, &message) == TL_ARGUMENT, "a vector");
    CHECK(tl_adapter_add(a, "wq", 0, 0, 0, 1, &zeros, &zeros, &message) == TL_ARGUMENT, "rank 0");
    CHECK(tl_adapter_add(a, "wq", 0, 4, 0, NAN, &zeros, &zeros, &message) == TL_ARGUMENT, "a scale of NaN");
    CHECK(tl_adapter_add(a, "wq", 0, 4, 0, 1, &blocks, &zeros, &message) == TL_ARGUMENT, "blocks");
    CHECK(tl_adapter_add(a, "wq", 0, 4, 0, 1, &zeros, &zeros, &message) == TL_OK, "%s", message.text);
    CHECK(tl_adapter_add(a, "wq", 0, 4, 0, 1, &zeros, &zeros, &message) == TL_ARGUMENT, "a second pair");
    CHECK(tl_adapter_add(a, "wk", 0, 4, 0, 1, &zeros, &zeros, &message) == TL_OK, "%s", message.text);
    CHECK(tl_adapter_add(a, "wv", 0, 4, 0, 1, &zeros, &zeros, &message) == TL_ARGUMENT, "more pairs than room");
    CHECK(tl_adapter_pair(a, &model->layers[0].wk) && !tl_adapter_pair(a, &model->layers[0].wo), "pairs are found");
    tl_adapter_free(a);
    tl_adapter_free(NULL);
    const int32_t ends[N_SEQ] = {1, 1, 1, 1}, falling[N_SEQ] = {1, 0, 1, 1};
    const tl_use own = {s.adapter, 1}, not_own = {foreign.adapter, 1}, endless = {s.adapter, INFINITY};
    c.batch.use_ends = ends;
    c.batch.uses = &not_own;
    CHECK(tl_forward(model, cache, &c.batch, &message) == TL_ARGUMENT && strstr(message.text, "another model"),
          "an adapter of another model");
    c.batch.uses = &endless;
    CHECK(tl_forward(model, cache, &c.batch, &message) == TL_ARGUMENT, "a strength that is infinite");
    c.batch.uses = &own;
    CHECK(tl_forward(model, cache, &c.batch, &message) == TL_OK, "%s", message.text);
    c.batch.use_ends = falling;
    CHECK(tl_forward(model, cache, &c.batch, &message) == TL_ARGUMENT, "ends that fall");
    tl_backend without = tl_backend_cpu;
    without.adapted = NULL;
    model->backend = &without;
    c.batch.use_ends = ends;
    CHECK(tl_forward(model, cache, &c.batch, &message) == TL_UNSUPPORTED, "a backend without adapters");
    CHECK(tl_adapter_create(&a, model, 1, &message) == TL_UNSUPPORTED, "a backend without adapters");
    model->backend = &tl_backend_cpu;
    free_adapter(&s);
    free_adapter(&foreign);
    tl_model_free(other);
}

int main(void) {
    static const int dims[] = {48, 64, 100, 192, 544, 1088};
    for (const char *const *isa = tl_isa_names(); *isa; isa++) {
        CHECK(tl_isa_select(*isa) == 0, "%s", *isa);
        for (int i = 0; i < 12; i++) {
            tl_model *model = make_model(dims[i / 2], i % 2 ? 8 : 0);
            tl_cache *cache;
            tl_message message;
            CHECK(tl_cache_create(&cache, model, 0, N_SEQ, &message) == TL_OK, "%s", message.text);
            CHECK(tl_cache_grow(cache, N_SEQ, &message) == TL_OK, "%s", message.text);
            test_bits(model, cache, i % 2 ? "q8_0" : "f32");
            if (i == 0) test_refusals(model, cache);
            tl_cache_free(cache);
            tl_model_free(model);
        }
    }
    size_t blocks, bytes;
    tl_memory_live(&blocks, &bytes);
    CHECK(blocks == 0, "%zu blocks of %zu bytes are left", blocks, bytes);
    printf("adapters: ok\n");
    return 0;
}
