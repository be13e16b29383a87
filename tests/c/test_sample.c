// Bounds and corners of sample.c and repetition.c, for the sanitizers: every call gets scratch of exactly
// tl_sample_scratch(n, n_history) bytes. What the numbers mean is tested in tests/test_sampling.py. Exits with 1
// and a line for the first failure.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "tinyllm.h"

#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                                             \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static const tl_sampling OFF = {
    .temperature = 1, .top_p = 1, .typical_p = 1, .repetition_penalty = 1, .penalty_window = -1, .dry_base = 2};

// Allocates everything to size, so that a byte too far is seen.
static tl_status sample(tl_sampled *out, const float *logits, int n, tl_sampling s, const int32_t *history,
                        int n_history, uint64_t position, tl_message *message) {
    void *scratch = malloc(tl_sample_scratch(n, n_history));
    float *own = malloc((size_t)n * sizeof(float));
    memcpy(own, logits, (size_t)n * sizeof(float));
    int32_t *before = history ? malloc((size_t)n_history * sizeof(int32_t)) : NULL;
    if (history) memcpy(before, history, (size_t)n_history * sizeof(int32_t));
    tl_status status = tl_sample(out, own, n, &s, before, n_history, 1, position, NULL, scratch, message);
    EXPECT(!memcmp(own, logits, (size_t)n * sizeof(float)));
    free(own);
    free(before);
    free(scratch);
    return status;
}

static void every_size(void) {
    static const int sizes[] = {1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 1023, 1024, 1025, 5000};
    static const int ranks[] = {0, 1, 2, 16, 64, 79, 80, 1000, 2000000000};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        int n = sizes[i];
        float *logits = malloc((size_t)n * sizeof(float));
        for (int j = 0; j < n; j++) logits[j] = (float)(10 * tl_random(7, (uint64_t)j) - 5);
        int32_t history[3] = {0, n - 1, n - 1}, bias_tokens[2] = {n - 1, 0};
        float bias[2] = {1, -INFINITY};
        for (size_t r = 0; r < sizeof ranks / sizeof *ranks; r++) {
            for (int variant = 0; variant < 8; variant++) {
                tl_sampling s = OFF;
                tl_sampled out;
                tl_message message;
                s.top_k = ranks[r];
                if (variant == 0) s.temperature = 0;
                if (variant == 2) s.top_p = 0.9f, s.min_p = 0.05f;
                if (variant == 3) s.typical_p = 0.5f;
                if (variant == 4) s.repetition_penalty = 1.5f, s.frequency_penalty = 0.5f;
                if (variant == 5) s.n_bias = n > 1 ? 2 : 1, s.bias_tokens = bias_tokens, s.bias = bias;
                if (variant == 6) s.n_banned = n > 1, s.banned = bias_tokens;
                if (variant == 7) s.xtc_probability = 1, s.xtc_threshold = 0.001f * (float)i;
                EXPECT(sample(&out, logits, n, s, history, 3, 3, &message) == TL_OK);
                EXPECT(out.token >= 0 && out.token < n && out.logprob <= 0);
                EXPECT(out.logprob == tl_logprob(logits, n, out.token));
                EXPECT(!(variant == 5 && n > 1 && out.token == 0));
                EXPECT(!(variant == 6 && n > 1 && out.token == n - 1));
                int32_t first = out.token;
                EXPECT(sample(&out, logits, n, s, history, 3, 3, &message) == TL_OK && out.token == first);
            }
        }
        for (int k = 1; k <= n; k = k < n && 3 * k > n ? n : 3 * k) {
            int32_t *tokens = malloc((size_t)k * sizeof(int32_t));
            float *logprobs = malloc((size_t)k * sizeof(float));
            void *scratch = malloc(tl_sample_scratch(n, 0));
            tl_message message;
            EXPECT(tl_top_logprobs(tokens, logprobs, k, logits, n, NULL, scratch, &message) == TL_OK);
            for (int j = 1; j < k; j++) EXPECT(logprobs[j] <= logprobs[j - 1] && tokens[j] != tokens[j - 1]);
            free(tokens);
            free(logprobs);
            free(scratch);
        }
        free(logits);
    }
}

// The text so far, of every length, with few tokens so that much of it comes again.
static void histories(void) {
    static const int32_t words[] = {1, 2, 1, 0, 3, 3, 3, 3, 2}, ends[] = {1, 3, 8, 9}, some_ends[] = {2, 7};
    float logits[4] = {0.5f, 0.25f, 1, 0};
    int32_t history[80];
    for (int n = 0; n <= 80; n++) {
        for (int i = 0; i < n; i++) history[i] = (int32_t)(4 * tl_random(5, (uint64_t)i) * tl_random(6, (uint64_t)i));
        for (int variant = 0; variant < 60; variant++) {
            static const int windows[] = {-1, 0, 1, 7, 100}, sizes[] = {0, 3, 2147483647};
            tl_sampling s = OFF;
            tl_sampled out;
            tl_message message;
            s.penalty_window = s.dry_penalty_last_n = windows[variant % 5];
            s.no_repeat_ngram_size = sizes[variant % 3];
            s.frequency_penalty = 0.5f;
            s.dry_multiplier = variant % 4 ? 1e30f : 0.5f;
            s.dry_base = variant % 4 > 1 ? 1e30f : 1;
            s.dry_allowed_length = variant % 7;
            if (variant % 2) s.bad_words = (tl_sequences){2, words + 1, some_ends};
            if (variant > 30) s.breakers = (tl_sequences){variant % 4 + 1, words, ends};
            tl_status status = sample(&out, logits, 4, s, history, n, 3, &message);
            EXPECT(status == TL_OK || strstr(message.text, "all 4 logits are -inf after logit bias, bans"));
            EXPECT(status || (out.token >= 0 && out.token < 4));
        }
    }
    tl_sampling s = OFF;
    tl_sampled out;
    tl_message message;
    s.temperature = 0, s.no_repeat_ngram_size = 1, s.bad_words = (tl_sequences){1, words, ends};
    EXPECT(sample(&out, logits, 4, s, NULL, 0, 3, &message) == TL_OK && out.token == 2);
    s.bad_words.ids = words + 1;
    EXPECT(sample(&out, logits, 4, s, NULL, 0, 3, &message) == TL_OK && out.token == 0);
}

static void extremes(void) {
    static const float rows[][4] = {
        {3.4e38f, -3.4e38f, 0, -INFINITY},
        {1e-45f, -1e-45f, 0, -0.0f},
        {-INFINITY, -INFINITY, -INFINITY, -3.4e38f},
        {0, 0, 0, 0},
        {-3.4e38f, 3.4e38f, 3.4e38f, 1},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        for (int variant = 0; variant < 4; variant++) {
            tl_sampling s = OFF;
            tl_sampled out;
            tl_message message;
            if (variant == 1) s.temperature = 1e-45f;
            if (variant == 2) s.typical_p = 0.5f, s.top_p = 0, s.min_p = 1;
            if (variant == 3) s.temperature = 3.4e38f, s.min_p = 1e-45f, s.top_p = 0.99999994f;
            for (uint64_t position = 0; position < 20; position++) {
                EXPECT(sample(&out, rows[i], 4, s, NULL, 0, position, &message) == TL_OK);
                EXPECT(isfinite(rows[i][out.token]));
            }
        }
    }
}

static void errors(void) {
    float logits[4] = {0, 1, 2, 3}, nothing[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    float nan[4] = {0, NAN, 0, 0}, inf[4] = {0, 0, 0, INFINITY};
    int32_t outside[2] = {1, 4}, below[1] = {-1}, tokens[5], two[1] = {2}, twice[2] = {1, 1};
    float bias[2] = {0, 0}, logprobs[5];
    tl_sampled out;
    tl_message message;
    void *scratch = malloc(tl_sample_scratch(4, 0));
#define REFUSED(field, value)                                                                                          \
    do {                                                                                                               \
        tl_sampling s = OFF;                                                                                           \
        s.field = value;                                                                                               \
        message.text[0] = 0;                                                                                           \
        EXPECT(sample(&out, logits, 4, s, NULL, 0, 0, &message) == TL_ARGUMENT && strstr(message.text, #field));       \
    } while (0)
    REFUSED(temperature, -1);
    REFUSED(temperature, NAN);
    REFUSED(temperature, INFINITY);
    REFUSED(top_k, -1);
    REFUSED(top_p, 1.5f);
    REFUSED(min_p, NAN);
    REFUSED(typical_p, -0.5f);
    REFUSED(repetition_penalty, 0);
    REFUSED(presence_penalty, NAN);
    REFUSED(frequency_penalty, INFINITY);
    REFUSED(xtc_probability, 1.5f);
    REFUSED(xtc_threshold, NAN);
    REFUSED(no_repeat_ngram_size, -1);
    REFUSED(dry_multiplier, -1);
    REFUSED(dry_multiplier, INFINITY);
    REFUSED(dry_allowed_length, -1);
    tl_sampling dry = OFF, words = OFF, banned = OFF;
    dry.dry_multiplier = 1, dry.dry_base = 0.5f;
    EXPECT(sample(&out, logits, 4, dry, NULL, 0, 0, &message) == TL_ARGUMENT &&
           strstr(message.text, "dry_base is 0.5"));
    words.bad_words = (tl_sequences){1, outside, two};
    EXPECT(sample(&out, logits, 4, words, NULL, 0, 0, &message) == TL_ARGUMENT &&
           strstr(message.text, "the bad words name token 4"));
    words.bad_words = (tl_sequences){2, outside, twice};
    EXPECT(sample(&out, logits, 4, words, NULL, 0, 0, &message) == TL_ARGUMENT && strstr(message.text, "is empty"));
    words.bad_words.n = -1;
    EXPECT(sample(&out, logits, 4, words, NULL, 0, 0, &message) == TL_ARGUMENT && strstr(message.text, "are -1 bad"));
    banned.n_banned = 2, banned.banned = outside;
    EXPECT(sample(&out, logits, 4, banned, NULL, 0, 0, &message) == TL_ARGUMENT && strstr(message.text, "name 4"));
    banned.n_banned = -1;
    EXPECT(sample(&out, logits, 4, banned, NULL, 0, 0, &message) == TL_ARGUMENT && strstr(message.text, "-1 banned"));
    tl_sampling biased = OFF;
    biased.n_bias = 2, biased.bias = bias, biased.bias_tokens = outside;
    EXPECT(sample(&out, logits, 4, biased, NULL, 0, 0, &message) == TL_ARGUMENT && strstr(message.text, "token 4"));
    EXPECT(sample(&out, logits, 4, OFF, outside, 2, 0, &message) == TL_ARGUMENT && strstr(message.text, "is 4"));
    EXPECT(sample(&out, logits, 4, OFF, below, 1, 0, &message) == TL_ARGUMENT && strstr(message.text, "is -1"));
    EXPECT(sample(&out, nan, 4, OFF, NULL, 0, 0, &message) == TL_ARGUMENT && strstr(message.text, "token 1 is NaN"));
    EXPECT(sample(&out, inf, 4, OFF, NULL, 0, 0, &message) == TL_ARGUMENT && strstr(message.text, "token 3 is +inf"));
    EXPECT(sample(&out, nothing, 4, OFF, NULL, 0, 0, &message) == TL_ARGUMENT && strstr(message.text, "-inf"));
    EXPECT(tl_sample(&out, logits, 0, &OFF, NULL, 0, 0, 0, NULL, scratch, &message) == TL_ARGUMENT);
    EXPECT(tl_top_logprobs(tokens, logprobs, 5, logits, 4, NULL, scratch, &message) == TL_ARGUMENT);
    EXPECT(tl_top_logprobs(tokens, logprobs, 0, logits, 4, NULL, scratch, &message) == TL_ARGUMENT);
    EXPECT(tl_top_logprobs(tokens, logprobs, 1, nan, 4, NULL, scratch, &message) == TL_ARGUMENT);
    EXPECT(isnan(tl_logprob(nan, 4, 0)) && isnan(tl_logprob(nothing, 4, 0)) && isnan(tl_logprob(logits, 4, 4)));
    free(scratch);
}

// The published first vector of philox4x32-10 (counter 0, key 0): 6627e8d5 e169c58d.
static void random_numbers(void) {
    EXPECT(tl_random(0, 0) == (double)(0xe169c58d6627e8d5u >> 11) / 9007199254740992.0);
    for (uint64_t i = 0; i < 1000; i++) EXPECT(tl_random(~i, i << 40) >= 0 && tl_random(~i, i << 40) < 1);
}

int main(void) {
    random_numbers();
    every_size();
    histories();
    extremes();
    errors();
    return 0;
}
