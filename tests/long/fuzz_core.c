// fuzz_core.c: libFuzzer on the C entry points that take sizes and bytes: rounding and packing of every format, what a
// model is made of, batches, caches, sampling. Buffers are of exactly the size that the header promises, so that
// AddressSanitizer sees one byte too far. Built and run by fuzz_core.py.
#define _GNU_SOURCE
#include "formats/formats.h"
#include "tinyllm.h"
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

// What the fuzzer gave, taken from its start; zeros when it is used up, which stand for what is usual and right.
typedef struct input {
    const uint8_t *at, *end;
} input;

static void take(input *in, void *to, size_t n) {
    const size_t left = (size_t)(in->end - in->at), some = n < left ? n : left;
    memset(to, 0, n);
    if (some) memcpy(to, in->at, some);
    in->at += some;
}

static unsigned below(input *in, unsigned n) {
    uint16_t x;
    take(in, &x, sizeof x);
    return x % n;
}

// One time in n.
static int oddly(input *in, unsigned n) { return below(in, n) == 1; }

static int32_t any_int(input *in) {
    int32_t x;
    take(in, &x, sizeof x);
    return x;
}

static float any_float(input *in) {
    float x;
    take(in, &x, sizeof x);
    return x;
}

static void *exactly(size_t n) {
    void *block = malloc(n ? n : 1);
    if (!block) abort();
    return block;
}

static void *bytes_of(input *in, size_t n) {
    uint8_t *block = exactly(n);
    take(in, block, n);
    for (size_t i = (size_t)(in->end - in->at); i < n && i > 0; i++) block[i] = (uint8_t)(i * 2654435761u >> 13);
    return block;
}

static const tl_format *any_format(input *in) { return &tl_formats[below(in, TL_N_FORMATS)]; }

static void must(int condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "broken promise: %s\n", what);
    abort();
}

// A refusal says something.
static int ok(tl_status status, const tl_message *message) {
    if (status != TL_OK)
        must(message->text[0] && memchr(message->text, 0, sizeof message->text), "a refusal's sentence");
    return status == TL_OK;
}

static void convert(input *in) {
    const tl_format *from = any_format(in), *to = any_format(in);
    const size_t k = oddly(in, 8) ? below(in, 600) : 256 * (1 + below(in, 3)), rows = below(in, 4);
    const size_t in_bytes = rows * (k / (size_t)from->block) * (size_t)from->block_bytes;
    const size_t out_bytes = rows * (k / (size_t)to->block) * (size_t)to->block_bytes;
    float *importance = below(in, 2) ? bytes_of(in, k * sizeof(float)) : NULL;
    for (size_t i = 0; importance && i < k && !oddly(in, 4); i++)
        importance[i] = importance[i] < 0 || importance[i] != importance[i] ? 1 : importance[i];
    uint8_t *source = bytes_of(in, in_bytes), *blocks = exactly(out_bytes), *again = exactly(out_bytes);
    tl_message message = {""};
    if (ok(tl_convert(blocks, to, source, from, rows, k, importance, 1, &message), &message)) {
        must(ok(tl_convert(again, to, source, from, rows, k, importance, 2, &message), &message), "the same again");
        must(!memcmp(blocks, again, out_bytes), "the same bits on two threads");
    }
    free(importance);
    free(source);
    free(blocks);
    free(again);
}

static tl_config small_config(input *in) {
    tl_config c = {.n_layers = 1 + (int)below(in, 2), .dim = 256, .n_heads = 4, .n_kv_heads = 2, .head_dim = 64};
    c.ff_dim = 256;
    c.vocab_size = 1 + (int)below(in, 40);
    c.context = 200;
    c.norm_eps = 1e-5f;
    c.attention_scale = 0.125f;
    c.rope_theta = 10000;
    c.rope_dim = 64;
    c.rope_scale = 1;
    c.n_experts = oddly(in, 3) ? 3 : 0;
    c.n_experts_used = c.n_experts ? 2 : 0;
    return c;
}

static void upload(input *in) {
    static const char *const names[] = {
        "embedding", "wq",       "wk",      "w_down",    "output_norm", "bq",
        "w_gate.1",  "w_gate.9", "router",  "w_up.",     "sinks",       "nothing",
        "w_gate.-1", "b_router", "w_up.0x", "b_down.2 ", "q_norm",      "w_up.99999999999999999999"};
    const tl_config c = small_config(in);
    tl_message message = {""};
    tl_model *model = NULL;
    must(ok(tl_model_create(&model, &c, &tl_backend_cpu, &message), &message), "a small model");
    const tl_format *from = any_format(in), *to = oddly(in, 2) ? any_format(in) : from;
    const char *name = names[below(in, sizeof names / sizeof names[0])];
    const int layer = oddly(in, 4) ? any_int(in) : (int)below(in, 2), rows = oddly(in, 2) ? (int)below(in, 300) : 256,
              with_order = oddly(in, 3);
    const int apart = from->id == 39 && below(in, 2), stride = 1 + (int)below(in, 2);
    int32_t *order = exactly((size_t)rows * sizeof *order);
    for (int i = 0; i < rows; i++)
        order[i] = oddly(in, 64) ? any_int(in) : (int32_t)below(in, (unsigned)(rows ? rows : 1));
    // As many bytes as the largest of those weights needs with that stride.
    const size_t row_bytes = 256 / (size_t)from->block * (size_t)from->block_bytes, n_bytes = row_bytes * 512;
    const size_t blocks = 256 / 32 * 512;
    uint8_t *memory = bytes_of(in, apart ? blocks * 16 : n_bytes), *scale_bytes = bytes_of(in, blocks);
    int fd = -1;
    if (oddly(in, 3)) { // a file of any length
        fd = memfd_create("fuzz", 0);
        const size_t length = oddly(in, 2) ? below(in, 65535) : n_bytes;
        must(fd >= 0 && write(fd, memory, length < n_bytes && !apart ? length : 1) > 0, "a file in memory");
    }
    const tl_source scales = {.format = from, .fd = -1, .memory = scale_bytes};
    uint64_t offset = 0;
    if (fd >= 0 && oddly(in, 4)) take(in, &offset, sizeof offset);
    const tl_source source = {.format = from,
                              .fd = fd,
                              .offset = offset,
                              .memory = memory,
                              .row_order = with_order ? order : NULL,
                              .n_row_order = rows,
                              .row_stride = stride,
                              .scales = apart ? &scales : NULL};
    if (ok(tl_model_upload(model, name, layer, &source, to, 1 + (int)below(in, 2), &message), &message)) {
        const tl_matrix *matrix = tl_model_matrix(model, name, layer);
        if (matrix) {
            float *out = exactly((size_t)matrix->rows * (size_t)matrix->k * sizeof *out);
            must(ok(tl_model_unpack(model, name, layer, out, &message), &message), "what was packed is unpacked");
            free(out);
        }
        must(!ok(tl_model_upload(model, name, layer, &source, to, 1, &message), &message), "no weight twice");
    }
    ok(tl_model_check(model, &message), &message);
    tl_model_tie(model);
    tl_model_token_bytes(model);
    tl_model_free(model);
    if (fd >= 0) close(fd);
    free(order);
    free(memory);
    free(scale_bytes);
}

static int size_like(input *in, int usual) {
    switch (below(in, 16)) {
    case 1: return any_int(in);
    case 2: return (int)below(in, 70) - 2;
    default: return usual;
    }
}

static void configure(input *in) {
    tl_config c = small_config(in);
    int *sizes[] = {&c.n_layers,       &c.dim,        &c.n_heads,    &c.n_kv_heads, &c.head_dim,
                    &c.ff_dim,         &c.vocab_size, &c.context,    &c.rope_dim,   &c.n_experts,
                    &c.n_experts_used, &c.parallel,   &c.query_span, &c.page_layers};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) *sizes[i] = size_like(in, *sizes[i]);
    float *numbers[] = {&c.norm_eps,  &c.attention_scale, &c.rope_scale,     &c.attention_cap,
                        &c.logit_cap, &c.embedding_scale, &c.residual_scale, &c.logit_scale};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (oddly(in, 16)) *numbers[i] = any_float(in);
    if (oddly(in, 8)) take(in, &c.rope_theta, sizeof c.rope_theta);
    if (oddly(in, 8)) take(in, &c.local_rope_theta, sizeof c.local_rope_theta);
    if (oddly(in, 8)) take(in, &c.query_growth, sizeof c.query_growth);
    c.norm_kind = (tl_norm_kind)size_like(in, 0);
    c.norm_place = (tl_norm_place)size_like(in, 0);
    c.activation = (tl_activation)size_like(in, 0);
    c.qk_norm = (tl_qk_norm)size_like(in, 0);
    const size_t layers = c.n_layers > 0 && c.n_layers <= 1 << 12 ? (size_t)c.n_layers : 0;
    const size_t pairs = c.rope_dim > 0 && c.rope_dim <= 1 << 12 ? (size_t)c.rope_dim / 2 : 0;
    int32_t *windows = bytes_of(in, layers * 4), *ropes = bytes_of(in, layers * 4), *places = bytes_of(in, layers * 4);
    for (size_t i = 0; i < layers; i++) places[i] = places[i] & 0x7f ? places[i] & 3 : places[i];
    for (size_t i = 0; i < layers; i++) ropes[i] = ropes[i] & 0x7f ? ropes[i] & 3 : ropes[i];
    for (size_t i = 0; i < layers; i++) windows[i] = windows[i] & 0x7f ? windows[i] & 0xff : windows[i];
    float *factors = bytes_of(in, pairs * 4);
    if (below(in, 2)) c.windows = windows;
    if (below(in, 2)) c.ropes = ropes;
    if (below(in, 2)) c.places = places;
    if (oddly(in, 4)) c.rope_factors = factors;
    tl_message message = {""};
    tl_model *model = NULL;
    if ((int64_t)c.n_layers * c.n_experts < 1 << 16 &&
        ok(tl_model_create(&model, &c, &tl_backend_cpu, &message), &message)) {
        must(!ok(tl_model_check(model, &message), &message), "an empty model lacks weights");
        tl_cache *cache = NULL;
        const int type = oddly(in, 4) ? any_int(in) : (int[]){0, 1, 8}[below(in, 3)], pages = size_like(in, 3);
        if ((int64_t)c.n_layers * c.n_kv_heads * c.head_dim < 1 << 12 &&
            ok(tl_cache_create(&cache, model, type, pages, &message), &message)) {
            for (int i = 0; i < 4; i++) {
                const int to = size_like(in, 1), page = size_like(in, 0), n = size_like(in, 20);
                switch (below(in, 3)) {
                case 0:
                    if (to < 100) ok(tl_cache_grow(cache, to, &message), &message);
                    break;
                case 1: ok(tl_cache_clear_page(cache, page, &message), &message); break;
                default: ok(tl_cache_copy_page(cache, to, page, n, &message), &message);
                }
            }
            tl_cache_free(cache);
        }
        tl_model_free(model);
    }
    free(windows);
    free(ropes);
    free(places);
    free(factors);
}

// A model with weights, the same for every input.
static tl_model *runnable(tl_cache **cache) {
    static tl_model *model;
    static tl_cache *pages;
    if (!model) {
        static const uint8_t nothing[1];
        input none = {nothing, nothing};
        tl_config c = small_config(&none);
        c.n_experts = c.n_experts_used = 0;
        c.n_layers = 2;
        c.vocab_size = 40;
        c.dim = c.ff_dim = 64; // few numbers, many calls
        c.head_dim = c.rope_dim = 16;
        static const int32_t windows[2] = {0, 70}, places[2] = {0, 1}; // each layer has pages of its own
        c.windows = windows;
        c.places = places;
        c.page_layers = 1;
        tl_message message = {""};
        must(ok(tl_model_create(&model, &c, &tl_backend_cpu, &message), &message), "a model");
        static const char *const names[] = {"attention_norm", "wq",     "wk",   "wv",    "wo",
                                            "ffn_norm",       "w_gate", "w_up", "w_down"};
        uint8_t *zeros = calloc(1, 1 << 20);
        const tl_source floats = {.format = tl_format_of(0), .fd = -1, .memory = zeros};
        const tl_source blocks = {.format = tl_format_of(8), .fd = -1, .memory = zeros};
        must(ok(tl_model_upload(model, "embedding", 0, &floats, floats.format, 1, &message), &message), "embedding");
        must(ok(tl_model_upload(model, "output_norm", 0, &floats, floats.format, 1, &message), &message),
             "output norm");
        for (int layer = 0; layer < 2; layer++)
            for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
                const tl_source *source = names[i][0] == 'w' ? &blocks : &floats;
                must(ok(tl_model_upload(model, names[i], layer, source, source->format, 1, &message), &message),
                     names[i]);
            }
        tl_model_tie(model);
        must(ok(tl_model_check(model, &message), &message), "all weights");
        must(ok(tl_cache_create(&pages, model, 1, 8, &message), &message), "a cache");
        must(ok(tl_cache_grow(pages, 6, &message), &message), "pages");
        free(zeros);
    }
    *cache = pages;
    return model;
}

static int n_computed; // calls that were not refused

static void run(input *in) {
    tl_cache *cache;
    tl_model *model = runnable(&cache);
    tl_batch b = {.n = oddly(in, 32) ? 0 : 1 + (int)below(in, 40),
                  .n_sequences = 1 + (int)below(in, 3),
                  .max_pages = 1 + (int)below(in, 4)};
    const size_t n = (size_t)b.n, n_tables = (size_t)b.n_sequences * (size_t)model->n_tables * (size_t)b.max_pages;
    b.n_rows = (int)below(in, oddly(in, 32) || b.n > 4 ? 5 : (unsigned)b.n + 1);
    int32_t *tokens = exactly(n * 4), *positions = exactly(n * 4), *sequences = exactly(n * 4);
    int32_t *tables = exactly(n_tables * 4), *rows = exactly((size_t)b.n_rows * 4);
    int position = (int)below(in, 4) * 63, sequence = 0;
    for (size_t i = 0; i < n; i++) {
        if (oddly(in, 16)) position = (int)below(in, 64 * (unsigned)b.max_pages), sequence++;
        tokens[i] = size_like(in, (int)below(in, 40));
        positions[i] = oddly(in, 64) ? size_like(in, position) : position++;
        sequences[i] = oddly(in, 64) ? size_like(in, sequence) : sequence;
    }
    for (size_t i = 0; i < n_tables; i++) tables[i] = oddly(in, 64) ? any_int(in) : (int32_t)below(in, 6);
    for (int i = 0; i < b.n_rows; i++) rows[i] = oddly(in, 16) ? any_int(in) : (int32_t)below(in, (unsigned)b.n + 1);
    float *x = bytes_of(in, n * 64 * 4), *logits = exactly((size_t)b.n_rows * 40 * 4), *out = exactly(n * 64 * 4);
    b.positions = positions;
    b.sequences = sequences;
    b.page_tables = tables;
    b.rows = rows;
    if (!oddly(in, 4)) b.tokens = tokens;
    if (!b.tokens || oddly(in, 8)) b.x = x;
    if (!oddly(in, 2)) b.logits = logits;
    if (below(in, 2)) b.activations = out;
    b.first_layer = size_like(in, 0);
    b.last_layer = size_like(in, 2);
    b.threads = size_like(in, 1);
    if (b.threads > 4 && b.threads <= TL_MAX_THREADS) b.threads = 4;
    tl_message message = {""};
    n_computed += ok(tl_forward(model, cache, &b, &message), &message);
    free(tokens);
    free(positions);
    free(sequences);
    free(tables);
    free(rows);
    free(x);
    free(logits);
    free(out);
}

static void sample(input *in) {
    const int n = (int)below(in, 300), n_history = (int)below(in, 20);
    float *logits = bytes_of(in, (size_t)n * 4);
    for (int i = 0; i < n && !oddly(in, 8); i++) // else NaN and infinities are nearly everywhere
        if (!(logits[i] > -1e30f && logits[i] < 1e30f)) logits[i] = (float)(i % 7);
    int32_t *history = exactly((size_t)n_history * 4);
    for (int i = 0; i < n_history; i++) history[i] = oddly(in, 8) || !n ? any_int(in) : (int32_t)below(in, (unsigned)n);
    tl_sampling s = {.temperature = 1, .top_p = 1, .typical_p = 1, .repetition_penalty = 1, .dry_base = 1.75f};
    float *numbers[] = {&s.temperature,
                        &s.top_p,
                        &s.min_p,
                        &s.typical_p,
                        &s.xtc_probability,
                        &s.xtc_threshold,
                        &s.repetition_penalty,
                        &s.dry_multiplier,
                        &s.dry_base,
                        &s.presence_penalty,
                        &s.frequency_penalty};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++) switch (below(in, 8)) {
        case 1: *numbers[i] = any_float(in); break;
        case 2: *numbers[i] = (float)below(in, 1000) / 1000; break;
        default: break;
        }
    s.top_k = size_like(in, (int)below(in, 50));
    s.penalty_window = size_like(in, (int)below(in, 20) - 1);
    s.no_repeat_ngram_size = size_like(in, (int)below(in, 5));
    s.dry_penalty_last_n = size_like(in, (int)below(in, 20) - 1);
    s.dry_allowed_length = size_like(in, (int)below(in, 4));
    s.n_banned = (int)below(in, 4);
    int32_t *banned = exactly((size_t)s.n_banned * 4), *words = exactly(6 * 4), *ends = exactly(3 * 4);
    for (int i = 0; i < s.n_banned; i++) banned[i] = oddly(in, 8) || !n ? any_int(in) : (int32_t)below(in, (unsigned)n);
    for (int i = 0; i < 6; i++) words[i] = oddly(in, 8) || !n ? any_int(in) : (int32_t)below(in, (unsigned)n);
    for (int i = 0; i < 3; i++) ends[i] = (int32_t)below(in, 2) + 1 + (i ? ends[i - 1] : 0);
    s.banned = banned;
    s.bad_words = (tl_sequences){(int)below(in, 4), words, ends};
    s.breakers = (tl_sequences){(int)below(in, 4), words, ends}; // not in order: less is found
    s.n_bias = (int)below(in, 4);
    int32_t *bias_tokens = exactly((size_t)s.n_bias * 4);
    float *bias = exactly((size_t)s.n_bias * 4);
    for (int i = 0; i < s.n_bias; i++) {
        bias_tokens[i] = oddly(in, 8) || !n ? any_int(in) : (int32_t)below(in, (unsigned)n);
        bias[i] = any_float(in);
    }
    s.bias_tokens = bias_tokens;
    s.bias = bias;
    void *scratch = exactly(tl_sample_scratch(n, n_history));
    const double sum = oddly(in, 8) ? (double)any_float(in) : 1 + (double)below(in, 1000);
    const tl_total row = {sum, n > 0 ? logits[0] : 0};
    const tl_total *total = oddly(in, 4) ? &row : NULL; // with it, logits that are not in order are a lie
    tl_sampled sampled;
    tl_message message = {""};
    if (ok(tl_sample(&sampled, logits, n, &s, history, n_history, 7, 9, total, scratch, &message), &message))
        must(sampled.token >= 0 && sampled.token < n && (total || sampled.logprob <= 0), "a token of the vocabulary");
    const int k = size_like(in, 1);
    int32_t *top = exactly(k > 0 && k <= n ? (size_t)k * 4 : 0);
    float *logprobs = exactly(k > 0 && k <= n ? (size_t)k * 4 : 0);
    if (ok(tl_top_logprobs(top, logprobs, k, logits, n, total, scratch, &message), &message))
        for (int i = 0; i < k; i++)
            must(top[i] >= 0 && top[i] < n && (total || logprobs[i] <= (i ? logprobs[i - 1] : 0)),
                 "tokens in descending order");
    if (n) tl_logprob(logits, n, (int32_t)below(in, (unsigned)n));
    free(logits);
    free(history);
    free(bias_tokens);
    free(bias);
    free(banned);
    free(words);
    free(ends);
    free(scratch);
    free(top);
    free(logprobs);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static void (*const targets[])(input *) = {convert, upload, configure, run, sample};
    input in = {data, data + size};
    const char *const *isas = tl_isa_names();
    unsigned n = 0, which = below(&in, 64);
    while (isas[n]) n++;
    if (tl_isa_select(isas[which % n])) abort();
    targets[below(&in, sizeof targets / sizeof targets[0])](&in);
    return 0;
}
