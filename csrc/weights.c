// weights.c: a model's life around its forward pass: created from a configuration, filled tensor by tensor,
// checked, freed. The table below is the one place that knows which weights there are. Includes tinyllm.h,
// numeric.h.
#include "numeric.h"
#include "tinyllm.h"
#include <stdlib.h>
#include <string.h>

enum { HIDDEN = 1, HEADS, KV_HEADS, FEED_FORWARD, VOCABULARY, EXPERTS, Q_NORM, K_NORM, N_HEADS, MIXED };
enum { CHANNELS = MIXED + 1, TAPS, V_HEADS, V_WIDTH, V_DIM }; // of Gated DeltaNet
enum { MATRIX, BIAS, VECTOR };
// When a weight is required.
enum { OPTIONAL, ALWAYS, NORM_BEFORE, NORM_AFTER, QK_NORM, DENSE, UNIT_GATE, MIXTURE, ATTENTION, GATED, DELTA };

typedef struct slot {
    const char *name; // an expert's ends with '.', and its number follows
    int kind, in_layer, required;
    size_t offset; // of the tl_matrix or the float pointer in tl_model, tl_layer or (in_layer is EACH) tl_expert
    int rows, k;   // which of the configuration's sizes
} slot;

#define EACH                   2
#define IN_MODEL(field)        0, ALWAYS, offsetof(tl_model, field)
#define IN_LAYER(field)        1, ALWAYS, offsetof(tl_layer, field)
#define IN_MIXER(field, mixer) 1, mixer, offsetof(tl_layer, field)
#define IN_DENSE(field)        1, DENSE, offsetof(tl_layer, field)
#define BIAS_OF(field)         1, OPTIONAL, offsetof(tl_layer, field.bias)
#define NORM_OF(field, when)   1, when, offsetof(tl_layer, field.weight)
#define OF_EACH(field)         EACH, MIXTURE, offsetof(tl_expert, field)
#define BIAS_EACH(field)       EACH, OPTIONAL, offsetof(tl_expert, field.bias)

static const slot slots[] = {
    {"embedding", MATRIX, IN_MODEL(embedding), VOCABULARY, HIDDEN},
    {"output", MATRIX, IN_MODEL(output), VOCABULARY, HIDDEN},
    {"output_norm", VECTOR, IN_MODEL(output_norm.weight), HIDDEN, 0},
    {"attention_norm", VECTOR, NORM_OF(attention_norm, NORM_BEFORE), HIDDEN, 0},
    {"wq", MATRIX, IN_MIXER(wq, ATTENTION), HEADS, HIDDEN},
    {"wk", MATRIX, IN_MIXER(wk, ATTENTION), KV_HEADS, HIDDEN},
    {"wv", MATRIX, IN_MIXER(wv, ATTENTION), KV_HEADS, HIDDEN},
    {"wo", MATRIX, IN_LAYER(wo), HIDDEN, MIXED},
    {"w_attention_gate", MATRIX, IN_MIXER(w_attention_gate, GATED), HEADS, HIDDEN},
    {"w_qkv", MATRIX, IN_MIXER(delta.w_qkv, DELTA), CHANNELS, HIDDEN},
    {"w_z", MATRIX, IN_MIXER(delta.w_z, DELTA), V_WIDTH, HIDDEN},
    {"w_a", MATRIX, IN_MIXER(delta.w_a, DELTA), V_HEADS, HIDDEN},
    {"w_b", MATRIX, IN_MIXER(delta.w_b, DELTA), V_HEADS, HIDDEN},
    {"conv", VECTOR, IN_MIXER(delta.conv, DELTA), TAPS, 0},
    {"dt_bias", VECTOR, IN_MIXER(delta.dt_bias, DELTA), V_HEADS, 0},
    {"a", VECTOR, IN_MIXER(delta.a, DELTA), V_HEADS, 0},
    {"delta_norm", VECTOR, IN_MIXER(delta.norm.weight, DELTA), V_DIM, 0},
    {"ffn_norm", VECTOR, NORM_OF(ffn_norm, NORM_BEFORE), HIDDEN, 0},
    {"w_gate", MATRIX, 1, UNIT_GATE, offsetof(tl_layer, w_gate), FEED_FORWARD, HIDDEN},
    {"w_up", MATRIX, IN_DENSE(w_up), FEED_FORWARD, HIDDEN},
    {"w_down", MATRIX, IN_DENSE(w_down), HIDDEN, FEED_FORWARD},
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
    {"attention_norm_bias", VECTOR, BIAS_OF(attention_norm), HIDDEN, 0},
    {"ffn_norm_bias", VECTOR, BIAS_OF(ffn_norm), HIDDEN, 0},
    {"output_norm_bias", VECTOR, 0, OPTIONAL, offsetof(tl_model, output_norm.bias), HIDDEN, 0},
    {"router", MATRIX, 1, MIXTURE, offsetof(tl_layer, router), EXPERTS, HIDDEN},
    {"b_router", BIAS, BIAS_OF(router), EXPERTS, 0},
    {"w_gate.", MATRIX, OF_EACH(w_gate), FEED_FORWARD, HIDDEN},
    {"w_up.", MATRIX, OF_EACH(w_up), FEED_FORWARD, HIDDEN},
    {"w_down.", MATRIX, OF_EACH(w_down), HIDDEN, FEED_FORWARD},
    {"b_gate.", BIAS, BIAS_EACH(w_gate), FEED_FORWARD, 0},
    {"b_up.", BIAS, BIAS_EACH(w_up), FEED_FORWARD, 0},
    {"b_down.", BIAS, BIAS_EACH(w_down), HIDDEN, 0},
};
#define N_SLOTS (sizeof slots / sizeof slots[0])

static int size_of(const tl_model *model, int which, int layer) {
    const tl_config *c = &model->config;
    const tl_delta_sizes *d = &c->delta;
    switch (which) {
    case HIDDEN: return c->dim;
    case HEADS: return c->n_heads * c->head_dim;
    case KV_HEADS: return c->n_kv_heads * c->head_dim;
    case FEED_FORWARD: return c->ff_dim;
    case VOCABULARY: return c->vocab_size;
    case Q_NORM: return c->qk_norm == TL_QK_HEAD ? c->head_dim : c->n_heads * c->head_dim;
    case K_NORM: return c->qk_norm == TL_QK_HEAD ? c->head_dim : c->n_kv_heads * c->head_dim;
    case N_HEADS: return c->n_heads;
    case EXPERTS: return c->n_experts;
    case MIXED: return model->layers[layer].mixer == TL_DELTA ? d->v_heads * d->v_dim : c->n_heads * c->head_dim;
    case CHANNELS: return tl_delta_channels(d);
    case TAPS: return tl_delta_channels(d) * d->kernel;
    case V_HEADS: return d->v_heads;
    case V_WIDTH: return d->v_heads * d->v_dim;
    case V_DIM: return d->v_dim;
    default: return 1;
    }
}

static int is_required(const tl_model *model, const slot *s, int layer) {
    const tl_config *c = &model->config;
    const int is_delta = s->in_layer && model->layers[layer].mixer == TL_DELTA;
    switch (s->required) {
    case NORM_BEFORE: return c->norm_place != TL_NORM_AFTER;
    case NORM_AFTER: return c->norm_place != TL_NORM_BEFORE;
    case QK_NORM: return c->qk_norm != TL_QK_NONE && !is_delta;
    case DENSE: return !c->n_experts;
    case UNIT_GATE: return !c->n_experts && c->activation < TL_RELU_SQUARED;
    case MIXTURE: return c->n_experts > 0;
    case ATTENTION: return !is_delta;
    case GATED: return c->gated_attention && !is_delta;
    case DELTA: return is_delta;
    default: return s->required;
    }
}

// A weight of this slot is in so many layers (1: outside them), so many times in each.
static int n_layers_with(const tl_model *model, const slot *s) { return s->in_layer ? model->config.n_layers : 1; }
static int n_in_layer(const tl_model *model, const slot *s) {
    return s->in_layer == EACH ? model->config.n_experts : 1;
}

static void *slot_at(const tl_model *model, const slot *s, int layer, int i) {
    char *base = s->in_layer ? (char *)&model->layers[layer] : (char *)(uintptr_t)model;
    if (s->in_layer == EACH) base = (char *)&model->layers[layer].experts[i];
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
    layer->mixer = c->mixers ? (tl_mixer)c->mixers[l] : TL_ATTENTION;
    tl_norm *norms[] = {
        &layer->attention_norm, &layer->attention_post_norm, &layer->ffn_norm, &layer->ffn_post_norm, &layer->q_norm,
        &layer->k_norm,         &layer->delta.norm};
    // One by one: GCC 12 loses eps where a chain of struct assignments sets it.
    for (size_t i = 0; i < sizeof norms / sizeof norms[0]; i++) {
        norms[i]->eps = c->norm_eps;
        norms[i]->kind = c->norm_kind;
    }
    for (int i = 0; c->activation == TL_XIELU && i < TL_XIELU_NUMBERS; i++)
        layer->xielu[i] = c->xielu[l * TL_XIELU_NUMBERS + i];
}

// Norms without weights are norms whose weights are 1.
static tl_status fill_plain_norms(tl_model *model, tl_message *message) {
    const tl_config *c = &model->config;
    float *ones = tl_alloc((size_t)c->dim * sizeof(float));
    tl_status status = ones ? TL_OK : tl_fail(message, TL_MEMORY, "no memory for a norm");
    for (int i = 0; ones && i < c->dim; i++) ones[i] = 1;
    const tl_source source = {.format = tl_format_of(0), .fd = -1, .memory = (const uint8_t *)ones};
    for (int l = 0; l <= c->n_layers; l++) { // the last: what stands before the output
        tl_norm *norms[] = {l < c->n_layers ? &model->layers[l].attention_norm : &model->output_norm,
                            l < c->n_layers ? &model->layers[l].ffn_norm : NULL};
        for (int i = 0; i < 2 && norms[i] && status == TL_OK; i++) {
            status = model->backend->upload_floats(&norms[i]->weight, &source, c->dim, message);
            norms[i]->kind = TL_LAYER_NORM;
        }
    }
    tl_free(ones);
    return status;
}

// The slot of a name such as wq or w_gate.17, and where that weight is.
static const slot *find_slot(const tl_model *model, const char *name, int layer, void **at) {
    const char *dot = strchr(name, '.');
    const size_t length = dot ? (size_t)(dot - name) + 1 : strlen(name);
    char *end = NULL;
    const long i = dot ? strtol(dot + 1, &end, 10) : 0;
    if (dot && (end == dot + 1 || *end)) return NULL;
    for (const slot *s = slots; s < slots + N_SLOTS; s++) {
        if (strlen(s->name) != length || strncmp(s->name, name, length)) continue;
        const int l = s->in_layer ? layer : 0;
        if (l < 0 || l >= n_layers_with(model, s) || i < 0 || i >= n_in_layer(model, s)) return NULL;
        *at = slot_at(model, s, l, (int)i);
        return s;
    }
    return NULL;
}

tl_status tl_model_create(tl_model **out, const tl_config *config, const tl_backend *backend, tl_message *message) {
    tl_status status = tl_config_check(config, message);
    if (status != TL_OK) return status;
    tl_model *model = tl_alloc(sizeof *model);
    if (!model) return tl_fail(message, TL_MEMORY, "no memory for a model");
    tl_config *c = &model->config;
    *c = *config;
    c->rope_factors = NULL; // they go into the frequencies, these into the layers
    c->windows = c->ropes = c->places = c->mixers = NULL;
    c->xielu = NULL;
    if (!c->page_layers) c->page_layers = c->n_layers;
    float *scales[] = {&c->embedding_scale, &c->residual_scale, &c->logit_scale};
    for (int i = 0; i < 3; i++) *scales[i] = *scales[i] == 0 ? 1 : *scales[i];
    model->backend = backend;
    model->layers = tl_alloc((size_t)config->n_layers * sizeof(tl_layer));
    model->rope_frequencies = frequencies(config->rope_theta, config->rope_dim, config->rope_factors);
    if (config->local_rope_theta > 0)
        model->local_rope_frequencies = frequencies(config->local_rope_theta, config->rope_dim, NULL);
    int complete =
        model->layers && model->rope_frequencies && (config->local_rope_theta <= 0 || model->local_rope_frequencies);
    for (int l = 0; complete && config->n_experts && l < config->n_layers; l++)
        complete = (model->layers[l].experts = tl_alloc((size_t)config->n_experts * sizeof(tl_expert))) != NULL;
    if (!complete) {
        tl_model_free(model);
        return tl_fail(message, TL_MEMORY, "no memory for %d layers", config->n_layers);
    }
    model->output_norm = (tl_norm){.eps = config->norm_eps, .kind = config->norm_kind};
    for (int l = 0; l < config->n_layers; l++) {
        const int place = config->places ? config->places[l] : l, table = place / c->page_layers;
        create_layer(&model->layers[l], config, l);
        model->layers[l].state = model->layers[l].mixer == TL_DELTA ? model->n_states++ : -1;
        model->layers[l].table = table;
        model->layers[l].place = place % c->page_layers;
        if (table >= model->n_tables) model->n_tables = table + 1;
    }
    if (c->norm_kind == TL_PLAIN_LAYER_NORM && (status = fill_plain_norms(model, message)) != TL_OK) {
        tl_model_free(model);
        return status;
    }
    *out = model;
    return TL_OK;
}

tl_status tl_model_upload(tl_model *model, const char *name, int layer, const tl_source *source,
                          const tl_format *format, int threads, tl_message *message) {
    void *at;
    const slot *s = find_slot(model, name, layer, &at);
    if (!s) return tl_fail(message, TL_ARGUMENT, "there is no weight \"%s\" in layer %d", name, layer);
    int rows = size_of(model, s->rows, layer), k = size_of(model, s->k, layer);
    if (source->scales && (source->format->id != 39 || source->row_order))
        return tl_fail(message, TL_ARGUMENT, "%s: scales apart go with MXFP4 in the file's order alone", name);
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
        if (*floats || !source->format->is_float || source->format->block > 1)
            status = tl_fail(message, TL_ARGUMENT, "%s of layer %d is %s", name, layer,
                             *floats ? "there already" : "a vector, which must be F32, F16 or BF16");
        else
            status = model->backend->upload_floats(floats, source, rows, message);
        if (status == TL_OK) model->weight_bytes += (size_t)rows * sizeof(float);
    } else {
        tl_matrix *matrix = at;
        if (matrix->data)
            status = tl_fail(message, TL_ARGUMENT, "%s of layer %d is there already", name, layer);
        else if (source->format != format && (!source->format->is_float || source->format->block > 1))
            status = tl_fail(message, TL_UNSUPPORTED, "%s cannot be turned into %s while loading", source->format->name,
                             format->name);
        else if (source->format != format && !format->quantize)
            status = tl_fail(message, TL_UNSUPPORTED, "%s: nothing is quantized to %s here", name, format->name);
        else if (k % format->block || k % source->format->block)
            status = tl_fail(message, TL_ARGUMENT, "rows of %d numbers are no multiple of %s's block of %d", k,
                             format->name, format->block);
        else {
            matrix->format = format;
            matrix->rows = rows;
            matrix->k = k;
            matrix->factor = source->factor;
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

tl_status tl_model_check(tl_model *model, tl_message *message) {
    for (const slot *s = slots; s < slots + N_SLOTS; s++)
        for (int l = 0; l < n_layers_with(model, s); l++)
            for (int i = 0; is_required(model, s, l) && i < n_in_layer(model, s); i++) {
                void *at = slot_at(model, s, l, i);
                int there = s->kind == MATRIX ? ((tl_matrix *)at)->data != NULL : *(float **)at != NULL;
                if (!there && s->in_layer == EACH)
                    return tl_fail(message, TL_ARGUMENT, "weight %s%d of layer %d is missing", s->name, i, l);
                if (!there) return tl_fail(message, TL_ARGUMENT, "weight %s of layer %d is missing", s->name, l);
            }
    model->is_complete = 1;
    return TL_OK;
}

const tl_matrix *tl_model_matrix(const tl_model *model, const char *name, int layer) {
    void *at;
    const slot *s = find_slot(model, name, layer, &at);
    const tl_matrix *matrix = s && s->kind == MATRIX ? at : NULL;
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
    size_t of_experts = 0;
    for (const slot *s = slots; s < slots + N_SLOTS; s++)
        for (int l = 0; s->in_layer == EACH && l < model->config.n_layers; l++)
            for (int i = 0; i < model->config.n_experts; i++) {
                void *at = slot_at(model, s, l, i);
                size_t bias_bytes = (size_t)size_of(model, s->rows, l) * sizeof(float);
                of_experts += s->kind == MATRIX ? ((tl_matrix *)at)->n_bytes : *(float **)at ? bias_bytes : 0;
            }
    size_t used = of_experts ? of_experts / (size_t)model->config.n_experts * (size_t)model->config.n_experts_used : 0;
    return model->weight_bytes - (tied ? 0 : model->embedding.n_bytes) - of_experts + used;
}

void tl_model_free(tl_model *model) {
    if (!model) return;
    if (model->output.data == model->embedding.data) model->output = (tl_matrix){0};
    for (const slot *s = slots; s < slots + N_SLOTS && model->layers; s++)
        for (int l = 0; l < n_layers_with(model, s); l++)
            for (int i = 0; i < n_in_layer(model, s) && (s->in_layer != EACH || model->layers[l].experts); i++) {
                void *at = slot_at(model, s, l, i);
                model->backend->free(s->kind == MATRIX ? ((tl_matrix *)at)->data : *(void **)at);
            }
    if (model->scratch) model->backend->release(model->scratch);
    for (int l = 0; model->layers && l < model->config.n_layers; l++) tl_free(model->layers[l].experts);
    tl_free(model->layers);
    tl_free(model->rope_frequencies);
    tl_free(model->local_rope_frequencies);
    tl_free(model);
}
