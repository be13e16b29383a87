// sample.c: from a row of logits to the next token, and the random numbers for it. What the text so far does to
// the logits is repetition.c; docs/sampling.md describes the steps to users, src/tinyllm/engine/sampling.py is the
// caller.
//
// The same inputs give the same token on every machine: nothing here but + - * / of IEEE numbers in a written
// order, with exp and log of our own. Every filter after typical_p keeps a prefix of the candidates in
// descending order, so the work is: find a threshold that no survivor can be below, gather what reaches it,
// sort only that, cut the prefix.
#include <float.h>
#include <math.h>
#include <string.h>
#include "repetition.h"

#define LANES 16
#define BLOCK 64 // logits that share a maximum in workspace.block_max
#define PIECE 1024

// Something to be sorted by ascending key; ties keep their order.
typedef struct ranked {
    uint32_t key;
    int32_t id;
} ranked;

typedef struct workspace {
    float *logits;        // [n] after bias, bans and penalties
    float *block_max;     // [n / 64, rounded up]
    float *weights;       // [n] of the candidates
    int32_t *ids;         // [n] of the candidates; before that, repetition.c's
    ranked *list, *spare; // [n] each
    int32_t *matches;     // [n_history]
} workspace;

static size_t block_count(int n) { return ((size_t)n + BLOCK - 1) / BLOCK; }

size_t tl_sample_scratch(int n, int n_history) {
    if (n <= 0) return 0;
    size_t of_history = n_history > 0 ? (size_t)n_history * sizeof(int32_t) : 0;
    return block_count(n) * sizeof(float) + (size_t)n * (2 * sizeof(float) + sizeof(int32_t) + 2 * sizeof(ranked)) +
           of_history;
}

static workspace workspace_in(void *scratch, int n) {
    workspace w;
    w.logits = scratch;
    w.block_max = w.logits + n;
    w.weights = w.block_max + block_count(n);
    w.ids = (int32_t *)(w.weights + n);
    w.list = (ranked *)(w.ids + n);
    w.spare = w.list + n;
    w.matches = (int32_t *)(w.spare + n);
    return w;
}

// ---- numbers ------------------------------------------------------------------------------------------

// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): key = seed,
// counter = position. 128 bits, of which the draw takes the first 64 and XTC the others.
static void philox(uint32_t c[4], uint64_t seed, uint64_t position) {
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    c[0] = (uint32_t)position, c[1] = (uint32_t)(position >> 32), c[2] = 0, c[3] = 0;
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ key[0];
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ key[1];
        c[1] = (uint32_t)b;
        c[3] = (uint32_t)a;
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
}

static double uniform(uint32_t low, uint32_t high) { return (double)(((uint64_t)high << 32 | low) >> 11) * 0x1p-53; }

double tl_random(uint64_t seed, uint64_t position) {
    uint32_t c[4];
    philox(c, seed, position);
    return uniform(c[0], c[1]);
}

// Where exponents stop: e^-87 next to the 1 of the maximum is nothing, even in double, and no number is
// subnormal.
static float exponent(float x) { return x < -87.0f ? -87.0f : x; }

// e^x for -87 <= x <= 0, within 2 units in the last place; exactly 1 at 0. x = k ln 2 + r, |r| <= ln 2 / 2,
// and the Taylor polynomial of e^r to r^7 (the next term is under 2^-27). Without branches, for compilers to
// vectorize.
static float exp_of(float x) {
    float shifted = x * 0x1.715476p0f + 0x1.8p23f; // the low bits now hold k, rounded to nearest
    float k = shifted - 0x1.8p23f;
    float r = (x - k * 0x1.63p-1f) + k * 0x1.bd0106p-13f; // ln 2 is the difference of the two; k * the first is exact
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    float power; // 2^k
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

// The natural logarithm of a normal x > 0: x = m 2^k, m within sqrt(2) of 1, log m = 2 atanh((m - 1) / (m +
// 1)), whose argument is at most 0.1716: terms past its 19th power are under 2^-57.
static double log_positive(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int k = (int)(bits >> 52) - 1023;
    bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
    double m;
    memcpy(&m, &bits, sizeof m);
    if (m > 0x1.6a09e667f3bcdp0) m *= 0.5, k++;
    double s = (m - 1) / (m + 1), square = s * s, sum = 0;
    for (int power = 19; power >= 1; power -= 2) sum = sum * square + 1.0 / power;
    return k * 0x1.62e42fefa39efp-1 + 2 * s * sum;
}

// The sum of e^(x - max): 16 strided partial sums, float within a piece, double across pieces; then a tree.
static double exp_sum(const float *x, int n, float max) {
    double total[LANES] = {0};
    for (int start = 0; start < n; start += PIECE) {
        int length = n - start < PIECE ? n - start : PIECE;
        float e[PIECE], part[LANES] = {0};
        for (int i = 0; i < length; i++) e[i] = exponent(x[start + i] - max);
        for (int i = 0; i < length; i++) e[i] = exp_of(e[i]);
        for (int i = length; i % LANES; i++) e[i] = 0;
        for (int i = 0; i < length; i += LANES)
            for (int j = 0; j < LANES; j++) part[j] += e[i + j];
        for (int j = 0; j < LANES; j++) total[j] += (double)part[j];
    }
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) total[j] += total[j + half];
    return total[0];
}

// NaN or +inf; -inf is a masked token.
static int not_a_logit(float x) { return !(x <= FLT_MAX); }

static float block_maximum(const float *x, int length, int *bad) {
    float max[LANES];
    int wrong = 0;
    for (int j = 0; j < LANES; j++) max[j] = -INFINITY;
    for (int i = 0; i < length / LANES * LANES; i += LANES)
        for (int j = 0; j < LANES; j++) max[j] = x[i + j] > max[j] ? x[i + j] : max[j];
    for (int i = length / LANES * LANES; i < length; i++) max[0] = x[i] > max[0] ? x[i] : max[0];
    for (int i = 0; i < length; i++) wrong |= not_a_logit(x[i]);
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) max[j] = max[j + half] > max[j] ? max[j + half] : max[j];
    *bad |= wrong;
    return max[0];
}

// The maximum, the maxima of blocks unless block_max is NULL, and whether anything is no logit.
static float scan(const float *x, int n, float *block_max, int *bad) {
    float max = -INFINITY;
    *bad = 0;
    for (int i = 0; i < n; i += BLOCK) {
        float m = block_maximum(x + i, n - i < BLOCK ? n - i : BLOCK, bad);
        if (block_max) block_max[i / BLOCK] = m;
        max = m > max ? m : max;
    }
    return max;
}

// scan, with the sentence for logits that nothing can be chosen from. `when` says which logits these are.
static tl_status scan_checked(float *max, const float *x, int n, float *block_max, const char *when,
                              tl_message *message) {
    int bad;
    *max = scan(x, n, block_max, &bad);
    if (bad) {
        int i = 0;
        while (!not_a_logit(x[i])) i++;
        return tl_fail(message, TL_ARGUMENT, "the logit of token %d is %s%s: logits must be numbers or -inf", i,
                       x[i] > 0 ? "+inf" : "NaN", when);
    }
    if (*max == -INFINITY)
        return tl_fail(message, TL_ARGUMENT, "all %d logits are -inf%s: leave at least one token to choose", n, when);
    return TL_OK;
}

// ---- order --------------------------------------------------------------------------------------------

// Ascends as x descends; adding 0 makes -0 and 0 the same.
static uint32_t descending_key(float x) {
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

// A stable radix sort by key, 11 bits a pass. Returns which of the two holds the result.
static ranked *sort(ranked *list, ranked *spare, int n) {
    for (int shift = 0; shift < 32; shift += 11) {
        uint32_t start[2048] = {0}, sum = 0;
        for (int i = 0; i < n; i++) start[list[i].key >> shift & 2047]++;
        for (int digit = 0; digit < 2048; digit++) {
            uint32_t count = start[digit];
            start[digit] = sum;
            sum += count;
        }
        for (int i = 0; i < n; i++) spare[start[list[i].key >> shift & 2047]++] = list[i];
        ranked *sorted = spare;
        spare = list;
        list = sorted;
    }
    return list;
}

// A value that the k largest logits reach: the k-th of the blocks' maxima, as each is a logit of its own.
static float kth_threshold(const workspace *w, int n, int k) {
    int n_blocks = (int)block_count(n);
    if (k > n_blocks) return -INFINITY;
    for (int i = 0; i < n_blocks; i++) w->list[i] = (ranked){descending_key(w->block_max[i]), i};
    return w->block_max[sort(w->list, w->spare, n_blocks)[k - 1].id];
}

// The ids of logits >= threshold, largest first, lower ids first among equals, into w->ids. Returns how many.
static int gather(const workspace *w, const float *x, int n, float threshold) {
    int count = 0;
    for (int start = 0; start < n; start += BLOCK) {
        if (w->block_max[start / BLOCK] < threshold) continue;
        for (int i = start; i < n && i < start + BLOCK; i++)
            if (x[i] >= threshold) w->list[count++] = (ranked){descending_key(x[i]), i};
    }
    const ranked *sorted = sort(w->list, w->spare, count);
    for (int i = 0; i < count; i++) w->ids[i] = sorted[i].id;
    return count;
}

// ---- the steps ----------------------------------------------------------------------------------------

static tl_status check(int n, const tl_sampling *s, const int32_t *history, int n_history, tl_message *message) {
    if (n <= 0) return tl_fail(message, TL_ARGUMENT, "there are %d logits, expected at least 1", n);
    if (!(s->temperature >= 0 && s->temperature <= FLT_MAX))
        return tl_fail(message, TL_ARGUMENT, "temperature is %g, expected 0 or more", (double)s->temperature);
    if (s->top_k < 0) return tl_fail(message, TL_ARGUMENT, "top_k is %d, expected 0 (off) or more", s->top_k);
    if (!(s->top_p >= 0 && s->top_p <= 1))
        return tl_fail(message, TL_ARGUMENT, "top_p is %g, expected 0 to 1", (double)s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return tl_fail(message, TL_ARGUMENT, "min_p is %g, expected 0 to 1", (double)s->min_p);
    if (!(s->typical_p >= 0 && s->typical_p <= 1))
        return tl_fail(message, TL_ARGUMENT, "typical_p is %g, expected 0 to 1", (double)s->typical_p);
    if (!(s->xtc_probability >= 0 && s->xtc_probability <= 1))
        return tl_fail(message, TL_ARGUMENT, "xtc_probability is %g, expected 0 to 1", (double)s->xtc_probability);
    if (!(s->xtc_threshold >= 0 && s->xtc_threshold <= 1))
        return tl_fail(message, TL_ARGUMENT, "xtc_threshold is %g, expected 0 to 1", (double)s->xtc_threshold);
    if (s->n_bias < 0 || s->n_banned < 0 || n_history < 0)
        return tl_fail(message, TL_ARGUMENT,
                       "there are %d biases, %d banned tokens and %d tokens of history, expected 0 or more", s->n_bias,
                       s->n_banned, n_history);
    for (int i = 0; i < s->n_bias; i++)
        if (s->bias_tokens[i] < 0 || s->bias_tokens[i] >= n)
            return tl_fail(message, TL_ARGUMENT, "the logit bias names token %d, expected 0 to %d", s->bias_tokens[i],
                           n - 1);
    for (int i = 0; i < s->n_banned; i++)
        if (s->banned[i] < 0 || s->banned[i] >= n)
            return tl_fail(message, TL_ARGUMENT, "the banned tokens name %d, expected 0 to %d", s->banned[i], n - 1);
    for (int i = 0; i < n_history; i++)
        if (history[i] < 0 || history[i] >= n)
            return tl_fail(message, TL_ARGUMENT, "token %d of the history is %d, expected 0 to %d", i, history[i],
                           n - 1);
    return tl_check_repetition(n, s, message);
}

static tl_status check_total(const tl_total *total, tl_message *message) {
    if (!total || isfinite(total->sum)) return TL_OK;
    return tl_fail(message, TL_ARGUMENT, "among the logits is NaN or +inf, or all are -inf: leave a token to choose");
}

// Leaves the logits whose bits are set, 32 at a time: most words of a mask are all ones.
static void keep_allowed(float *x, int n, const uint32_t *allowed) {
    for (int start = 0; start < n; start += 32) {
        const uint32_t bits = allowed[start / 32];
        if (bits == UINT32_MAX) continue;
        const int length = n - start < 32 ? n - start : 32;
        for (int i = 0; i < length; i++)
            if (!(bits >> i & 1)) x[start + i] = -INFINITY;
    }
}

// Logit bias, then bans and the mask, then what the text so far asks for.
static void adjust(const workspace *w, int n, const tl_sampling *s, const int32_t *history, int n_history) {
    for (int i = 0; i < s->n_bias; i++) w->logits[s->bias_tokens[i]] += s->bias[i];
    for (int i = 0; i < s->n_banned; i++) w->logits[s->banned[i]] = -INFINITY;
    if (s->allowed) keep_allowed(w->logits, n, s->allowed);
    tl_mind_history(w->logits, s, history, n_history, w->ids, w->matches);
}

static double sum(const float *weights, int count) {
    double total = 0;
    for (int i = 0; i < count; i++) total += (double)weights[i];
    return total;
}

// Locally typical sampling (arXiv 2202.00666): of the candidates, those whose surprise -log p is nearest the
// entropy, as few as hold the mass typical_p. Keeps them in their order; returns how many.
static int keep_typical(const workspace *w, const float *x, int count, double total, double typical_p) {
    double log_total = log_positive(total), entropy = 0, mass = 0;
    float max = x[w->ids[0]];
    for (int i = 0; i < count; i++)
        entropy += (double)w->weights[i] / total * (log_total - ((double)x[w->ids[i]] - (double)max));
    for (int i = 0; i < count; i++) {
        double distance = log_total - ((double)x[w->ids[i]] - (double)max) - entropy;
        w->list[i] = (ranked){descending_key(-(float)(distance < 0 ? -distance : distance)), i};
    }
    ranked *nearest = sort(w->list, w->spare, count);
    int kept = 0;
    do mass += (double)w->weights[nearest[kept++].id];
    while (kept < count && mass < typical_p * total);
    for (int i = 0; i < kept; i++) nearest[i].key = (uint32_t)nearest[i].id;
    nearest = sort(nearest, nearest == w->list ? w->spare : w->list, kept);
    for (int i = 0; i < kept; i++) {
        w->ids[i] = w->ids[nearest[i].id];
        w->weights[i] = w->weights[nearest[i].id];
    }
    return kept;
}

// Nucleus sampling (arXiv 1904.09751): the fewest most likely candidates that hold the share top_p of all.
static int keep_top_p(const float *weights, int count, double total, double top_p) {
    double mass = 0;
    for (int i = 0; i < count; i++) {
        mass += (double)weights[i];
        if (mass >= top_p * total) return i + 1;
    }
    return count;
}

// Min-p sampling (arXiv 2407.01082): the candidates at least min_p times as likely as the most likely one.
static int keep_min_p(const float *weights, int count, float min_p) {
    int kept = 1;
    while (kept < count && (double)weights[kept] >= (double)min_p * (double)weights[0]) kept++;
    return kept;
}

// Exclude top choices (XTC of p-e-w, text-generation-webui, pull request 6335): of the candidates with at least
// the probability threshold all but the least likely go. Returns how many; they come first.
static int n_excluded(const float *weights, int count, double threshold) {
    double least = threshold * sum(weights, count);
    int n = 0;
    while (n + 1 < count && (double)weights[n + 1] >= least) n++;
    return n;
}

// No token below this survives min_p or, as the tokens under (1 - top_p) / n hold less than 1 - top_p
// together, top_p. Half of each, as the comparisons that decide are rounded.
static float mass_threshold(const tl_sampling *s, int n, float max, double total) {
    double share = 0, rest = (1 - (double)s->top_p) * total / n;
    if (s->typical_p < 1) return -FLT_MAX;
    if (s->min_p > 0) share = (double)s->min_p;
    if (s->top_p < 1 && rest > share) share = rest;
    return share > 0 ? (float)((double)max + log_positive(share / 2)) : -FLT_MAX;
}

// top_k, typical_p, top_p, min_p, XTC, temperature, draw. x [n] has its maxima in w->block_max.
static int32_t draw(const workspace *w, const float *x, int n, float max, const tl_sampling *s, uint64_t seed,
                    uint64_t position) {
    uint32_t random[4];
    philox(random, seed, position);
    int by_rank = s->top_k > 0 && s->top_k < n;
    double total = by_rank ? 0 : exp_sum(x, n, max);
    float threshold = by_rank ? kth_threshold(w, n, s->top_k) : mass_threshold(s, n, max, total);
    int count = gather(w, x, n, threshold > -FLT_MAX ? threshold : -FLT_MAX);
    if (by_rank && count > s->top_k) count = s->top_k;
    for (int i = 0; i < count; i++) w->weights[i] = exp_of(exponent(x[w->ids[i]] - max));
    if (by_rank) total = sum(w->weights, count);

    if (s->typical_p < 1) {
        count = keep_typical(w, x, count, total, (double)s->typical_p);
        total = sum(w->weights, count);
    }
    if (s->top_p < 1) count = keep_top_p(w->weights, count, total, (double)s->top_p);
    if (s->min_p > 0) count = keep_min_p(w->weights, count, s->min_p);

    const int32_t *ids = w->ids;
    if (s->xtc_threshold <= 0.5f && uniform(random[2], random[3]) < (double)s->xtc_probability) {
        int n_gone = n_excluded(w->weights, count, (double)s->xtc_threshold);
        ids += n_gone, count -= n_gone;
    }

    float most = x[ids[0]];
    for (int i = 0; i < count; i++) w->weights[i] = exp_of(exponent((x[ids[i]] - most) / s->temperature));
    double target = uniform(random[0], random[1]) * sum(w->weights, count), reached = 0;
    int last = 0; // the end, where rounding leaves the target unreached
    for (int i = 0; i < count; i++) {
        double before = reached;
        reached += (double)w->weights[i];
        if (reached > target) return ids[i];
        if (reached > before) last = i;
    }
    return ids[last];
}

static int32_t first_of(const float *x, const float *block_max, float value) {
    int block = 0;
    while (block_max[block] != value) block++;
    int32_t i = block * BLOCK;
    while (x[i] != value) i++;
    return i;
}

tl_status tl_sample(tl_sampled *out, const float *logits, int n, const tl_sampling *sampling, const int32_t *history,
                    int n_history, uint64_t seed, uint64_t position, const tl_total *total, void *scratch,
                    tl_message *message) {
    tl_status status = check(n, sampling, history, n_history, message);
    if (!status) status = check_total(total, message);
    if (status) return status;
    workspace w = workspace_in(scratch, n);
    const float *x = logits;
    float max, own_max;
    status = scan_checked(&own_max, logits, n, w.block_max, "", message);
    if (status) return status;
    max = own_max;
    if (total) own_max = total->largest;
    if (sampling->n_bias || sampling->n_banned || sampling->allowed || tl_minds_history(sampling)) {
        memcpy(w.logits, logits, (size_t)n * sizeof(float));
        adjust(&w, n, sampling, history, n_history);
        x = w.logits;
        status = scan_checked(&max, x, n, w.block_max, " after logit bias, bans and penalties", message);
        if (status) return status;
    }
    out->token =
        sampling->temperature > 0 ? draw(&w, x, n, max, sampling, seed, position) : first_of(x, w.block_max, max);
    out->logprob = (float)((double)logits[out->token] - (double)own_max -
                           log_positive(total ? total->sum : exp_sum(logits, n, own_max)));
    return TL_OK;
}

typedef struct rows_job {
    tl_choice *choices;
    char *scratch;
    size_t each_bytes;
} rows_job;

static void sample_row(void *data, int unit, int thread) {
    const rows_job *job = data;
    tl_choice *c = &job->choices[unit];
    c->status = tl_sample(&c->sampled, c->logits, c->n, &c->sampling, c->history, c->n_history, c->seed, c->position,
                          NULL, job->scratch + (size_t)thread * job->each_bytes, &c->message);
}

void tl_sample_rows(tl_choice *choices, int n_choices, int threads, void *scratch, size_t each_bytes) {
    rows_job job = {choices, scratch, each_bytes};
    tl_pool_enter();
    tl_parallel(threads, n_choices, sample_row, &job);
    tl_pool_leave();
}

tl_status tl_top_logprobs(int32_t *tokens, float *logprobs, int k, const float *logits, int n, const tl_total *total,
                          void *scratch, tl_message *message) {
    float max;
    if (n <= 0) return tl_fail(message, TL_ARGUMENT, "there are %d logits, expected at least 1", n);
    if (k < 1 || k > n) return tl_fail(message, TL_ARGUMENT, "top_logprobs is %d, expected 1 to %d", k, n);
    workspace w = workspace_in(scratch, n);
    tl_status status = check_total(total, message);
    if (!status) status = scan_checked(&max, logits, n, w.block_max, "", message);
    if (status) return status;
    if (total) max = total->largest;
    double log_total = log_positive(total ? total->sum : exp_sum(logits, n, max));
    gather(&w, logits, n, kth_threshold(&w, n, k));
    for (int i = 0; i < k; i++) {
        tokens[i] = w.ids[i];
        logprobs[i] = (float)((double)logits[w.ids[i]] - (double)max - log_total);
    }
    return TL_OK;
}

float tl_logprob(const float *logits, int n, int32_t token) {
    int bad;
    float max = scan(logits, n, NULL, &bad);
    if (bad || max == -INFINITY || token < 0 || token >= n) return NAN;
    return (float)((double)logits[token] - (double)max - log_positive(exp_sum(logits, n, max)));
}
