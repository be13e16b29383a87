// numeric.h: elementary functions of our own, in float64 and the same bits on every machine: libm's may
// differ between versions. Includes nothing. For float32 vectors see kernels/rows.inc.
#ifndef TINYLLM_NUMERIC_H
#define TINYLLM_NUMERIC_H

double tl_exp(double x);                                  // x < 709, or NaN; within a few units in the last place
double tl_log(double x);                                  // x > 0; likewise
double tl_pow(double base, double exponent);              // base > 0; within a few units in the last place
void tl_sincos(double radians, double *sin, double *cos); // |radians| < 2^30, within 1e-15

#endif
