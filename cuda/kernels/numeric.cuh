// kernels/numeric.cuh: exp, gates, caps, sin and cos from explicit operations, as csrc/kernels/rows.inc and csrc/numeric.c
// have them: the same numbers on every device, and on the CPU that runs these kernels. Includes primitives.cuh.
#ifndef TINYLLM_CUDA_NUMERIC_CUH
#define TINYLLM_CUDA_NUMERIC_CUH

#include "primitives.cuh"

// e^x to about one unit in the last place; exactly 1 at 0; x below -87.3 counts as -87.3, above 88 as 88. NaN stays NaN.
DEVICE float exponential(float x) {
    x = x < -87.3f ? -87.3f : x > 88.0f ? 88.0f : x;
    const int n = round_to_int(x * 1.44269504f);
    float r = fmaf((float)n, -0x1.62e4p-1f, x); // ln 2 in two parts, the first exact times n
    r = fmaf((float)n, -0x1.7f7d1cp-20f, r);
    float sum = 1.0f / 720; // Taylor, |r| <= 0.35
    sum = fmaf(sum, r, 1.0f / 120);
    sum = fmaf(sum, r, 1.0f / 24);
    sum = fmaf(sum, r, 1.0f / 6);
    sum = fmaf(sum, r, 0.5f);
    sum = fmaf(sum, r, 1.0f);
    sum = fmaf(sum, r, 1.0f);
    return sum * as_float((uint32_t)(n + 127) << 23);
}

// What a gate makes of itself and of up, g / (1 + e^(slope (g + cubic g^3))) (u + shift), g and u no larger than limit: any
// activation (csrc/kernels/rows.inc) is four numbers, and no branch.
struct gating {
    float slope, cubic, limit, shift;
};
DEVICE float gated(const gating &a, float gate, float up) {
    const float g = gate > a.limit ? a.limit : gate, u = up > a.limit ? a.limit : up < -a.limit ? -a.limit : up;
    return g / (1.0f + exponential(a.slope * fmaf(a.cubic * g * g, g, g))) * (u + a.shift);
}

// e^x - 1 for x <= 0, as exact near 0 as elsewhere.
DEVICE float exponential_minus_1(float x) {
    if (x > -0.35f) { // Taylor
        float sum = 1.0f / 5040;
        const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f};
        for (int i = 0; i < 5; i++) sum = fmaf(sum, x, factors[i]);
        return fmaf(sum * x, x, x);
    }
    return exponential(x) - 1.0f;
}

// A unit without a gate: ReLU squared (arXiv 2109.08668), or where there are numbers, xIELU (arXiv 2411.13010).
struct ungated {
    bool is, has_numbers;
    float above, below, beta, epsilon;
};
DEVICE float ungated_of(const ungated &a, float x) {
    if (!a.has_numbers) return x < 0 ? 0.0f : x * x; // a NaN stays one
    if (x > 0) return fmaf(x * x, a.above, x * a.beta);
    const float least = x > a.epsilon ? a.epsilon : x;
    return fmaf(exponential_minus_1(least) - x, a.below, x * a.beta);
}

// cap tanh(x / cap), tanh y = 1 - 2 / (e^2y + 1). What is infinite becomes NaN (x - x), for a cap would hide it.
DEVICE float soft_cap(float x, float cap) {
    return (1.0f - 2.0f / (exponential(x * (2.0f / cap)) + 1.0f)) * cap + (x - x);
}

// What a norm multiplies by. NaN where the squares overflow: zeros would look like an answer.
DEVICE float norm_scale(float mean_square, float eps) {
    return mean_square < INFINITY ? 1.0f / sqrtf(mean_square + eps) : as_float(0x7fc00000);
}

// In float64, so that RoPE's angles are good at any position; the reduction is Cody and Waite's.
DEVICE void sine_cosine(double radians, double *sine, double *cosine) {
    const double n = rint(radians * 0x1.45f306dc9c883p-1); // quarter turns, taken off with pi/2 in three parts
    double r = fma(n, -0x1.921fb54442d18p0, radians);
    r = fma(n, -0x1.1a62633145c07p-54, r);
    r = fma(n, 0x1.f1976b7ed8fbcp-110, r);
    const double r2 = r * r;
    double s = 1, c = 1;
    for (int i = 20; i >= 2; i -= 2) {
        s = fma(s, -r2 / (i * (i + 1)), 1.0);
        c = fma(c, -r2 / (i * (i - 1)), 1.0);
    }
    s *= r;
    const int quarter = (int)((long long)n & 3);
    *sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
    *cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
}

#endif
