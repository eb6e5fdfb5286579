// One decode step of an autoregressive block on the CPU: the causal Transformer of a few new tokens of each
// image, whose keys and values join the cache. Compiled on first use by native.py, which says what it needs.
//
// Why not PyTorch: with few tokens a step is bound by overhead between operations and by reading weights and
// cache. Here one parallel region runs the whole step; weights lie in the order in which they are read; norms'
// scale and shift are folded into the next matrix; keys lie in blocks of tokens, so that scores
// need no sums across lanes; and while one part of the cache is in use, the next is fetched.
//
// T computes (float, double), S stores weights, keys and values (T, or bfloat16 as uint16_t).
// Letters: as in kernels.h, and e head width, t known tokens.

#include <atomic>
#include <thread>

#include "kernels.h"

namespace {

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

template <typename T> constexpr int block = Lanes<T>::count;  // tokens whose keys lie together

// Scores of one query with a block of tokens. Meanwhile the block at ``ahead`` is fetched: the cache is larger
// than what lies near the processor.
template <typename S, typename T>
inline void scores(const T* q, const S* keys, const S* ahead, T* score, int64_t e) {
    constexpr int B = block<T>;
    Vec<T> sum[4] = {};  // which hide each other's latency; e is a multiple of the lanes
    for (int64_t i = 0; i < e; i += 4)
        for (int u = 0; u < 4; ++u) {
            __builtin_prefetch(ahead + (i + u) * B);
            sum[u] += load(keys + (i + u) * B) * q[i + u];
        }
    store(score, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// C vectors of the weighted sum of values. Meanwhile those of later tokens are fetched, and then what is at ``next``.
template <int C, typename S, typename T>
inline void mix(const T* score, const S* values, const S* next, T* y, int64_t e, int64_t known, T factor) {
    constexpr int L = Lanes<T>::count, distance = 32;  // tokens fetched ahead
    Vec<T> sum[C] = {};
    for (int64_t t = 0; t < known; ++t) {
        const int64_t later = t + distance;
        const S* ahead = later < known ? values + later * e : next + (later - known) * e;
        for (int c = 0; c < C; ++c) {
            __builtin_prefetch(ahead + c * L);
            sum[c] += load(values + t * e + c * L) * score[t];
        }
    }
    for (int c = 0; c < C; ++c) store(y + c * L, sum[c] * factor);
}

// New keys and values into the cache, then attention, for the n new tokens of one head of one image; ``next`` is
// the head whose turn comes then, counted over all images.
template <typename S, typename T>
void attend(const ModelOf<S, T>& model, const LayerOf<S, T>& layer, int64_t row, int64_t head, int64_t n,
            int64_t start, T* qkv, T* y, int64_t ldq, T* score, T scale, int64_t next) {
    constexpr int L = Lanes<T>::count;
    const int64_t width = model.width, e = width / model.heads, B = block<T>, blocks = (model.tokens + B - 1) / B;
    S* keys = layer.keys + (row * model.heads + head) * blocks * B * e;
    S* values = layer.values + (row * model.heads + head) * model.tokens * e;
    const S* keys_of_next = layer.keys + next * blocks * B * e;
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
        for (; c + 8 * L <= e; c += 8 * L) mix<8>(score, values + c, keys_of_next + c, to + c, e, known, 1 / sum);
        for (; c + 4 * L <= e; c += 4 * L) mix<4>(score, values + c, keys_of_next + c, to + c, e, known, 1 / sum);
        for (; c + 2 * L <= e; c += 2 * L) mix<2>(score, values + c, keys_of_next + c, to + c, e, known, 1 / sum);
        for (; c < e; c += L) mix<1>(score, values + c, keys_of_next + c, to + c, e, known, 1 / sum);
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
            const int64_t then = std::min(task + 1, tasks - 1);
            attend(model, layer, which[row], head, n, start, wide + row * n * 3 * w, mixed + row * n * w, 3 * w,
                   score, model.scale[which[row]], which[then / model.heads] * model.heads + then % model.heads);
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
