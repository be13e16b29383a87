// test_pool.c: the thread pool: every unit of a job exactly once, for any number of threads and units, from
// several callers, after fork(), and always in the default floating-point mode.
#include "check.h"
#include "tinyllm.h"
#include <fenv.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_UNITS 5000

typedef struct job {
    int threads, sum;            // sum: a plain number that the caller reads when all is done
    _Atomic int done[MAX_UNITS]; // how often each unit ran
    _Atomic int wrong_thread, wrong_mode;
    float result[MAX_UNITS]; // written without any lock: tl_parallel's return makes it visible
} job;

static void spin(int n) {
    for (volatile int i = 0; i < n; i++) continue;
}

// Round to nearest, subnormals kept.
static int default_mode(void) {
    volatile float smallest = 0x1p-126f, third = 3;
    return fegetround() == FE_TONEAREST && smallest * 0.5f != 0 && 1 / third == 0x1.555556p-2f;
}

static void run_unit(void *data, int unit, int thread) {
    job *j = data;
    atomic_fetch_add(&j->done[unit], 1);
    if (thread < 0 || thread >= j->threads) atomic_store(&j->wrong_thread, 1);
    if (!default_mode()) atomic_store(&j->wrong_mode, 1);
    j->result[unit] = (float)unit;
    if (unit % 97 == 0) spin(2000); // a unit that takes longer, so that others steal
}

static const char *try_job(job *j, int threads, int n_units) {
    memset(j, 0, sizeof *j);
    j->threads = threads;
    tl_parallel(threads, n_units, run_unit, j);
    for (int i = 0; i < MAX_UNITS; i++) {
        if (atomic_load(&j->done[i]) != (i < n_units)) return "a unit did not run exactly once";
        if (j->result[i] != (float)(i < n_units ? i : 0)) return "a unit's result is not there";
    }
    if (atomic_load(&j->wrong_thread)) return "a thread's number is out of range";
    return atomic_load(&j->wrong_mode) ? "the floating-point mode is not the default one" : NULL;
}

static const char *try_all(job *j) {
    static const int threads[] = {1, 2, 3, 7, 16}, units[] = {0, 1, 2, 3, 6, 7, 8, 15, 64, 1000, MAX_UNITS};
    for (size_t t = 0; t < sizeof threads / sizeof threads[0]; t++)
        for (size_t u = 0; u < sizeof units / sizeof units[0]; u++) {
            const char *wrong = try_job(j, threads[t], units[u]);
            if (wrong) return wrong;
        }
    return NULL;
}

static void count_unit(void *data, int unit, int thread) {
    (void)thread;
    atomic_fetch_add((_Atomic int *)data, unit + 1);
}

// Small jobs one after another, where waking, revoking and stealing meet.
static const char *try_many(int n_jobs) {
    for (int i = 0; i < n_jobs; i++) {
        const int n_units = i % 23;
        _Atomic int sum = 0;
        tl_parallel(1 + i % 5, n_units, count_unit, &sum);
        if (atomic_load(&sum) != n_units * (n_units + 1) / 2) return "a small job is not complete";
        if (i % 500 == 0) usleep(200); // long enough for the workers to park
    }
    return NULL;
}

static void *caller(void *wrong) {
    static job jobs[4];
    static _Atomic int n_callers;
    job *own = &jobs[atomic_fetch_add(&n_callers, 1)];
    for (int i = 0; i < 300 && !*(const char **)wrong; i++) {
        tl_pool_enter();
        *(const char **)wrong = i % 10 ? try_many(10) : try_job(own, 1 + i % 4, i);
        tl_pool_leave();
    }
    return NULL;
}

static void check_callers(void) {
    pthread_t threads[4];
    const char *wrong[4] = {NULL};
    for (int i = 0; i < 4; i++) CHECK(!pthread_create(&threads[i], NULL, caller, (void *)&wrong[i]), "no thread");
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
        CHECK(!wrong[i], "caller %d: %s", i, wrong[i]);
    }
}

// ---- fork
static job shared;

static int run_child(int depth) { // the exit status: 0 is well
    tl_pool_enter();
    const char *wrong = try_job(&shared, 3, 1000);
    if (!wrong) wrong = try_many(50);
    tl_pool_leave();
    if (wrong) return 1;
    if (depth == 0) return 0;
    pid_t pid = fork();
    if (pid == 0) _exit(run_child(depth - 1));
    int status;
    return pid < 0 || waitpid(pid, &status, 0) != pid || status != 0;
}

static _Atomic int forked_enough;

static void *busy_caller(void *data) { // so that fork() meets a pool in the middle of a job
    while (!atomic_load(&forked_enough)) {
        tl_pool_enter();
        tl_parallel(3, 20, count_unit, data);
        tl_pool_leave();
    }
    return NULL;
}

static void check_fork(void) {
    _Atomic int sum = 0;
    pthread_t thread;
    CHECK(run_child(0) == 0, "before fork");
    for (int i = 0; i < 12; i++) {
        if (i == 4) CHECK(!pthread_create(&thread, NULL, busy_caller, (void *)&sum), "no thread");
        pid_t pid = fork();
        if (pid == 0) {
            alarm(300); // a deadlock ends, too
            _exit(run_child(1));
        }
        int status = -1;
        CHECK(pid > 0 && waitpid(pid, &status, 0) == pid, "fork");
        CHECK(status == 0, "child %d ended with status %d", i, status);
        if (i < 4) CHECK(run_child(0) == 0, "the parent after fork");
    }
    atomic_store(&forked_enough, 1);
    pthread_join(thread, NULL);
    CHECK(run_child(0) == 0, "the parent after all forks");
}

// ---- the floating-point mode
// Flush to zero has no standard function; -1 where this file does not know the machine's.
static int flush_to_zero(int on) {
#ifdef __x86_64__
    const unsigned flush = 0x8040, mode = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(on ? mode | flush : mode & ~flush);
    return (mode & flush) == flush;
#else
    (void)on;
    return -1;
#endif
}

static void check_mode(void) {
    for (int round = 0; round < 20; round++) { // more threads each time: workers are born under the odd mode
        fesetround(round % 2 ? FE_UPWARD : FE_TOWARDZERO);
        flush_to_zero(1);
        tl_pool_enter();
        const int inside = default_mode();
        const char *wrong = try_job(&shared, 1 + round * 2, 200);
        tl_pool_leave();
        const int rounding = fegetround(), flushing = flush_to_zero(0);
        fesetround(FE_TONEAREST);
        CHECK(inside, "between tl_pool_enter and tl_pool_leave the mode is not the default one");
        CHECK(!wrong, "%s", wrong);
        CHECK(rounding == (round % 2 ? FE_UPWARD : FE_TOWARDZERO), "the caller's rounding is not restored");
        CHECK(flushing != 0, "the caller's flushing to zero is not restored");
    }
}

int main(int n_arguments, char **arguments) {
    check_mode();
    tl_pool_enter();
    const char *wrong = try_all(&shared);
    if (!wrong) wrong = try_many(4000);
    tl_pool_leave();
    CHECK(!wrong, "%s", wrong);
    check_callers();
    if (n_arguments < 2 || strcmp(arguments[1], "without-fork") != 0) check_fork(); // an emulator may not bear it
    tl_pool_enter();
    wrong = try_job(&shared, TL_MAX_THREADS, MAX_UNITS);
    if (!wrong) wrong = try_many(20);
    tl_pool_leave();
    CHECK(!wrong, "with %d threads: %s", TL_MAX_THREADS, wrong);
    return 0;
}
