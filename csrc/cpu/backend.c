// cpu/backend.c: the CPU's operations, each a page or less: products (products.c), attention (attend.c), experts
// (experts.c), and what lies between them. A call's buffers are run.c's, loading is load.c's. Includes cpu.h.
#include "cpu/cpu.h"
#include <string.h>

static void embed_token(void *data, int t, int thread) {
    (void)thread;
    tl_run *run = data;
    const size_t dim = (size_t)run->model->config.dim, row = (size_t)t;
    if (run->batch->tokens)
        tl_cpu_unpack_row(&run->model->embedding, run->batch->tokens[t], run->x + row * dim);
    else
        memcpy(run->x + row * dim, run->batch->x + row * dim, dim * sizeof(float));
    const float scale = run->batch->tokens ? run->model->config.embedding_scale : 1;
    for (size_t i = row * dim; scale != 1 && i < (row + 1) * dim; i++) run->x[i] *= scale;
}

static void cpu_embed(tl_run *run) { tl_parallel(run->batch->threads, run->batch->n, embed_token, run); }

static void cpu_qkv(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_layer *w = &run->model->layers[layer];
    tl_product products[] = {{.w = &w->wq, .out = run->q, .stride = r->q_width},
                             {.w = &w->wk, .out = r->k, .stride = r->kv_width},
                             {.w = &w->wv, .out = r->v, .stride = r->kv_width},
                             {.w = &w->w_attention_gate, .out = r->gate, .stride = r->q_width}};
    tl_cpu_products(r, run->x, NULL, run->batch->n, &w->attention_norm, products, w->w_attention_gate.data ? 4 : 3);
    tl_cpu_rotate_and_store(r, layer);
}

static void cpu_linear_add(tl_run *run, const float *in, const tl_matrix *w, const tl_norm *norm) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const int direct = !norm->weight && run->model->config.residual_scale == 1;
    tl_product product = {.w = w, .out = direct ? run->x : r->normed, .stride = (size_t)w->rows, .add = direct};
    tl_cpu_products(r, in, NULL, run->batch->n, NULL, &product, 1);
    if (!direct) tl_cpu_add(r, r->normed, norm);
}

static void cpu_norm_glu(tl_run *run, int layer) {
    tl_cpu_run *r = (tl_cpu_run *)run;
    const tl_layer *w = &run->model->layers[layer];
    const size_t stride = (size_t)w->w_up.rows;
    tl_product up = {.w = &w->w_up, .out = r->up, .stride = stride};
    tl_product gate = {.w = &w->w_gate, .out = run->hidden, .stride = stride, .up = &up, .xielu = w->xielu};
    gate.activation = run->model->config.activation;
    tl_cpu_products(r, run->x, NULL, run->batch->n, &w->ffn_norm, &gate, 1);
}

static void cpu_norm_linear(tl_run *run, const tl_norm *norm, const tl_matrix *w) {
    const tl_batch *b = run->batch;
    if (b->n_rows == 0) return;
    tl_product product = {.w = w, .out = b->logits, .stride = (size_t)w->rows};
    tl_cpu_products((tl_cpu_run *)run, run->x, b->rows, b->n_rows, norm, &product, 1);
    tl_cpu_finish_logits((tl_cpu_run *)run);
}

const tl_backend tl_backend_cpu = {
    .name = "cpu",
    .alloc = tl_alloc,
    .free = tl_free,
    .clear = tl_clear,
    .copy = tl_copy,
    .upload = tl_cpu_upload,
    .upload_floats = tl_cpu_upload_floats,
    .unpack = tl_cpu_unpack,
    .begin = tl_cpu_begin,
    .embed = cpu_embed,
    .qkv = cpu_qkv,
    .attend = tl_cpu_attend,
    .linear_add = cpu_linear_add,
    .norm_glu = cpu_norm_glu,
    .moe = tl_cpu_moe,
    .norm_linear = cpu_norm_linear,
    .end = tl_cpu_end,
    .release = tl_cpu_release,
    .adapted = &tl_cpu_adapted,
    .delta_net = tl_cpu_delta_net,
};
