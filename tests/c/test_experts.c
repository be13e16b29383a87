// test_experts.c: how a mixture of experts shares out its tokens, against slow truths: which experts a token goes to and
// with what weights, how visits are grouped, and that a batch reads every panel of the experts it uses once and nothing of
// the others. What the operation computes, and that its bits depend on nothing else, is test_model.c's.
#include "check.h"
#include "cpu/cpu.h"
#include <math.h>
#include <string.h>

typedef struct counts {
    int n, n_experts, n_used, norm;
} counts;

static const counts cases[] = {{0, 4, 2, 1},  {1, 1, 1, 1},   {1, 8, 2, 1},    {3, 8, 8, 0},
                               {7, 5, 1, 0},  {64, 8, 2, 1},  {33, 128, 8, 1}, {33, 128, 8, 0},
                               {2, 60, 4, 1}, {200, 3, 2, 0}, {5, 16, 4, 1},   {1, 128, 128, 1}};

static tl_routing make_routing(const counts *c) {
    const size_t n = (size_t)c->n, visits = n * (size_t)c->n_used, experts = (size_t)c->n_experts;
    tl_routing r = {.scores = random_floats(n * experts, 4),
                    .experts = exactly(visits * sizeof(int)),
                    .weights = exactly(visits * sizeof(float)),
                    .rows = exactly(visits * sizeof(int)),
                    .tokens = exactly(visits * sizeof(int)),
                    .first_row = exactly((experts + 1) * sizeof(int)),
                    .active = exactly(experts * sizeof(int))};
    for (size_t i = 0; i < n * experts; i++)
        if (random_below(3) == 0) r.scores[i] = (float)random_below(3); // many that are equal
    return r;
}

static void free_routing(tl_routing *r) {
    void *all[] = {r->scores, r->experts, r->weights, r->rows, r->tokens, r->first_row, r->active};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

// Whether expert a comes before b for a token with these scores.
static int before(const float *scores, int a, int b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
}

static void check_routes(const tl_routing *r, const counts *c) {
    for (int t = 0; t < c->n; t++) {
        const float *scores = r->scores + t * c->n_experts, *weights = r->weights + t * c->n_used;
        const int *experts = r->experts + t * c->n_used;
        double sum = 0, all = 0, chosen = 0;
        for (int e = 0; e < c->n_experts; e++) all += exp((double)scores[e]);
        for (int i = 0; i < c->n_used; i++) chosen += exp((double)scores[experts[i]]);
        for (int i = 0; i < c->n_used; i++) {
            const double expected = exp((double)scores[experts[i]]) / (c->norm ? chosen : all);
            CHECK(i == 0 || experts[i] > experts[i - 1], "token %d: experts do not ascend", t);
            CHECK(fabs((double)weights[i] - expected) <= 0x1p-23 * expected, "token %d: weight %g, not %g", t,
                  (double)weights[i], expected);
            sum += (double)weights[i];
            for (int e = 0; e < c->n_experts; e++) {
                int is_chosen = 0;
                for (int j = 0; j < c->n_used; j++) is_chosen |= experts[j] == e;
                CHECK(is_chosen || before(scores, experts[i], e), "token %d: expert %d is left out", t, e);
            }
        }
        CHECK(!c->norm || fabs(sum - 1) < 1e-6, "token %d: the weights' sum is %g", t, sum);
    }
}

static void check_groups(const tl_routing *r, const counts *c) {
    const int n_rows = c->n * c->n_used;
    CHECK(r->first_row[0] == 0 && r->first_row[c->n_experts] == n_rows, "%d rows", r->first_row[c->n_experts]);
    for (int i = 0; i < n_rows; i++) {
        const int row = r->rows[i], e = r->experts[i];
        CHECK(row >= r->first_row[e] && row < r->first_row[e + 1], "row %d is not one of expert %d", row, e);
        CHECK(r->tokens[row] == i / c->n_used, "row %d is of token %d, not %d", row, r->tokens[row], i / c->n_used);
    }
    for (int e = 0; e < c->n_experts; e++)
        for (int row = r->first_row[e] + 1; row < r->first_row[e + 1]; row++)
            CHECK(r->tokens[row] > r->tokens[row - 1], "expert %d: tokens do not ascend", e);
}

// Every panel of every expert that has rows is in one unit, with all its rows; no unit is of another expert.
static void check_units(const tl_routing *r, const counts *c, int n_panels, int block) {
    const int n_units = r->n_active * ((n_panels + block - 1) / block);
    int *seen = exactly((size_t)(c->n_experts * n_panels) * sizeof *seen);
    memset(seen, 0, (size_t)(c->n_experts * n_panels) * sizeof *seen);
    for (int unit = 0; unit < n_units; unit++) {
        const tl_expert_unit u = tl_cpu_expert_unit(r, n_panels, block, unit);
        CHECK(u.from == r->first_row[u.expert] && u.to == r->first_row[u.expert + 1], "unit %d: rows %d to %d", unit,
              u.from, u.to);
        for (int p = u.first; p < u.last; p++) seen[u.expert * n_panels + p]++;
    }
    for (int e = 0; e < c->n_experts; e++)
        for (int p = 0; p < n_panels; p++) {
            const int wanted = r->first_row[e + 1] > r->first_row[e];
            CHECK(seen[e * n_panels + p] == wanted, "panel %d of expert %d is read %d times, not %d", p, e,
                  seen[e * n_panels + p], wanted);
        }
    free(seen);
}

// One score that is no number, of any expert: all weights of its token are NaN, those of the other are not, and nothing leaves
// the buffers; nor where most are none.
static void check_not_a_number(void) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    const counts c = {2, 6, 2, 1};
    for (int i = 0; i < 6 * 3 * 2 + 2; i++) {
        const int norm = i % 2;
        const tl_config config = {.n_experts = 6, .n_experts_used = 2, .norm_topk_prob = norm};
        tl_routing r = make_routing(&c);
        for (int e = 0; e < 6 && i >= 36; e++) r.scores[e] = e % 5 < 3 ? NAN : 1;
        if (i < 36) r.scores[i / 6] = bad[i / 2 % 3];
        tl_cpu_route(&r, &config, c.n, 1);
        check_groups(&r, &c);
        for (int w = 0; w < 4; w++)
            CHECK(isnan(r.weights[w]) == (w < 2), "case %d: weight %d is %g", i, w, (double)r.weights[w]);
        free_routing(&r);
    }
}

int main(void) {
    tl_pool_enter();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int threads = 1; threads <= 3; threads++) {
            const counts *c = &cases[i];
            const tl_config config = {
                .n_experts = c->n_experts, .n_experts_used = c->n_used, .norm_topk_prob = c->norm};
            tl_routing r = make_routing(c);
            tl_cpu_route(&r, &config, c->n, threads);
            check_routes(&r, c);
            check_groups(&r, c);
            static const int blocks[][2] = {{1, 4}, {9, 4}, {8, 4}, {30, 8}, {3, 12}};
            for (int b = 0; b < 5; b++) check_units(&r, c, blocks[b][0], blocks[b][1]);
            free_routing(&r);
        }
    check_not_a_number();
    tl_pool_leave();
    return 0;
}
