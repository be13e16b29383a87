// quantize.c: floats -> a file's blocks, to the bits of ggml's reference quantizers (they are part of the
// formats). Includes formats.h only. pack.c reads what is written here.
#include "formats.h"
#include <math.h>
#include <string.h>

static void put_half(uint8_t *p, unsigned short h) { memcpy(p, &h, 2); }

void tl_quantize_f32(uint8_t *blocks, const float *x, size_t k) { memcpy(blocks, x, 4 * k); }

void tl_quantize_f16(uint8_t *blocks, const float *x, size_t k) {
    for (size_t i = 0; i < k; i++) put_half(blocks + 2 * i, tl_f32_to_f16(x[i]));
}

void tl_quantize_bf16(uint8_t *blocks, const float *x, size_t k) {
    for (size_t i = 0; i < k; i++) put_half(blocks + 2 * i, tl_f32_to_bf16(x[i]));
}

// 1 / d, or 0 for a block whose d is 0 or so small (its f16 is 0 by far) that the inverse overflows.
static float inverse(float d) {
    float inverse = d != 0 ? 1 / d : 0;
    return isfinite(inverse) ? inverse : 0;
}

// Whichever is farther from zero, the first at equal distance; a NaN is farthest, so that it shows in d.
static float farther(float a, float b) { return fabsf(b) > fabsf(a) || isnan(b) ? b : a; }

// d = max|x| / 127; q = x / d rounded half away from zero.
void tl_quantize_q8_0(uint8_t *blocks, const float *x, size_t k) {
    for (; k; k -= 32, x += 32, blocks += 34) {
        float farthest = x[0];
        for (int i = 1; i < 32; i++) farthest = farther(farthest, x[i]);
        float d = fabsf(farthest) / 127, scale = inverse(d);
        put_half(blocks, tl_f32_to_f16(d));
        for (int i = 0; i < 32; i++) {
            float q = roundf(x[i] * scale);
            blocks[2 + i] = (uint8_t)(fabsf(q) <= 127 ? (int)q : 0);
        }
    }
}

// d = the x farthest from zero / -8, so that it becomes code 0; code = x / d + 8 rounded half up, at most 15.
static unsigned code_q4_0(float x, float scale) {
    float code = x * scale + 8.5f;
    return code < 0 || isnan(code) ? 0 : code < 15 ? (unsigned)code : 15;
}

void tl_quantize_q4_0(uint8_t *blocks, const float *x, size_t k) {
    for (; k; k -= 32, x += 32, blocks += 18) {
        float farthest = x[0];
        for (int i = 1; i < 32; i++) farthest = farther(farthest, x[i]);
        float d = farthest / -8, scale = inverse(d);
        put_half(blocks, tl_f32_to_f16(d));
        for (int i = 0; i < 16; i++)
            blocks[2 + i] = (uint8_t)(code_q4_0(x[i], scale) | code_q4_0(x[16 + i], scale) << 4);
    }
}
