// model.c: THE forward pass, the same page for every data type, instruction set and device: it knows only the
// operations of a backend (tinyllm.h, "the seam"). Includes tinyllm.h only. Read cpu/backend.c next.
#include "tinyllm.h"

static tl_status forward(tl_model *model, tl_cache *cache, const tl_batch *batch, tl_message *message) {
    const tl_backend *be = batch->use_ends ? model->backend->adapted : model->backend;
    tl_status status = be->begin(&model->scratch, model, cache, batch, message);
    tl_run *run = model->scratch;
    if (status == TL_REPLAYED) return be->end(run, message);
    if (status != TL_OK) return status;

    be->embed(run);
    for (int l = batch->first_layer; l < batch->last_layer; l++) {
        if (batch->stop && batch->stop(batch->stop_data)) return tl_fail(message, TL_CANCELLED, "cancelled");
        const tl_layer *layer = &model->layers[l];
        if (layer->mixer == TL_DELTA) be->delta_net(run, l);
        if (layer->mixer == TL_ATTENTION) be->qkv(run, l), be->attend(run, l);
        if (model->config.parallel) be->norm_glu(run, l); // of the x that attention read
        be->linear_add(run, run->attended, &layer->wo, &layer->attention_post_norm);
        if (layer->experts) {
            be->moe(run, l);
            continue;
        }
        if (!model->config.parallel) be->norm_glu(run, l);
        be->linear_add(run, run->hidden, &layer->w_down, &layer->ffn_post_norm);
    }
    if (batch->logits || batch->n_candidates) be->norm_linear(run, &model->output_norm, &model->output);
    return be->end(run, message);
}

tl_status tl_forward(tl_model *model, tl_cache *cache, const tl_batch *batch, tl_message *message) {
    tl_status status = tl_batch_check(model, cache, batch, message);
    if (status != TL_OK || batch->n == 0) return status;
    tl_pool_enter(); // calls queue here
    status = forward(model, cache, batch, message);
    tl_pool_leave();
    return status;
}
