// states.c: the memory of what layers keep at one size, slot by slot: growing, reading, writing, and whether a batch's
// slots fit. Which sequence owns a slot is Python's business (engine/states.py). Includes tinyllm.h only; cpu/delta.c reads
// the layout that tinyllm.h describes.
#include "tinyllm.h"

tl_status tl_states_create(tl_states **out, const tl_model *model, int max_slots, tl_message *message) {
    const tl_delta_sizes *d = &model->config.delta;
    if (model->n_states < 1 || max_slots < 1 || max_slots > 1 << 24)
        return tl_fail(message, TL_ARGUMENT, "%d slots for %d layers with a state: not 1..%d for 1 or more", max_slots,
                       model->n_states, 1 << 24);
    tl_states *states = tl_alloc(sizeof *states);
    if (!states) return tl_fail(message, TL_MEMORY, "no memory for states");
    *states = (tl_states){.backend = model->backend, .n_layers = model->n_states, .max_slots = max_slots};
    states->layer_floats = (size_t)(d->kernel - 1) * (size_t)tl_delta_channels(d) +
                           (size_t)d->v_heads * (size_t)d->v_dim * (size_t)d->k_dim;
    states->slot_bytes = states->layer_floats * sizeof(float) * (size_t)model->n_states;
    states->slots = tl_alloc((size_t)max_slots * sizeof(void *));
    if (states->slots) return *out = states, TL_OK;
    tl_states_free(states);
    return tl_fail(message, TL_MEMORY, "no memory for %d slots", max_slots);
}

tl_status tl_states_grow(tl_states *states, int n_slots, tl_message *message) {
    if (n_slots > states->max_slots)
        return tl_fail(message, TL_ARGUMENT, "%d slots asked for, there may be at most %d", n_slots, states->max_slots);
    while (states->n_slots < n_slots) {
        void *slot = states->backend->alloc(states->slot_bytes);
        if (!slot)
            return tl_fail(message, TL_MEMORY, "no memory for a slot of %zu bytes more (%d exist)", states->slot_bytes,
                           states->n_slots);
        states->slots[states->n_slots++] = slot;
    }
    return TL_OK;
}

float *tl_states_at(const tl_states *states, int slot, int place) {
    return (float *)states->slots[slot] + (size_t)place * states->layer_floats;
}

static tl_status check(const tl_states *states, int slot, tl_message *message) {
    if (slot >= 0 && slot < states->n_slots) return TL_OK;
    return tl_fail(message, TL_ARGUMENT, "slot %d is not one of the %d that exist", slot, states->n_slots);
}

tl_status tl_states_read(const tl_states *states, int slot, void *out, tl_message *message) {
    const tl_backend *b = states->backend;
    const tl_status status = check(states, slot, message);
    return status == TL_OK ? (b->read ? b->read : b->copy)(out, states->slots[slot], states->slot_bytes) : status;
}

tl_status tl_states_write(tl_states *states, int slot, const void *from, tl_message *message) {
    const tl_backend *b = states->backend;
    const tl_status status = check(states, slot, message);
    return status == TL_OK ? (b->write ? b->write : b->copy)(states->slots[slot], from, states->slot_bytes) : status;
}

void tl_states_free(tl_states *states) {
    if (!states) return;
    for (int i = 0; i < states->n_slots; i++) states->backend->free(states->slots[i]);
    tl_free(states->slots);
    tl_free(states);
}

// Whether nobody reads this slot in the call, and it is written once.
static int is_own(const tl_batch *b, int save) {
    const int slot = b->saves[save].slot;
    for (int i = 0; i < save; i++)
        if (b->saves[i].slot == slot) return 0;
    for (int t = 0; t < b->n; t++)
        if ((t == 0 || b->sequences[t] != b->sequences[t - 1]) && b->positions[t] > 0 &&
            b->states_in[b->sequences[t]] == slot)
            return 0;
    return 1;
}

tl_status tl_states_check(const tl_model *model, const tl_batch *b, tl_message *message) {
    const tl_states *states = b->states;
    if (!states || !b->states_in)
        return tl_fail(message, TL_ARGUMENT,
                       "this model keeps a state beside pages: give the call states, and the slot of each sequence");
    if (states->n_layers != model->n_states || states->backend != model->backend)
        return tl_fail(message, TL_ARGUMENT, "the states were made for a model of another shape");
    for (int t = 0; t < b->n; t++) {
        const int first = t == 0 || b->sequences[t] != b->sequences[t - 1];
        if (!first || b->positions[t] == 0) continue;
        const tl_status status = check(states, b->states_in[b->sequences[t]], message);
        if (status != TL_OK) return status;
    }
    if (b->n_saves < 0) return tl_fail(message, TL_ARGUMENT, "a count is negative");
    for (int i = 0; i < b->n_saves; i++) {
        const int token = b->saves[i].token;
        if (token < 0 || token >= b->n || (i > 0 && token <= b->saves[i - 1].token))
            return tl_fail(message, TL_ARGUMENT, "state %d is kept after token %d of %d: not ascending", i, token,
                           b->n);
        const tl_status status = check(states, b->saves[i].slot, message);
        if (status != TL_OK) return status;
        if (!is_own(b, i))
            return tl_fail(message, TL_ARGUMENT, "slot %d is written twice, or read and written", b->saves[i].slot);
    }
    return TL_OK;
}
