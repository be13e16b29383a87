// weights.c: a model's life around its forward pass: created from a configuration, filled tensor by tensor,
// checked, freed. The table below is the one place that knows which weights there are. Includes tinyllm.h,
// numeric.h.
#include "numeric.h"
#include "tinyllm.h"
#include <string.h>

enum { HIDDEN = 1, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY, Q_NORM, K_NORM, N_HEADS };
enum { MATRIX, BIAS, VECTOR };
enum { OPTIONAL, ALWAYS, NORM_BEFORE, NORM_AFTER, QK_NORM }; // when a weight is required

typedef struct slot {
    const char *name;
    int kind, in_layer, required;
    size_t offset; // of the tl_matrix or the float pointer in tl_model or tl_layer
    int rows, k;   // which of the configuration's sizes
} slot;

#define IN_MODEL(field)      0, ALWAYS, offsetof(tl_model, field)
#define IN_LAYER(field)      1, ALWAYS, offsetof(tl_layer, field)
#define BIAS_OF(field)       1, OPTIONAL, offsetof(tl_layer, field.bias)
#define NORM_OF(field, when) 1, when, offsetof(tl_layer, field.weight)

static const slot slots[] = {
    {"embedding", MATRIX, IN_MODEL(embedding), VOCABULARY, HIDDEN},
    {"output", MATRIX, IN_MODEL(output), VOCABULARY, HIDDEN},
    {"output_norm", VECTOR, IN_MODEL(output_norm.weight), HIDDEN, 0},
    {"attention_norm", VECTOR, NORM_OF(attention_norm, NORM_BEFORE), HIDDEN, 0},
    {"wq", MATRIX, IN_LAYER(wq), HEADS, HIDDEN},
    {"wk", MATRIX, IN_LAYER(wk), KV_HEADS, HIDDEN},
    {"wv", MATRIX, IN_LAYER(wv), KV_HEADS, HIDDEN},
    {"wo", MATRIX, IN_LAYER(wo), HIDDEN, HEADS},
    {"ffn_norm", VECTOR, NORM_OF(ffn_norm, NORM_BEFORE), HIDDEN, 0},
    {"w_gate", MATRIX, IN_LAYER(w_gate), FEED_FORWARD, HIDDEN},
    {"w_up", MATRIX, IN_LAYER(w_up), FEED_FORWARD, HIDDEN},
    {"w_down", MATRIX, IN_LAYER(w_down), HIDDEN, FEED_FORWARD},
    {"attention_post_norm", VECTOR, NORM_OF(attention_post_norm, NORM_AFTER), HIDDEN, 0},
    {"ffn_post_norm", VECTOR, NORM_OF(ffn_post_norm, NORM_AFTER), HIDDEN, 0},
    {"q_norm", VECTOR, NORM_OF(q_norm, QK_NORM), Q_NORM, 0},
    {"k_norm", VECTOR, NORM_OF(k_norm, QK_NORM), K_NORM, 0},
    {"sinks", VECTOR, 1, OPTIONAL, offsetof(tl_layer, sinks), N_HEADS, 0},
    {"bq", BIAS, BIAS_OF(wq), HEADS, 0},
    {"bk", BIAS, BIAS_OF(wk), KV_HEADS, 0},
    {"bv", BIAS, BIAS_OF(wv), KV_HEADS, 0},
    {"bo", BIAS, BIAS_OF(wo), HIDDEN, 0},
    {"b_gate", BIAS, BIAS_OF(w_gate), FEED_FORWARD, 0},
    {"b_up", BIAS, BIAS_OF(w_up), FEED_FORWARD, 0},
    {"b_down", BIAS, BIAS_OF(w_down), HIDDEN, 0},
};
#define N_SLOTS (sizeof slots / sizeof slots[0])

static int size_of(const tl_config *c, int which) {
    switch (which) {
    case HIDDEN: return c->dim;
    case HEADS: return c->n_heads * c->head_dim;
    case KV_HEADS: return c->n_kv_heads * c->head_dim;
    case FEED_FORWARD: return c->ff_dim;
    case VOCABULARY: return c->vocab_size;
    case Q_NORM: return c->qk_norm == TL_QK_HEAD ? c->head_dim : c->n_heads * c->head_dim;
    case K_NORM: return c->qk_norm == TL_QK_HEAD ? c->head_dim : c->n_kv_heads * c->head_dim;
    case N_HEADS: return c->n_heads;
    default: return 1;
    }
}

static int is_required(const tl_config *c, const slot *s) {
    switch (s->required) {
    case NORM_BEFORE: return c->norm_place != TL_NORM_AFTER;
    case NORM_AFTER: return c->norm_place != TL_NORM_BEFORE;
    case QK_NORM: return c->qk_norm != TL_QK_NONE;
    default: return s->required;
    }
}

static const slot *find_slot(const tl_model *model, const char *name, int layer) {
    for (size_t i = 0; i < N_SLOTS; i++)
        if (!strcmp(slots[i].name, name))
            return !slots[i].in_layer || (layer >= 0 && layer < model->config.n_layers) ? &slots[i] : NULL;
    return NULL;
}

static void *slot_at(const tl_model *model, const slot *s, int layer) {
    char *base = s->in_layer ? (char *)&model->layers[layer] : (char *)(uintptr_t)model;
    return base + s->offset;
}

// RoFormer, arXiv 2104.09864: theta^(-2i/d) radians a position.
static double *frequencies(double theta, int rope_dim, const float *factors) {
    double *f = tl_alloc((size_t)(rope_dim + 1) * sizeof(double));
    for (int i = 0; f && i < rope_dim / 2; i++)
        f[i] = tl_pow(theta, -2.0 * i / rope_dim) / (factors ? (double)factors[i] : 1.0);
    return f;
}

static void create_layer(tl_layer *layer, const tl_config *c, int l) {
    layer->window = c->windows ? c->windows[l] : 0;
    layer->rope = c->ropes ? (tl_rope)c->ropes[l] : TL_ROPE;
    tl_norm *norms[] = {&layer->attention_norm, &layer->attention_post_norm,
                        &layer->ffn_norm,       &layer->ffn_post_norm,
                        &layer->q_norm,         &layer->k_norm};
    // One by one: GCC 12 loses eps where a chain of struct assignments sets it.
    for (size_t i = 0; i < sizeof norms / sizeof norms[0]; i++) {
        norms[i]->eps = c->norm_eps;
        norms[i]->kind = c->norm_kind;
    }
}

tl_status tl_model_create(tl_model **out, const tl_config *config, const tl_backend *backend, tl_message *message) {
    tl_status status = tl_config_check(config, message);
    if (status != TL_OK) return status;
    tl_model *model = tl_alloc(sizeof *model);
    if (!model) return tl_fail(message, TL_MEMORY, "no memory for a model");
    tl_config *c = &model->config;
    *c = *config;
    c->rope_factors = NULL; // they go into the frequencies, these into the layers
    c->windows = c->ropes = NULL;
    float *scales[] = {&c->embedding_scale, &c->residual_scale, &c->logit_scale};
    for (int i = 0; i < 3; i++) *scales[i] = *scales[i] == 0 ? 1 : *scales[i];
    model->backend = backend;
    model->layers = tl_alloc((size_t)config->n_layers * sizeof(tl_layer));
    model->rope_frequencies = frequencies(config->rope_theta, config->rope_dim, config->rope_factors);
    if (config->local_rope_theta > 0)
        model->local_rope_frequencies = frequencies(config->local_rope_theta, config->rope_dim, NULL);
    if (!model->layers || !model->rope_frequencies ||
        (config->local_rope_theta > 0 && !model->local_rope_frequencies)) {
        tl_model_free(model);
        return tl_fail(message, TL_MEMORY, "no memory for %d layers", config->n_layers);
    }
    model->output_norm = (tl_norm){NULL, config->norm_eps, config->norm_kind};
    for (int l = 0; l < config->n_layers; l++) create_layer(&model->layers[l], config, l);
    *out = model;
    return TL_OK;
}

tl_status tl_model_upload(tl_model *model, const char *name, int layer, const tl_source *source,
                          const tl_format *format, int threads, tl_message *message) {
    const slot *s = find_slot(model, name, layer);
    if (!s) return tl_fail(message, TL_ARGUMENT, "there is no weight \"%s\" in layer %d", name, layer);
    int rows = size_of(&model->config, s->rows), k = size_of(&model->config, s->k);
    void *at = slot_at(model, s, layer);
    if (source->row_order && source->n_row_order != rows)
        return tl_fail(message, TL_ARGUMENT, "%s has %d rows, the order %d", name, rows, source->n_row_order);
    for (int i = 0; source->row_order && i < rows; i++)
        if (source->row_order[i] < 0 || source->row_order[i] >= rows)
            return tl_fail(message, TL_ARGUMENT, "row %d of %s comes from row %d of %d", i, name, source->row_order[i],
                           rows);
    tl_status status;
    tl_pool_enter();
    if (s->kind != MATRIX) {
        float **floats = at;
        if (*floats || !source->format->is_float)
            status = tl_fail(message, TL_ARGUMENT, "%s of layer %d is %s", name, layer,
                             *floats ? "there already" : "a vector, which must be F32, F16 or BF16");
        else
            status = model->backend->upload_floats(floats, source, rows, message);
        if (status == TL_OK) model->weight_bytes += (size_t)rows * sizeof(float);
    } else {
        tl_matrix *matrix = at;
        if (matrix->data)
            status = tl_fail(message, TL_ARGUMENT, "%s of layer %d is there already", name, layer);
        else if (source->format != format && !source->format->is_float)
            status = tl_fail(message, TL_UNSUPPORTED, "%s cannot be turned into %s while loading", source->format->name,
                             format->name);
        else if (k % format->block || k % source->format->block)
            status = tl_fail(message, TL_ARGUMENT, "rows of %d numbers are no multiple of %s's block of %d", k,
                             format->name, format->block);
        else {
            matrix->format = format;
            matrix->rows = rows;
            matrix->k = k;
            status = model->backend->upload(matrix, source, threads, message);
        }
        if (status == TL_OK) model->weight_bytes += matrix->n_bytes;
    }
    tl_pool_leave();
    return status;
}

void tl_model_tie(tl_model *model) {
    if (!model->output.data) model->output = model->embedding;
}

tl_status tl_model_check(const tl_model *model, tl_message *message) {
    for (size_t i = 0; i < N_SLOTS; i++)
        for (int l = 0; l < (slots[i].in_layer ? model->config.n_layers : 1); l++) {
            void *at = slot_at(model, &slots[i], l);
            int there = slots[i].kind == MATRIX ? ((tl_matrix *)at)->data != NULL : *(float **)at != NULL;
            if (is_required(&model->config, &slots[i]) && !there)
                return tl_fail(message, TL_ARGUMENT, "weight %s of layer %d is missing", slots[i].name, l);
        }
    return TL_OK;
}

const tl_matrix *tl_model_matrix(const tl_model *model, const char *name, int layer) {
    const slot *s = find_slot(model, name, layer);
    const tl_matrix *matrix = s && s->kind == MATRIX ? slot_at(model, s, layer) : NULL;
    return matrix && matrix->data ? matrix : NULL;
}

tl_status tl_model_observe(tl_model *model, const char *name, int layer, double *seen, tl_message *message) {
    tl_matrix *matrix = (tl_matrix *)(uintptr_t)tl_model_matrix(model, name, layer);
    if (!matrix) return tl_fail(message, TL_ARGUMENT, "there is no matrix \"%s\" in layer %d", name, layer);
    matrix->seen = seen;
    return TL_OK;
}

tl_status tl_model_unpack(const tl_model *model, const char *name, int layer, float *out, tl_message *message) {
    const tl_matrix *matrix = tl_model_matrix(model, name, layer);
    if (!matrix) return tl_fail(message, TL_ARGUMENT, "there is no matrix \"%s\" in layer %d", name, layer);
    return model->backend->unpack(matrix, out);
}

size_t tl_model_token_bytes(const tl_model *model) {
    int tied = model->output.data == model->embedding.data;
    return model->weight_bytes - (tied ? 0 : model->embedding.n_bytes);
}

void tl_model_free(tl_model *model) {
    if (!model) return;
    if (model->output.data == model->embedding.data) model->output = (tl_matrix){0};
    for (size_t i = 0; i < N_SLOTS && model->layers; i++)
        for (int l = 0; l < (slots[i].in_layer ? model->config.n_layers : 1); l++) {
            void *at = slot_at(model, &slots[i], l);
            model->backend->free(slots[i].kind == MATRIX ? ((tl_matrix *)at)->data : *(void **)at);
        }
    if (model->scratch) model->backend->release(model->scratch);
    tl_free(model->layers);
    tl_free(model->rope_frequencies);
    tl_free(model->local_rope_frequencies);
    tl_free(model);
}
