// tinyllm.h: the C ABI. Every type and function that crosses a boundary: between the core's files, to the
// Python binding, and to another backend's library. Includes only standard headers. Read model.c next: it is
// the forward pass.
//
// Conventions. Functions that can fail return a tl_status and, when it is not TL_OK, have written one
// sentence into the caller's tl_message. Nothing here prints, exits or aborts. Arrays are row-major; [n, dim]
// means n rows of dim elements.
#ifndef TINYLLM_H
#define TINYLLM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum tl_status {
    TL_OK = 0,
    TL_REPLAYED,    // a backend's begin: the whole call has already run (a captured graph), go to end
    TL_CANCELLED,   // the batch's stop function said so; the call's positions count as unwritten
    TL_ARGUMENT,    // an argument is out of range
    TL_MEMORY,      // an allocation failed
    TL_IO,          // a read failed or came short
    TL_UNSUPPORTED, // not built into this backend
} tl_status;

typedef struct tl_message {
    char text[512];
} tl_message;

// Writes a printf-style sentence into message and returns status, so that errors are `return tl_fail(...)`.
tl_status tl_fail(tl_message *message, tl_status status, const char *format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 3, 4)))
#endif
    ;

// ---- memory --------------------------------------------------------------------------------------------------------
// Zeroed and aligned to 64 bytes, to 2 MB from there up; NULL when there is none. Every live block is
// counted.
void *tl_alloc(size_t n_bytes);
void tl_free(void *block); // NULL is fine
tl_status tl_clear(void *to, size_t n_bytes);
tl_status tl_copy(void *to, const void *from, size_t n_bytes);
void tl_memory_live(size_t *n_blocks, size_t *n_bytes);

// ---- formats -------------------------------------------------------------------------------------------------------
// How a tensor's numbers are stored. `id` is the type number GGUF files use, or one from TL_FIRST_OWN on. A row of k numbers is k / block
// blocks of block_bytes each. The core keeps matrices as panels of 16 rows: panel_bytes hold 16 rows x block
// numbers (formats/formats.h).
typedef struct tl_format {
    int id;
    const char *name; // lower case, as in "q4_k"
    int block;        // numbers in a block: 1, 32, 64, 128 or 256
    int block_bytes;  // bytes of a block in the file
    int panel_bytes;  // bytes of 16 rows' blocks in a panel
    int is_float; // meets float32 activations; others meet int8 activations. F32, F16 and BF16 (of block 1), and others
    // Packs one block of 16 rows; rows[i] is row i's block in the file, NULL for a row of zeros (past the
    // matrix's end).
    void (*pack)(uint8_t *panel, const uint8_t *const rows[16]);
    // The slow truth: out[block] = row's numbers in a packed block, exactly what the file's block means.
    void (*unpack)(float *out, const uint8_t *panel, int row);
    // Rounds k floats (a multiple of block) to the file's blocks. importance [k]: weights of the columns' squared
    // errors, finite and >= 0, or NULL: all alike. What is not finite makes its block's numbers not finite. NULL: nothing
    // is quantized to the format.
    void (*quantize)(uint8_t *blocks, const float *x, size_t k, const float *importance);
    const uint16_t *codes; // the code book that blocks point into (formats/codebooks.h), or NULL
    int n_codes;
} tl_format;

#define TL_FIRST_OWN 200 // the least id of those formats that no GGUF file has

#define TL_ROWS  16 // rows of a panel
#define TL_GROUP 4  // panels that store their blocks side by side
#define TL_Q     32 // activations that share a scale

extern const tl_format tl_formats[];   // one row a format, ends with name == NULL
const tl_format *tl_format_of(int id); // NULL if unknown

// Turns rows of a file's tensor into another format: blocks [rows, k] in both. `from` may be any format; what is in
// blocks is unpacked first. importance [k] or NULL, as above. TL_ARGUMENT, TL_MEMORY.
// (cpu/quantize.c)
tl_status tl_convert(uint8_t *to, const tl_format *format, const uint8_t *in, const tl_format *from, size_t rows,
                     size_t k, const float *importance, int threads, tl_message *message);

// ---- matrices ------------------------------------------------------------------------------------------------------
// Where a tensor's bytes lie: at `offset` of an open file, or in memory (fd < 0). Rows lie one after another.
typedef struct tl_source {
    const tl_format *format;
    int fd;
    uint64_t offset;
    const uint8_t *memory;
    const int32_t *row_order; // [rows] the file's row for each row of the matrix, both < rows; NULL: as they are
    int n_row_order;          // of row_order: the matrix's rows
    int row_stride;           // rows of the file from one of the matrix to the next; 0 counts as 1
    // Of MXFP4 in two parts, as safetensors hold it: 16 bytes a block lie here, one after another, numbers 2i and 2i + 1
    // in byte i, and a byte of scale a block lies there. NULL: blocks as GGUF has them.
    const struct tl_source *scales;
    float factor; // of all numbers, beside their blocks' own; 0 counts as 1
} tl_source;

// Rows [first, first + n) of the matrix that the source is for, but for row_order: the format's blocks, row_bytes a row.
// Returns 0, or -1 where the file ends before. (source.c)
int tl_read_rows(const tl_source *source, uint8_t *to, int first, int n, size_t row_bytes);

// Weights [rows, k] as the backend packed them; out = in @ w.T * factor + bias.
typedef struct tl_matrix {
    const tl_format *format;
    int rows, k;
    void *data;     // the backend's; NULL: absent
    size_t n_bytes; // of data
    float *bias;    // [rows] in the backend's memory, or NULL
    float factor;   // of all numbers in data; 0: none
    double *seen;   // [k + 1] sums of squares of the rows it met, by column, and their number; or NULL: nobody asked
} tl_matrix;

// LayerNorm is arXiv 1607.06450; the plain one has no weights.
typedef enum tl_norm_kind { TL_RMS_NORM, TL_LAYER_NORM, TL_PLAIN_LAYER_NORM } tl_norm_kind;

typedef struct tl_norm {
    float *weight; // [numbers of a row] in the backend's memory; NULL: the row stays as it is
    float *bias;   // [numbers of a row], added; or NULL
    float eps;
    tl_norm_kind kind;
} tl_norm;

// ---- the model -----------------------------------------------------------------------------------------------------
// What families vary. The first of each, 0, is Llama's.
// Of the gate; GELU in its tanh form (arXiv 1606.08415); gpt-oss's SwiGLU (kernels/rows.inc). From TL_RELU_SQUARED on there is
// no gate: hidden = activation(up), of xIELU (arXiv 2411.13010) with a layer's numbers.
typedef enum tl_activation { TL_SILU, TL_GELU, TL_CLAMPED_SWIGLU, TL_RELU_SQUARED, TL_XIELU } tl_activation;
typedef enum tl_norm_place { TL_NORM_BEFORE, TL_NORM_AFTER, TL_NORM_BOTH } tl_norm_place; // of attention and of FFN
typedef enum tl_qk_norm {                                                                 // RMSNorm or LayerNorm of
    TL_QK_NONE,                                                                           // queries and keys:
    TL_QK_HEAD,  // each head by itself, all with the same weights [head_dim]
    TL_QK_HEADS, // each head by itself, with its own weights [heads * head_dim]
    TL_QK_ALL,   // all heads as one row, weights [heads * head_dim]
} tl_qk_norm;
typedef enum tl_rope { TL_ROPE, TL_ROPE_LOCAL, TL_ROPE_NONE } tl_rope; // of a layer: usual, with local_rope_theta, none

// alpha of what is above 0, alpha of what is below, beta, epsilon, as the formula has them.
#define TL_XIELU_NUMBERS 4

// What mixes a layer's positions, and the sizes of the second kind.
typedef enum tl_mixer { TL_ATTENTION, TL_DELTA } tl_mixer;
typedef struct tl_delta_sizes {
    int k_heads, v_heads; // v_heads a multiple of k_heads, which they share
    int k_dim, v_dim;     // of a head, multiples of 16
    int kernel;           // tokens that the convolution sees
    int tiled;            // v head h has k head h % k_heads, as GGUF files have it; 0: h / (v_heads / k_heads)
} tl_delta_sizes;
static inline int tl_delta_channels(const tl_delta_sizes *d) {
    return 2 * d->k_heads * d->k_dim + d->v_heads * d->v_dim;
}

typedef struct tl_config {
    int n_layers, dim, n_heads, n_kv_heads, head_dim, ff_dim, vocab_size;
    int context; // positions the cache and RoPE may reach
    float norm_eps;
    float attention_scale; // q.k is multiplied by it, 1/sqrt(head_dim) for Llama
    double rope_theta;
    int rope_dim;              // dimensions of a head that are rotated, even, <= head_dim
    float rope_scale;          // cos and sin are multiplied by it (YaRN), else 1
    const float *rope_factors; // [rope_dim / 2] divisors of the frequencies, or NULL; copied

    // Beyond Llama; zero is Llama's. A backend that lacks one of these refuses the model in its begin.
    tl_norm_kind norm_kind;
    tl_norm_place norm_place;
    tl_activation activation;
    tl_qk_norm qk_norm;
    int qk_norm_late;        // RMSNorm of queries and keys comes after RoPE, not before
    int parallel;            // attention and FFN read the same x, both results are added to it
    int bidirectional;       // tokens attend to those behind them, too, as far as windows reach: all of a call's
    float qkv_limit;         // q, k and v are kept within [-qkv_limit, qkv_limit]; 0: as they are
    float attention_cap;     // scores become cap * tanh(score / cap); 0: as they are
    float logit_cap;         // logits likewise, after logit_scale
    float embedding_scale;   // of embedded tokens; 0 counts as 1, as in the next two
    float residual_scale;    // of what attention and FFN add to x
    float logit_scale;       // of the logits
    double local_rope_theta; // of TL_ROPE_LOCAL layers, whose angles have neither factors nor rope_scale; 0: none
    double query_growth; // queries at position p are multiplied by 1 + query_growth * ln(1 + p / query_span), a whole
    int query_span;      // quotient (Llama 4's scaling of attention); query_growth 0: they are not
    const int32_t *windows; // [n_layers] positions a token attends to, itself among them; 0: all. Or NULL. Copied.
                            // Of a bidirectional model: on either side
    const int32_t *ropes;   // [n_layers] tl_rope, or NULL; copied
    const float *xielu;     // [n_layers, TL_XIELU_NUMBERS] of TL_XIELU; copied
    int page_layers;        // whose keys and values share a page of the cache; 0: all n_layers
    const int32_t *places;  // [n_layers] table of the layer * page_layers + its place in a page; or NULL: l. Copied
    int n_experts;          // of every layer's feed-forward, each of ff_dim; 0: it is one dense block
    int n_experts_used;     // by a token: those its router scores highest
    int norm_topk_prob;     // their weights, a softmax over all scores, are divided by their sum
    int gated_attention;    // what attention gives is multiplied by the sigmoid of a product of its own
    const int32_t *mixers;  // [n_layers] tl_mixer, or NULL: attention. Copied
    tl_delta_sizes delta;   // of TL_DELTA layers
} tl_config;

// Gated DeltaNet (arXiv 2412.06464) in one layer; its output matrix is the layer's wo, [dim, v_heads * v_dim].
typedef struct tl_delta {
    tl_matrix w_qkv;    // [channels, dim]: q and k of k_heads, v of v_heads (tl_delta_channels)
    tl_matrix w_z;      // [v_heads * v_dim, dim] of the output's gate
    tl_matrix w_a, w_b; // [v_heads, dim] of the decay, of beta
    float *conv;        // [channels, kernel] the last is the token's own
    float *dt_bias, *a; // [v_heads] decay = exp(a * softplus(in @ w_a.T + dt_bias)), a < 0
    tl_norm norm;       // [v_dim] of a head's output
} tl_delta;

// One block of feed-forward: [ff_dim, dim] x2, [dim, ff_dim].
typedef struct tl_expert {
    tl_matrix w_gate, w_up, w_down;
} tl_expert;

typedef struct tl_layer {
    tl_mixer mixer;
    int state;  // the place of its state in a slot (tl_states); -1: it has none
    int window; // as in the configuration
    tl_rope rope;
    int table, place;                           // its pages: which of a sequence's tables, and where in a page
    tl_norm attention_norm, ffn_norm;           // of x, before; weight NULL where there is none
    tl_norm attention_post_norm, ffn_post_norm; // of what is added to x; likewise
    tl_norm q_norm, k_norm;                     // before RoPE, or after it; likewise
    float xielu[TL_XIELU_NUMBERS];
    float *sinks;                   // [n_heads] a score more in each head's softmax, with no value; or NULL
    tl_matrix wq, wk, wv, wo;       // [heads * head_dim, dim] x3 (kv_heads for k, v), [dim, heads * head_dim]
    tl_matrix w_gate, w_up, w_down; // [ff_dim, dim] x2, [dim, ff_dim]; w_gate's data NULL where there is no gate
    tl_matrix w_attention_gate;     // [heads * head_dim, dim], or absent
    tl_delta delta;                 // of TL_DELTA layers, instead of wq, wk and wv
    tl_matrix router;               // [n_experts, dim]
    tl_expert *experts;             // [n_experts] instead of w_gate, w_up and w_down; NULL: there are none
} tl_layer;

typedef struct tl_backend tl_backend;
typedef struct tl_cache tl_cache;
typedef struct tl_model tl_model;
typedef struct tl_run tl_run; // one call's state, the backend's own

struct tl_model {
    tl_config config;
    const tl_backend *backend;
    double *rope_frequencies;       // [rope_dim / 2] radians a position
    double *local_rope_frequencies; // likewise for TL_ROPE_LOCAL layers, or NULL
    tl_matrix embedding;            // [vocab_size, dim]
    tl_matrix output;               // the same data as embedding where they are tied
    tl_norm output_norm;
    tl_layer *layers;    // [n_layers]
    int n_tables;        // of pages that a sequence has
    int n_states;        // layers that keep a state
    size_t weight_bytes; // packed bytes uploaded
    tl_run *scratch;     // the backend's, reused from call to call
    int is_complete;     // no weight is missing: tl_model_check said so
};

tl_status tl_config_check(const tl_config *config, tl_message *message);
// Makes a model with no weights. Checks the configuration (check.c).
tl_status tl_model_create(tl_model **model, const tl_config *config, const tl_backend *backend, tl_message *message);
// Packs one tensor. `name` is embedding, output, output_norm or, for a layer, attention_norm, wq, wk, wv, wo,
// ffn_norm, w_gate, w_up, w_down; where the configuration asks for it attention_post_norm, ffn_post_norm, q_norm, k_norm,
// w_attention_gate; of TL_DELTA layers w_qkv, w_z, w_a, w_b, conv, dt_bias, a, delta_norm and wo; sinks; or a bias: bq, bk,
// bv, bo, b_gate, b_up, b_down, attention_norm_bias, ffn_norm_bias, output_norm_bias. Where layers have experts: router,
// b_router, and expert i's
// w_gate.i, w_up.i, w_down.i and biases. Vectors (norms, biases, sinks) are read as floats. `format` is what to keep
// matrices in: the source's own, or one to quantize a float source to.
tl_status tl_model_upload(tl_model *model, const char *name, int layer, const tl_source *source,
                          const tl_format *format, int threads, tl_message *message);
// The output matrix is the embedding, from now on, where it has none of its own: one copy serves both.
void tl_model_tie(tl_model *model);
// Says which weight is missing, if one is. Until it finds none, tl_forward refuses the model.
tl_status tl_model_check(tl_model *model, tl_message *message);
// The bytes of weights one token reads: every packed matrix once, of the experts as many as it uses; the embedding's
// row not counted.
size_t tl_model_token_bytes(const tl_model *model);
// The slow truth of a packed matrix: out [rows, k] float32.
tl_status tl_model_unpack(const tl_model *model, const char *name, int layer, float *out, tl_message *message);
// From now on calls add to seen [k + 1] the squares of every row of activations that meets the matrix, as floats, column
// by column, and 1 to the last; the caller keeps it, zeroed first, until NULL ends it. Which inputs matter is what
// quantizing wants to know. CPU only.
tl_status tl_model_observe(tl_model *model, const char *name, int layer, double *seen, tl_message *message);
const tl_matrix *tl_model_matrix(const tl_model *model, const char *name, int layer); // NULL if there is none
void tl_model_free(tl_model *model);

// ---- adapters ------------------------------------------------------------------------------------------------------
// LoRA, arXiv 2106.09685: beside a matrix w stands a pair of thin ones, and out = in @ w.T + scale * (in @ a.T) @ b.T, the
// pair in float32. The model's own weights stay as they are, so that rows of one call can have different adapters.
typedef struct tl_pair {
    const tl_matrix *of; // the model's
    int rank, looked_up; // looked_up: the embedding's, of whose a a token has a row
    float scale;
    tl_matrix a; // [rank, k], looked_up: [vocab_size, rank]; the backend puts it as it likes
    tl_matrix b; // [rows, rank], or [rows, rank + 1], whose last column is a bias that scale goes with, too
} tl_pair;

typedef struct tl_adapter {
    const tl_model *model;
    tl_pair *pairs; // [n_pairs] ascending by `of`
    int n_pairs, room;
    size_t n_bytes; // packed bytes uploaded
} tl_adapter;

// An adapter used with a strength: every pair's scale is multiplied by it.
typedef struct tl_use {
    const tl_adapter *adapter;
    float scale;
} tl_use;

// Makes an adapter without pairs, for as many as `room`. The model outlives it.
tl_status tl_adapter_create(tl_adapter **adapter, const tl_model *model, int room, tl_message *message);
// Packs one pair of a matrix, named as for tl_model_upload. a and b: rows of floats in memory. has_bias: b's last column.
tl_status tl_adapter_add(tl_adapter *adapter, const char *name, int layer, int rank, int has_bias, float scale,
                         const tl_source *a, const tl_source *b, tl_message *message);
void tl_adapter_free(tl_adapter *adapter);

// The first pair whose matrix is not before `of`; and the pair of `of`, NULL if there is none.
static inline int tl_adapter_place(const tl_adapter *adapter, const tl_matrix *of) {
    int first = 0, end = adapter->n_pairs;
    while (first < end) {
        const int middle = (first + end) / 2, before = (uintptr_t)adapter->pairs[middle].of < (uintptr_t)of;
        first = before ? middle + 1 : first;
        end = before ? end : middle;
    }
    return first;
}
static inline const tl_pair *tl_adapter_pair(const tl_adapter *adapter, const tl_matrix *of) {
    const int at = tl_adapter_place(adapter, of);
    return at < adapter->n_pairs && adapter->pairs[at].of == of ? &adapter->pairs[at] : NULL;
}

// ---- the KV cache --------------------------------------------------------------------------------------------------
#define TL_PAGE    64  // tokens a page holds
#define TL_SEGMENT 256 // positions attention adds up at a time (4 pages)

// Pages of 64 tokens in slabs that never move. A page holds page_layers layers: [layer][kv head] a block of keys,
// each [4][head_dim][16 tokens], then a block of values [64][v_stride]. Who owns a page, reuse, and which layers
// share one, is Python's (kvcache.py).
struct tl_cache {
    const tl_backend *backend;
    int type;                                        // format id of the numbers: 0 F32, 1 F16, 8 Q8_0
    int n_layers, n_kv_heads, head_dim;              // n_layers: of a page
    int v_stride;                                    // head_dim rounded up to 16
    size_t k_bytes, v_bytes;                         // of one layer's one head's keys, values
    size_t page_bytes;                               // of one page, all its layers
    int pages_per_slab, n_slabs, max_pages, n_pages; // n_pages: allocated so far
    void **slabs;
};
tl_status tl_cache_create(tl_cache **cache, const tl_model *model, int type, int max_pages, tl_message *message);
// At least n_pages exist from now on; adds whole slabs. n_pages <= max_pages.
tl_status tl_cache_grow(tl_cache *cache, int n_pages, tl_message *message);
// Zeroes a page: do it when a page is handed out, so that nothing of its last owner remains.
tl_status tl_cache_clear_page(tl_cache *cache, int page, tl_message *message);
// Copies the 16-token blocks that hold the first n_tokens tokens.
tl_status tl_cache_copy_page(tl_cache *cache, int to, int from, int n_tokens, tl_message *message);
// The page_bytes of a page, out to the caller's memory and back. What they mean depends on the cache's type, the device's
// backend and the build.
tl_status tl_cache_read_page(const tl_cache *cache, int page, void *out, tl_message *message);
tl_status tl_cache_write_page(tl_cache *cache, int page, const void *from, tl_message *message);
// The keys of one head of the layer at `place` in a page; the values follow k_bytes later.
uint8_t *tl_cache_head(const tl_cache *cache, int page, int place, int kv_head);
void tl_cache_free(tl_cache *cache);

// ---- states --------------------------------------------------------------------------------------------------------
// What a sequence keeps of layers whose state has a fixed size, whatever its length: slots, each of all such layers at
// one position. A slot is written by one call and does not change after it, so that sequences share it as they do full
// pages; who owns one is Python's (engine/states.py). The numbers are float32, each layer's
// [kernel - 1][channels] the last inputs of its convolution, then [v_heads][v_dim / 16][k_dim][16] the state.
typedef struct tl_states {
    const tl_backend *backend;
    size_t layer_floats, slot_bytes;
    int n_layers, max_slots, n_slots; // n_slots: allocated so far
    void **slots;
} tl_states;
tl_status tl_states_create(tl_states **states, const tl_model *model, int max_slots, tl_message *message);
// At least n_slots exist from now on, n_slots <= max_slots.
tl_status tl_states_grow(tl_states *states, int n_slots, tl_message *message);
// The slot_bytes of a slot, out to the caller's memory and back.
tl_status tl_states_read(const tl_states *states, int slot, void *out, tl_message *message);
tl_status tl_states_write(tl_states *states, int slot, const void *from, tl_message *message);
float *tl_states_at(const tl_states *states, int slot, int place); // what the layer at `place` keeps there
void tl_states_free(tl_states *states);

// After a call's token the state of its sequence goes into a slot.
typedef struct tl_save {
    int32_t token, slot;
} tl_save;

// ---- the one entry
// ----------------------------------------------------------------------------------------------------- n
// tokens, each with its position and its sequence. A sequence's tokens stand together, in order, without
// gaps; sequences ascend; of a bidirectional model a call takes them from their first token to their last. They
// enter as ids (tokens) or as activations (x), pass layers [first_layer, last_layer), and leave as logits for the
// chosen rows (last_layer == n_layers) and/or as activations.
typedef struct tl_candidate {
    int32_t token; // -1, with the logit -inf, where fewer may come
    float logit;
} tl_candidate;

// What a probability needs of a row: log softmax of x is x - largest - log(sum).
typedef struct tl_total {
    double sum;    // of e^(logit - largest) over all logits; not finite where one is no logit
    float largest; // of all logits
} tl_total;

typedef struct tl_batch {
    int n;
    const int32_t *tokens;    // [n], or NULL
    const float *x;           // [n, dim], where tokens is NULL
    const int32_t *positions; // [n]
    const int32_t *sequences; // [n] index into page_tables
    int n_sequences, max_pages;
    // [n_sequences, n_tables, max_pages] page ids. What lies wholly behind the windows of a table's layers may be any
    // page of the cache, what is past a sequence's last position any number.
    const int32_t *page_tables;
    int first_layer, last_layer;
    int n_rows;
    const int32_t *rows; // [n_rows] indices into the n tokens, for the logits
    float *logits;       // [n_rows, vocab_size], or NULL
    // > 0: so many of each row's largest instead, at most the backend's most_candidates and of 64 rows at most.
    int n_candidates;
    // [n_rows, vocab_size / 32, rounded up] a bit a token, lowest first: what may be a candidate; NULL: all.
    const uint32_t *allowed;
    tl_candidate *candidates; // [n_rows, n_candidates] the largest first, of equal ones the lower token
    tl_total *totals;         // [n_rows]
    float *activations;       // [n, dim], or NULL
    const int32_t *use_ends;  // [n_sequences] a sequence's adapters are those of uses before its end and from the end
                              // before it on, added one after another; NULL: none has any
    const tl_use *uses;
    // Where layers keep a state: [n_sequences] the slot of what is before a sequence's first token here (any number where
    // that is at position 0), and which states are kept, ascending by token, into slots that nobody reads from here.
    const tl_states *states;
    const int32_t *states_in;
    int n_saves;
    const tl_save *saves; // [n_saves]
    int threads;
    int (*stop)(void *); // asked before each layer; non-zero cancels; or NULL
    void *stop_data;
} tl_batch;

tl_status tl_batch_check(const tl_model *model, const tl_cache *cache, const tl_batch *batch, tl_message *message);
// The same of its states alone (states.c).
tl_status tl_states_check(const tl_model *model, const tl_batch *batch, tl_message *message);
// Calls on one model queue. Checks the batch, then runs it.
tl_status tl_forward(tl_model *model, tl_cache *cache, const tl_batch *batch, tl_message *message);

// ---- the seam ------------------------------------------------------------------------------------------------------
// A backend is these operations; each is one fused kernel on a GPU. Activations live in the run: x [n, dim],
// q and attended [n, n_heads * head_dim], hidden [n, ff_dim].
struct tl_run {
    const tl_model *model;
    const tl_cache *cache;
    const tl_batch *batch;
    float *x, *q, *attended, *hidden;
};

struct tl_backend {
    const char *name;
    int most_candidates;            // that a call may ask for instead of logits; 0: it has logits alone
    void *(*alloc)(size_t n_bytes); // zeroed
    void (*free)(void *block);
    tl_status (*clear)(void *to, size_t n_bytes);
    tl_status (*copy)(void *to, const void *from, size_t n_bytes); // within the backend's memory
    tl_status (*read)(void *to, const void *from, size_t n_bytes); // out of it; NULL: it is the process's, copy will do
    tl_status (*write)(void *to, const void *from, size_t n_bytes); // into it; likewise
    tl_status (*upload)(tl_matrix *matrix, const tl_source *source, int threads, tl_message *message);
    tl_status (*upload_floats)(float **to, const tl_source *source, int n, tl_message *message);
    tl_status (*unpack)(const tl_matrix *matrix, float *out);
    // A batch starts: buffers for n tokens, cos and sin of its positions. *run stays the model's.
    tl_status (*begin)(tl_run **run, tl_model *model, tl_cache *cache, const tl_batch *batch, tl_message *message);
    void (*embed)(tl_run *run);             // x = rows of the embedding * embedding_scale, or batch->x
    void (*qkv)(tl_run *run, int layer);    // norm, q, k, v, q/k norms, RoPE, k and v into pages
    void (*attend)(tl_run *run, int layer); // attended = attention(q, pages): window, cap, sinks
    // x += residual_scale * norm(in @ w.T); in Llama there is no such norm.
    void (*linear_add)(tl_run *run, const float *in, const tl_matrix *w, const tl_norm *norm);
    void (*norm_glu)(tl_run *run, int layer); // hidden = activation(gate) * up, or activation(up), of norm(x)
    void (*moe)(tl_run *run, int layer); // x += weight * expert's output, in ascending expert index; NULL: no experts
    // Logits of the chosen rows: norm(x) @ w.T, then logit_scale and logit_cap.
    void (*norm_linear)(tl_run *run, const tl_norm *norm, const tl_matrix *w);
    tl_status (*end)(tl_run *run, tl_message *message); // activations out
    void (*release)(tl_run *run);                       // frees what begin kept
    const tl_backend
        *adapted; // the same operations for a batch with adapters, whose pairs they add; NULL: none has them
    tl_status (*upload_pair)(tl_pair *pair, const tl_source *a, const tl_source *b,
                             tl_message *message); // of `adapted`
    // attended = the gated delta rule on norm(x), its state moved on; NULL: no such layers
    void (*delta_net)(tl_run *run, int layer);
};

extern const tl_backend tl_backend_cpu;

// Changes with the structs that a backend in another library reads: equal on both sides, or it must not be used.
static inline int tl_seam_abi(void) {
    const size_t sizes[] = {sizeof(tl_backend), sizeof(tl_run),    sizeof(tl_model),  sizeof(tl_layer),
                            sizeof(tl_config),  sizeof(tl_cache),  sizeof(tl_matrix), sizeof(tl_source),
                            sizeof(tl_batch),   sizeof(tl_format), sizeof(tl_pair),   sizeof(tl_adapter),
                            sizeof(tl_states),  sizeof(tl_save)};
    unsigned abi = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) abi = abi * 31 + (unsigned)sizes[i];
    return (int)(abi & 0x7fffffff);
}

// ---- threads -------------------------------------------------------------------------------------------------------
// Runs work(data, unit, thread) for every unit in [0, n_units) on up to `threads` threads (the caller is one)
// and returns when all are done. Thread i starts on the i-th share of the units and then takes from the tails
// of the others'. Only inside tl_pool_enter / tl_pool_leave, which queue callers and set the floating-point
// mode the numbers need.
void tl_parallel(int threads, int n_units, void (*work)(void *data, int unit, int thread), void *data);
void tl_pool_enter(void);
void tl_pool_leave(void);
#define TL_MAX_THREADS 256

// ---- instruction sets
// -------------------------------------------------------------------------------------------------- Names of
// those built in and usable on this machine, best first, ends with NULL.
const char *const *tl_isa_names(void);
const char *tl_isa_name(void);       // the one in use
int tl_isa_select(const char *name); // 0, or -1 if it is not usable here; waits for calls that are running
const char *tl_isa_refused(void);    // why one that the processor has is not usable, or NULL

// How fast `threads` threads of the pool read n_bytes (at least 1 MB) of memory, in 1e9 bytes a second over all
// repetitions: the limit of decoding. Takes the memory and writes it once before. TL_ARGUMENT, TL_MEMORY.
// (cpu/bandwidth.c)
tl_status tl_read_bandwidth(double *gb_s, size_t n_bytes, int threads, int repetitions, tl_message *message);

// How fast `threads` threads multiply and add with the instruction set in use, in 1e9 a second, on data in the first
// cache: int8 with int8 (what quantized weights take) or floats: the limit of reading a prompt. About 0.1 ms a
// repetition where 16 floats are a register. TL_ARGUMENT. (cpu/bandwidth.c)
tl_status tl_multiply_rate(double *gmac_s, int floats, int threads, int repetitions, tl_message *message);

// ---- sampling ------------------------------------------------------------------------------------------------------
// The steps, in this order: logit bias, bans, penalties, n-grams, bad words, DRY, temperature 0 stops here (greedy),
// top_k, typical_p, top_p, min_p, XTC, temperature, draw. Filters look at the distribution at temperature 1. (sample.c,
// repetition.c, docs/sampling.md)

// Sequences of tokens, one after another in ids: sequence i ends before ids[ends[i]], where the next one begins.
typedef struct tl_sequences {
    int n;
    const int32_t *ids;
    const int32_t *ends; // [n], ascending, as no sequence is empty
} tl_sequences;

typedef struct tl_sampling {
    float temperature;                         // 0: greedy
    int top_k;                                 // 0: off
    float top_p, min_p;                        // 1, 0: off
    float typical_p;                           // 1: off
    float repetition_penalty;                  // 1: off (arXiv 1909.05858)
    float presence_penalty, frequency_penalty; // 0: off
    int penalty_window;                        // how many of the last tokens these three look at; -1: all
    float xtc_probability, xtc_threshold;      // 0, more than 0.5: off
    int n_bias;
    const int32_t *bias_tokens; // [n_bias]
    const float *bias;          // [n_bias] added to the logits
    int n_banned;
    const int32_t *banned;    // [n_banned] tokens that must not come
    const uint32_t *allowed;  // [n / 32, rounded up] a bit a token, lowest first: what may come; NULL: all
    int no_repeat_ngram_size; // so many tokens in a row come once only; 0: off
    tl_sequences bad_words;   // that must not be completed
    float dry_multiplier;     // 0: off
    float dry_base;           // at least 1
    int dry_allowed_length, dry_penalty_last_n; // tokens; -1: the whole text
    tl_sequences breakers;                      // of DRY, ascending by their first token
} tl_sampling;

typedef struct tl_sampled {
    int32_t token;
    float logprob; // of the model's own distribution: log softmax of the logits as given
} tl_sampled;

// Chooses the next token. logits [n] are left as they are. history [n_history]: the tokens so far, or as many of the
// last as the steps look at.
// The draw depends on (seed, position) only. scratch: tl_sample_scratch(n, n_history) bytes, aligned to 4; what they
// hold does not matter. A logit of -inf is a masked token. NaN or +inf among the logits, or nothing but -inf,
// is TL_ARGUMENT. total: logits are only the largest of a row, or of what may come of it, in order, and this is the row's
// (tl_batch); NULL: they are all. The largest top_k + 1 (of greedy choice: 1) give the same as all, and one more for each
// that is banned, if nothing else changes logits.
size_t tl_sample_scratch(int n, int n_history);
tl_status tl_sample(tl_sampled *out, const float *logits, int n, const tl_sampling *sampling, const int32_t *history,
                    int n_history, uint64_t seed, uint64_t position, const tl_total *total, void *scratch,
                    tl_message *message);
// What tl_sample takes and gives of one row; status and message are its own.
typedef struct tl_choice {
    const float *logits;
    const int32_t *history;
    int n, n_history;
    tl_sampling sampling;
    uint64_t seed, position;
    tl_sampled sampled;
    tl_status status;
    tl_message message;
} tl_choice;
// Many rows at once, shared out to threads. scratch: for each thread what the row that needs most does, each_bytes.
void tl_sample_rows(tl_choice *choices, int n_choices, int threads, void *scratch, size_t each_bytes);
// The k most likely tokens of the model's own distribution, most likely first (ties: lower id first): tokens
// [k], logprobs [k], 1 <= k <= n. Errors and scratch as above, without a history.
tl_status tl_top_logprobs(int32_t *tokens, float *logprobs, int k, const float *logits, int n, const tl_total *total,
                          void *scratch, tl_message *message);
// Uniform in [0, 1) from a counter-based generator.
double tl_random(uint64_t seed, uint64_t position);
// log softmax at one token; NaN where tl_sample would refuse the logits.
float tl_logprob(const float *logits, int n, int32_t token);

#ifdef __cplusplus
}
#endif
#endif
