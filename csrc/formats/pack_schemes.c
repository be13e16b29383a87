// formats/pack_schemes.c: the formats that weights of safetensors are kept in which other libraries quantized. No GGUF
// file has them: their blocks are what src/tinyllm/files/schemes/ makes of such tensors, row by row, without changing a
// number. Includes panel.h. Read formats_schemes.inc next.
//
// Blocks as they come in, and 16 rows of them in a panel. A scale is a float32, and multiplies once, rounding once.
//   i4_128, i4_32  scale (i4_32's is a half), zero point (0..15), nibbles, the low one first: scale * (code - zero).
//                  Panel: 4-bit slices, 16 scales, 16 bytes of 16 - zero
//   i8_64          scale, signed bytes: scale * code. Panel: bytes + 128, 16 scales
//   nvfp4_64       factor, 4 scales (E4M3), nibbles, the low one first: E2M1 times what each 16 have: the scale times the
//                  factor or, where that is negative, divided by it without its sign. Panel: 4-bit slices, 16 scales for
//                  each 16 k, 16 factors in units of 128 (or parts of it)
//   f8_e4m3        scale, bytes of E4M3: scale * number. Panel: 16 bytes for each k, 16 scales times 256. Of its 256 codes two
//                  are NaN, which the readers refuse; here they are +-480
//   bnb8           scale, signed bytes: scale * code, rounded, / 127. Panel: as f8_e4m3's, the scales as they are
//   bnb4           which table, scale, nibbles, the high one first: scale * table[code]. Panel: for each two k 16 bytes,
//                  the low nibbles the first's, 16 scales, 16 times which table (a matrix has one)
#include "formats/panel.h"

static float float_at(const uint8_t *p) {
    float x;
    memcpy(&x, p, 4);
    return x;
}

static void put_float(uint8_t *p, float x) { memcpy(p, &x, 4); }

static const uint8_t nothing[128]; // a row past the end: every scale is 0

// ---- i4_128, i4_32 -------------------------------------------------------------------------------------------------
static void pack_i4(uint8_t *panel, const uint8_t *const rows[16], int groups, int scale_bytes) {
    for (int row = 0; row < 16; row++) {
        const uint8_t *b = rows[row] ? rows[row] : nothing, *nibbles = b + scale_bytes + 1;
        uint8_t code[32], *scales = panel + 256 * groups;
        for (int j = 0; j < groups; j++) {
            for (int i = 0; i < 32; i++) code[i] = nibbles[16 * j + i / 2] >> i % 2 * 4 & 15;
            put_slice(panel + 256 * j, 4, row, code, 0);
        }
        memcpy(scales + scale_bytes * row, b, (size_t)scale_bytes);
        scales[16 * scale_bytes + row] = (uint8_t)(16 - (b[scale_bytes] & 15));
    }
}

static void unpack_i4(float *out, const uint8_t *panel, int row, int groups, float scale, uint8_t left) {
    for (int j = 0; j < groups; j++) {
        uint8_t code[32] = {0};
        get_slice(code, panel + 256 * j, 4, row, 0);
        scaled(out + 32 * j, code, 32, scale, 16 - left);
    }
}

void tl_pack_i4_128(uint8_t *panel, const uint8_t *const rows[16]) { pack_i4(panel, rows, 4, 4); }
void tl_unpack_i4_128(float *out, const uint8_t *panel, int row) {
    unpack_i4(out, panel, row, 4, float_at(panel + 1024 + 4 * row), panel[1088 + row]);
}
void tl_pack_i4_32(uint8_t *panel, const uint8_t *const rows[16]) { pack_i4(panel, rows, 1, 2); }
void tl_unpack_i4_32(float *out, const uint8_t *panel, int row) {
    unpack_i4(out, panel, row, 1, tl_f16_to_f32(half_at(panel + 256 + 2 * row)), panel[288 + row]);
}

// ---- i8_64 ---------------------------------------------------------------------------------------------------------
void tl_pack_i8_64(uint8_t *panel, const uint8_t *const rows[16]) {
    for (int row = 0; row < 16; row++) {
        const uint8_t *b = rows[row] ? rows[row] : nothing;
        uint8_t code[64];
        for (int i = 0; i < 64; i++) code[i] = b[4 + i] ^ 0x80;
        for (int j = 0; j < 2; j++) put_slice(panel + 512 * j, 8, row, code + 32 * j, 0);
        memcpy(panel + 1024 + 4 * row, b, 4);
    }
}
void tl_unpack_i8_64(float *out, const uint8_t *panel, int row) {
    for (int j = 0; j < 2; j++) {
        uint8_t code[32] = {0};
        get_slice(code, panel + 512 * j, 8, row, 0);
        scaled(out + 32 * j, code, 32, float_at(panel + 1024 + 4 * row), 128);
    }
}

// ---- nvfp4_64 ------------------------------------------------------------------------------------------------------
static float e4m3_256th(uint8_t code) { // its exponent begins 8 below a half's
    return tl_f16_to_f32((unsigned short)((code & 0x80) << 8 | (code & 0x7f) << 7));
}

void tl_pack_nvfp4_64(uint8_t *panel, const uint8_t *const rows[16]) {
    for (int row = 0; row < 16; row++) {
        const uint8_t *b = rows[row] ? rows[row] : nothing;
        const float factor = float_at(b);
        for (int j = 0; j < 2; j++) {
            uint8_t code[32];
            for (int i = 0; i < 32; i++) code[i] = b[8 + 16 * j + i / 2] >> i % 2 * 4 & 15;
            put_slice(panel + 256 * j, 4, row, code, 0);
        }
        for (int i = 0; i < 4; i++) panel[512 + 16 * i + row] = b[4 + i];
        put_float(panel + 576 + 4 * row, factor < 0 ? factor / 128 : factor * 128);
    }
}
void tl_unpack_nvfp4_64(float *out, const uint8_t *panel, int row) {
    const float factor = float_at(panel + 576 + 4 * row);
    for (int j = 0; j < 2; j++) {
        uint8_t code[32] = {0};
        get_slice(code, panel + 256 * j, 4, row, 0);
        for (int i = 0; i < 32; i++) {
            const float scale =
                e4m3_256th(panel[512 + 16 * (2 * j + i / 16) + row]); // half of what it is, as codes are
            out[32 * j + i] = (factor < 0 ? scale / -factor : scale * factor) * (float)e2m1_values[code[i]]; // doubled
        }
    }
}

// ---- f8_e4m3, bnb8 -------------------------------------------------------------------------------------------------
static void pack_bytes(uint8_t *panel, const uint8_t *const rows[16], float unit) {
    for (int row = 0; row < 16; row++) {
        const uint8_t *b = rows[row] ? rows[row] : nothing;
        for (int i = 0; i < 64; i++) panel[16 * i + row] = b[4 + i];
        put_float(panel + 1024 + 4 * row, float_at(b) * unit);
    }
}

void tl_pack_f8_e4m3(uint8_t *panel, const uint8_t *const rows[16]) { pack_bytes(panel, rows, 256); }
void tl_unpack_f8_e4m3(float *out, const uint8_t *panel, int row) {
    const float scale = float_at(panel + 1024 + 4 * row);
    for (int i = 0; i < 64; i++) out[i] = e4m3_256th(panel[16 * i + row]) * scale;
}

void tl_pack_bnb8(uint8_t *panel, const uint8_t *const rows[16]) { pack_bytes(panel, rows, 1); }
void tl_unpack_bnb8(float *out, const uint8_t *panel, int row) {
    const float scale = float_at(panel + 1024 + 4 * row);
    for (int i = 0; i < 64; i++) out[i] = (float)(int8_t)panel[16 * i + row] * scale * (1.0f / 127);
}

// ---- bnb4 ----------------------------------------------------------------------------------------------------------
const float tl_bnb4[2][16] = {
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
     1.0f}, // nf4, of "QLoRA"
    {0.0f, 0.005208333488553762f, 0.6666666865348816f, 1.0f, 0.3333333432674408f, 0.5f, 0.1666666716337204f, 0.25f,
     0.0f, -0.005208333488553762f, -0.6666666865348816f, -1.0f, -0.3333333432674408f, -0.5f, -0.1666666716337204f,
     -0.25f}, // fp4
};

void tl_pack_bnb4(uint8_t *panel, const uint8_t *const rows[16]) {
    for (int row = 0; row < 16; row++) {
        const uint8_t *b = rows[row] ? rows[row] : nothing;
        for (int i = 0; i < 32; i++) panel[16 * i + row] = (uint8_t)(b[5 + i] >> 4 | b[5 + i] << 4);
        memcpy(panel + 512 + 4 * row, b + 1, 4);
        panel[576 + row] = rows[0] ? rows[0][0] & 1 : 0;
    }
}
void tl_unpack_bnb4(float *out, const uint8_t *panel, int row) {
    const float scale = float_at(panel + 512 + 4 * row), *table = tl_bnb4[panel[576]];
    for (int i = 0; i < 64; i++) out[i] = table[panel[16 * (i / 2) + row] >> i % 2 * 4 & 15] * scale;
}
