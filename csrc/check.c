// check.c: says no before anything runs: configurations and batches whose numbers do not fit. Includes
// tinyllm.h only.
#include "tinyllm.h"
#include <math.h>

// What families vary.
static tl_status check_variations(const tl_config *c, tl_message *message) {
    const struct {
        const char *name;
        int value, most;
    } kinds[] = {{"norm_kind", (int)c->norm_kind, TL_PLAIN_LAYER_NORM},
                 {"norm_place", (int)c->norm_place, TL_NORM_BOTH},
                 {"activation", (int)c->activation, TL_XIELU},
                 {"qk_norm", (int)c->qk_norm, TL_QK_ALL},
                 {"qk_norm_late", c->qk_norm_late, 1},
                 {"parallel", c->parallel, 1},
                 {"gated_attention", c->gated_attention, 1},
                 {"bidirectional", c->bidirectional, 1}};
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        if (kinds[i].value < 0 || kinds[i].value > kinds[i].most)
            return tl_fail(message, TL_ARGUMENT, "%s is %d, not in 0..%d", kinds[i].name, kinds[i].value,
                           kinds[i].most);
    const double numbers[] = {c->attention_cap, c->logit_cap,        c->embedding_scale, c->residual_scale,
                              c->logit_scale,   c->local_rope_theta, c->query_growth,    c->qkv_limit};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (!(numbers[i] >= 0) || !isfinite(numbers[i]))
            return tl_fail(message, TL_ARGUMENT,
                           "a cap, a scale, qkv_limit, query_growth or local_rope_theta is not a number from 0 up: %g",
                           numbers[i]);
    if (c->query_growth > 0 && c->query_span < 1)
        return tl_fail(message, TL_ARGUMENT, "query_span is %d, not 1 or more", c->query_span);
    if (c->page_layers < 0 || c->page_layers > c->n_layers || (c->places && !c->page_layers))
        return tl_fail(message, TL_ARGUMENT, "%d layers of %d share a page", c->page_layers, c->n_layers);
    const tl_delta_sizes *d = &c->delta;
    for (int l = 0; c->mixers && l < c->n_layers; l++) {
        if (c->mixers[l] < 0 || c->mixers[l] > TL_DELTA)
            return tl_fail(message, TL_ARGUMENT, "the mixer of layer %d is %d, not one there is", l, c->mixers[l]);
        if (c->mixers[l] == TL_DELTA && (c->parallel || c->bidirectional || c->norm_place == TL_NORM_AFTER))
            return tl_fail(message, TL_UNSUPPORTED, "Gated DeltaNet goes forward, behind a norm, before the rest");
        if (c->mixers[l] == TL_DELTA &&
            (d->k_heads < 1 || d->v_heads < 1 || d->v_heads > 1 << 10 || d->v_heads % d->k_heads || d->k_dim < 16 ||
             d->v_dim < 16 || d->k_dim > 256 || d->v_dim > 256 || d->k_dim % 16 || d->v_dim % 16 || d->kernel < 2 ||
             d->kernel > 8))
            return tl_fail(
                message, TL_UNSUPPORTED,
                "%d heads of %d share %d of %d numbers behind a convolution of %d tokens: they must come out "
                "even, be multiples of 16 up to 256, and 2 to 8",
                d->v_heads, d->v_dim, d->k_heads, d->k_dim, d->kernel);
    }
    for (int l = 0; l < c->n_layers; l++) {
        if (c->windows && c->windows[l] < 0)
            return tl_fail(message, TL_ARGUMENT, "the window of layer %d is %d", l, c->windows[l]);
        if (c->ropes && (c->ropes[l] < 0 || c->ropes[l] > TL_ROPE_NONE ||
                         (c->ropes[l] == TL_ROPE_LOCAL && c->local_rope_theta == 0)))
            return tl_fail(message, TL_ARGUMENT, "the RoPE of layer %d is %d, not one there is", l, c->ropes[l]);
        if (c->places && (c->places[l] < 0 || c->places[l] >= c->n_layers * c->page_layers))
            return tl_fail(message, TL_ARGUMENT, "the place of layer %d in the cache is %d", l, c->places[l]);
    }
    if (c->qk_norm_late && c->norm_kind != TL_RMS_NORM)
        return tl_fail(message, TL_UNSUPPORTED, "norms of queries and keys after RoPE are RMSNorms");
    if (c->norm_kind == TL_PLAIN_LAYER_NORM &&
        (c->qk_norm != TL_QK_NONE || c->norm_place != TL_NORM_BEFORE || c->parallel))
        return tl_fail(message, TL_UNSUPPORTED, "norms without weights stand before attention and feed-forward alone");
    if (c->activation == TL_XIELU && !c->xielu)
        return tl_fail(message, TL_ARGUMENT, "xIELU needs its numbers, %d a layer", TL_XIELU_NUMBERS);
    for (int i = 0; c->activation == TL_XIELU && i < c->n_layers * TL_XIELU_NUMBERS; i++)
        if (!isfinite(c->xielu[i]) || (i % TL_XIELU_NUMBERS == 3 && c->xielu[i] > 0))
            return tl_fail(message, TL_ARGUMENT, "number %d of xIELU in layer %d is %g", i % TL_XIELU_NUMBERS,
                           i / TL_XIELU_NUMBERS, (double)c->xielu[i]);
    if (c->n_experts && c->activation >= TL_RELU_SQUARED) return tl_fail(message, TL_UNSUPPORTED, "experts have gates");
    if (c->n_experts &&
        (c->parallel || c->norm_place != TL_NORM_BEFORE || (c->residual_scale != 0 && c->residual_scale != 1)))
        return tl_fail(message, TL_UNSUPPORTED, "experts go with norms before, one after the other and unscaled");
    return TL_OK;
}

tl_status tl_config_check(const tl_config *c, tl_message *message) {
    const struct {
        const char *name;
        int value, most;
    } sizes[] = {{"n_layers", c->n_layers, 1 << 12},     {"dim", c->dim, 1 << 20},
                 {"n_heads", c->n_heads, 1 << 14},       {"n_kv_heads", c->n_kv_heads, 1 << 14},
                 {"head_dim", c->head_dim, 1 << 12},     {"ff_dim", c->ff_dim, 1 << 22},
                 {"vocab_size", c->vocab_size, 1 << 24}, {"context", c->context, 1 << 30}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].most)
            return tl_fail(message, TL_ARGUMENT, "%s is %d, not in 1..%d", sizes[i].name, sizes[i].value,
                           sizes[i].most);
    if (c->n_experts < 0 || c->n_experts > 1 << 12 || c->n_experts_used < 0 || c->n_experts_used > c->n_experts ||
        !c->n_experts != !c->n_experts_used)
        return tl_fail(message, TL_ARGUMENT, "%d experts of %d are not 1 or more of at most %d", c->n_experts_used,
                       c->n_experts, 1 << 12);
    if (c->n_heads % c->n_kv_heads)
        return tl_fail(message, TL_ARGUMENT, "%d heads cannot share %d kv heads evenly", c->n_heads, c->n_kv_heads);
    if ((int64_t)c->n_heads * c->head_dim > 1 << 20)
        return tl_fail(message, TL_ARGUMENT, "%d heads of %d dimensions are too many", c->n_heads, c->head_dim);
    if (c->rope_dim < 0 || c->rope_dim > c->head_dim || c->rope_dim % 2)
        return tl_fail(message, TL_ARGUMENT, "rope_dim is %d, not even and in 0..%d", c->rope_dim, c->head_dim);
    if (!(c->rope_theta > 0) || !isfinite(c->rope_theta) || !(c->norm_eps >= 0) || !isfinite(c->norm_eps) ||
        !isfinite(c->rope_scale) || !isfinite(c->attention_scale))
        return tl_fail(message, TL_ARGUMENT,
                       "rope_theta, norm_eps, rope_scale or attention_scale is not a usable number");
    for (int i = 0; c->rope_factors && i < c->rope_dim / 2; i++)
        if (!(c->rope_factors[i] > 0) || !isfinite(c->rope_factors[i]))
            return tl_fail(message, TL_ARGUMENT, "rope factor %d is not a positive number", i);
    return check_variations(c, message);
}

// Tokens of a sequence stand together and climb by one, so that a call's keys are written before they are
// read.
static tl_status check_token(const tl_model *model, const tl_cache *cache, const tl_batch *b, int t,
                             tl_message *message) {
    if (b->tokens && (b->tokens[t] < 0 || b->tokens[t] >= model->config.vocab_size))
        return tl_fail(message, TL_ARGUMENT, "token %d is %d, not in 0..%d", t, b->tokens[t],
                       model->config.vocab_size - 1);
    int position = b->positions[t], sequence = b->sequences[t];
    if (sequence < 0 || sequence >= b->n_sequences)
        return tl_fail(message, TL_ARGUMENT, "token %d is of sequence %d of %d", t, sequence, b->n_sequences);
    if (position < 0 || position >= model->config.context || position / TL_PAGE >= b->max_pages)
        return tl_fail(message, TL_ARGUMENT, "position %d is past the context of %d or the table of %d pages", position,
                       model->config.context, b->max_pages);
    if (t > 0 && sequence == b->sequences[t - 1] && position != b->positions[t - 1] + 1)
        return tl_fail(message, TL_ARGUMENT, "positions of sequence %d go from %d to %d", sequence, b->positions[t - 1],
                       position);
    if (model->config.bidirectional && position > 0 && (t == 0 || sequence != b->sequences[t - 1]))
        return tl_fail(message, TL_ARGUMENT,
                       "sequence %d begins at position %d: a bidirectional model takes it whole, from 0", sequence,
                       position);
    if (t > 0 && sequence < b->sequences[t - 1])
        return tl_fail(message, TL_ARGUMENT, "sequences must come in ascending order, %d follows %d", sequence,
                       b->sequences[t - 1]);
    if (t + 1 < b->n && b->sequences[t + 1] == sequence) return TL_OK; // its last token needs all its pages
    const int n_tables = model->n_tables;
    for (int table = 0; table < n_tables; table++)
        for (int i = 0; i <= position / TL_PAGE; i++) {
            const size_t row = (size_t)sequence * (size_t)n_tables + (size_t)table;
            int page = b->page_tables[row * (size_t)b->max_pages + (size_t)i];
            if (page < 0 || page >= cache->n_pages)
                return tl_fail(message, TL_ARGUMENT, "page %d of sequence %d is %d, not one of the cache's %d", i,
                               sequence, page, cache->n_pages);
        }
    return TL_OK;
}

static tl_status check_uses(const tl_model *model, const tl_batch *b, tl_message *message) {
    if (!model->backend->adapted)
        return tl_fail(message, TL_UNSUPPORTED, "adapters do not run on %s", model->backend->name);
    if (model->n_states || model->config.gated_attention)
        return tl_fail(message, TL_UNSUPPORTED, "adapters do not run on models with Gated DeltaNet");
    for (int s = 0, end = 0; s < b->n_sequences; end = b->use_ends[s++]) {
        if (b->use_ends[s] < end)
            return tl_fail(message, TL_ARGUMENT, "the adapters of sequence %d end at %d, before %d", s, b->use_ends[s],
                           end);
        for (int i = end; i < b->use_ends[s]; i++)
            if (b->uses[i].adapter->model != model || !isfinite(b->uses[i].scale))
                return tl_fail(message, TL_ARGUMENT, "adapter %d of sequence %d %s", i - end, s,
                               isfinite(b->uses[i].scale) ? "is another model's" : "has a scale that is not finite");
    }
    return TL_OK;
}

tl_status tl_batch_check(const tl_model *model, const tl_cache *cache, const tl_batch *b, tl_message *message) {
    const tl_config *c = &model->config;
    if (!model->is_complete)
        return tl_fail(message, TL_ARGUMENT, "not all weights are known to be there: check the model first");
    if (c->n_experts && !model->backend->moe)
        return tl_fail(message, TL_UNSUPPORTED, "mixtures of experts do not run on %s", model->backend->name);
    if ((model->n_states || c->gated_attention) && !model->backend->delta_net)
        return tl_fail(message, TL_UNSUPPORTED, "Gated DeltaNet (Qwen 3.5) does not run on %s", model->backend->name);
    if (cache->n_layers != c->page_layers || cache->n_kv_heads != c->n_kv_heads || cache->head_dim != c->head_dim)
        return tl_fail(message, TL_ARGUMENT, "the cache was made for a model of another shape");
    if (b->n < 0 || b->n_sequences < 0 || b->max_pages < 0 || b->n_rows < 0)
        return tl_fail(message, TL_ARGUMENT, "a count is negative");
    if (b->n_rows > b->n) // the buffers are for n tokens
        return tl_fail(message, TL_ARGUMENT, "%d rows are more than the %d tokens", b->n_rows, b->n);
    if (b->first_layer < 0 || b->first_layer > b->last_layer || b->last_layer > c->n_layers)
        return tl_fail(message, TL_ARGUMENT, "layers %d to %d are not in 0..%d", b->first_layer, b->last_layer,
                       c->n_layers);
    if (b->n_candidates < 0 || b->n_candidates > model->backend->most_candidates || b->n_candidates > c->vocab_size ||
        (b->n_candidates && b->n_rows > 64))
        return tl_fail(message, TL_ARGUMENT, "%d candidates of %d rows, not 0..%d of 64 at most", b->n_candidates,
                       b->n_rows, model->backend->most_candidates);
    if (b->allowed && !b->n_candidates)
        return tl_fail(message, TL_ARGUMENT, "a mask says which candidates there may be, but none are asked for");
    if ((b->logits || b->n_candidates) && b->last_layer != c->n_layers)
        return tl_fail(message, TL_ARGUMENT, "logits come after layer %d, not after %d", c->n_layers, b->last_layer);
    if (!b->tokens == !b->x) return tl_fail(message, TL_ARGUMENT, "give either token ids or activations");
    if (b->threads < 1 || b->threads > TL_MAX_THREADS)
        return tl_fail(message, TL_ARGUMENT, "%d threads, not 1..%d", b->threads, TL_MAX_THREADS);
    for (int i = 0; i < b->n_rows; i++)
        if (b->rows[i] < 0 || b->rows[i] >= b->n)
            return tl_fail(message, TL_ARGUMENT, "row %d is %d, not one of the %d tokens", i, b->rows[i], b->n);
    for (int t = 0; t < b->n; t++) {
        tl_status status = check_token(model, cache, b, t, message);
        if (status != TL_OK) return status;
    }
    if (model->n_states && b->first_layer < b->last_layer) {
        tl_status status = tl_states_check(model, b, message);
        if (status != TL_OK) return status;
    }
    return b->use_ends ? check_uses(model, b, message) : TL_OK;
}
