// adapters.c: an adapter's life: created for a model, filled pair by pair, freed. What a pair adds is cpu/adapters.c's
// business. Includes tinyllm.h only.
#include "tinyllm.h"
#include <math.h>
#include <string.h>

#define MOST_RANK (1 << 16)

tl_status tl_adapter_create(tl_adapter **out, const tl_model *model, int room, tl_message *message) {
    if (!model->backend->adapted)
        return tl_fail(message, TL_UNSUPPORTED, "adapters do not run on %s", model->backend->name);
    if (room < 0 || room > 1 << 24) return tl_fail(message, TL_ARGUMENT, "%d pairs, not 0..%d", room, 1 << 24);
    tl_adapter *adapter = tl_alloc(sizeof *adapter);
    if (adapter) adapter->pairs = tl_alloc((size_t)room * sizeof *adapter->pairs);
    if (!adapter || !adapter->pairs) {
        tl_adapter_free(adapter);
        return tl_fail(message, TL_MEMORY, "no memory for an adapter of %d pairs", room);
    }
    adapter->model = model;
    adapter->room = room;
    *out = adapter;
    return TL_OK;
}

tl_status tl_adapter_add(tl_adapter *adapter, const char *name, int layer, int rank, int has_bias, float scale,
                         const tl_source *a, const tl_source *b, tl_message *message) {
    const tl_model *model = adapter->model;
    const tl_matrix *of = tl_model_matrix(model, name, layer);
    if (!of) return tl_fail(message, TL_ARGUMENT, "there is no matrix \"%s\" in layer %d", name, layer);
    if (tl_adapter_pair(adapter, of))
        return tl_fail(message, TL_ARGUMENT, "%s of layer %d has a pair already", name, layer);
    if (adapter->n_pairs == adapter->room)
        return tl_fail(message, TL_ARGUMENT, "the adapter was made for %d pairs", adapter->room);
    if (rank < 1 || rank > MOST_RANK || !isfinite(scale) || !a->format->is_float || !b->format->is_float)
        return tl_fail(message, TL_ARGUMENT, "%s of layer %d: rank %d (1..%d), scale %g, %s and %s (floats)", name,
                       layer, rank, MOST_RANK, (double)scale, a->format->name, b->format->name);
    const int looked_up = of == &model->embedding;
    const int k = rank + (has_bias != 0), rows = looked_up ? of->k : of->rows;
    tl_pair pair = {.of = of, .rank = rank, .looked_up = looked_up, .scale = scale};
    pair.a = (tl_matrix){.format = a->format, .rows = looked_up ? of->rows : rank, .k = looked_up ? rank : of->k};
    pair.b = (tl_matrix){.format = b->format, .rows = rows, .k = k};
    tl_pool_enter();
    const tl_status status = model->backend->adapted->upload_pair(&pair, a, b, message);
    tl_pool_leave();
    if (status != TL_OK) {
        model->backend->free(pair.a.data);
        model->backend->free(pair.b.data);
        return status;
    }
    const int at = tl_adapter_place(adapter, of);
    memmove(adapter->pairs + at + 1, adapter->pairs + at, (size_t)(adapter->n_pairs - at) * sizeof *adapter->pairs);
    adapter->pairs[at] = pair;
    adapter->n_pairs++;
    adapter->n_bytes += pair.a.n_bytes + pair.b.n_bytes;
    return TL_OK;
}

void tl_adapter_free(tl_adapter *adapter) {
    if (!adapter) return;
    for (int i = 0; i < adapter->n_pairs; i++) {
        adapter->model->backend->free(adapter->pairs[i].a.data);
        adapter->model->backend->free(adapter->pairs[i].b.data);
    }
    tl_free(adapter->pairs);
    tl_free(adapter);
}
