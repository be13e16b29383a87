// threads.c: one pool a process. A job's units are shared out in contiguous ranges; a thread that is done
// takes from the tails of the others. Waiting threads spin by the clock for a while, then park. Includes
// tinyllm.h only.
#define _GNU_SOURCE
#include "tinyllm.h"
#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#define SPIN_NS 30000
enum { IDLE, OFFERED, RUNNING };

typedef struct worker {
    _Alignas(64) _Atomic uint64_t range; // units it still owns: first << 32 | end
    _Alignas(64) _Atomic int state;      // the caller offers a job, the worker takes it, and is idle again when done
    _Atomic int parked;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} worker;

static struct {
    pthread_mutex_t entry;
    fenv_t caller_mode;
    int n_workers; // that exist, the caller (worker 0) among them
    int threads;   // of the current job
    void (*work)(void *, int, int);
    void *data;
    worker workers[TL_MAX_THREADS];
} pool = {.entry = PTHREAD_MUTEX_INITIALIZER, .n_workers = 1};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * (int64_t)1000000000 + t.tv_nsec;
}

// One unit from the front (for the owner) or the tail (for a thief) of a range; -1 when it is empty.
static int take(worker *w, int front) {
    uint64_t range = atomic_load(&w->range);
    for (;;) {
        uint32_t first = (uint32_t)(range >> 32), end = (uint32_t)range;
        if (first >= end) return -1;
        uint64_t rest = front ? (uint64_t)(first + 1) << 32 | end : (uint64_t)first << 32 | (end - 1);
        if (atomic_compare_exchange_weak(&w->range, &range, rest)) return (int)(front ? first : end - 1);
    }
}

static void run_units(int self) {
    for (int i = 0; i < pool.threads; i++) {
        worker *victim = &pool.workers[(self + i) % pool.threads];
        for (int unit; (unit = take(victim, i == 0)) >= 0;) pool.work(pool.data, unit, self);
    }
}

static void park(worker *w) {
    pthread_mutex_lock(&w->lock);
    atomic_store(&w->parked, 1);
    while (atomic_load(&w->state) != OFFERED) pthread_cond_wait(&w->wake, &w->lock);
    atomic_store(&w->parked, 0);
    pthread_mutex_unlock(&w->lock);
}

static void *worker_main(void *argument) {
    worker *self = argument;
    fesetenv(FE_DFL_ENV);
    for (int64_t idle_since = now_ns();;) {
        int offered = OFFERED;
        if (atomic_compare_exchange_strong(&self->state, &offered, RUNNING)) {
            run_units((int)(self - pool.workers));
            atomic_store(&self->state, IDLE);
            idle_since = now_ns();
        } else if (now_ns() - idle_since > SPIN_NS) {
            park(self);
        }
    }
    return NULL;
}

static void start_workers(int wanted) {
    sigset_t all, before;
    sigfillset(&all); // signals are for the program's own threads
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (pthread_t thread; pool.n_workers < wanted; pool.n_workers++) {
        worker *w = &pool.workers[pool.n_workers];
        atomic_store(&w->state, IDLE);
        atomic_store(&w->parked, 0);
        pthread_mutex_init(&w->lock, NULL);
        pthread_cond_init(&w->wake, NULL);
        if (pthread_create(&thread, NULL, worker_main, w)) break; // do with those there are
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void tl_parallel(int threads, int n_units, void (*work)(void *, int, int), void *data) {
    if (threads > n_units) threads = n_units;
    if (threads > pool.n_workers) start_workers(threads < TL_MAX_THREADS ? threads : TL_MAX_THREADS);
    pool.threads = threads < pool.n_workers ? threads : pool.n_workers;
    pool.work = work;
    pool.data = data;
    for (int i = 0; i < pool.threads; i++) {
        uint64_t first = (uint64_t)n_units * (uint64_t)i / (uint64_t)pool.threads;
        uint64_t end = (uint64_t)n_units * (uint64_t)(i + 1) / (uint64_t)pool.threads;
        atomic_store(&pool.workers[i].range, first << 32 | end);
    }
    for (int i = 1; i < pool.threads; i++) {
        worker *w = &pool.workers[i];
        atomic_store(&w->state, OFFERED);
        if (!atomic_load(&w->parked)) continue;
        pthread_mutex_lock(&w->lock);
        pthread_cond_signal(&w->wake);
        pthread_mutex_unlock(&w->lock);
    }
    run_units(0);
    for (int i = 1; i < pool.threads; i++) { // every unit is taken: who has not begun need not
        int offered = OFFERED;
        if (atomic_compare_exchange_strong(&pool.workers[i].state, &offered, IDLE)) continue;
        for (int64_t start = now_ns(); atomic_load(&pool.workers[i].state) != IDLE;)
            if (now_ns() - start > SPIN_NS) sched_yield();
    }
}

static void after_fork(void) { // the child has the caller's thread only
    pthread_mutex_init(&pool.entry, NULL);
    pool.n_workers = 1;
}

static void once(void) { pthread_atfork(NULL, NULL, after_fork); }

void tl_pool_enter(void) {
    static pthread_once_t registered = PTHREAD_ONCE_INIT;
    pthread_once(&registered, once);
    pthread_mutex_lock(&pool.entry);
    fegetenv(&pool.caller_mode);
    fesetenv(FE_DFL_ENV); // round to nearest, no flush to zero: what the numbers are defined under
}

void tl_pool_leave(void) {
    fenv_t mode = pool.caller_mode;
    pthread_mutex_unlock(&pool.entry);
    fesetenv(&mode);
}
