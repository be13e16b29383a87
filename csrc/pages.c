// pages.c: the bytes of a page of the KV cache, out to the caller's memory and back, so that a session can be kept in a
// file. Includes tinyllm.h only; engine/saved.py writes the file.
#include "tinyllm.h"

static tl_status check(const tl_cache *cache, int page, tl_message *message) {
    if (page >= 0 && page < cache->n_pages) return TL_OK;
    return tl_fail(message, TL_ARGUMENT, "page %d is not one of the cache's %d", page, cache->n_pages);
}

tl_status tl_cache_read_page(const tl_cache *cache, int page, void *out, tl_message *message) {
    tl_status status = check(cache, page, message);
    if (status != TL_OK) return status;
    const tl_backend *b = cache->backend;
    return (b->read ? b->read : b->copy)(out, tl_cache_head(cache, page, 0, 0), cache->page_bytes);
}

tl_status tl_cache_write_page(tl_cache *cache, int page, const void *from, tl_message *message) {
    tl_status status = check(cache, page, message);
    if (status != TL_OK) return status;
    const tl_backend *b = cache->backend;
    return (b->write ? b->write : b->copy)(tl_cache_head(cache, page, 0, 0), from, cache->page_bytes);
}
