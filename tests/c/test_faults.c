// test_faults.c: the k-th allocation, thread or read fails, for every k: each call says so, leaves nothing behind, and
// the next one works. The linker puts the functions here (__wrap_...) in place of the system's (CMakeLists.txt).
#define _GNU_SOURCE
#include "check.h"
#include "tinyllm.h"
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

// ---- the system, which fails at the k-th request
static int allocations, fail_allocation, threads_left = -1; // 0, -1: never
static int reads, storm;                                    // storm: reads are interrupted, and come short
static int fail_read;

void *__real_aligned_alloc(size_t alignment, size_t n_bytes);
void *__real_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *a, void *(*f)(void *), void *data);
ssize_t __real_pread(int fd, void *to, size_t n, off_t offset);
void *__wrap_aligned_alloc(size_t alignment, size_t n_bytes);
void *__wrap_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *a, void *(*f)(void *), void *data);
ssize_t __wrap_pread(int fd, void *to, size_t n, off_t offset);

void *__wrap_aligned_alloc(size_t alignment, size_t n_bytes) {
    return ++allocations == fail_allocation ? NULL : __real_aligned_alloc(alignment, n_bytes);
}

void *__wrap_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset) {
    return ++allocations == fail_allocation ? MAP_FAILED : __real_mmap(at, n, protection, flags, fd, offset);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *a, void *(*f)(void *), void *data) {
    if (threads_left == 0) return EAGAIN;
    if (threads_left > 0) threads_left--;
    return __real_pthread_create(thread, a, f, data);
}

ssize_t __wrap_pread(int fd, void *to, size_t n, off_t offset) {
    const int k = __atomic_add_fetch(&reads, 1, __ATOMIC_RELAXED);
    if (k == fail_read) {
        errno = EIO;
        return -1;
    }
    if (storm && k % 3) { // as if a signal had come
        errno = EINTR;
        return -1;
    }
    return __real_pread(fd, to, storm && n > 1 ? n / 2 : n, offset);
}

static void expect_nothing_left(const char *after) {
    size_t n_blocks, n_bytes;
    tl_memory_live(&n_blocks, &n_bytes);
    CHECK(n_blocks == 0 && n_bytes == 0, "%s: %zu blocks of %zu bytes are left", after, n_blocks, n_bytes);
}

// ---- a small model, in a file
#define VOCAB  33000 // an embedding past 2 MB, which is mapped
#define DIM    32
#define N_BODY 10

static const char *const names[N_BODY] = {"attention_norm", "ffn_norm", "router", "wq", "wk", "wv", "wo",
                                          "w_gate.",        "w_up.",    "w_down."};
static int fd;

static const tl_config config = {.n_layers = 2,
                                 .dim = DIM,
                                 .n_heads = 2,
                                 .n_kv_heads = 1,
                                 .head_dim = 16,
                                 .ff_dim = 64,
                                 .vocab_size = VOCAB,
                                 .context = 700,
                                 .norm_eps = 1e-5f,
                                 .attention_scale = 0.25f,
                                 .rope_theta = 10000,
                                 .rope_dim = 16,
                                 .rope_scale = 1,
                                 .local_rope_theta = 100,
                                 .n_experts = 3,
                                 .n_experts_used = 2};

static void write_file(void) {
    char path[] = "/tmp/test_faults_XXXXXX";
    fd = mkstemp(path);
    CHECK(fd >= 0, "no temporary file");
    unlink(path);
    float *x = random_floats((size_t)VOCAB * DIM, 0.3f);
    CHECK(write(fd, x, (size_t)VOCAB * DIM * sizeof *x) == (ssize_t)((size_t)VOCAB * DIM * sizeof *x), "disk full");
    free(x);
}

static tl_status upload(tl_model *model, const char *name, int layer, int keep_as, tl_message *message) {
    const tl_source source = {.format = tl_format_of(0), .fd = fd, .offset = 0};
    return tl_model_upload(model, name, layer, &source, tl_format_of(keep_as), 2, message);
}

static tl_status load(tl_model **model, tl_message *message) {
    tl_status status = tl_model_create(model, &config, &tl_backend_cpu, message);
    for (int layer = 0; status == TL_OK && layer < config.n_layers; layer++)
        for (int i = 0; status == TL_OK && i < N_BODY; i++)
            for (int e = 0; status == TL_OK && e < (i < 7 ? 1 : config.n_experts); e++) {
                char name[32];
                snprintf(name, sizeof name, i < 7 ? "%s" : "%s%d", names[i], e);
                status = upload(*model, name, layer, i < 3 ? 0 : i % 2 ? 8 : 0, message);
            }
    if (status == TL_OK) status = upload(*model, "output_norm", -1, 0, message);
    if (status == TL_OK) status = upload(*model, "embedding", -1, 0, message);
    if (status == TL_OK) tl_model_tie(*model);
    return status == TL_OK ? tl_model_check(*model, message) : status;
}

static tl_status run(tl_model *model, tl_cache *cache, int n, int threads, float *logits, tl_message *message) {
    static int32_t tokens[600], positions[600], sequences[600], table[11];
    const int32_t last = n - 1;
    for (int i = 0; i < n; i++) {
        tokens[i] = i * 7 % VOCAB;
        positions[i] = i;
    }
    for (int i = 0; i < 11; i++) table[i] = i;
    const tl_batch batch = {.n = n,
                            .tokens = tokens,
                            .positions = positions,
                            .sequences = sequences,
                            .n_sequences = 1,
                            .max_pages = 11,
                            .page_tables = table,
                            .last_layer = config.n_layers,
                            .n_rows = 1,
                            .rows = &last,
                            .logits = logits,
                            .threads = threads};
    return tl_forward(model, cache, &batch, message);
}

// The status of `call` with its k-th allocation failing; TL_OK from the first k that it does not reach.
#define SWEEP(what, call, undo)                                                                                        \
    do {                                                                                                               \
        for (int k = 1, left = 1; left; k++) {                                                                         \
            tl_message message = {""};                                                                                 \
            allocations = 0;                                                                                           \
            fail_allocation = k;                                                                                       \
            const tl_status status = call;                                                                             \
            left = allocations >= k;                                                                                   \
            fail_allocation = 0;                                                                                       \
            n_injected += left;                                                                                        \
            CHECK(status == (left ? TL_MEMORY : TL_OK), "%s: allocation %d failed: status %d, \"%s\"", what, k,        \
                  status, message.text);                                                                               \
            CHECK(!left || strstr(message.text, "no memory"), "%s: no message: \"%s\"", what, message.text);           \
            undo;                                                                                                      \
        }                                                                                                              \
    } while (0)

static int n_injected;

int main(void) {
    write_file();
    tl_model *model = NULL;
    SWEEP("load", load(&model, &message), {
        tl_model_free(model);
        model = NULL;
        expect_nothing_left("load");
    });

    tl_message message = {""};
    CHECK(load(&model, &message) == TL_OK, "%s", message.text);
    tl_cache *cache = NULL;
    SWEEP("a cache", tl_cache_create(&cache, model, 1, 20000, &message), {
        if (cache) tl_cache_free(cache);
        cache = NULL;
    });
    CHECK(tl_cache_create(&cache, model, 1, 20000, &message) == TL_OK, "%s", message.text);
    size_t blocks_before, bytes_before, blocks, bytes;
    tl_memory_live(&blocks_before, &bytes_before);
    allocations = 0;
    fail_allocation = 2; // of several slabs: those that came stay
    CHECK(tl_cache_grow(cache, 20000, &message) == TL_MEMORY, "a cache grows without memory");
    fail_allocation = 0;
    n_injected++;
    tl_memory_live(&blocks, &bytes);
    CHECK(cache->n_pages > 0 && cache->n_pages < 20000 && blocks == blocks_before + 1, "%d pages, %zu blocks more",
          cache->n_pages, blocks - blocks_before);
    CHECK(tl_cache_grow(cache, 20000, &message) == TL_OK && cache->n_pages == 20000, "%s", message.text);

    static float right[VOCAB], logits[VOCAB];
    CHECK(run(model, cache, 500, 2, right, &message) == TL_OK, "%s", message.text);
    tl_model_free(model);
    CHECK(load(&model, &message) == TL_OK, "%s", message.text); // one that has made no call yet
    for (int n = 1; n <= 500; n += 499)
        SWEEP("a call", run(model, cache, n, 2, logits, &message), {
            if (!left && n == 500) CHECK(!memcmp(logits, right, sizeof right), "other bits after failures");
        });

    uint8_t blocks_of[34 * 2];
    float x[64] = {0};
    SWEEP("a conversion",
          tl_convert(blocks_of, tl_format_of(8), (uint8_t *)x, tl_format_of(0), 1, 64, NULL, 2, &message), (void)0);
    double gb_s;
    SWEEP("a measurement", tl_read_bandwidth(&gb_s, (size_t)4 << 20, 2, 1, &message), (void)0);

    // Threads that cannot be had are done without.
    for (threads_left = 0; threads_left < 3; threads_left++) {
        const int wanted = threads_left;
        CHECK(run(model, cache, 500, 8 + 8 * wanted, logits, &message) == TL_OK, "%s", message.text);
        CHECK(!memcmp(logits, right, sizeof right), "other bits with %d threads more", wanted);
        n_injected++;
        threads_left = wanted;
    }
    threads_left = -1;
    tl_model_free(model);
    model = NULL;

    // Reads: interrupted and short ones change nothing, failing ones are an error each.
    storm = 1;
    CHECK(load(&model, &message) == TL_OK, "in a storm of signals: %s", message.text);
    n_injected += reads;
    storm = 0;
    CHECK(run(model, cache, 500, 2, logits, &message) == TL_OK, "%s", message.text);
    CHECK(!memcmp(logits, right, sizeof right), "other bits after interrupted reads");
    tl_model_free(model);
    model = NULL;
    reads = 0;
    CHECK(load(&model, &message) == TL_OK, "%s", message.text);
    tl_model_free(model);
    for (int n = reads, k = 1; k <= n; k += k < 60 ? 1 : 97) {
        model = NULL;
        reads = 0;
        fail_read = k;
        CHECK(load(&model, &message) == TL_IO, "read %d of %d failed: %s", k, n, message.text);
        tl_model_free(model);
        n_injected++;
    }
    tl_cache_free(cache);
    expect_nothing_left("all");
    printf("%d faults injected\n", n_injected);
    return 0;
}
