// cuda_stub.c: a libtinyllm_cuda.so without a GPU, for tests of how the library is opened and chosen. Its devices are
// what STUB_DEVICES, STUB_FREE (bytes), STUB_WHY, STUB_OLD (devices it refuses), STUB_REFUSES (models) and STUB_ABI say; its
// model answers each token with the next one.
#include "../../cuda/tinyllm_cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long long setting(const char *name, long long otherwise) {
    const char *text = getenv(name);
    return text ? atoll(text) : otherwise;
}

static tl_status fail(tl_message *message, tl_status status, const char *text) {
    snprintf(message->text, sizeof message->text, "%s", text);
    return status;
}

static void *stub_alloc(size_t n_bytes) { return calloc(1, n_bytes); }

static tl_status stub_clear(void *to, size_t n_bytes) {
    memset(to, 0, n_bytes);
    return TL_OK;
}

static tl_status stub_copy(void *to, const void *from, size_t n_bytes) {
    memcpy(to, from, n_bytes);
    return TL_OK;
}

static tl_status stub_upload(tl_matrix *m, const tl_source *source, int threads, tl_message *message) {
    (void)source, (void)threads, (void)message;
    m->n_bytes = 64;
    m->data = calloc(1, m->n_bytes);
    return TL_OK;
}

static tl_status stub_upload_floats(float **to, const tl_source *source, int n, tl_message *message) {
    (void)source, (void)message;
    *to = calloc((size_t)n, sizeof(float));
    return TL_OK;
}

static tl_status stub_begin(tl_run **run, tl_model *model, tl_cache *cache, const tl_batch *batch,
                            tl_message *message) {
    if (getenv("STUB_REFUSES")) return fail(message, TL_UNSUPPORTED, "experts cannot be computed yet");
    if (!*run) *run = calloc(1, sizeof **run);
    **run = (tl_run){.model = model, .cache = cache, .batch = batch};
    return TL_REPLAYED; // it has nothing to run
}

static tl_status stub_end(tl_run *run, tl_message *message) {
    (void)message;
    const tl_batch *b = run->batch;
    const int vocabulary = run->model->config.vocab_size;
    for (int i = 0; b->logits && i < b->n_rows; i++) {
        float *logits = b->logits + (size_t)i * (size_t)vocabulary;
        memset(logits, 0, (size_t)vocabulary * sizeof(float));
        logits[(b->tokens[b->rows[i]] + 1) % vocabulary] = 100;
    }
    return TL_OK;
}

static void stub_release(tl_run *run) { free(run); }

static const tl_backend stub = {.name = "stub",
                                .alloc = stub_alloc,
                                .free = free,
                                .clear = stub_clear,
                                .copy = stub_copy,
                                .upload = stub_upload,
                                .upload_floats = stub_upload_floats,
                                .begin = stub_begin,
                                .end = stub_end,
                                .release = stub_release};

int tl_cuda_abi(void) { return (int)setting("STUB_ABI", tl_seam_abi()); }

int tl_cuda_device_count(tl_message *why) {
    const char *text = getenv("STUB_WHY");
    fail(why, TL_OK, text ? text : "");
    return (int)setting("STUB_DEVICES", 1);
}

tl_status tl_cuda_device_info(int device, tl_cuda_info *info, tl_message *message) {
    (void)message;
    *info = (tl_cuda_info){.major = 9, .total_bytes = 80000000000, .bandwidth_gb_s = 4800};
    snprintf(info->name, sizeof info->name, "Stub %d", device);
    info->free_bytes = (uint64_t)setting("STUB_FREE", 70000000000) * (uint64_t)(device + 1);
    return TL_OK;
}

tl_status tl_cuda_backend(int device, const tl_backend **backend, tl_message *message) {
    if (device < setting("STUB_OLD", 0)) return fail(message, TL_UNSUPPORTED, "compute capability 7.0 is too old");
    *backend = &stub;
    return TL_OK;
}

tl_status tl_cuda_read_bandwidth(int device, double *gb_s, size_t n_bytes, int repetitions, tl_message *message) {
    (void)device, (void)repetitions;
    if (n_bytes < 1 << 20) return fail(message, TL_ARGUMENT, "too few bytes");
    *gb_s = 4321;
    return TL_OK;
}
