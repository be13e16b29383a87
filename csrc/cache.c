// cache.c: the memory of the paged KV cache: slabs, pages, copies, bounds. Which sequence owns a page is
// Python's business (kvcache.py). Includes tinyllm.h only; kernels/attention.inc reads the layout that tinyllm.h
// describes.
#include "tinyllm.h"
#include <string.h>

#define SLAB_BYTES ((size_t)64 << 20)

tl_status tl_cache_create(tl_cache **out, const tl_model *model, int type, int max_pages, tl_message *message) {
    const tl_config *c = &model->config;
    if (type != 0 && type != 1 && (type != 8 || c->head_dim % TL_Q))
        return tl_fail(message, TL_ARGUMENT,
                       "cache type %d is not F32 (0), F16 (1) or, for heads of a multiple of 32, Q8_0 (8)", type);
    if (max_pages < 1 || max_pages > 1 << 24)
        return tl_fail(message, TL_ARGUMENT, "max_pages is %d, not in 1..%d", max_pages, 1 << 24);
    tl_cache *cache = tl_alloc(sizeof *cache);
    if (!cache) return tl_fail(message, TL_MEMORY, "no memory for a cache");
    const size_t v_stride = ((size_t)c->head_dim + 15) / 16 * 16, size = type == 0 ? 4 : 2; // of a number
    const size_t q8_bytes = TL_PAGE * ((size_t)c->head_dim / TL_Q) * 34;                    // of either, as Q8_0 blocks
    *cache = (tl_cache){.backend = model->backend,
                        .type = type,
                        .n_layers = c->page_layers,
                        .n_kv_heads = c->n_kv_heads,
                        .head_dim = c->head_dim,
                        .v_stride = (int)v_stride,
                        .k_bytes = type == 8 ? q8_bytes : TL_PAGE * (size_t)c->head_dim * size,
                        .v_bytes = type == 8 ? q8_bytes : TL_PAGE * v_stride * size,
                        .max_pages = max_pages};
    cache->page_bytes = (size_t)c->page_layers * (size_t)c->n_kv_heads * (cache->k_bytes + cache->v_bytes);
    cache->pages_per_slab = cache->page_bytes > SLAB_BYTES ? 1 : (int)(SLAB_BYTES / cache->page_bytes);
    if (cache->pages_per_slab > max_pages) cache->pages_per_slab = max_pages;
    cache->slabs = tl_alloc(((size_t)max_pages / (size_t)cache->pages_per_slab + 1) * sizeof(void *));
    if (cache->slabs) return *out = cache, TL_OK;
    tl_cache_free(cache);
    return tl_fail(message, TL_MEMORY, "no memory for a cache of %d pages", max_pages);
}

tl_status tl_cache_grow(tl_cache *cache, int n_pages, tl_message *message) {
    if (n_pages > cache->max_pages)
        return tl_fail(message, TL_ARGUMENT, "%d pages asked for, the cache holds at most %d", n_pages,
                       cache->max_pages);
    while (cache->n_pages < n_pages) {
        int left = cache->max_pages - cache->n_pages, n = left < cache->pages_per_slab ? left : cache->pages_per_slab;
        void *slab = cache->backend->alloc((size_t)n * cache->page_bytes);
        if (!slab)
            return tl_fail(message, TL_MEMORY, "no memory for %d more pages of %zu bytes (%d exist)", n,
                           cache->page_bytes, cache->n_pages);
        cache->slabs[cache->n_slabs++] = slab;
        cache->n_pages += n;
    }
    return TL_OK;
}

static uint8_t *page_at(const tl_cache *cache, int page) {
    return (uint8_t *)cache->slabs[page / cache->pages_per_slab] +
           (size_t)(page % cache->pages_per_slab) * cache->page_bytes;
}

uint8_t *tl_cache_head(const tl_cache *cache, int page, int place, int kv_head) {
    size_t head = (size_t)place * (size_t)cache->n_kv_heads + (size_t)kv_head;
    return page_at(cache, page) + head * (cache->k_bytes + cache->v_bytes);
}

static tl_status page_check(const tl_cache *cache, int page, tl_message *message) {
    if (page >= 0 && page < cache->n_pages) return TL_OK;
    return tl_fail(message, TL_ARGUMENT, "page %d is not one of the cache's %d", page, cache->n_pages);
}

tl_status tl_cache_clear_page(tl_cache *cache, int page, tl_message *message) {
    tl_status status = page_check(cache, page, message);
    return status == TL_OK ? cache->backend->clear(page_at(cache, page), cache->page_bytes) : status;
}

tl_status tl_cache_copy_page(tl_cache *cache, int to, int from, int n_tokens, tl_message *message) {
    tl_status status = page_check(cache, to, message);
    if (status == TL_OK) status = page_check(cache, from, message);
    if (n_tokens < 0 || n_tokens > TL_PAGE)
        return tl_fail(message, TL_ARGUMENT, "%d tokens to copy from a page of %d", n_tokens, TL_PAGE);
    size_t blocks = ((size_t)n_tokens + 15) / 16; // of the page's four, in keys and values alike
    for (int h = 0; status == TL_OK && h < cache->n_layers * cache->n_kv_heads; h++) {
        uint8_t *a = tl_cache_head(cache, to, 0, h), *b = tl_cache_head(cache, from, 0, h);
        status = cache->backend->copy(a, b, cache->k_bytes / 4 * blocks);
        if (status == TL_OK)
            status = cache->backend->copy(a + cache->k_bytes, b + cache->k_bytes, cache->v_bytes / 4 * blocks);
    }
    return status;
}

void tl_cache_free(tl_cache *cache) {
    if (!cache) return;
    for (int i = 0; i < cache->n_slabs; i++) cache->backend->free(cache->slabs[i]);
    tl_free(cache->slabs);
    tl_free(cache);
}
