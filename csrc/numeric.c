// numeric.c: exp, log, pow, sin and cos in float64 from explicit operations (Cody and Waite's reductions, Taylor and
// atanh series), so that RoPE's angles have the same bits everywhere. Includes numeric.h.
#include "numeric.h"
#include <math.h>

// ln x = e ln 2 + 2 atanh((m - 1) / (m + 1)), m in [sqrt 1/2, sqrt 2): the series' ratio is below 0.0295.
double tl_log(double x) {
    int e;
    double m = frexp(x, &e);
    if (m < 0.70710678118654752440) {
        m *= 2;
        e--;
    }
    double r = (m - 1) / (m + 1), r2 = r * r, sum = 0;
    for (int n = 23; n >= 1; n -= 2) sum = fma(sum, r2, 1.0 / n);
    return fma(e, 0x1.62e42fefa39efp-1, fma(e, 0x1.abc9e3b39803fp-56, 2 * r * sum));
}

double tl_exp(double x) {
    if (!(x > -745)) return x < 0 ? 0 : x;    // below the least number; NaN stays NaN
    double n = rint(x * 0x1.71547652b82fep0); // multiples of ln 2
    double r = fma(n, -0x1.abc9e3b39803fp-56, fma(n, -0x1.62e42fefa39efp-1, x)), sum = 1;
    for (int i = 18; i >= 1; i--) sum = fma(sum, r / i, 1);
    return ldexp(sum, (int)n);
}

double tl_pow(double base, double exponent) { return tl_exp(exponent * tl_log(base)); }

void tl_sincos(double radians, double *sin, double *cos) {
    double n = rint(radians * 0x1.45f306dc9c883p-1); // quarter turns, taken off with pi/2 in three parts
    double r = fma(n, -0x1.921fb54442d18p0, radians);
    r = fma(n, -0x1.1a62633145c07p-54, r);
    r = fma(n, 0x1.f1976b7ed8fbcp-110, r);
    double r2 = r * r, s = 1, c = 1;
    for (int i = 20; i >= 2; i -= 2) {
        s = fma(s, -r2 / (i * (i + 1)), 1);
        c = fma(c, -r2 / (i * (i - 1)), 1);
    }
    s *= r;
    switch ((long long)n & 3) {
    case 0: *sin = s, *cos = c; break;
    case 1: *sin = c, *cos = -s; break;
    case 2: *sin = -s, *cos = -c; break;
    default: *sin = -c, *cos = s; break;
    }
}
