// repetition.h: what sample.c asks of repetition.c. Private to the two.
#ifndef TL_REPETITION_H
#define TL_REPETITION_H
#include "tinyllm.h"

tl_status tl_check_repetition(int n, const tl_sampling *s, tl_message *message);
// Whether the text so far changes any logit.
int tl_minds_history(const tl_sampling *s);
// x [vocabulary] is changed in place. of_tokens [vocabulary], matches [n_history]: scratch.
void tl_mind_history(float *x, const tl_sampling *s, const int32_t *history, int n_history, int32_t *of_tokens,
                     int32_t *matches);
#endif
