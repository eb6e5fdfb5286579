// One decode step of an autoregressive block on the CPU: the causal Transformer of a few new tokens of each
// image, whose keys and values join the cache. Compiled on first use by native.py, which says what it needs.
//
// Why not PyTorch: with few tokens a step is bound by overhead between operations and by reading weights and
// cache. Here one parallel region runs the whole step; weights lie in the order in which they are read; norms'
// scale and shift are folded into the next matrix; keys lie in blocks of tokens, so that scores
// need no sums across lanes.
//
// T computes (float, double), S stores weights, keys and values (T, or bfloat16 as uint16_t).
// Letters: m rows of a product, k its inner size, p columns of a panel, e head width, t known tokens.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __AVX512F__
#define BYTES 64
#else
#define BYTES 32
#endif

namespace {

template <typename T> struct Lanes {
    static constexpr int count = BYTES / sizeof(T);
    typedef T vector __attribute__((vector_size(BYTES), aligned(sizeof(T))));
};
template <typename T> using Vec = typename Lanes<T>::vector;
template <typename T> constexpr int panel = 2 * Lanes<T>::count;  // columns of packed weights read together

template <typename T> inline Vec<T> load(const T* p) { return *reinterpret_cast<const Vec<T>*>(p); }
template <typename T> inline void store(T* p, Vec<T> v) { *reinterpret_cast<Vec<T>*>(p) = v; }

typedef uint16_t Halves __attribute__((vector_size(BYTES / 2), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(BYTES)));
inline Vec<float> load(const uint16_t* p) {  // bfloat16 is the upper half of a float
    Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16;
    return (Vec<float>)words;
}

template <typename S, typename T> inline S narrow(T value) {
    if constexpr (std::is_same_v<S, T>) {
        return value;
    } else {  // round to nearest, ties to even
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        return static_cast<S>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

// exp to about one unit in the last place, in a form that the compiler turns into vectors.
inline float fast_exp(float x) {
    x = std::min(std::max(x, -80.f), 80.f);  // results far from denormal, which are slow
    const float shifted = x * 1.44269504f + 12582912.f;
    const float n = shifted - 12582912.f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    const int32_t exponent = (bits - 0x4b400000 + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, 4);
    return y * power;
}
inline double fast_exp(double x) { return std::exp(x); }

// The exact GELU; in float erf is Abramowitz and Stegun 7.1.26, off by at most 1.5e-7.
inline float gelu(float x) {
    const float a = std::fabs(x) * 0.70710678f, t = 1.f / (1.f + 0.3275911f * a);
    float poly = 1.061405429f;
    poly = poly * t - 1.453152027f;
    poly = poly * t + 1.421413741f;
    poly = poly * t - 0.284496736f;
    poly = poly * t + 0.254829592f;
    const float tail = 0.5f * poly * t * fast_exp(-a * a);  // the normal distribution's, at |x|
    return x * (x < 0 ? tail : 1.f - tail);
}
inline double gelu(double x) { return 0.5 * x * (1 + std::erf(x * 0.70710678118654752440)); }
template <typename T> inline T silu(T x) { return x / (1 + fast_exp(-x)); }

template <typename S, typename T> struct LayerOf {
    const S *qkv, *proj, *up, *down;              // packed weights
    const T *qkv_bias, *proj_bias, *up_bias, *down_bias;
    const T *q_norm, *k_norm;                     // weights of the RMS norms, or null
    S *keys, *values;                             // (b, h, t / block, e, block) and (b, h, t, e)
};

template <typename S, typename T> struct ModelOf {
    int64_t width, heads, hidden, layers, token_dim, tokens, gated, threads;
    T eps, qk_eps;
    const S *in, *out;
    const T *out_bias;
    const T *place;                               // (tokens, width): position and the input's bias
    const T *context;                             // (rows, width), or null
    const T *cos, *sin;                           // (tokens, e), or null
    const T *scale;                               // (rows): factor of the attention scores
    const LayerOf<S, T>* layer;
    T *x, *norm, *wide, *mixed, *score;           // scratch
};

// Where the threads of a step wait for each other. The waits are shorter than waking a thread takes, so they
// spin; but where other processes want the processor, the thread that is waited for may need it.
struct Meeting {
    std::atomic<int64_t> arrived{0}, round{0};
    void wait(int64_t threads) {
        const int64_t now = round.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int64_t spins = 0; round.load(std::memory_order_acquire) == now; ++spins)
            if (spins >= 4096) std::this_thread::yield();
    }
};

enum Finish { SET, ADD, GELU };

// Columns of one panel for R rows: y (op)= x · w + bias. Meanwhile the weights at ``ahead`` are fetched.
template <int R, typename S, typename T>
inline void tile(const T* x, int64_t ldx, int64_t k, const S* w, const S* ahead, const T* bias, T* y, int64_t ldy,
                 Finish finish) {
    constexpr int L = Lanes<T>::count;
    constexpr int U = R == 1 ? 4 : R <= 3 ? 2 : 1;  // independent sums that hide the latency of few rows
    Vec<T> sum[U][R][2] = {};
    int64_t i = 0;
    for (; i + U <= k; i += U)
        for (int u = 0; u < U; ++u) {
            const S* row = w + (i + u) * 2 * L;
            const Vec<T> left = load(row), right = load(row + L);
            __builtin_prefetch(ahead + (i + u) * 2 * L);
            for (int r = 0; r < R; ++r) {
                const T value = x[r * ldx + i + u];
                sum[u][r][0] += left * value;
                sum[u][r][1] += right * value;
            }
        }
    for (; i < k; ++i)
        for (int r = 0; r < R; ++r) {
            sum[0][r][0] += load(w + i * 2 * L) * x[r * ldx + i];
            sum[0][r][1] += load(w + i * 2 * L + L) * x[r * ldx + i];
        }
    alignas(BYTES) T made[R * 2 * L];
    for (int r = 0; r < R; ++r)
        for (int half = 0; half < 2; ++half) {
            Vec<T> total = sum[0][r][half];
            for (int u = 1; u < U; ++u) total += sum[u][r][half];
            if (bias) total += load(bias + half * L);
            if (finish == ADD) total += load(y + r * ldy + half * L);
            store(made + (2 * r + half) * L, total);
        }
    if (finish == GELU) {
#pragma omp simd
        for (int j = 0; j < R * 2 * L; ++j) made[j] = gelu(made[j]);
    }
    for (int r = 0; r < R; ++r)
        for (int half = 0; half < 2; ++half) store(y + r * ldy + half * L, load(made + (2 * r + half) * L));
}

// This thread's share of y (op)= x · w + bias; rows in tiles of at most 6, which fill the registers.
template <typename S, typename T>
void product(const T* x, int64_t ldx, int64_t m, int64_t k, const S* w, int64_t columns, const T* bias, T* y,
             int64_t ldy, Finish finish, int64_t thread, int64_t threads) {
    const int64_t panels = columns / panel<T>, tiles = (m + 5) / 6;
    const int64_t first = panels * tiles * thread / threads, last = panels * tiles * (thread + 1) / threads;
    for (int64_t task = first; task < last; ++task) {
        const int64_t column = task / tiles, row = m * (task % tiles) / tiles;
        const int64_t rows = m * (task % tiles + 1) / tiles - row;
        const T* from = x + row * ldx;
        const S* weights = w + column * k * panel<T>;
        const S* ahead = (task + 1) % tiles ? weights : weights + k * panel<T>;
        const T* shift = bias ? bias + column * panel<T> : nullptr;
        T* to = y + row * ldy + column * panel<T>;
        switch (rows) {
            case 1: tile<1>(from, ldx, k, weights, ahead, shift, to, ldy, finish); break;
            case 2: tile<2>(from, ldx, k, weights, ahead, shift, to, ldy, finish); break;
            case 3: tile<3>(from, ldx, k, weights, ahead, shift, to, ldy, finish); break;
            case 4: tile<4>(from, ldx, k, weights, ahead, shift, to, ldy, finish); break;
            case 5: tile<5>(from, ldx, k, weights, ahead, shift, to, ldy, finish); break;
            default: tile<6>(from, ldx, k, weights, ahead, shift, to, ldy, finish);
        }
    }
}

// (x - mean) / deviation of this thread's rows; scale and shift are part of the next weights.
template <typename T>
void normalise(const T* x, T* y, int64_t m, int64_t width, T eps, int64_t thread, int64_t threads) {
    for (int64_t row = m * thread / threads; row < m * (thread + 1) / threads; ++row) {
        const T* from = x + row * width;
        T* to = y + row * width;
        T sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < width; ++i) sum += from[i];
        const T mean = sum / width;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < width; ++i) square += (from[i] - mean) * (from[i] - mean);
        const T factor = 1 / std::sqrt(square / width + eps);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) to[i] = (from[i] - mean) * factor;
    }
}

template <typename T> void rms_norm(T* x, const T* weight, int64_t e, T eps) {
    T square = 0;
    for (int64_t i = 0; i < e; ++i) square += x[i] * x[i];
    const T factor = 1 / std::sqrt(square / e + eps);
    for (int64_t i = 0; i < e; ++i) x[i] *= factor * weight[i];
}

template <typename T> void rotate(T* x, const T* cos, const T* sin, int64_t e) {
    for (int64_t i = 0; i < e / 2; ++i) {
        const T first = x[i], second = x[i + e / 2];
        x[i] = first * cos[i] - second * sin[i];
        x[i + e / 2] = second * cos[i + e / 2] + first * sin[i + e / 2];
    }
}

template <typename T> constexpr int block = 4 * Lanes<T>::count;  // tokens whose keys lie together

// Scores of one query with a block of tokens. Meanwhile the block at ``ahead`` is fetched: the cache is larger
// than what lies near the processor.
template <typename S, typename T>
inline void scores(const T* q, const S* keys, const S* ahead, T* score, int64_t e) {
    constexpr int L = Lanes<T>::count;
    Vec<T> sum[4] = {};
    for (int64_t i = 0; i < e; ++i)
        for (int g = 0; g < 4; ++g) {
            if (g % 2 == 0) __builtin_prefetch(ahead + i * block<T> + g * L);
            sum[g] += load(keys + i * block<T> + g * L) * q[i];
        }
    for (int g = 0; g < 4; ++g) store(score + g * L, sum[g]);
}

// C vectors of the weighted sum of values.
template <int C, typename S, typename T>
inline void mix(const T* score, const S* values, T* y, int64_t e, int64_t known, T factor) {
    constexpr int L = Lanes<T>::count, distance = 12;  // tokens fetched ahead
    Vec<T> sum[C] = {};
    for (int64_t t = 0; t < known; ++t)
        for (int c = 0; c < C; ++c) {
            if (c % 2 == 0) __builtin_prefetch(values + (t + distance) * e + c * L);
            sum[c] += load(values + t * e + c * L) * score[t];
        }
    for (int c = 0; c < C; ++c) store(y + c * L, sum[c] * factor);
}

// New keys and values into the cache, then attention, for the n new tokens of one head of one image.
template <typename S, typename T>
void attend(const ModelOf<S, T>& model, const LayerOf<S, T>& layer, int64_t row, int64_t head, int64_t n,
            int64_t start, T* qkv, T* y, int64_t ldq, T* score, T scale) {
    constexpr int L = Lanes<T>::count;
    const int64_t width = model.width, e = width / model.heads, B = block<T>, blocks = (model.tokens + B - 1) / B;
    S* keys = layer.keys + (row * model.heads + head) * blocks * B * e;
    S* values = layer.values + (row * model.heads + head) * model.tokens * e;
    for (int64_t j = 0; j < n; ++j) {
        T *q = qkv + j * ldq + head * e, *k = q + width, *v = k + width;
        const int64_t t = start + j;
        if (layer.q_norm) rms_norm(q, layer.q_norm, e, model.qk_eps);
        if (layer.k_norm) rms_norm(k, layer.k_norm, e, model.qk_eps);
        if (model.cos) {
            rotate(q, model.cos + t * e, model.sin + t * e, e);
            rotate(k, model.cos + t * e, model.sin + t * e, e);
        }
        S* to = keys + t / B * B * e + t % B;
        for (int64_t i = 0; i < e; ++i) to[i * B] = narrow<S>(k[i]);
        for (int64_t i = 0; i < e; ++i) values[t * e + i] = narrow<S>(v[i]);
    }
    for (int64_t j = 0; j < n; ++j) {
        T* q = qkv + j * ldq + head * e;
        for (int64_t i = 0; i < e; ++i) q[i] *= scale;
        const int64_t known = start + j + 1, used = (known + B - 1) / B;
        for (int64_t g = 0; g < used; ++g) {
            const S* from = keys + g * B * e;
            scores(q, from, g + 1 < used ? from + B * e : values, score + g * B, e);
        }
        T most = score[0], sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t t = 0; t < known; ++t) most = std::max(most, score[t]);
#pragma omp simd reduction(+ : sum)
        for (int64_t t = 0; t < known; ++t) {
            score[t] = fast_exp(score[t] - most);
            sum += score[t];
        }
        T* to = y + j * width + head * e;
        int64_t c = 0;
        for (; c + 8 * L <= e; c += 8 * L) mix<8>(score, values + c, to + c, e, known, 1 / sum);
        for (; c + 2 * L <= e; c += 2 * L) mix<2>(score, values + c, to + c, e, known, 1 / sum);
        for (; c < e; c += L) mix<1>(score, values + c, to + c, e, known, 1 / sum);
    }
}

// One thread's part of a step. ``threads`` of them share the rows and meet after each operation.
template <typename S, typename T>
void part(const ModelOf<S, T>& model, const T* tokens, const int64_t* which, int64_t rows, int64_t n, int64_t start,
          T* out, int64_t columns, int64_t before, T* score, Meeting& meeting, int64_t thread, int64_t threads) {
    const int64_t w = model.width, m = rows * n, hidden = model.hidden, up = model.gated ? 2 * hidden : hidden;
    const int64_t row_size = std::max(3 * w, up), tasks = rows * model.heads;
    T *x = model.x + before * w, *norm = model.norm + before * w, *mixed = model.mixed + before * w;
    T* wide = model.wide + before * row_size;
    const int64_t first = m * thread / threads, last = m * (thread + 1) / threads;
    const auto meet = [&meeting, threads] {
        if (threads > 1) meeting.wait(threads);
    };
    for (int64_t i = first; i < last; ++i) {
        const T* place = model.place + (start + i % n) * w;
        const T* context = model.context ? model.context + which[i / n] * w : nullptr;
        for (int64_t c = 0; c < w; ++c) x[i * w + c] = place[c] + (context ? context[c] : 0);
    }
    meet();
    const int64_t d = model.token_dim;
    product(tokens, d, m, d, model.in, w, static_cast<const T*>(nullptr), x, w, ADD, thread, threads);
    meet();
    for (int64_t l = 0; l < model.layers; ++l) {
        const LayerOf<S, T>& layer = model.layer[l];
        normalise(x, norm, m, w, model.eps, thread, threads);
        meet();
        product(norm, w, m, w, layer.qkv, 3 * w, layer.qkv_bias, wide, 3 * w, SET, thread, threads);
        meet();
        for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task) {
            const int64_t row = task / model.heads, head = task % model.heads;
            attend(model, layer, which[row], head, n, start, wide + row * n * 3 * w, mixed + row * n * w, 3 * w,
                   score, model.scale[which[row]]);
        }
        meet();
        product(mixed, w, m, w, layer.proj, w, layer.proj_bias, x, w, ADD, thread, threads);
        meet();
        normalise(x, norm, m, w, model.eps, thread, threads);
        meet();
        const Finish finish = model.gated ? SET : GELU;
        product(norm, w, m, w, layer.up, up, layer.up_bias, wide, up, finish, thread, threads);
        meet();
        if (model.gated) {
            for (int64_t i = first; i < last; ++i) {
                T *gate = wide + i * up, *value = gate + hidden;
                for (int64_t c = 0; c < hidden; ++c) gate[c] = silu(gate[c]) * value[c];
            }
            meet();
        }
        product(wide, up, m, hidden, layer.down, w, layer.down_bias, x, w, ADD, thread, threads);
        meet();
    }
    product(x, w, m, w, model.out, columns, model.out_bias, out, columns, SET, thread, threads);
}

// tokens (rows, n, token_dim) at places start ... start + n - 1 -> out (rows, n, columns): log-scale and shift
// of the next tokens. Row r uses cache, context and scale of image which[r].
//
// With enough rows each thread takes some through the whole step and waits for nobody; with fewer, all share
// every operation, so that each reads a part of the weights; with next to nothing to do, one thread does it.
template <typename S, typename T>
void step(const ModelOf<S, T>& model, const T* tokens, const int64_t* which, int64_t rows, int64_t n, int64_t start,
          T* out, int64_t columns) {
    const int64_t least = 1 << 18;  // multiply-adds of a layer that are worth more than one thread
    const int64_t wanted = rows * n * 12 * model.width * model.width < least ? 1 : model.threads;
    Meeting meeting;
#pragma omp parallel num_threads(wanted)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
        const int64_t thread = 0, threads = 1;
#endif
        T* score = model.score + thread * ((model.tokens + 63) / 64 * 64);
        if (rows / threads * n >= 24) {
            const int64_t first = rows * thread / threads, last = rows * (thread + 1) / threads;
            part(model, tokens + first * n * model.token_dim, which + first, last - first, n, start,
                 out + first * n * columns, columns, first * n, score, meeting, 0, 1);
        } else {
            part(model, tokens, which, rows, n, start, out, columns, 0, score, meeting, thread, threads);
        }
    }
}

}  // namespace

extern "C" {
int lanes_f32() { return Lanes<float>::count; }
int lanes_f64() { return Lanes<double>::count; }

// native.py mirrors these structures.
int layer_size() { return sizeof(LayerOf<float, float>); }
int model_size_f32() { return sizeof(ModelOf<float, float>); }
int model_size_f64() { return sizeof(ModelOf<double, double>); }

#define STEP(NAME, S, T)                                                                                              \
    void NAME(const void* model, const T* tokens, const int64_t* which, int64_t rows, int64_t n, int64_t start,       \
              T* out, int64_t columns) {                                                                              \
        step(*static_cast<const ModelOf<S, T>*>(model), tokens, which, rows, n, start, out, columns);                 \
    }
STEP(step_f32, float, float)
STEP(step_f64, double, double)
STEP(step_bf16, uint16_t, float)
}
