/* Forward passes of Llama-shaped models on a CPU, for the few rows at a time that decoding needs.
 *
 * A pass of one token reads every weight once and does little with it, so that its price is that
 * of the memory. These kernels keep it there: weights are read as the 4 or 8 bits that they are
 * stored in, unpacked in registers, and used for all rows before the next ones are read, so that
 * verifying five tokens costs little more than decoding one.
 *
 * Weights are codes in groups of 32 columns with a scale (and for 4 bits a minimum) each; the
 * input of a product is rounded to 8 bits in the same groups. Products of codes are summed in
 * integers. A row's result does not depend on the other rows of a pass, nor on slots of the cache
 * that it may not see, to the bit: every sum runs in one fixed order.
 *
 * Compiled for the machine that it runs on, with vectors as wide as it has them. AVX-512 VNNI, AVX2
 * and dot products of NEON have their own inner product; everything else is plain C. Knows tensors
 * as pointers and nothing of Python; see `mtad.native.abi` for the calls. */

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

/* Bytes of a vector, and how many of them a sum over values keeps: what the registers hold. */
#if defined(__AVX512VNNI__)
#define VECTOR 64
#define WIDE 4
#elif defined(__AVX2__)
#define VECTOR 32
#define WIDE 2
#else
#define VECTOR 16
#define WIDE 4
#endif

#define LANES (VECTOR / 4)
#define BLOCK 16  /* output rows, or slots of keys, that are stored side by side */
#define GROUP 32  /* columns that share a scale */
#define TILE 12   /* input rows that share one reading of a block */
#define QUERIES 4 /* query rows that share one reading of the keys */
#define CHUNK 64  /* of the slots that a row sees, how many it attends to at a time */
/* Bytes of weights between what is used and what is asked for: with one row, whose products wait for
 * memory, and with more, where memory waits for products. */
#define NEAR 256
#define AHEAD 2048
#define FAR 8192
#define OWN_VALUES 8192 /* of an input that every thread makes for itself */
#define SPLIT_ROWS 32 /* rows whose attention is shared out by parts of the cache */
#define APART 16  /* counters from one thread's to the next one's: a cache line */

typedef float floats __attribute__((vector_size(VECTOR)));
typedef int32_t ints __attribute__((vector_size(VECTOR)));
typedef int8_t codes __attribute__((vector_size(VECTOR)));
typedef uint16_t words __attribute__((vector_size(VECTOR)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef floats loose_floats __attribute__((aligned(4)));
typedef codes loose_codes __attribute__((aligned(1)));
typedef ints loose_ints __attribute__((aligned(4)));

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32 = 0, CODES8 = 1, CODES4 = 2 };

/* A linear layer of [rows, columns], block after block of 16 rows, each of them:
 *   FLOAT32  for every column 16 floats;
 *   CODES8   for every group 8 × 64 signed codes, byte 4·lane + i of part j being column 4·j + i,
 *            then 16 scales as float16;
 *   CODES4   for every group 4 × 64 bytes, whose low halves are parts 0 to 3 and whose high halves
 *            parts 4 to 7, then 16 scales and 16 minima as float16. */
typedef struct {
    int32_t kind, rows, columns;
    int32_t streamed; /* no cache holds it from one pass to the next */
    const uint8_t *data;
} Matrix;

typedef struct {
    const float *attention_norm, *mlp_norm;
    Matrix qkv, out, gate_up, down; /* gate_up: 16 rows of the gate, 16 of up, and so on */
} Layer;

typedef struct {
    int32_t layers, width, heads, kv_heads, head_size, mlp;
    float eps;
    const float *cosines, *sines; /* [positions, head_size / 2] */
    const float *embedding;       /* [vocabulary, width], or NULL for layers of a draft */
    int32_t vocabulary;
    const Layer *layer;
    const float *norm;            /* before the head */
    Matrix head;
} Model;

/* keys [layers, texts, kv_heads, capacity / 16, head_size, 16], values [layers, texts, kv_heads,
 * capacity, head_size], float32, or float16 with `halves`; capacity is a multiple of 16. */
typedef struct {
    uint8_t *keys, *values;
    int64_t capacity;
    int32_t texts, halves;
} Cache;

/* New tokens of one text take the last `rows` of the `nodes` slots that follow `prefix` slots.
 * With several texts in the cache there is a row for each of them, its token takes slot `prefix`
 * and sees all of its own text; `nodes` is then 1. */
typedef struct {
    int32_t rows, prefix, nodes;
    const int64_t *tokens;    /* [rows] */
    const int64_t *positions; /* [rows] in the text; NULL where they are those of the slots */
    const uint8_t *visible;   /* [rows, nodes] who sees which slot; NULL for a chain */
    float *logits;            /* [rows − skipped, head rows], or NULL */
    int32_t skipped;          /* rows at the beginning whose logits nobody wants */
    int32_t taps;             /* hidden states to return: 0 is the input, i follows layer i, */
    const int32_t *tap_layer; /*   the last follows the final norm */
    float *tapped;            /* [rows, taps, width] */
    const Matrix *more;       /* more rows of the head, with which logits are as wide as both; NULL */
    int32_t from;             /*   for none. Theirs begin at this column, over what stands there */
    float *states;            /* [rows, width] scratch: what goes into a layer, and comes out */
} Pass;

/* The input of a product: floats, and where codes meet it also codes. */
typedef struct {
    float *values;   /* [rows, columns] */
    int8_t *codes;   /* [rows, columns] */
    float *scales;   /* [rows, columns / 32] */
    float *sums;     /* [rows, columns / 32] scale × sum of the codes */
    int32_t *totals; /* [rows, columns / 32] sum of the codes */
    int32_t columns;
    size_t apart;    /* bytes from one thread's own to the next one's; 0 where all share one */
} Input;

struct Seat;

typedef struct {
    int threads;
    pthread_t *workers;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int sleepers;
    int stop;
    _Atomic uint32_t job; /* counts the calls */
    _Atomic int32_t arrived;
    _Atomic uint32_t phase;
    _Atomic int32_t *next; /* of each thread's items in the present loop, how many are taken */
    void (*work)(const struct Seat *seat, void *argument);
    void *argument;
    size_t size; /* of the scratch memory */
    char *scratch;
} Context;

/* A thread's place among those of a context. */
typedef struct Seat {
    Context *all;
    int thread;
} Seat;

/* ---- threads ------------------------------------------------------------------------------ */

#define SPINS_BEFORE_YIELD 256
#define SPINS_BEFORE_SLEEP 20000

INLINE void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void rewind_loop(Context *c) {
    for (int t = 0; t < c->threads; t++)
        atomic_store_explicit(&c->next[t * APART], 0, memory_order_relaxed);
}

/* All threads meet here; the last one makes the counters ready for the next loop. */
static void meet(const Seat *s) {
    Context *c = s->all;
    uint32_t phase = atomic_load_explicit(&c->phase, memory_order_acquire);
    if (atomic_fetch_add_explicit(&c->arrived, 1, memory_order_acq_rel) + 1 == c->threads) {
        atomic_store_explicit(&c->arrived, 0, memory_order_relaxed);
        rewind_loop(c);
        atomic_store_explicit(&c->phase, phase + 1, memory_order_release);
        return;
    }
    for (uint32_t spins = 0; atomic_load_explicit(&c->phase, memory_order_acquire) == phase;) {
        relax();
        if (++spins > SPINS_BEFORE_YIELD) sched_yield();
    }
}

/* Where a thread's part of a loop over `count` begins. */
INLINE int part_start(const Context *c, int count, int thread) {
    return (int)((int64_t)count * thread / c->threads);
}

/* The next items of a loop over `count`. Each thread walks through a part of its own, in order, so
 * that what it reads lies in a row; then it helps where something is left. */
static int take(const Seat *s, int count, int *end) {
    Context *c = s->all;
    for (int i = 0; i < c->threads; i++) {
        const int owner = (s->thread + i) % c->threads;
        const int first = part_start(c, count, owner);
        const int size = part_start(c, count, owner + 1) - first;
        _Atomic int32_t *next = &c->next[owner * APART];
        int32_t taken = atomic_load_explicit(next, memory_order_relaxed);
        while (taken < size) {
            const int more = taken + 1 + (size - taken) / 4;
            if (!atomic_compare_exchange_weak_explicit(
                    next, &taken, more, memory_order_relaxed, memory_order_relaxed))
                continue;
            *end = first + more;
            return first + taken;
        }
    }
    return -1;
}

#define PARALLEL(seat, count)                                           \
    for (int start_, end_; (start_ = take(seat, count, &end_)) >= 0;)   \
        for (int item = start_; item < end_; item++)

static void *worker(void *seat_) {
    Seat seat = *(Seat *)seat_;
    free(seat_);
    Context *c = seat.all;
    uint32_t done = 0;
    for (;;) {
        for (int spins = 0; atomic_load_explicit(&c->job, memory_order_acquire) == done;) {
            relax();
            if (++spins < SPINS_BEFORE_SLEEP) continue;
            pthread_mutex_lock(&c->lock);
            c->sleepers++;
            while (atomic_load_explicit(&c->job, memory_order_acquire) == done)
                pthread_cond_wait(&c->wake, &c->lock);
            c->sleepers--;
            pthread_mutex_unlock(&c->lock);
        }
        done++;
        if (c->stop) return NULL;
        c->work(&seat, c->argument);
        meet(&seat);
    }
}

static void announce(Context *c) {
    pthread_mutex_lock(&c->lock);
    atomic_fetch_add_explicit(&c->job, 1, memory_order_release);
    if (c->sleepers) pthread_cond_broadcast(&c->wake);
    pthread_mutex_unlock(&c->lock);
}

/* Runs `work` on all threads and returns when all have ended. One call at a time. */
static void run(Context *c, void (*work)(const Seat *, void *), void *argument) {
    const Seat first = {c, 0};
    c->work = work;
    c->argument = argument;
    rewind_loop(c);
    if (c->threads > 1) announce(c);
    work(&first, argument);
    meet(&first);
}

void mtad_close(Context *c) {
    if (!c) return;
    c->stop = 1;
    if (c->threads > 1) announce(c);
    for (int i = 1; i < c->threads; i++) pthread_join(c->workers[i], NULL);
    pthread_mutex_destroy(&c->lock);
    pthread_cond_destroy(&c->wake);
    free(c->workers);
    free((void *)c->next);
    free(c->scratch);
    free(c);
}

/* NULL where memory or threads are missing. */
Context *mtad_open(int threads) {
    Context *c = calloc(1, sizeof *c);
    if (!c) return NULL;
    c->threads = 1;
    c->workers = calloc((size_t)threads, sizeof *c->workers);
    c->next = calloc((size_t)threads * APART, sizeof *c->next);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->wake, NULL);
    const int room = c->workers && c->next;
    for (int i = 1; room && i < threads; i++) {
        Seat *seat = malloc(sizeof *seat);
        if (!seat) break;
        *seat = (Seat){c, i};
        if (pthread_create(&c->workers[i], NULL, worker, seat)) {
            free(seat);
            break;
        }
        c->threads++;
    }
    if (room && c->threads == threads) return c;
    mtad_close(c);
    return NULL;
}

/* ---- numbers ------------------------------------------------------------------------------ */

INLINE floats load_floats(const float *from) { return *(const loose_floats *)from; }
INLINE void store_floats(float *to, floats value) { *(loose_floats *)to = value; }
INLINE floats broadcast(float value) { return value - (floats){0}; }
INLINE floats absolute(floats x) { return (floats)((ints)x & 0x7fffffff); }

INLINE floats pick(ints mask, floats yes, floats no) {
    return (floats)(((ints)yes & mask) | ((ints)no & ~mask));
}

/* b where one of them is NaN. */
INLINE floats larger(floats a, floats b) {
#if VECTOR == 64
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return pick(a > b, a, b);
#endif
}

/* Every lane changes places with the one `by` (a power of two) away; compilers make an instruction
 * of it, unlike of single lanes. */
#define TURN_FOUR(by, i) (i) ^ (by), (i + 1) ^ (by), (i + 2) ^ (by), (i + 3) ^ (by)
#if VECTOR == 64
#define TURNED(by) TURN_FOUR(by, 0), TURN_FOUR(by, 4), TURN_FOUR(by, 8), TURN_FOUR(by, 12)
#elif VECTOR == 32
#define TURNED(by) TURN_FOUR(by, 0), TURN_FOUR(by, 4)
#else
#define TURNED(by) TURN_FOUR(by, 0)
#endif
#if defined(__clang__)
#define TURN(x, by) __builtin_shufflevector(x, x, TURNED(by))
#else
#define TURN(x, by) __builtin_shuffle(x, (ints){TURNED(by)})
#endif

INLINE float lane_sum(floats x) {
#if VECTOR >= 64
    x += TURN(x, 8);
#endif
#if VECTOR >= 32
    x += TURN(x, 4);
#endif
    x += TURN(x, 2);
    return x[0] + x[1];
}

INLINE float lane_maximum(floats x) {
#if VECTOR >= 64
    x = larger(x, TURN(x, 8));
#endif
#if VECTOR >= 32
    x = larger(x, TURN(x, 4));
#endif
    x = larger(x, TURN(x, 2));
    return x[0] > x[1] ? x[0] : x[1];
}

/* Keeps a value in a register: compilers for x86 would read it from memory at every use. */
#if defined(__AVX2__)
#define HOLD(x) __asm__("" : "+v"(x))
#else
#define HOLD(x) (void)(x)
#endif

INLINE ints lane_numbers(void) {
    ints numbers;
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    return numbers;
}

/* Half as many vectors, and in each the lanes of two: those whose number has the bit `by` go on with
 * the later one. A macro, since compilers want to see what lanes are turned by. */
#define FOLD(x, by, sum)                                                         \
    for (int i = 0; i < (by); i++) {                                             \
        const ints later = (lane_numbers() & (by)) != 0;                         \
        const floats stay = pick(later, x[i + (by)], x[i]);                      \
        const floats come = pick(later, x[i], x[i + (by)]);                      \
        x[i] = sum ? stay + TURN(come, by) : larger(stay, TURN(come, by));       \
    }

/* The vector whose lane i is the sum of all lanes of x[i], or the largest of them. `sum` is a constant
 * at every call. */
INLINE floats across(floats *x, const int sum) {
#if VECTOR >= 64
    FOLD(x, 8, sum)
#endif
#if VECTOR >= 32
    FOLD(x, 4, sum)
#endif
    FOLD(x, 2, sum)
    FOLD(x, 1, sum)
    return x[0];
}

INLINE floats load_halves(const uint8_t *from) {
#if VECTOR == 64
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)from));
#elif defined(__AVX2__) && defined(__F16C__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const void *)from));
#elif defined(__ARM_FEATURE_DOTPROD)
    return (floats)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from)));
#else
    floats value;
    for (int i = 0; i < LANES; i++) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, 2);
        uint32_t word = (uint32_t)(bits & 0x7fff) << 13;
        float size;
        memcpy(&size, &word, 4);
        size *= 0x1p112f; /* the difference of the two exponents' offsets, also for subnormals */
        value[i] = bits & 0x8000 ? -size : size;
    }
    return value;
#endif
}

/* To the nearest half, of two the even one. */
INLINE void store_halves(uint8_t *to, floats value) {
#if VECTOR == 64
    _mm256_storeu_si256((void *)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128((void *)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_FEATURE_DOTPROD)
    vst1_u8(to, vreinterpret_u8_f16(vcvt_f16_f32((float32x4_t)value)));
#else
    for (int i = 0; i < LANES; i++) {
        uint32_t word, sign;
        float size = value[i] < 0.0f ? -value[i] : value[i];
        memcpy(&word, &value[i], 4);
        sign = word >> 16 & 0x8000;
        if (size < 0x1p-14f) { /* subnormal: a multiple of 2^−24 */
            size += 0x1p-1f;   /* whose last bit is that */
            memcpy(&word, &size, 4);
            word -= 0x3f000000;
        } else {
            memcpy(&word, &size, 4);
            word &= 0x7fffffff; /* a NaN is not below 0 and keeps its sign */
            word += 0xfff + (word >> 13 & 1);
            word = word >= 0x47800000 ? (word > 0x7f800fff ? 0x7e00 : 0x7c00)
                                      : (word - 0x38000000) >> 13;
        }
        uint16_t bits = (uint16_t)(word | sign);
        memcpy(to + 2 * i, &bits, 2);
    }
#endif
}

/* What a cache holds, at a place that counts numbers; `halves` is a constant at every call. */
INLINE floats load_cached(const uint8_t *from, size_t at, const int halves) {
    return halves ? load_halves(from + 2 * at) : load_floats((const float *)(from + 4 * at));
}

/* e^x for x ≤ 0 to a relative 2e-7; 0 below −87. */
INLINE floats exponential(floats x) {
    ints gone = x < -87.0f;
    floats turns = x * 1.44269504f;
    floats magic = broadcast(12582912.0f); /* 1.5 · 2^23: what is added to it is rounded */
    floats whole = (turns + magic) - magic;
    floats rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    floats sum = broadcast(1.9875691500e-4f);
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    ints power = (__builtin_convertvector(whole, ints) + 127) << 23;
    floats value = sum * (floats)power;
    return (floats)((ints)value & ~gone);
}

/* ---- products ----------------------------------------------------------------------------- */

INLINE int32_t load_four(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return four;
}

/* acc[lane] + Σ_i part[4·lane + i] · four[i], with −127 … 127 in both. On VNNI `part` has 128 added
 * to it, which `begin_dot` takes back. */
INLINE ints dot(ints acc, codes part, int32_t four) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)part, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
    const __m256i size = _mm256_abs_epi8((__m256i)part);
    const __m256i turned = _mm256_sign_epi8(_mm256_set1_epi32(four), (__m256i)part);
    const __m256i pairs = _mm256_maddubs_epi16(size, turned);
    return acc + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
    int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
    return (ints)vdotq_s32((int32x4_t)acc, (int8x16_t)part, x);
#else
    int8_t x[4];
    memcpy(x, &four, 4);
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 0; i < 4; i++) acc[lane] += part[4 * lane + i] * x[i];
    return acc;
#endif
}

INLINE ints begin_dot(int32_t total) {
#if defined(__AVX512VNNI__)
    return -128 * total - (ints){0};
#else
    (void)total;
    return (ints){0};
#endif
}

/* Σ over a group, whose parts hold 0 … 15. */
INLINE ints dot_small(const codes *part, const int8_t *x) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
    __m256i pairs = _mm256_setzero_si256(); /* 16 · 15 · 127 fits 16 bits */
    for (int j = 0; j < 8; j++) {
        const __m256i four = _mm256_set1_epi32(load_four(x + 4 * j));
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16((__m256i)part[j], four));
    }
    return (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    ints acc = {0};
    for (int j = 0; j < 8; j++) acc = dot(acc, part[j], load_four(x + 4 * j));
    return acc;
#endif
}

/* Whether `rows` inputs take their time over weights that pass through: a thread then asks far ahead
 * and for its second cache. The first one has too few requests open to go on reading while the
 * products of many rows are made, and both times would add up. Of four bits, whose products are
 * the longer part, what that drives out costs more than it gains. */
INLINE int reads_far(const Matrix *m, int rows) {
    return m->streamed && m->kind == CODES8 && rows > 1;
}

/* Asks for weights before they are used: memory is slower than the products. Those that are streamed
 * are not to drive out what stays, such as the draft and the interpreter. */
INLINE void fetch(const Matrix *m, const uint8_t *data, const int bytes, const int far) {
    if (far)
        for (int i = 0; i < bytes; i += 64) __builtin_prefetch(data + i, 0, 2);
    else if (m->streamed)
        for (int i = 0; i < bytes; i += 64) __builtin_prefetch(data + i, 0, 0);
    else
        for (int i = 0; i < bytes; i += 64) __builtin_prefetch(data + i, 0, 3);
}

/* The outputs of piece `piece` of a block for `rows` inputs from `row` on; `rows` is a constant at
 * every call. */
INLINE void block(const Matrix *m, const uint8_t *data, int piece, const Input *in, int row,
                  const int rows, floats *out) {
    floats sum[TILE]; /* not `out`, which the compiler would write back at every step */
    const int columns = m->columns, groups = columns / GROUP, far = reads_far(m, rows);
    const int ahead = far ? FAR : rows == 1 ? NEAR : AHEAD;
    for (int r = 0; r < rows; r++) sum[r] = (floats){0};
    if (m->kind == FLOAT32) {
        const float *weight = (const float *)data + piece * LANES;
        for (int k = 0; k < columns; k++) {
            floats w = load_floats(weight + (size_t)k * BLOCK);
            for (int r = 0; r < rows; r++) sum[r] += w * in->values[(size_t)(row + r) * columns + k];
        }
    } else if (m->kind == CODES8) {
        for (int g = 0; g < groups; g++, data += 8 * 64 + 32) {
            codes part[8];
            if (piece == 0) fetch(m, data + ahead, 8 * 64 + 32, far);
            for (int j = 0; j < 8; j++) {
                part[j] = *(const loose_codes *)(data + 64 * j + piece * VECTOR);
#if defined(__AVX512VNNI__)
                part[j] ^= (int8_t)-128;
#endif
            }
            floats scale = load_halves(data + 512 + piece * LANES * 2);
            for (int r = 0; r < rows; r++) {
                size_t at = (size_t)(row + r) * groups + g;
                const int8_t *x = in->codes + at * GROUP;
                ints acc = begin_dot(in->totals[at]);
                for (int j = 0; j < 8; j++) acc = dot(acc, part[j], load_four(x + 4 * j));
                sum[r] += __builtin_convertvector(acc, floats) * (scale * in->scales[at]);
            }
        }
    } else {
        for (int g = 0; g < groups; g++, data += 4 * 64 + 64) {
            codes part[8];
            if (piece == 0) fetch(m, data + ahead, 4 * 64 + 64, 0);
            for (int j = 0; j < 4; j++) {
                codes both = *(const loose_codes *)(data + 64 * j + piece * VECTOR);
                part[j] = both & 15;
                part[j + 4] = (codes)((words)both >> 4) & 15;
            }
            floats scale = load_halves(data + 256 + piece * LANES * 2);
            floats minimum = load_halves(data + 288 + piece * LANES * 2);
            for (int r = 0; r < rows; r++) {
                size_t at = (size_t)(row + r) * groups + g;
                const ints total = dot_small(part, in->codes + at * GROUP);
                sum[r] += __builtin_convertvector(total, floats) * (scale * in->scales[at]);
                sum[r] += minimum * in->sums[at];
            }
        }
    }
    for (int r = 0; r < rows; r++) out[r] = sum[r];
}

INLINE size_t block_bytes(const Matrix *m) {
    size_t groups = (size_t)m->columns / GROUP;
    if (m->kind == CODES8) return groups * (8 * 64 + 32);
    if (m->kind == CODES4) return groups * (4 * 64 + 64);
    return (size_t)m->columns * BLOCK * sizeof(float);
}

static void tile(const Matrix *m, const uint8_t *data, int piece, const Input *in, int row,
                 int rows, floats *sum) {
    switch (rows) {
#define CASE(n) case n: block(m, data, piece, in, row, n, sum); break
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
        CASE(8);
        CASE(9);
        CASE(10);
        CASE(11);
        CASE(12);
#undef CASE
    }
}

enum { STORE, ADD, GATE };

/* Asks for the beginning of what this thread will read of a matrix for `rows` inputs. */
INLINE void expect(const Seat *s, const Matrix *m, int rows) {
    const int far = reads_far(m, rows);
    const size_t start = (size_t)part_start(s->all, m->rows / BLOCK, s->thread);
    fetch(m, m->data + start * block_bytes(m), far ? FAR : AHEAD, far);
}

/* out [rows, stride], of which the first m->rows columns are set to the product, or grown by it;
 * for GATE the first m->rows / 2 are set to silu(gate) × up. `next` is the matrix that will be read
 * after this one, or NULL. */
static void product_in(const Seat *s, const Matrix *m, const Input *in, int rows, float *out,
                       size_t stride, int mode, const Matrix *next) {
    size_t bytes = block_bytes(m);
    int blocks = mode == GATE ? m->rows / BLOCK / 2 : m->rows / BLOCK;
    PARALLEL(s, blocks) {
        const uint8_t *data = m->data + (mode == GATE ? 2 : 1) * (size_t)item * bytes;
        for (int row = 0; row < rows; row += TILE) {
            const int count = rows - row < TILE ? rows - row : TILE;
            for (int piece = 0; piece < BLOCK / LANES; piece++) {
                floats sum[TILE], up[TILE];
                tile(m, data, piece, in, row, count, sum);
                if (mode == GATE) tile(m, data + bytes, piece, in, row, count, up);
                for (int r = 0; r < count; r++) {
                    float *to = out + (size_t)(row + r) * stride + item * BLOCK + piece * LANES;
                    floats value = sum[r];
                    if (mode == ADD) value += load_floats(to);
                    if (mode == GATE) {
                        floats small = exponential(-absolute(value)); /* never overflows */
                        floats share = 1.0f / (1.0f + small);
                        value *= pick(value < 0.0f, small * share, share) * up[r];
                    }
                    store_floats(to, value);
                }
            }
        }
    }
    if (next) expect(s, next, rows);
    meet(s);
}

/* The same with rows of `out` side by side. */
static void product(const Seat *s, const Matrix *m, const Input *in, int rows, float *out, int mode,
                    const Matrix *next) {
    product_in(s, m, in, rows, out, (size_t)(mode == GATE ? m->rows / 2 : m->rows), mode, next);
}

static void normalise(const float *from, const float *weight, float eps, int columns, float *to) {
    floats even = {0}, odd = {0};
    for (int k = 0; k < columns; k += 2 * LANES) {
        floats left = load_floats(from + k), right = load_floats(from + k + LANES);
        even += left * left;
        odd += right * right;
    }
    float factor = 1.0f / sqrtf(lane_sum(even + odd) / (float)columns + eps);
    for (int k = 0; k < columns; k += LANES)
        store_floats(to + k, load_floats(from + k) * factor * load_floats(weight + k));
}

/* Rounds `count` groups of an input from group `at` on, at most LANES, to codes of −127 … 127. */
INLINE void encode_groups(const Input *in, size_t at, int count) {
    floats most[LANES], sum[LANES];
    float inverses[LANES], scales[LANES], sums[LANES];
    int32_t totals[LANES];
    for (int g = 0; g < LANES; g++) {
        most[g] = (floats){0};
        if (g >= count) continue;
        const float *from = in->values + (at + (size_t)g) * GROUP;
        for (int i = 0; i < GROUP; i += LANES)
            most[g] = larger(most[g], absolute(load_floats(from + i)));
    }
    const floats largest = across(most, 0), scale = largest / 127.0f;
    store_floats(inverses, pick(largest > 0.0f, 127.0f / largest, (floats){0}));
    const floats magic = broadcast(12582912.0f); /* see `exponential` */
    for (int g = 0; g < LANES; g++) {
        const size_t start = (at + (size_t)g) * GROUP;
        ints total = {0};
        for (int i = 0; g < count && i < GROUP; i += LANES) {
            /* One expression: compilers differ in what they fuse across two. */
            ints code = __builtin_convertvector(
                (load_floats(in->values + start + i) * inverses[g] + magic) - magic, ints);
            bytes small = __builtin_convertvector(code, bytes);
            memcpy(in->codes + start + i, &small, LANES);
            total += code;
        }
        sum[g] = __builtin_convertvector(total, floats);
    }
    const floats total = across(sum, 1); /* whole numbers, exact in any order */
    const ints whole = __builtin_convertvector(total, ints);
    store_floats(scales, scale);
    store_floats(sums, scale * total);
    memcpy(totals, &whole, sizeof totals);
    memcpy(in->scales + at, scales, (size_t)count * sizeof *scales);
    memcpy(in->sums + at, sums, (size_t)count * sizeof *sums);
    memcpy(in->totals + at, totals, (size_t)count * sizeof *totals);
}

/* Rounds a row to codes, group by group. */
static void encode(const Input *in, int row) {
    const int groups = in->columns / GROUP;
    const size_t start = (size_t)row * groups;
    int g = 0;
    for (; g + LANES <= groups; g += LANES) encode_groups(in, start + (size_t)g, LANES);
    if (g < groups) encode_groups(in, start + (size_t)g, groups - g);
}

/* Makes row `row` of `in` from as many floats: normalised if there is a norm, encoded if `m` has
 * codes. */
static void prepare_row(const Matrix *m, const float *from, const float *norm, float eps,
                        const Input *in, int row) {
    const size_t start = (size_t)row * m->columns;
    if (norm) normalise(from, norm, eps, m->columns, in->values + start);
    else if (in->values + start != from)
        memcpy(in->values + start, from, (size_t)m->columns * sizeof(float));
    if (m->kind != FLOAT32) encode(in, row);
}

/* The rows of an input: all of them for every thread where each makes its own, which for few is
 * sooner done than waiting for one another. */
static int take_rows(const Seat *s, const Input *in, int rows, int *end) {
    if (!in->apart) return take(s, rows, end);
    if (*end == rows) return -1;
    *end = rows;
    return 0;
}

#define ROWS_OF(seat, in, rows)                                                        \
    for (int start_, end_ = -1; (start_ = take_rows(seat, in, rows, &end_)) >= 0;)     \
        for (int item = start_; item < end_; item++)

/* Makes `in` from [rows, columns]. */
static void prepare(const Seat *s, const Matrix *m, const float *from, const float *norm, float eps,
                    int rows, Input *in) {
    in->columns = m->columns;
    ROWS_OF(s, in, rows)
        prepare_row(m, from + (size_t)item * m->columns, norm, eps, in, item);
    if (!in->apart) meet(s);
}

/* ---- attention ---------------------------------------------------------------------------- */

/* Softmax over slots of the cache, a chunk at a time: weights relative to the largest score so
 * far, their sum, and the sum of the values with these weights. */
typedef struct {
    float *sums; /* [parts, rows · heads, head_size] */
    float *tops; /* [parts, rows · heads] the largest score; −∞ where no slot is seen */
    float *mass; /* [parts, rows · heads] */
    int parts;
} Partial;

typedef struct {
    const Model *model;
    Cache *cache;
    const Pass *pass;
    Input in;
    Partial partial;
    float *spare;        /* of each thread [QUERIES, head_size + widest] */
    int32_t *chunk_of;   /* [rows, span] the chunk that a row meets each slot from `unsure` on in, */
    int32_t unsure, span; /*  −1 for those that it does not see; chunk 0 has the first CHUNK that */
    int32_t *first, *last; /* it sees, and so on. [chunks] The slots of each chunk, for all rows, */
    int32_t chunks, widest; /* and the most of them that a chunk has */
    float *qkv, *inner;
} Forward;

/* Where the keys and the values of a head begin. */
INLINE size_t head_start(const Model *model, const Cache *cache, int layer, int text, int head) {
    size_t heads = ((size_t)layer * cache->texts + text) * model->kv_heads + head;
    return heads * (size_t)cache->capacity * model->head_size;
}

INLINE void rotate(float *restrict left, float *restrict right, const float *restrict cosine,
                   const float *restrict sine, int half) {
    for (int i = 0; i < half; i++) {
        const float x = left[i], y = right[i];
        left[i] = x * cosine[i] - y * sine[i];
        right[i] = y * cosine[i] + x * sine[i];
    }
}

/* Turns queries, writes the new keys and values into the cache. */
static void place(const Seat *s, const Forward *f, int layer) {
    const Model *model = f->model;
    const Pass *pass = f->pass;
    const Cache *cache = f->cache;
    const int size = model->head_size, half = size / 2, share = model->heads / model->kv_heads;
    const int all = model->heads + 2 * model->kv_heads;
    const int several = cache->texts > 1;
    /* Head by head: keys of neighbouring rows lie in the same cache lines. */
    PARALLEL(s, pass->rows * model->kv_heads) {
        const int row = item % pass->rows, kv = item / pass->rows;
        const int text = several ? row : 0, before = several ? 0 : pass->nodes - pass->rows + row;
        const size_t slot = (size_t)(pass->prefix + before);
        const size_t position = pass->positions ? (size_t)pass->positions[row] : slot;
        const float *cosine = model->cosines + position * half;
        const float *sine = model->sines + position * half;
        float *heads = f->qkv + (size_t)row * all * size;
        for (int h = kv * share; h < (kv + 1) * share; h++)
            rotate(heads + h * size, heads + h * size + half, cosine, sine, half);
        float *key = heads + (model->heads + kv) * size;
        rotate(key, key + half, cosine, sine, half);
        const float *value = key + (size_t)model->kv_heads * size;
        const size_t head = head_start(model, cache, layer, text, kv), of_value = head + slot * size;
        const size_t of_key = head + slot / BLOCK * BLOCK * size + slot % BLOCK;
        if (!cache->halves) {
            float *keys = (float *)cache->keys + of_key;
            for (int i = 0; i < size; i++) keys[(size_t)i * BLOCK] = key[i];
            memcpy((float *)cache->values + of_value, value, (size_t)size * sizeof(float));
            continue;
        }
        uint16_t *keys = (uint16_t *)cache->keys + of_key, few[LANES];
        for (int i = 0; i < size; i += LANES) {
            store_halves((uint8_t *)few, load_floats(key + i));
            for (int j = 0; j < LANES; j++) keys[(size_t)(i + j) * BLOCK] = few[j];
            store_halves(cache->values + 2 * (of_value + (size_t)i), load_floats(value + i));
        }
    }
    meet(s);
}

static int sees(const Pass *pass, int row, int slot) {
    int node = slot - pass->prefix;
    if (node < 0) return 1;
    if (pass->nodes == 1) return node == 0;
    if (node >= pass->nodes) return 0;
    if (pass->visible) return pass->visible[(size_t)row * pass->nodes + node];
    return node <= pass->nodes - pass->rows + row;
}

static void look(Forward *f) {
    const Pass *pass = f->pass;
    const int prefix = pass->prefix, slots = prefix + pass->nodes;
    for (int c = 0; c < f->chunks; c++) {
        const int start = c * CHUNK, end = start + CHUNK;
        f->first[c] = start < prefix ? start : slots;
        f->last[c] = end < prefix ? end : prefix;
    }
    for (int row = 0; row < pass->rows; row++) {
        int32_t *chunk_of = f->chunk_of + (size_t)row * f->span;
        for (int i = 0, place = f->unsure; i < f->span; i++) {
            const int slot = f->unsure + i, c = place / CHUNK;
            chunk_of[i] = sees(pass, row, slot) ? c : -1;
            if (chunk_of[i] < 0) continue;
            if (slot < f->first[c]) f->first[c] = slot / BLOCK * BLOCK;
            if (slot >= f->last[c]) f->last[c] = slot + 1;
            place++;
        }
    }
}

/* The sums of `slots` values with the weights of `count` queries, `vectors` of each value from `part`
 * on; both are constants at every call. In the order of the slots, so that those that are not seen,
 * whose weight is 0, change nothing. */
INLINE void weigh(const uint8_t *values, size_t value, const float *weight, int stride, int slots,
                  int size, int part, float **out, const int halves, const int count,
                  const int vectors) {
    floats sum[QUERIES][WIDE] = {{{0}}};
    value += (size_t)part;
    for (int slot = 0; slot < slots; slot++, value += (size_t)size) {
        floats from[WIDE];
        for (int v = 0; v < vectors; v++) {
            from[v] = load_cached(values, value + (size_t)(v * LANES), halves);
            HOLD(from[v]);
        }
        for (int q = 0; q < count; q++) {
            const float share = weight[q * stride + slot];
            for (int v = 0; v < vectors; v++) sum[q][v] += share * from[v];
        }
    }
    for (int q = 0; q < count; q++)
        for (int v = 0; v < vectors; v++) store_floats(out[q] + part + v * LANES, sum[q][v]);
}

/* `count` queries (a constant at every call) of one key-value head over what they see of the slots
 * from `first`, a multiple of BLOCK, to `last` as their chunk `chunk`. */
INLINE void attend(const Forward *f, int chunk, size_t head, float *score, const float **query,
                   const int *row, float **out, float *top, float *mass, const int halves,
                   const int count) {
    const uint8_t *keys = f->cache->keys, *values = f->cache->values;
    const int size = f->model->head_size, stride = f->widest;
    const int first = f->first[chunk], last = f->last[chunk];
    const float factor = 1.0f / sqrtf((float)size);
    floats largest[QUERIES];
    for (int q = 0; q < count; q++) largest[q] = broadcast(-INFINITY);
    for (int slot = first; slot < last; slot += LANES) {
        floats sum[QUERIES] = {{0}}, sum2[QUERIES] = {{0}};
        const size_t key = head + (size_t)(slot / BLOCK * BLOCK) * size + slot % BLOCK;
        const size_t value = head + (size_t)slot * size; /* LANES of them: as many numbers as keys */
        for (int i = 0; i < size; i += 2) {
            floats even = load_cached(keys, key + (size_t)i * BLOCK, halves);
            floats odd = load_cached(keys, key + (size_t)(i + 1) * BLOCK, halves);
            /* The values are next; memory is slower than the products. */
            const size_t next = (value + (size_t)i * LANES) * (halves ? 2 : 4);
            __builtin_prefetch(values + next);
            if (!halves) __builtin_prefetch(values + next + LANES * 4);
            for (int q = 0; q < count; q++) {
                sum[q] += even * query[q][i];
                sum2[q] += odd * query[q][i + 1];
            }
        }
        for (int q = 0; q < count; q++) {
            floats scores = (sum[q] + sum2[q]) * factor;
            if (slot >= f->unsure) {
                const int32_t *of = f->chunk_of + (size_t)row[q] * f->span + (slot - f->unsure);
                scores = pick(*(const loose_ints *)of == chunk, scores, broadcast(-INFINITY));
            }
            store_floats(score + q * stride + (slot - first), scores);
            largest[q] = larger(scores, largest[q]);
        }
    }
    for (int q = 0; q < count; q++) {
        top[q] = lane_maximum(largest[q]);
        const float most = top[q] > -INFINITY ? top[q] : 0.0f;
        for (int i = 0; i < last - first; i += LANES) {
            float *at = score + q * stride + i;
            store_floats(at, exponential(load_floats(at) - most));
        }
        mass[q] = 0.0f;
    }
    for (int i = 0; i < last - first; i++) /* likewise in the order of the slots */
        for (int q = 0; q < count; q++) mass[q] += score[q * stride + i];
    const size_t value = head + (size_t)first * size;
    const int slots = last - first;
    int part = 0;
    for (; part + WIDE * LANES <= size; part += WIDE * LANES)
        weigh(values, value, score, stride, slots, size, part, out, halves, count, WIDE);
    for (; part < size; part += LANES)
        weigh(values, value, score, stride, slots, size, part, out, halves, count, 1);
}

/* Adds a later part of a softmax to an earlier one. Compiled once, so that it always rounds alike. */
static __attribute__((noinline)) void merge(float *sums, float *top, float *mass,
                                            const float *more, float more_top, float more_mass,
                                            int size) {
    if (more_top == -INFINITY) return;
    const float most = *top > more_top ? *top : more_top;
    const float old = exponential(broadcast(*top - most))[0];
    const float new = exponential(broadcast(more_top - most))[0];
    *top = most;
    *mass = *mass * old + more_mass * new;
    for (int i = 0; i < size; i += LANES)
        store_floats(sums + i, load_floats(sums + i) * old + load_floats(more + i) * new);
}

/* The queries of few rows share the work by chunks, those of many by themselves. Both ways a query
 * meets the same chunks in the same order. */
static void attention(const Seat *s, const Forward *f, int layer) {
    const Model *model = f->model;
    const Pass *pass = f->pass;
    const Cache *cache = f->cache;
    const Partial *partial = &f->partial;
    const int size = model->head_size, share = model->heads / model->kv_heads;
    const int all = model->heads + 2 * model->kv_heads;
    /* Queries that read the same keys stand side by side: of all rows, or of one text. */
    const int queries = (cache->texts > 1 ? 1 : pass->rows) * share;
    const int tiles = (queries + QUERIES - 1) / QUERIES;
    const int split = partial->parts > 1, pieces = split ? f->chunks : tiles;
    float *spare = f->spare + (size_t)s->thread * QUERIES * (size_t)(size + f->widest);
    float *score = spare + QUERIES * size;
    PARALLEL(s, cache->texts * model->kv_heads * pieces) {
        const int piece = item % pieces, kv = item / pieces % model->kv_heads;
        const int text = item / pieces / model->kv_heads;
        const size_t head = head_start(model, cache, layer, text, kv);
        for (int tile = split ? 0 : piece; tile < (split ? tiles : piece + 1); tile++) {
            for (int c = split ? piece : 0; c < (split ? piece + 1 : f->chunks); c++) {
                const int later = !split && c;
                const float *query[QUERIES];
                float *out[QUERIES], top[QUERIES], mass[QUERIES];
                size_t at[QUERIES];
                int row[QUERIES], count = 0;
                for (int q = tile * QUERIES; q < queries && count < QUERIES; q++, count++) {
                    const int h = kv * share + q % share;
                    row[count] = text + q / share;
                    query[count] = f->qkv + ((size_t)row[count] * all + h) * size;
                    at[count] = (size_t)row[count] * model->heads + h;
                    if (split) at[count] += (size_t)c * pass->rows * model->heads;
                    out[count] = later ? spare + count * size : partial->sums + at[count] * size;
                }
                switch (count + (cache->halves ? QUERIES : 0)) {
#define CASE(n) \
    case n: attend(f, c, head, score, query, row, out, top, mass, 0, n); break; \
    case QUERIES + n: attend(f, c, head, score, query, row, out, top, mass, 1, n); break
                    CASE(1);
                    CASE(2);
                    CASE(3);
                    CASE(4);
#undef CASE
                }
                for (int q = 0; q < count; q++) {
                    float *sums = partial->sums + at[q] * size;
                    float *old = &partial->tops[at[q]], *sum = &partial->mass[at[q]];
                    if (later) merge(sums, old, sum, out[q], top[q], mass[q], size);
                    else *old = top[q], *sum = mass[q];
                }
            }
        }
    }
    meet(s);
}

/* Makes the input of the matrix behind the attention. */
static void gather(const Seat *s, const Forward *f, const Matrix *m, Input *in) {
    const int size = f->model->head_size, heads = f->model->heads, rows = f->pass->rows;
    const Partial *p = &f->partial;
    in->columns = m->columns;
    ROWS_OF(s, in, rows) {
        for (int h = 0; h < heads; h++) {
            size_t at = (size_t)item * heads + h;
            float *to = in->values + at * size, top = p->tops[at], mass = p->mass[at];
            memcpy(to, p->sums + at * size, (size_t)size * sizeof(float));
            for (int part = 1; part < p->parts; part++) {
                at += (size_t)rows * heads;
                merge(to, &top, &mass, p->sums + at * size, p->tops[at], p->mass[at], size);
            }
            for (int i = 0; i < size; i += LANES) store_floats(to + i, load_floats(to + i) / mass);
        }
        if (m->kind != FLOAT32) encode(in, item);
    }
    if (!in->apart) meet(s);
}

/* ---- calls -------------------------------------------------------------------------------- */

/* Cuts `size` bytes off the scratch memory, in whole cache lines. */
static void *cut(char **from, size_t size) {
    void *start = *from;
    *from += (size + 63) / 64 * 64;
    return start;
}

static size_t input_bytes(size_t rows, size_t columns) {
    size_t groups = columns / GROUP + 1;
    return (rows * (columns * 5 + groups * 12) + 9 * 64) / 64 * 64;
}

/* How many threads have an input of their own: one of few values is sooner made than waited for. */
static size_t copies(const Context *c, size_t rows, size_t columns) {
    return rows == 1 || rows * columns <= OWN_VALUES ? (size_t)c->threads : 1;
}

static Input cut_input(char **from, size_t rows, size_t columns, size_t count) {
    size_t groups = columns / GROUP + 1;
    char *at = *from;
    Input in;
    in.values = cut(&at, rows * columns * sizeof(float));
    in.codes = cut(&at, rows * columns);
    in.scales = cut(&at, rows * groups * sizeof(float));
    in.sums = cut(&at, rows * groups * sizeof(float));
    in.totals = cut(&at, rows * groups * sizeof(int32_t));
    in.columns = (int32_t)columns;
    in.apart = count > 1 ? input_bytes(rows, columns) : 0;
    *from += count * input_bytes(rows, columns);
    return in;
}

/* A thread's view of an input. */
static Input own(const Seat *s, Input in) {
    const size_t shift = (size_t)s->thread * in.apart;
    in.values = (float *)((char *)in.values + shift);
    in.codes += shift;
    in.scales = (float *)((char *)in.scales + shift);
    in.sums = (float *)((char *)in.sums + shift);
    in.totals = (int32_t *)((char *)in.totals + shift);
    return in;
}

static int reserve(Context *c, size_t size) {
    if (c->size >= size) return 1;
    free(c->scratch);
    c->size = 0;
    size = (size + size / 4 + 63) / 64 * 64;
    if (posix_memalign((void **)&c->scratch, 64, size)) {
        c->scratch = NULL;
        return 0;
    }
    c->size = size;
    return 1;
}

static void tap(const Seat *s, const Forward *f, int layer, const float *from) {
    const Pass *pass = f->pass;
    const size_t width = (size_t)f->model->width;
    for (int t = 0; t < pass->taps; t++) {
        if (pass->tap_layer[t] != layer) continue;
        PARALLEL(s, pass->rows) {
            memcpy(pass->tapped + ((size_t)item * pass->taps + t) * width, from + item * width,
                   width * sizeof(float));
        }
        meet(s);
    }
}

/* Columns of the logits: those of the head, and of more rows of it. */
static size_t logits_width(const Model *model, const Matrix *more) {
    return (size_t)(model->head.rows + (more ? more->rows : 0));
}

static void forward_work(const Seat *s, void *argument) {
    const Forward *f = argument;
    const Model *model = f->model;
    const Pass *pass = f->pass;
    const int rows = pass->rows;
    Input in = own(s, f->in);
    for (int l = 0; l < model->layers; l++) {
        const Layer *layer = &model->layer[l];
        const Matrix *next = l + 1 < model->layers ? &layer[1].qkv : &model->head;
        tap(s, f, l, pass->states);
        prepare(s, &layer->qkv, pass->states, layer->attention_norm, model->eps, rows, &in);
        product(s, &layer->qkv, &in, rows, f->qkv, STORE, &layer->out);
        place(s, f, l);
        attention(s, f, l);
        gather(s, f, &layer->out, &in);
        product(s, &layer->out, &in, rows, pass->states, ADD, &layer->gate_up);
        prepare(s, &layer->gate_up, pass->states, layer->mlp_norm, model->eps, rows, &in);
        product(s, &layer->gate_up, &in, rows, f->inner, GATE, &layer->down);
        prepare(s, &layer->down, f->inner, NULL, 0.0f, rows, &in);
        product(s, &layer->down, &in, rows, pass->states, ADD, next);
    }
    if (!pass->logits && !pass->taps) return;
    const int from = pass->taps ? 0 : pass->skipped;
    const float *states = pass->states + (size_t)from * model->width;
    prepare(s, &model->head, states, model->norm, model->eps, rows - from, &in);
    tap(s, f, model->layers, in.values);
    if (!pass->logits) return;
    const size_t groups = (size_t)(pass->skipped - from) * (size_t)(model->width / GROUP);
    in.values += groups * GROUP, in.codes += groups * GROUP;
    in.scales += groups, in.sums += groups, in.totals += groups;
    const Matrix *more = pass->more;
    const size_t stride = logits_width(model, more);
    const int asked = rows - pass->skipped;
    product_in(s, &model->head, &in, asked, pass->logits, stride, STORE, more);
    if (more) product_in(s, more, &in, asked, pass->logits + pass->from, stride, STORE, NULL);
}

static size_t most(size_t a, size_t b) { return a > b ? a : b; }

/* Scratch for a pass, with `more` bytes behind it: where those begin, or NULL where memory is
 * missing. The input of a product is as wide as `widest` at least. */
static char *cut_forward(Context *c, Forward *f, size_t widest, size_t more) {
    const Model *model = f->model;
    const Pass *pass = f->pass;
    const size_t rows = (size_t)pass->rows, size = (size_t)model->head_size;
    const size_t heads = (size_t)model->heads, joined = (heads + 2 * (size_t)model->kv_heads) * size;
    const size_t mlp = (size_t)model->mlp, slots = (size_t)(pass->prefix + pass->nodes);
    const size_t chunks = (slots + CHUNK - 1) / CHUNK;
    const size_t parts = f->cache->texts == 1 && rows <= SPLIT_ROWS ? chunks : 1;
    const size_t all = parts * rows * heads;
    widest = most(most(heads * size, mlp), most((size_t)model->width, widest));
    const size_t inputs = copies(c, rows, widest);
    f->unsure = pass->prefix / BLOCK * BLOCK;
    f->span = (int32_t)(slots + BLOCK - 1) / BLOCK * BLOCK - f->unsure;
    f->partial.parts = (int)parts;
    f->chunks = (int32_t)chunks;
    f->widest = f->span + CHUNK; /* slots of a chunk that are all seen, and all of the others */
    const size_t spare = (size_t)c->threads * QUERIES * (size + (size_t)f->widest);
    const size_t seen = rows * (size_t)f->span + 2 * chunks;
    size_t bytes = inputs * input_bytes(rows, widest) + 8 * 64 + more;
    bytes += (rows * (joined + mlp) + all * (size + 2) + spare + seen) * 4;
    if (!reserve(c, bytes)) return NULL;
    char *at = c->scratch;
    f->in = cut_input(&at, rows, widest, inputs);
    f->qkv = cut(&at, rows * joined * sizeof(float));
    f->inner = cut(&at, rows * mlp * sizeof(float));
    f->partial.sums = cut(&at, all * size * sizeof(float));
    f->partial.tops = cut(&at, all * sizeof(float));
    f->partial.mass = cut(&at, all * sizeof(float));
    f->spare = cut(&at, spare * sizeof(float));
    f->chunk_of = cut(&at, seen * sizeof(int32_t));
    f->first = f->chunk_of + rows * (size_t)f->span;
    f->last = f->first + chunks;
    return at;
}

static void text_work(const Seat *s, void *argument) {
    const Forward *f = argument;
    const Pass *pass = f->pass;
    const size_t width = (size_t)f->model->width;
    PARALLEL(s, pass->rows) {
        const float *embedded = f->model->embedding + (size_t)pass->tokens[item] * width;
        memcpy(pass->states + (size_t)item * width, embedded, width * sizeof(float));
    }
    meet(s);
    forward_work(s, argument);
}

/* One pass through all layers. 0 if it was done, 1 where memory is missing, 2 where a token is none
 * of the vocabulary. */
int mtad_forward(Context *c, const Model *model, Cache *cache, Pass *pass) {
    Forward f = {.model = model, .cache = cache, .pass = pass};
    for (int row = 0; row < pass->rows; row++)
        if (pass->tokens[row] < 0 || pass->tokens[row] >= model->vocabulary) return 2;
    const size_t bytes = (size_t)pass->rows * (size_t)model->width * sizeof(float);
    char *at = cut_forward(c, &f, 0, bytes + 64);
    if (!at) return 1;
    pass->states = cut(&at, bytes);
    look(&f);
    run(c, text_work, &f);
    return 0;
}

/* ---- a draft on hidden states ------------------------------------------------------------- */

/* See `HiddenDraft` in hidden_draft.py. */
typedef struct {
    Model model;             /* its layers, and the rows of the target's head */
    Matrix read, join;       /* [width, taps · width], [width, 2 · width] */
    const float *read_norm;  /* [taps, width] */
    const float *token_norm; /* [width] */
    const float *state_norm; /* [width] */
    int32_t taps;
} Draft;

/* Where a drafter is in a text. Below the `prefix` slots of its cache stand entries: a token and the
 * entry above it, −1 for the prefix; it stands one place further in the text than that one. */
typedef struct {
    int32_t prefix;
    int32_t position;        /* of an entry right below the prefix */
    const float *embedding;  /* [V, width] the target's */
    int64_t *tokens;         /* [entries] */
    int64_t *parents;        /* [entries] */
    float *given;            /* [1 + entries, width] the states that children of the prefix and of */
                             /*   each entry are read with */
    int64_t *tails;          /* [1 + entries, size] the last tokens up to there */
    int64_t *text;           /* [count] what can be copied, behind `size` places without a token */
    int32_t count, size;     /* `size` 0 copies nothing */
    const float *odds;       /* [size + 1] log(share / (1 − share)) by the length of a match */
    const Matrix *more;      /* as in Pass */
    int32_t from;
    int32_t columns;         /* that stand for tokens: */
    const int64_t *names;    /* [columns] the token of each; NULL where column i is token i */
    const int64_t *places;   /* [V] the column of each; `columns` or more for none; or NULL */
} Books;

/* `rows` entries are read behind `old` ones that have been. The last `fresh` of them are new. */
typedef struct {
    int32_t old, rows, fresh;
    const int64_t *tokens;  /* [fresh] */
    const int64_t *parents; /* [fresh]; NULL for a chain below the last entry */
    int32_t below;          /* the entry that parent 0 means; parent −1 is the one before it */
    const float *states;    /* [known, width] what the first of `given` become and stay; */
    int32_t known;          /*   the others are the draft's own */
    float *logits;          /* [fresh, head rows and `more`], or NULL */
} Step;

typedef struct {
    Forward forward;
    const Draft *draft;
    const Books *books;
    int old;
} Drafting;

static void draft_work(const Seat *s, void *argument) {
    const Drafting *d = argument;
    const Draft *draft = d->draft;
    const Books *books = d->books;
    const size_t width = (size_t)draft->model.width;
    Input in = own(s, d->forward.in);
    in.columns = draft->join.columns;
    ROWS_OF(s, &in, d->forward.pass->rows) {
        const int entry = d->old + item;
        const float *embedded = books->embedding + (size_t)books->tokens[entry] * width;
        const float *state = books->given + (size_t)(1 + books->parents[entry]) * width;
        float *to = in.values + (size_t)item * (size_t)in.columns;
        normalise(embedded, draft->token_norm, draft->model.eps, (int)width, to);
        normalise(state, draft->state_norm, draft->model.eps, (int)width, to + width);
        if (draft->join.kind != FLOAT32) encode(&in, item);
    }
    if (!in.apart) meet(s);
    const Matrix *next = &draft->model.layer[0].qkv;
    product(s, &draft->join, &in, d->forward.pass->rows, d->forward.pass->states, STORE, next);
    forward_work(s, (void *)&d->forward);
}

/* Where in the text the longest end of a tail stands with a token after it: the latest such place.
 * Its length; the token after it, any where the length is 0. */
static int longest_match(const Books *b, const int64_t *tail, int64_t *token) {
    int longest = 0;
    *token = b->text[0];
    for (int end = b->count - 2; end >= 0 && longest < b->size; end--) {
        int length = 0;
        while (length < b->size && length <= end &&
               b->text[end - length] == tail[b->size - 1 - length])
            length++;
        if (length > longest) longest = length, *token = b->text[end + 1];
    }
    return longest;
}

static float largest_of(const float *from, int columns);
static float log_sum(const float *from, int columns, float most);

/* A row becomes (1 − share) · softmax + share · the token that is copied, up to a constant: the mass
 * of that token grows. One without a column is not copied. */
static void mix(const Books *b, const int64_t *tail, float *row) {
    int64_t token;
    if (b->count < 2) return;
    const float odds = b->odds[longest_match(b, tail, &token)];
    const int64_t place = b->places ? b->places[token] : token;
    if (odds == -INFINITY || place >= b->columns) return;
    const float was = row[place];
    const float added = log_sum(row, b->columns, largest_of(row, b->columns)) + odds;
    row[place] = was > added ? was + log1pf(expf(added - was)) : added + log1pf(expf(was - added));
}

/* One pass over entries. 0 if it was done, 1 where memory is missing. */
int mtad_draft(Context *c, const Draft *draft, Cache *cache, const Books *books, const Step *step) {
    const size_t rows = (size_t)step->rows, width = (size_t)draft->model.width;
    const size_t size = (size_t)books->size;
    const int nodes = step->old + step->rows, first = nodes - step->fresh;
    const size_t seen = rows * (size_t)nodes;
    memcpy(books->given, step->states, (size_t)step->known * width * sizeof(float));
    for (int i = 0; i < step->fresh; i++) {
        books->tokens[first + i] = step->tokens[i];
        books->parents[first + i] = step->parents ? step->parents[i] + step->below : first + i - 1;
    }
    Pass pass = {.rows = step->rows, .prefix = books->prefix, .nodes = nodes,
                 .logits = step->logits, .skipped = step->rows - step->fresh,
                 .more = books->more, .from = books->from};
    Drafting d = {{.model = &draft->model, .cache = cache, .pass = &pass}, draft, books, step->old};
    const size_t more = rows * (width * sizeof(float) + sizeof(int64_t)) + seen + 3 * 64;
    char *at = cut_forward(c, &d.forward, (size_t)draft->join.columns, more);
    if (!at) return 1;
    pass.states = cut(&at, rows * width * sizeof(float));
    int64_t *positions = cut(&at, rows * sizeof(int64_t));
    uint8_t *visible = cut(&at, seen);
    memset(visible, 0, seen);
    for (int row = 0; row < step->rows; row++) {
        positions[row] = books->position - 1;
        for (int64_t e = step->old + row; e >= 0; e = books->parents[e]) {
            visible[(size_t)row * (size_t)nodes + (size_t)e] = 1;
            positions[row]++;
        }
    }
    pass.positions = positions;
    pass.visible = visible;
    look(&d.forward);
    run(c, draft_work, &d);
    const size_t stride = logits_width(&draft->model, books->more);
    for (int row = 0; row < step->rows; row++) {
        const size_t entry = (size_t)(step->old + row), above = (size_t)books->parents[entry] + 1;
        if ((int)entry + 1 >= step->known)
            memcpy(books->given + (entry + 1) * width, pass.states + (size_t)row * width,
                   width * sizeof(float));
        if (!size) continue;
        int64_t *tail = books->tails + (entry + 1) * size;
        memcpy(tail, books->tails + above * size + 1, (size - 1) * sizeof *tail);
        tail[size - 1] = books->tokens[entry];
        if (step->logits && row >= pass.skipped)
            mix(books, tail, step->logits + (size_t)(row - pass.skipped) * stride);
    }
    return 0;
}

typedef struct {
    const Draft *draft;
    const float *hidden;
    float *to;
    int rows;
    Input in;
} Reading;

static void read_work(const Seat *s, void *argument) {
    const Reading *r = argument;
    const Draft *draft = r->draft;
    const size_t width = (size_t)draft->model.width;
    Input in = own(s, r->in);
    ROWS_OF(s, &in, r->rows) {
        for (int t = 0; t < draft->taps; t++) {
            const size_t start = ((size_t)item * (size_t)draft->taps + (size_t)t) * width;
            normalise(r->hidden + start, draft->read_norm + (size_t)t * width, draft->model.eps,
                      (int)width, in.values + start);
        }
        if (draft->read.kind != FLOAT32) encode(&in, item);
    }
    if (!in.apart) meet(s);
    product(s, &draft->read, &in, r->rows, r->to, STORE, NULL);
}

/* The target's hidden states [rows, taps, width] → the states [rows, width] that the draft reads.
 * 0 if it was done, 1 where memory is missing. */
int mtad_read(Context *c, const Draft *draft, const float *hidden, float *to, int rows) {
    const size_t columns = (size_t)draft->read.columns, inputs = copies(c, (size_t)rows, columns);
    if (!reserve(c, inputs * input_bytes((size_t)rows, columns))) return 1;
    char *at = c->scratch;
    Reading r = {draft, hidden, to, rows, cut_input(&at, (size_t)rows, columns, inputs)};
    run(c, read_work, &r);
    return 0;
}

/* Entries that become text. */
typedef struct {
    const float *hidden; /* [rows, taps, width] the target's states at the next tokens, which are */
    float *states;       /*   read to the `known` that are there: [known + rows, width] */
    const int64_t *path; /* [length] nodes to keep, counted behind the unread; NULL for the first */
    int64_t *kept;       /* [length] becomes their tokens */
    int32_t rows, known, length;
    int32_t unread;      /* so many of the first entries are text already; */
    int32_t entries;     /*   so many entries have been read, or 0; */
    int32_t exact;       /*   so many nodes of them with the target's states. All are brought up */
} Keep;                  /*   to what is left to read */

/* What was read with the target's states becomes a part of the prefix, with its slots; the rest of
 * the path is to be read again. 0 if it was done, 1 where memory is missing, 2 where the path names
 * what is no node; then nothing was done. */
int mtad_keep(Context *c, const Draft *draft, Books *books, Keep *keep) {
    const size_t width = (size_t)draft->model.width, size = (size_t)books->size;
    float *more = keep->states + (size_t)keep->known * width;
    const int64_t nodes = keep->entries - keep->unread;
    for (int i = 0; keep->path && i < keep->length; i++)
        if (keep->path[i] < 0 || keep->path[i] >= nodes) return 2;
    if (keep->rows && mtad_read(c, draft, keep->hidden, more, keep->rows)) return 1;
    keep->known += keep->rows;
    for (int i = 0; i < keep->length; i++) {
        const int64_t node = keep->path ? keep->path[i] : i;
        keep->kept[i] = books->text[books->count++] = books->tokens[keep->unread + node];
    }
    int unread = keep->unread + keep->length;
    if (keep->entries) {
        const int stay = keep->length < keep->exact ? keep->length : keep->exact;
        const int done = keep->unread + stay;
        books->prefix += done;
        books->position += done;
        keep->known = keep->known > done ? keep->known - done : 0;
        memmove(keep->states, keep->states + (size_t)done * width,
                (size_t)keep->known * width * sizeof(float));
        unread -= done;
    }
    keep->unread = unread, keep->entries = keep->exact = 0;
    const int64_t *from = books->text + books->count - unread;
    for (int i = 0; i < unread; i++) books->tokens[i] = from[i], books->parents[i] = i - 1;
    memcpy(books->tails, from - size, size * sizeof *from);
    return 0;
}

/* ---- wide rows ---------------------------------------------------------------------------- */

#define ROWS_WORTH_THREADS 16384 /* logits */

typedef struct {
    const float *values; /* [rows, columns] */
    int64_t stride;      /* floats from row to row */
    int32_t rows, columns;
    int32_t count; /* at most `columns`; 0 looks for none */
    float *best;   /* [rows, count] the largest, descending; where there is a NaN it comes first */
    int64_t *at;   /* [rows, count] their columns; of equal ones the first comes first */
    float *sums;   /* [rows] log Σ exp; NULL for none */
} Rows;

INLINE int any(ints mask) {
#if VECTOR == 64
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
    uint64_t word[VECTOR / 8], all = 0;
    memcpy(word, &mask, VECTOR);
    for (int i = 0; i < VECTOR / 8; i++) all |= word[i];
    return all != 0;
#endif
}

/* Whether x in column i comes after y in column j. */
INLINE int after(float x, int64_t i, float y, int64_t j) {
    if (x != x || y != y) return y != y && (x == x || i > j);
    return x < y || (x == y && i > j);
}

/* Lets the item at `root` sink in a heap whose root comes after all others. */
static void sink(float *value, int64_t *at, int root, int count) {
    for (int child; (child = 2 * root + 1) < count; root = child) {
        if (child + 1 < count && after(value[child + 1], at[child + 1], value[child], at[child]))
            child++;
        if (!after(value[child], at[child], value[root], at[root])) return;
        float v = value[root];
        int64_t a = at[root];
        value[root] = value[child], at[root] = at[child];
        value[child] = v, at[child] = a;
    }
}

static void best_of_row(const float *from, int columns, int count, float *value, int64_t *at) {
    for (int i = 0; i < count; i++) value[i] = from[i], at[i] = i;
    for (int i = count / 2 - 1; i >= 0; i--) sink(value, at, i, count);
    for (int first = count; first < columns; first += LANES) {
        /* A vector at a time is looked at closely only if it holds something to take. */
        if (first + LANES <= columns && !any(~(load_floats(from + first) <= value[0]))) continue;
        for (int i = first; i < columns && i < first + LANES; i++) {
            if (!after(value[0], at[0], from[i], i)) continue;
            value[0] = from[i], at[0] = i;
            sink(value, at, 0, count);
        }
    }
    for (int last = count - 1; last > 0; last--) {
        float v = value[0];
        int64_t a = at[0];
        value[0] = value[last], at[0] = at[last];
        value[last] = v, at[last] = a;
        sink(value, at, 0, last);
    }
}

static float largest_of(const float *from, int columns) {
    const int whole = columns / LANES * LANES;
    floats most = broadcast(-INFINITY);
    for (int i = 0; i < whole; i += LANES) most = larger(load_floats(from + i), most);
    floats rest = broadcast(-INFINITY);
    for (int i = whole; i < columns; i++) rest[i - whole] = from[i];
    return lane_maximum(larger(rest, most));
}

/* log Σ exp of a row whose largest value is `top`. */
static float log_sum(const float *from, int columns, float top) {
    const int whole = columns / LANES * LANES;
    floats rest = broadcast(-INFINITY), sum = {0};
    for (int i = whole; i < columns; i++) rest[i - whole] = from[i];
    for (int i = 0; i < whole; i += LANES) sum += exponential(load_floats(from + i) - top);
    if (whole < columns) sum += exponential(rest - top);
    return top + logf(lane_sum(sum));
}

/* A row is read twice, the second time from the cache. */
static void rows_work(const Seat *s, void *argument) {
    const Rows *r = argument;
    PARALLEL(s, r->rows) {
        const float *from = r->values + item * r->stride;
        const size_t to = (size_t)item * (size_t)r->count;
        if (r->count) best_of_row(from, r->columns, r->count, r->best + to, r->at + to);
        if (!r->sums) continue;
        const float top = r->count ? r->best[to] : largest_of(from, r->columns);
        r->sums[item] = log_sum(from, r->columns, top);
    }
}

/* Waking the other threads costs more than a few rows of a draft. */
void mtad_rows(Context *c, const Rows *rows) {
    _Atomic int32_t next = 0;
    Context alone = {.threads = 1, .next = &next};
    const int small = (int64_t)rows->rows * rows->columns < ROWS_WORTH_THREADS;
    run(small ? &alone : c, rows_work, (void *)rows);
}

/* Warped log-probabilities of rows of logits, which descend if top_p < 1: divided by the
 * temperature and normalised, then only those before which less mass than top_p stands, and
 * normalised again. The first one always stays. */
void mtad_warp(const float *values, int rows, int columns, double temperature, double top_p,
               float *logprobs) {
    for (int row = 0; row < rows; row++, values += columns, logprobs += columns) {
        double most = values[0], mass = 0.0, kept = 0.0;
        for (int i = 1; i < columns; i++) /* a NaN, once met, stays */
            most = values[i] > most || values[i] != values[i] ? values[i] : most;
        for (int i = 0; i < columns; i++) mass += exp((values[i] - most) / temperature);
        int stay = 0;
        while (stay < columns && (stay == 0 || top_p >= 1.0 || kept < top_p * mass))
            kept += exp((values[stay++] - most) / temperature);
        const double total = log(kept);
        for (int i = 0; i < columns; i++) {
            const double scaled = (values[i] - most) / temperature;
            logprobs[i] = mass != mass ? NAN : i < stay ? (float)(scaled - total) : -INFINITY;
        }
    }
}

/* The largest logits of each row with their tokens, and what a draw is made from. */
typedef struct {
    const float *logits;  /* [rows, all] */
    int64_t stride;       /* floats from row to row */
    const int64_t *names; /* [all] tokens of the columns; NULL where column i is token i */
    int32_t rows, all;
    int32_t columns; /* so many of each row are choices */
    double temperature, top_p;
    float *values;      /* [rows, columns] the largest, */
    int64_t *token_ids; /* their tokens */
    float *logprobs;    /* and warped log-probabilities */
    float *sums;        /* [rows] log Σ exp of the whole row; NULL for none */
} Choices;

void mtad_choose(Context *c, const Choices *h) {
    const Rows rows = {h->logits, h->stride, h->rows, h->all, h->columns,
                       h->values, h->token_ids, h->sums};
    mtad_rows(c, &rows);
    for (int at = 0; h->names && at < h->rows * h->columns; at++)
        h->token_ids[at] = h->names[h->token_ids[at]];
    mtad_warp(h->values, h->rows, h->columns, h->temperature, h->top_p, h->logprobs);
}

typedef struct {
    Choices from;         /* [rows, columns], overwritten */
    const double *chance; /* uniforms: [rows * columns], or [width] where that is more */
    int32_t steps;        /* tokens in every hypothesis so far */
    int32_t width;        /* hypotheses of the next step */
    /* Of the hypotheses so far, [rows, steps] and [rows] ... */
    const int64_t *token_ids;
    const float *logprobs;
    const int64_t *nodes;
    const uint8_t *real;
    const double *joint;
    const uint8_t *finished;
    /* ... and of the next ones, [width, steps + 1] and [width]. */
    int64_t *new_token_ids;
    float *new_logprobs;
    int64_t *new_nodes;
    uint8_t *new_real;
    double *new_joint;
    uint8_t *new_finished;
    int64_t *came_from;
    double *races; /* as many as `chance`, overwritten */
} Growth;

/* A step of beam sampling: `width` distinct continuations, drawn by an exponential race with the
 * joint probabilities as weights. A finished hypothesis continues to itself alone. Ends of
 * sequences are the caller's. */
void mtad_grow(Context *c, const Growth *g) {
    mtad_choose(c, &g->from);
    const int rows = g->from.rows, columns = g->from.columns, steps = g->steps;
    const int count = rows * columns;
    float *choices = g->from.logprobs;
    int broken = 0;
    for (int row = 0; row < rows; row++) {
        for (int i = 0; i < columns; i++) {
            const int at = row * columns + i;
            if (g->finished[row]) choices[at] = i ? -INFINITY : 0.0f;
            const double weight = g->joint[row] + choices[at];
            const double wait = fmax(-log1p(-g->chance[at]), DBL_MIN);
            broken |= weight != weight;
            g->races[at] = weight - log(wait);
        }
    }
    for (int slot = 0; slot < g->width; slot++) {
        int best = -1;
        for (int i = 0; i < count; i++)
            if (g->races[i] == g->races[i] && (best < 0 || g->races[i] > g->races[best])) best = i;
        /* Without a candidate left, the slot is dead; it points anywhere. */
        const int at = best < 0 ? count - 1 : best, row = at / columns;
        const double joint =
            broken ? NAN : best < 0 ? -INFINITY : g->joint[row] + choices[at];
        if (best >= 0) g->races[best] = NAN;
        const size_t from = (size_t)row * (size_t)steps, to = (size_t)slot * (size_t)(steps + 1);
        if (steps) {
            memcpy(g->new_token_ids + to, g->token_ids + from, (size_t)steps * sizeof(int64_t));
            memcpy(g->new_logprobs + to, g->logprobs + from, (size_t)steps * sizeof(float));
            memcpy(g->new_nodes + to, g->nodes + from, (size_t)steps * sizeof(int64_t));
            memcpy(g->new_real + to, g->real + from, (size_t)steps);
        }
        const int ended = g->finished[row], alive = joint > -INFINITY;
        const size_t last = to + (size_t)steps;
        g->new_token_ids[last] =
            ended && steps ? g->token_ids[from + (size_t)steps - 1] : g->from.token_ids[at];
        g->new_logprobs[last] = broken ? NAN : choices[at];
        g->new_nodes[last] = (int64_t)steps * g->width + slot;
        g->new_real[last] = alive && !ended;
        g->new_joint[slot] = joint;
        g->new_finished[slot] = ended || !alive;
        g->came_from[slot] = row;
    }
}

/* The place at which the cumulative mass of a row passes a share of the whole. */
static int invert(const double *masses, int columns, double share) {
    double total = 0.0, mass = 0.0;
    for (int i = 0; i < columns; i++) total += masses[i];
    int at = 0;
    for (; at < columns - 1; at++) {
        mass += masses[at];
        if (mass > share * total) break;
    }
    return at;
}

/* One token of each row, by inverting its cumulative mass at a uniform. */
void mtad_draw(const double *logprobs, const int64_t *token_ids, const double *uniform, int rows,
               int columns, int64_t *drawn) {
    double masses[columns];
    for (int row = 0; row < rows; row++, logprobs += columns, token_ids += columns) {
        for (int i = 0; i < columns; i++) masses[i] = exp(logprobs[i]);
        drawn[row] = token_ids[invert(masses, columns, uniform[row])];
    }
}

static int draw_of(const float *logprobs, int columns, double uniform) {
    double masses[columns];
    for (int i = 0; i < columns; i++) masses[i] = exp((double)logprobs[i]);
    return invert(masses, columns, uniform);
}

/* The same from one of several rows. */
void mtad_draw_row(const float *logprobs, const int64_t *token_ids, const int64_t *row,
                   const double *uniform, int columns, int64_t *drawn) {
    const size_t start = (size_t)*row * (size_t)columns;
    *drawn = token_ids[start + (size_t)draw_of(logprobs + start, columns, *uniform)];
}

typedef struct {
    const float *target; /* [draft rows + 1, columns] log p, */
    const int64_t *target_ids;
    const float *draft;  /* [draft rows, draft columns] log q */
    const int64_t *draft_ids;
    int32_t columns, draft_columns, draft_rows;
    const int64_t *accepted; /* the row */
    const double *uniform;
} Correction;

/* A token from norm(max(p − q, 0)) of one row, from p itself where that mass is 0 or where there is
 * no q. */
void mtad_draw_corrected(const Correction *c, int64_t *drawn) {
    const size_t row = (size_t)*c->accepted, columns = (size_t)c->columns;
    const float *target = c->target + row * columns;
    const int64_t *ids = c->target_ids + row * columns;
    const size_t start = row * (size_t)c->draft_columns;
    double whole[columns], left[columns], total = 0.0;
    for (size_t i = 0; i < columns; i++) left[i] = whole[i] = exp((double)target[i]);
    for (int j = 0; j < c->draft_columns && (int)row < c->draft_rows; j++)
        for (size_t i = 0; i < columns; i++)
            if (ids[i] == c->draft_ids[start + j]) left[i] -= exp((double)c->draft[start + j]);
    for (size_t i = 0; i < columns; i++) {
        left[i] = left[i] > 0.0 ? left[i] : 0.0;
        total += left[i];
    }
    *drawn = ids[invert(total > 0.0 ? left : whole, c->columns, *c->uniform)];
}

typedef struct {
    Choices from;
    const double *uniform; /* [rows] */
    int64_t *drawn;        /* [rows] */
    float *picked;         /* [rows] their log-probabilities */
} Sample;

/* `mtad_draw` from the choices of each row. */
void mtad_sample(Context *c, const Sample *s) {
    mtad_choose(c, &s->from);
    const int columns = s->from.columns;
    for (int row = 0; row < s->from.rows; row++) {
        const size_t start = (size_t)row * (size_t)columns;
        const size_t at =
            start + (size_t)draw_of(s->from.logprobs + start, columns, s->uniform[row]);
        s->drawn[row] = s->from.token_ids[at];
        s->picked[row] = s->from.logprobs[at];
    }
}

/* What a row says of one token; −∞ where it is not among those of the row. */
static float said_of(const float *logprobs, const int64_t *token_ids, int columns, int64_t token) {
    float said = -INFINITY;
    for (int i = 0; i < columns; i++)
        if (token_ids[i] == token) said = logprobs[i];
    return said;
}

/* The same of one token for each row. */
void mtad_pick(const float *logprobs, const int64_t *token_ids, const int64_t *tokens, int rows,
               int columns, float *picked) {
    for (int row = 0; row < rows; row++, logprobs += columns, token_ids += columns)
        picked[row] = said_of(logprobs, token_ids, columns, tokens[row]);
}

typedef struct {
    const float *logits; /* [rows, vocabulary] */
    int64_t stride;
    int32_t vocabulary;
    const float *values;      /* [rows, columns] the largest of each row, descending, */
    const int64_t *token_ids; /*   and what they are */
    int32_t columns;
    const float *sums;       /* [rows] log Σ exp */
    const int64_t *path;     /* [depth + 1] the row at each depth; NULL for one after the other */
    const int64_t *tokens;   /* [depth] */
    const int64_t *accepted; /* of them */
    const int64_t *final;    /* what stands after those */
    int32_t depth, count;    /* so many of a row's largest are recorded */
    float *emitted;          /* [depth + 1] the log-probability of what was emitted, */
    int64_t *ids;            /* [depth + 1, count] what else could have been, */
    float *logprobs;         /*   and theirs */
} Record;

/* What a trace keeps of a pass; all log-probabilities are those of the rows as they are. */
void mtad_record(const Record *r) {
    for (int at = 0; at <= r->depth; at++) {
        const size_t row = r->path ? (size_t)r->path[at] : (size_t)at;
        const int is_draft = at < r->depth && at != *r->accepted;
        const int64_t token = is_draft ? r->tokens[at] : *r->final;
        const int known = token >= 0 && token < r->vocabulary;
        const size_t start = row * (size_t)r->stride;
        r->emitted[at] = known ? r->logits[start + (size_t)token] - r->sums[row] : -INFINITY;
        for (int i = 0; i < r->count; i++) {
            const size_t from = row * (size_t)r->columns + (size_t)i;
            const size_t to = (size_t)at * (size_t)r->count + (size_t)i;
            r->ids[to] = r->token_ids[from];
            r->logprobs[to] = r->values[from] - r->sums[row];
        }
    }
}

/* ---- acceptance rules ---------------------------------------------------------------------- */

/* What both models say of the nodes of a draft tree, parents before children. The row before a node
 * is its parent's; row 0 is that of the token before the tree. */
typedef struct {
    int32_t nodes, columns;
    const float *logprobs;    /* [rows, columns] log p, */
    const int64_t *token_ids; /*   of these tokens */
    const int64_t *tokens;    /* [nodes] */
    const int64_t *parents;   /* [nodes] −1 for a child of that token; NULL for a chain */
    const float *drafted;     /* [nodes] log q */
    const uint8_t *real;      /* [nodes] 0 for a slot without a node; NULL where all are */
    float *target;            /* [nodes] becomes log p of each */
} Offer;

static int64_t parent_of(const Offer *o, int node) {
    return o->parents ? o->parents[node] : node - 1;
}

/* log p of a node. */
static float look_up(const Offer *o, int node) {
    const size_t start = (size_t)(parent_of(o, node) + 1) * (size_t)o->columns;
    return o->target[node] =
               said_of(o->logprobs + start, o->token_ids + start, o->columns, o->tokens[node]);
}

static int stands(const Offer *o, int node) { return !o->real || o->real[node]; }

/* How long a prefix of a chain has a joint ratio p/q above a threshold: the longest such prefix. */
void mtad_joint_prefix(const Offer *o, double log_threshold, int64_t *accepted) {
    double target = 0.0, draft = 0.0;
    *accepted = 0;
    for (int node = 0; node < o->nodes; node++) {
        target += (double)look_up(o, node);
        draft += (double)o->drafted[node];
        if (target - draft > log_threshold && stands(o, node)) *accepted = node + 1;
    }
}

/* How many tokens of a chain are kept before the first whose ratio p/q is not above its uniform. */
void mtad_kept_run(const Offer *o, const double *uniform, double *ratios, int64_t *accepted) {
    int kept = 1;
    *accepted = 0;
    for (int node = 0; node < o->nodes; node++) {
        ratios[node] = exp((double)look_up(o, node) - (double)o->drafted[node]);
        kept = kept && uniform[node] < ratios[node];
        *accepted += kept;
    }
}

/* The way to the deepest node whose joint p is above that of a reference block under q, as far as
 * the node is deep, by a threshold; of several the one with the largest p, of equal ones the first.
 * Without any, the way to the first node. */
void mtad_joint_path(const Offer *o, const float *reference, const int64_t *paths, int levels,
                     double log_threshold, int64_t *accepted, int64_t *path) {
    double best = -INFINITY;
    int chosen = 0;
    *accepted = 0;
    for (int node = 0; node < o->nodes; node++) look_up(o, node);
    for (int node = 0; node < o->nodes; node++) {
        const int64_t *way = paths + (size_t)node * (size_t)levels;
        double target = 0.0, draft = 0.0;
        int depth = 0;
        for (; depth < levels && way[depth] >= 0; depth++) {
            target += (double)o->target[way[depth]];
            draft += (double)reference[depth];
        }
        if (!(target - draft > log_threshold) || !stands(o, node) || depth < *accepted) continue;
        if (depth == *accepted && !(target > best)) continue;
        *accepted = depth, best = target, chosen = node;
    }
    for (int depth = 0; depth < levels; depth++) {
        const int64_t node = paths[(size_t)chosen * (size_t)levels + (size_t)depth];
        path[depth] = node > 0 ? node : 0;
    }
}

/* Tests of the children of a node in turn, then of those of the child that was accepted. */
typedef struct {
    Offer offer;
    const float *draft; /* [rows, draft columns] log q of what children were drawn from, */
    const int64_t *draft_ids;
    int32_t draft_columns, levels, replacement;
    const double *uniform; /* [nodes + 1] of each node's test, then of the final draw */
    int64_t *path;         /* [levels] accepted nodes, */
    int64_t *accepted;     /*   so many */
    int64_t *tests;        /* [levels] how many children were tested below each of them */
    double *scores;        /* [nodes] p/q of each test, NaN for none, */
    double *thresholds;    /*   and the uniforms, likewise */
    int64_t *final;        /* the token behind them */
} Walk;

static void divide(double *masses, int count, double by) {
    for (int i = 0; i < count && by > 0.0; i++) masses[i] /= by;
}

static double mass_of(const double *masses, const int64_t *ids, int count, int64_t token) {
    double mass = 0.0;
    for (int i = 0; i < count; i++) mass += ids[i] == token ? masses[i] : 0.0;
    return mass;
}

/* See `multi_candidate` in verify.py. */
void mtad_walk(const Walk *w) {
    const Offer *o = &w->offer;
    const int columns = o->columns, draft_columns = w->draft_columns;
    double p[columns], q[draft_columns], shared[columns]; /* q of the tokens that p is about */
    const int64_t *ids;
    int64_t node = -1;
    *w->accepted = 0;
    for (int i = 0; i < w->levels; i++) w->path[i] = w->tests[i] = 0;
    for (int i = 0; i < o->nodes; i++) {
        look_up(o, i);
        w->scores[i] = w->thresholds[i] = NAN;
    }
    for (;;) {
        const size_t start = (size_t)(node + 1) * (size_t)columns;
        ids = o->token_ids + start;
        for (int i = 0; i < columns; i++) p[i] = exp((double)o->logprobs[start + (size_t)i]);
        int tests = 0;
        int64_t next = -1;
        for (int child = (int)node + 1; child < o->nodes; child++) {
            if (parent_of(o, child) != node || !stands(o, child)) continue;
            const size_t first = (size_t)(node + 1) * (size_t)draft_columns;
            const int64_t *draft_ids = w->draft_ids + first, token = o->tokens[child];
            if (!tests++) {
                for (int i = 0; i < draft_columns; i++)
                    q[i] = exp((double)w->draft[first + (size_t)i]);
                for (int i = 0; i < columns; i++)
                    shared[i] = mass_of(q, draft_ids, draft_columns, ids[i]);
            }
            const double drafted = mass_of(q, draft_ids, draft_columns, token);
            const double ratio = drafted > 0.0 ? mass_of(p, ids, columns, token) / drafted : 0.0;
            w->scores[child] = ratio;
            w->thresholds[child] = w->uniform[child];
            if (w->uniform[child] < ratio) {
                next = child;
                break;
            }
            double left[columns], total = 0.0;
            for (int i = 0; i < columns; i++) {
                left[i] = p[i] > shared[i] ? p[i] - shared[i] : 0.0;
                total += left[i];
            }
            if (total > 0.0) memcpy(p, left, sizeof p);
            divide(p, columns, total);
            if (w->replacement) continue;
            total = 0.0;
            for (int i = 0; i < draft_columns; i++) {
                q[i] = draft_ids[i] == token ? 0.0 : q[i];
                total += q[i];
            }
            for (int i = 0; i < columns; i++) shared[i] = ids[i] == token ? 0.0 : shared[i];
            divide(q, draft_columns, total);
            divide(shared, columns, total);
        }
        if (tests) w->tests[*w->accepted] = tests;
        if (next < 0) break;
        node = w->path[(*w->accepted)++] = next;
    }
    *w->final = ids[invert(p, columns, w->uniform[o->nodes])];
}

/* ---- whole blocks of a draft --------------------------------------------------------------- */

/* `steps` tokens behind the last of `first` entries, after which stand `logits`; each is read as an
 * entry of its own but those of the last step. With `floors` there may be fewer: none behind a token
 * that ends the text, or behind step s where the joint log-probability up to there is below
 * floors[s]. */
typedef struct {
    int32_t steps, first;
    const double *floors;       /* [steps − 1] or more; NULL for none */
    const int64_t *ends;        /* [num_ends] tokens that end a text */
    int32_t num_ends;
    int32_t *taken;             /* so many steps there were */
    int32_t choices;            /* of each row so many are left */
    double temperature, top_p;
    const float *logits;        /* [columns of the books] */
    float *scratch;             /* [width or 1, head rows and `more`] logits of later steps */
} Block;

static int further(Context *c, const Draft *draft, Cache *cache, const Books *books,
                   const Block *block, const Step *step, Choices *from) {
    if (mtad_draft(c, draft, cache, books, step)) return 1;
    from->logits = block->scratch;
    from->stride = (int64_t)logits_width(&draft->model, books->more);
    from->rows = step->fresh;
    return 0;
}

static Choices choices_of(const Books *books, const Block *block) {
    return (Choices){.logits = block->logits, .stride = books->columns, .names = books->names,
                     .rows = 1, .all = books->columns, .columns = block->choices,
                     .temperature = block->temperature, .top_p = block->top_p};
}

static int is_end(const Block *block, int64_t token) {
    for (int e = 0; e < block->num_ends; e++)
        if (block->ends[e] == token) return 1;
    return 0;
}

/* Whether a block is over behind a step, after which the likeliest text is so likely. */
static int is_over(const Block *block, int step, double joint, int ended) {
    return block->floors && step + 1 < block->steps && (ended || joint < block->floors[step]);
}

/* A line of draws. */
typedef struct {
    Block block;
    const double *uniform; /* [steps] */
    int64_t *drawn;        /* [steps] */
    float *picked;         /* [steps] their log-probabilities */
    float *values;         /* [steps, choices] the largest of each row, */
    int64_t *token_ids;    /* their tokens */
    float *logprobs;       /* and warped log-probabilities */
} Line;

/* 0 if it was done, 1 where memory is missing. */
int mtad_line(Context *c, const Draft *draft, Cache *cache, const Books *books, const Line *line) {
    const Block *block = &line->block;
    Choices from = choices_of(books, block);
    double joint = 0.0;
    for (int step = 0; step < block->steps; step++) {
        if (step) {
            const Step next = {.old = block->first + step - 1, .rows = 1, .fresh = 1,
                               .tokens = line->drawn + step - 1, .logits = block->scratch};
            if (further(c, draft, cache, books, block, &next, &from)) return 1;
        }
        const size_t at = (size_t)step * (size_t)block->choices;
        from.values = line->values + at;
        from.token_ids = line->token_ids + at;
        from.logprobs = line->logprobs + at;
        const Sample sample = {from, line->uniform + step, line->drawn + step, line->picked + step};
        mtad_sample(c, &sample);
        joint += (double)line->picked[step];
        *block->taken = step + 1;
        if (is_over(block, step, joint, is_end(block, line->drawn[step]))) break;
    }
    return 0;
}

/* The slot with the largest joint; a NaN counts as the largest. */
static int likeliest(const double *joint, int width) {
    int best = 0;
    for (int slot = 1; slot < width; slot++)
        if (joint[best] == joint[best] && !(joint[slot] <= joint[best])) best = slot;
    return best;
}

/* Beam sampling. Of step s there are [width, s] and [width] results, behind those of the steps
 * before. */
typedef struct {
    Block block;
    int32_t width;
    const double *chance; /* of each step as in Growth, one after the other */
    float *values;        /* [width, choices], overwritten, */
    int64_t *best;        /* as the following */
    float *warped;
    double *races;        /* [width, choices], or [width] where that is more */
    int64_t *tokens, *parents; /* [width] */
    int64_t *token_ids;
    float *logprobs;
    int64_t *nodes;
    uint8_t *real;
    double *joint;
    uint8_t *finished;
    int64_t *came_from;
} Search;

/* 0 if it was done, 1 where memory is missing. */
int mtad_search(Context *c, const Draft *draft, Cache *cache, const Books *books, const Search *b) {
    const Block *block = &b->block;
    const size_t width = (size_t)b->width;
    const double *chance = b->chance;
    const double no_joint = 0.0;
    const uint8_t unfinished = 0;
    Growth g = {.from = choices_of(books, block), .width = b->width, .joint = &no_joint,
                .finished = &unfinished, .races = b->races};
    g.from.values = b->values, g.from.token_ids = b->best, g.from.logprobs = b->warped;
    size_t wide = 0; /* where the [width, s] results of a step begin */
    for (int step = 0; step < block->steps; step++) {
        const size_t flat = width * (size_t)step, next = wide + width * (size_t)step;
        if (step) {
            for (size_t slot = 0; slot < width; slot++) {
                const size_t last = wide + (slot + 1) * (size_t)step - 1;
                b->tokens[slot] = b->token_ids[last];
                b->parents[slot] = step > 1 ? b->nodes[last - 1] : -1;
            }
            const int old = block->first + (step - 1) * b->width;
            const Step entries = {.old = old, .rows = b->width, .fresh = b->width,
                                  .tokens = b->tokens, .parents = b->parents,
                                  .below = block->first, .logits = block->scratch};
            if (further(c, draft, cache, books, block, &entries, &g.from)) return 1;
        }
        const int rows = g.from.rows, columns = g.from.columns;
        g.steps = step;
        g.chance = chance;
        chance += rows * columns > b->width ? rows * columns : b->width;
        g.new_token_ids = b->token_ids + next, g.new_logprobs = b->logprobs + next;
        g.new_nodes = b->nodes + next, g.new_real = b->real + next;
        g.new_joint = b->joint + flat, g.new_finished = b->finished + flat;
        g.came_from = b->came_from + flat;
        mtad_grow(c, &g);
        for (size_t slot = 0; slot < width; slot++)
            if (is_end(block, g.new_token_ids[(slot + 1) * (size_t)(step + 1) - 1]))
                g.new_finished[slot] = 1;
        *block->taken = step + 1;
        const int best = likeliest(g.new_joint, b->width);
        if (is_over(block, step, g.new_joint[best], g.new_finished[best])) break;
        g.token_ids = g.new_token_ids, g.logprobs = g.new_logprobs, g.nodes = g.new_nodes;
        g.real = g.new_real, g.joint = g.new_joint, g.finished = g.new_finished;
        wide = next;
    }
    return 0;
}

/* What `mtad_search` has left. */
typedef struct {
    int32_t steps, width;
    const int64_t *token_ids;
    const float *logprobs;
    const int64_t *nodes;
    const uint8_t *real;
    const double *joint;
} Beams;

/* Where the [width, step] results of a step begin, the first being 1. */
static size_t step_start(const Beams *b, int step) {
    return (size_t)b->width * (size_t)step * (size_t)(step - 1) / 2;
}

/* Where the history of the likeliest hypothesis begins. */
static size_t best_of(const Beams *b) {
    const double *joint = b->joint + (size_t)b->width * (size_t)(b->steps - 1);
    const size_t best = (size_t)likeliest(joint, b->width);
    return step_start(b, b->steps) + best * (size_t)b->steps;
}

/* The likeliest hypothesis, [steps] each, and the way to it among the nodes of a cache: `waiting`
 * tokens, then its own. */
void mtad_best_block(const Beams *b, int waiting, int64_t *token_ids, float *logprobs,
                     uint8_t *real, int64_t *path) {
    const size_t from = best_of(b), steps = (size_t)b->steps;
    memcpy(token_ids, b->token_ids + from, steps * sizeof *token_ids);
    memcpy(logprobs, b->logprobs + from, steps * sizeof *logprobs);
    memcpy(real, b->real + from, steps);
    for (int i = 0; i < waiting; i++) path[i] = i;
    for (size_t i = 0; i < steps; i++) path[(size_t)waiting + i] = waiting + b->nodes[from + i];
}

/* All hypotheses as the nodes of a tree: [width · steps] each but paths, [width · steps, steps], and
 * the conditionals of the likeliest hypothesis, [steps]. */
void mtad_beam_tree(const Beams *b, int64_t *token_ids, int64_t *parents, float *logprobs,
                    uint8_t *real, int64_t *paths, float *reference) {
    const int steps = b->steps;
    for (int step = 1, node = 0; step <= steps; step++) {
        for (int slot = 0; slot < b->width; slot++, node++, paths += steps) {
            const size_t from = step_start(b, step) + (size_t)slot * (size_t)step;
            const size_t last = from + (size_t)step - 1;
            token_ids[node] = b->token_ids[last];
            parents[node] = step > 1 ? b->nodes[last - 1] : -1;
            logprobs[node] = b->logprobs[last];
            real[node] = b->real[last];
            for (int depth = 0; depth < steps; depth++)
                paths[depth] = depth < step ? b->nodes[from + (size_t)depth] : -1;
        }
    }
    memcpy(reference, b->logprobs + best_of(b), (size_t)steps * sizeof *reference);
}

/* Adds `count` nodes to a tree of `old` ones: who is whose ancestor or the node itself, [old + count,
 * old + count], and where the new ones stand in a text whose next token stands at `start`. 0 if it
 * was done, 1 where a parent is no node before its child. */
int mtad_grow_tree(const uint8_t *ancestors, int old, const int64_t *parents, int count,
                   int64_t start, uint8_t *grown, int64_t *positions) {
    const size_t size = (size_t)(old + count);
    memset(grown, 0, size * size);
    for (int node = 0; node < old; node++)
        memcpy(grown + (size_t)node * size, ancestors + (size_t)node * (size_t)old, (size_t)old);
    for (int node = 0; node < count; node++) {
        uint8_t *row = grown + (size_t)(old + node) * size;
        if (parents[node] < -1 || parents[node] >= old + node) return 1;
        if (parents[node] >= 0) memcpy(row, grown + (size_t)parents[node] * size, size);
        row[old + node] = 1;
        int64_t depth = -1;
        for (size_t i = 0; i < size; i++) depth += row[i];
        positions[node] = start + depth;
    }
    return 0;
}

/* ---- single products and moves ------------------------------------------------------------- */

typedef struct {
    const Matrix *matrix;
    const float *from;
    float *to;
    int rows;
    Input in;
} Linear;

static void linear_work(const Seat *s, void *argument) {
    const Linear *l = argument;
    Input in = own(s, l->in);
    prepare(s, l->matrix, l->from, NULL, 0.0f, l->rows, &in);
    product(s, l->matrix, &in, l->rows, l->to, STORE, NULL);
}

/* from [rows, columns] → to [rows, matrix rows]. 0 if it was done, 1 where memory is missing. */
int mtad_linear(Context *c, const Matrix *matrix, const float *from, float *to, int rows) {
    const size_t columns = (size_t)matrix->columns, inputs = copies(c, (size_t)rows, columns);
    if (!reserve(c, inputs * input_bytes((size_t)rows, columns))) return 1;
    char *at = c->scratch;
    Linear l = {matrix, from, to, rows, cut_input(&at, (size_t)rows, columns, inputs)};
    run(c, linear_work, &l);
    return 0;
}

/* Rounds a group of a row to 8 bits, as pack in packing.py does, into the places of `lane`. */
static void write_group(uint8_t *group, int lane, const float *values) {
    float most = 0.0f;
    for (int i = 0; i < GROUP; i++) most = fmaxf(most, fabsf(values[i]));
    uint8_t halves[2 * LANES];
    store_halves(halves, broadcast(most / 127.0f));
    const float scale = load_halves(halves)[0];
    memcpy(group + 8 * 64 + 2 * lane, halves, 2);
    for (int i = 0; i < GROUP; i++) {
        const float code = scale > 0.0f ? rintf(values[i] / scale) : 0.0f;
        group[64 * (i / 4) + 4 * lane + i % 4] = (uint8_t)(int8_t)fmaxf(fminf(code, 127.0f), -127.0f);
    }
}

/* Writes [count, columns] into a matrix of floats or 8 bits, from a row on. */
void mtad_write_rows(const Matrix *m, int row, int count, const float *values, uint8_t *data) {
    const size_t bytes = block_bytes(m);
    for (int end = row + count; row < end; row++, values += m->columns) {
        uint8_t *block = data + (size_t)(row / BLOCK) * bytes;
        const int lane = row % BLOCK;
        if (m->kind == FLOAT32)
            for (int k = 0; k < m->columns; k++) ((float *)block)[k * BLOCK + lane] = values[k];
        else
            for (int k = 0; k < m->columns; k += GROUP, block += 8 * 64 + 32)
                write_group(block, lane, values + k);
    }
}

/* Moves slots from[i] ≥ start + i to start + i, in order, in every layer of a single text. */
void mtad_move(const Model *model, Cache *cache, const int32_t *from, int count, int start) {
    const size_t size = (size_t)model->head_size, bytes = cache->halves ? 2 : 4;
    for (int layer = 0; layer < model->layers; layer++) {
        for (int h = 0; h < model->kv_heads; h++) {
            const size_t head = head_start(model, cache, layer, 0, h);
            uint8_t *keys = cache->keys + head * bytes, *values = cache->values + head * bytes;
            for (int i = 0; i < count; i++) {
                size_t old = (size_t)from[i], new = (size_t)(start + i);
                if (old == new) continue;
                const uint8_t *key = keys + (old / BLOCK * BLOCK * size + old % BLOCK) * bytes;
                uint8_t *there = keys + (new / BLOCK * BLOCK * size + new % BLOCK) * bytes;
                for (size_t j = 0; j < size * BLOCK * bytes; j += BLOCK * bytes)
                    memcpy(there + j, key + j, bytes);
                memcpy(values + new * size * bytes, values + old * size * bytes, size * bytes);
            }
        }
    }
}

/* Which inner product this build has. */
const char *mtad_kernels(void) {
#if defined(__AVX512VNNI__)
    return "AVX-512 VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__ARM_FEATURE_DOTPROD)
    return "NEON dot products";
#else
    return "plain C";
#endif
}
