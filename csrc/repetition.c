// repetition.c: what the text so far makes of the next token's logits: penalties, n-grams that came before, bad
// words, DRY. Each reads the history and changes x of single tokens only, by + - * / in a written order, so the
// bits are the same everywhere. -inf is a token that must not come. Read sample.c, the caller, first.
#include "repetition.h"
#include <float.h>
#include <math.h>
#include <string.h>

static tl_status check_sequences(const tl_sequences *s, int n, const char *what, tl_message *message) {
    if (s->n < 0) return tl_fail(message, TL_ARGUMENT, "there are %d %s, expected 0 or more", s->n, what);
    for (int i = 0, start = 0; i < s->n; start = s->ends[i++]) {
        if (s->ends[i] <= start) return tl_fail(message, TL_ARGUMENT, "number %d of the %s is empty", i, what);
        for (int j = start; j < s->ends[i]; j++)
            if (s->ids[j] < 0 || s->ids[j] >= n)
                return tl_fail(message, TL_ARGUMENT, "the %s name token %d, expected 0 to %d", what, s->ids[j], n - 1);
    }
    return TL_OK;
}

tl_status tl_check_repetition(int n, const tl_sampling *s, tl_message *message) {
    if (!(s->repetition_penalty > 0 && s->repetition_penalty <= FLT_MAX))
        return tl_fail(message, TL_ARGUMENT, "repetition_penalty is %g, expected more than 0",
                       (double)s->repetition_penalty);
    if (!isfinite(s->presence_penalty) || !isfinite(s->frequency_penalty))
        return tl_fail(message, TL_ARGUMENT, "presence_penalty is %g and frequency_penalty %g, expected finite numbers",
                       (double)s->presence_penalty, (double)s->frequency_penalty);
    if (s->no_repeat_ngram_size < 0)
        return tl_fail(message, TL_ARGUMENT, "no_repeat_ngram_size is %d, expected 0 (off) or more",
                       s->no_repeat_ngram_size);
    if (!(s->dry_multiplier >= 0 && s->dry_multiplier <= FLT_MAX))
        return tl_fail(message, TL_ARGUMENT, "dry_multiplier is %g, expected 0 (off) or more",
                       (double)s->dry_multiplier);
    if (s->dry_multiplier > 0 && !(s->dry_base >= 1 && s->dry_base <= FLT_MAX))
        return tl_fail(message, TL_ARGUMENT, "dry_base is %g, expected 1 or more", (double)s->dry_base);
    if (s->dry_allowed_length < 0)
        return tl_fail(message, TL_ARGUMENT, "dry_allowed_length is %d, expected 0 or more", s->dry_allowed_length);
    tl_status status = check_sequences(&s->bad_words, n, "bad words", message);
    return status ? status : check_sequences(&s->breakers, n, "sequence breakers", message);
}

static int penalizes(const tl_sampling *s) {
    return s->penalty_window && (s->repetition_penalty != 1 || s->presence_penalty != 0 || s->frequency_penalty != 0);
}

static int dries(const tl_sampling *s) { return s->dry_multiplier > 0 && s->dry_penalty_last_n; }

int tl_minds_history(const tl_sampling *s) {
    return penalizes(s) || s->no_repeat_ngram_size || s->bad_words.n || dries(s);
}

// Of n tokens, how many a window holds.
static int in_window(int window, int n) { return window < 0 || window > n ? n : window; }

static int same(const int32_t *a, const int32_t *b, int n) { return !memcmp(a, b, (size_t)n * sizeof *a); }

// x / r above 0 and x * r below (arXiv 1909.05858, its extension to negative logits as commonly done), then
// x - presence - count * frequency.
static void penalize(float *x, const tl_sampling *s, const int32_t *history, int n_history, int32_t *counts) {
    for (int i = 0; i < n_history; i++) counts[history[i]] = 0;
    for (int i = 0; i < n_history; i++) counts[history[i]]++;
    for (int i = 0; i < n_history; i++) {
        float *logit = &x[history[i]];
        int32_t count = counts[history[i]];
        if (!count) continue;
        counts[history[i]] = 0;
        *logit = *logit > 0 ? *logit / s->repetition_penalty : *logit * s->repetition_penalty;
        *logit -= s->presence_penalty + (float)count * s->frequency_penalty;
    }
}

// Bans what would complete `size` tokens that are in the text already.
static void ban_ngrams(float *x, int size, const int32_t *history, int n_history) {
    for (int i = 0; i <= n_history - size; i++)
        if (same(history + i, history + n_history - (size - 1), size - 1)) x[history[i + size - 1]] = -INFINITY;
}

static void ban_words(float *x, const tl_sequences *words, const int32_t *history, int n_history) {
    for (int i = 0, start = 0; i < words->n; start = words->ends[i++]) {
        int before = words->ends[i] - start - 1; // tokens of the word before its last
        if (!before || (before <= n_history && same(words->ids + start, history + n_history - before, before)))
            x[words->ids[start + before]] = -INFINITY;
    }
}

// ---- DRY ----------------------------------------------------------------------------------------------
// "Don't repeat yourself" of p-e-w (text-generation-webui, pull request 5677): a token that would lengthen a
// repetition, of which there are m tokens, loses multiplier * base^(m - allowed).

// The first breaker that begins with the token; of none, where it would be.
static int first_breaker(const tl_sequences *b, int32_t token) {
    int low = 0, high = b->n;
    while (low < high) {
        int middle = low + (high - low) / 2;
        if (b->ids[middle ? b->ends[middle - 1] : 0] < token)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// The most tokens of a breaker that begins at the text's end - n; 0: none does.
static int longest_breaker(const tl_sequences *b, const int32_t *end, int n) {
    int longest = 0;
    for (int i = first_breaker(b, end[-n]); i < b->n; i++) {
        int start = i ? b->ends[i - 1] : 0, length = b->ends[i] - start;
        if (b->ids[start] != end[-n]) break;
        if (length > longest && length <= n && same(b->ids + start, end - n, length)) longest = length;
    }
    return longest;
}

// How many tokens there are after the last breaker, of n.
static int since_breaker(const tl_sequences *b, const int32_t *history, int n) {
    for (int back = 1; back <= n; back++) {
        int length = longest_breaker(b, history + n, back);
        if (length) return back - length;
    }
    return n;
}

static int is_breaker(const tl_sequences *b, int32_t token) { return longest_breaker(b, &token + 1, 1) == 1; }

// matches[k], k of 1 to n - 1: how many tokens before the k last are the same as the last of all, the Z-function of
// the text read backwards (Gusfield, Algorithms on Strings, 1.4). Looks at each token once or twice.
static void match_ends(int32_t *matches, const int32_t *history, int n) {
    const int32_t *last = history + n - 1;
    int left = 0, right = 0; // the match that reaches furthest
    for (int k = 1; k < n; k++) {
        int length = 0;
        if (k < right) length = matches[k - left] < right - k ? matches[k - left] : right - k;
        while (k + length < n && last[-length] == last[-k - length]) length++;
        if (k + length > right) left = k, right = k + length;
        matches[k] = length;
    }
}

// base^n by squaring; as large as a float gets at most.
static double power(double base, int n) {
    double result = 1;
    for (; n; n >>= 1, base *= base)
        if (n & 1) result *= base;
    return result < (double)FLT_MAX ? result : (double)FLT_MAX;
}

static void dry(float *x, const tl_sampling *s, const int32_t *history, int n, int32_t *longest, int32_t *matches) {
    int most = since_breaker(&s->breakers, history, n);
    if (n <= s->dry_allowed_length || most < s->dry_allowed_length) return;
    match_ends(matches, history, n);
    for (int k = 1; k < n; k++) longest[history[n - k]] = -1;
    for (int k = 1; k < n; k++) {
        int length = matches[k] < most ? matches[k] : most;
        if (length > longest[history[n - k]]) longest[history[n - k]] = length;
    }
    for (int k = 1; k < n; k++) {
        int32_t token = history[n - k];
        int length = longest[token];
        longest[token] = -1; // once
        if (length < s->dry_allowed_length || is_breaker(&s->breakers, token)) continue;
        double penalty = (double)s->dry_multiplier * power((double)s->dry_base, length - s->dry_allowed_length);
        x[token] -= (float)(penalty < (double)FLT_MAX ? penalty : (double)FLT_MAX);
    }
}

void tl_mind_history(float *x, const tl_sampling *s, const int32_t *history, int n_history, int32_t *of_tokens,
                     int32_t *matches) {
    if (n_history && penalizes(s)) {
        int last = in_window(s->penalty_window, n_history);
        penalize(x, s, history + n_history - last, last, of_tokens);
    }
    if (s->no_repeat_ngram_size) ban_ngrams(x, s->no_repeat_ngram_size, history, n_history);
    if (s->bad_words.n) ban_words(x, &s->bad_words, history, n_history);
    if (n_history && dries(s)) {
        int last = in_window(s->dry_penalty_last_n, n_history);
        dry(x, s, history + n_history - last, last, of_tokens, matches);
    }
}
