// A Transformer's step on the CPU: a few new tokens of each image, whose keys and values join the cache, of an
// autoregressive block; or all tokens at once, which see each other, of a student. Compiled on first use by
// native.py, which says what it needs.
//
// Why not PyTorch: with few tokens a step is bound by overhead between operations and by reading weights and
// cache. Here one parallel region runs the whole step; weights lie in the order in which they are read; norms'
// scale and shift are folded into the next matrix; keys lie in blocks of tokens, so that scores
// need no sums across lanes; and while one part of the cache is in use, the next is fetched.
//
// The threads of a team share the weights: each has some heads and some of the MLP's inner columns, and makes from
// them its part of a sum for all columns of the tokens (as Megatron-LM does, arXiv 1909.08053, Sec. 3). So they wait
// for each other twice a layer, and what lies between stays near each one's processor.
//
// T computes (float, double), S stores weights, C keys and values (T, or bfloat16 as uint16_t).
// Letters: as in kernels.h, and e head width, t known tokens.

#include <atomic>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "kernels.h"

namespace {

template <typename S, typename C, typename T> struct LayerOf {
    const S *qkv, *proj, *up, *down;              // packed weights
    const T *qkv_bias, *proj_bias, *up_bias, *down_bias;
    const T *q_norm, *k_norm;                     // weights of the RMS norms, or null
    const T *context;                             // (rows, width), added to the tokens first; or null
    C *keys, *values;                             // (b, h, t / block, e, block) and (b, h, t, e)
};

template <typename S, typename C, typename T> struct ModelOf {
    int64_t width, heads, hidden, layers, token_dim, tokens, gated, causal, final_norm, threads;
    T eps, qk_eps;
    const S *in, *out;
    const T *out_bias;
    const T *place;                               // (tokens, width): position and the input's bias
    const T *cos, *sin;                           // (tokens, e), or null
    const T *scale;                               // (rows): factor of the attention scores
    const LayerOf<S, C, T>* layer;
};

// Where the threads of a team wait for each other. The waits are shorter than waking a thread takes, so they
// spin; but where other processes want the processor, the thread that is waited for may need it.
struct alignas(64) Meeting {
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

// (x - mean) / deviation; scale and shift are part of the next weights.
template <typename T> void normalise(const T* x, T* y, int64_t m, int64_t width, T eps) {
    for (int64_t row = 0; row < m; ++row) {
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
inline int64_t score_size(int64_t tokens) { return (tokens + 63) / 64 * 64; }

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

// y = x · w for R rows and C vectors of columns, which lie ``apart``; row i of w begins at i · ldw.
template <int R, int C, typename S, typename T>
inline void multiply(const T* x, int64_t ldx, int64_t k, const S* w, int64_t ldw, int64_t apart, T* y, int64_t ldy) {
    Vec<T> sum[R][C] = {};
    for (int64_t i = 0; i < k; ++i) {
        Vec<T> row[C];
        for (int c = 0; c < C; ++c) row[c] = load(w + i * ldw + c * apart);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) sum[r][c] += row[c] * x[r * ldx + i];
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(y + r * ldy + c * Lanes<T>::count, sum[r][c]);
}

// The same for so many vectors of columns.
template <int R, typename S, typename T>
inline void multiply(const T* x, int64_t ldx, int64_t k, const S* w, int64_t ldw, int64_t apart, int64_t vectors, T* y,
                     int64_t ldy) {
    int64_t c = 0;
    for (; c + 2 <= vectors; c += 2)
        multiply<R, 2>(x, ldx, k, w + c * apart, ldw, apart, y + c * Lanes<T>::count, ldy);
    if (c < vectors) multiply<R, 1>(x, ldx, k, w + c * apart, ldw, apart, y + c * Lanes<T>::count, ldy);
}

// exp of the scores of ``known`` tokens, less the largest; returns 1 / their sum.
template <typename T> inline T softmax(T* score, int64_t known) {
    const T most = largest(score, known);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < known; ++t) {
        score[t] = fast_exp(score[t] - most);
        sum += score[t];
    }
    return 1 / sum;
}

// Attention of R queries, whose keys and values are in use for all of them while they are near; the first one knows
// ``known`` tokens, each later one ``more`` others.
template <int R, typename S, typename T>
inline void attend_together(const T* q, int64_t ldq, const S* keys, const S* values, int64_t e, int64_t known,
                            int64_t more, T* score, int64_t lds, T* y, int64_t ldy) {
    constexpr int64_t L = Lanes<T>::count, B = block<T>;
    const int64_t all = known + (R - 1) * more;
    multiply<R>(q, ldq, e, keys, B, B * e, (all + B - 1) / B, score, lds);
    T factor[R];
    for (int r = 0; r < R; ++r) factor[r] = softmax(score + r * lds, known + r * more);
    multiply<R>(score, lds, known, values, e, L, e / L, y, ldy);
    for (int r = 0; r < R; ++r)
        for (int64_t i = 0; i < e; i += L) {
            // What a query does not know must not reach it, not even times 0: it may be infinite.
            Vec<T> sum = load(y + r * ldy + i);
            for (int64_t t = known; t < known + r * more; ++t) sum += load(values + t * e + i) * score[r * lds + t];
            store(y + r * ldy + i, sum * factor[r]);
        }
}

// New keys and values into the cache, then attention, for the n new tokens of one head of one image; ``next`` is
// the head whose turn comes then, counted over all images. The head's queries lie at qkv, its keys ``apart`` from
// them, its values as far from these; y has rows of ``apart``.
template <typename S, typename C, typename T>
void attend(const ModelOf<S, C, T>& model, const LayerOf<S, C, T>& layer, int64_t row, int64_t head, int64_t n,
            int64_t start, T* qkv, int64_t apart, T* y, T* score, T scale, int64_t next) {
    constexpr int L = Lanes<T>::count, together = most_rows;
    const int64_t e = model.width / model.heads, B = block<T>, blocks = (model.tokens + B - 1) / B, ldq = 3 * apart;
    const int64_t lds = score_size(model.tokens);
    C* keys = layer.keys + (row * model.heads + head) * blocks * B * e;
    C* values = layer.values + (row * model.heads + head) * model.tokens * e;
    const C* keys_of_next = layer.keys + next * blocks * B * e;
    for (int64_t j = 0; j < n; ++j) {
        T *q = qkv + j * ldq, *k = q + apart, *v = k + apart;
        const int64_t t = start + j;
        if (layer.q_norm) rms_norm(q, layer.q_norm, e, model.qk_eps);
        if (layer.k_norm) rms_norm(k, layer.k_norm, e, model.qk_eps);
        if (model.cos) {
            rotate(q, model.cos + t * e, model.sin + t * e, e);
            rotate(k, model.cos + t * e, model.sin + t * e, e);
        }
        C* to = keys + t / B * B * e + t % B;
        for (int64_t i = 0; i < e; ++i) to[i * B] = narrow<C>(k[i]);
        for (int64_t i = 0; i < e; ++i) values[t * e + i] = narrow<C>(v[i]);
    }
    for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < e; ++i) qkv[j * ldq + i] *= scale;
    int64_t j = 0;
    for (; j + together <= n; j += together)
        attend_together<together>(qkv + j * ldq, ldq, keys, values, e, start + (model.causal ? j + 1 : n),
                                  model.causal, score, lds, y + j * apart, apart);
    for (; j < n; ++j) {
        const T* q = qkv + j * ldq;
        const int64_t known = start + (model.causal ? j + 1 : n), used = (known + B - 1) / B;
        for (int64_t g = 0; g < used; ++g) {
            const C* from = keys + g * B * e;
            scores(q, from, g + 1 < used ? from + B * e : values, score + g * B, e);
        }
        const T factor = softmax(score, known);
        T* to = y + j * apart;
        int64_t c = 0;
        for (; c + 8 * L <= e; c += 8 * L) mix<8>(score, values + c, keys_of_next + c, to + c, e, known, factor);
        for (; c + 4 * L <= e; c += 4 * L) mix<4>(score, values + c, keys_of_next + c, to + c, e, known, factor);
        for (; c + 2 * L <= e; c += 2 * L) mix<2>(score, values + c, keys_of_next + c, to + c, e, known, factor);
        for (; c < e; c += L) mix<1>(score, values + c, keys_of_next + c, to + c, e, known, factor);
    }
}

// Memory of a thread, which grows as it is needed and stays.
class Memory {
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> lines;

  public:
    template <typename T> T* room(int64_t count) {
        const size_t needed = (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
        if (lines.size() < needed) lines.resize(needed);
        return reinterpret_cast<T*>(lines.data());
    }
};
thread_local Memory own_memory, shared_memory;

struct Range {
    int64_t first, last;
    int64_t count() const { return last - first; }
};
inline Range share(int64_t count, int64_t part, int64_t parts) {
    return {count * part / parts, count * (part + 1) / parts};
}

// How many heads have whole panels: threads take as many, or a multiple.
template <typename T> int64_t heads_together(int64_t e) { return panel<T> / std::gcd<int64_t>(e, panel<T>); }

// One thread's part of a step of its team, which has these rows and meets where all its members' sums are needed.
// ``common`` is the team's memory: two sums of each member.
template <typename S, typename C, typename T>
void part(const ModelOf<S, C, T>& model, const T* tokens, const int64_t* which, int64_t rows, int64_t n, int64_t start,
          T* out, int64_t columns, T* common, Meeting& meeting, int64_t member, int64_t members) {
    const int64_t w = model.width, e = w / model.heads, m = rows * n, d = model.token_dim;
    const int64_t together = heads_together<T>(e);
    const Range groups = share(model.heads / together, member, members);
    const Range heads = {groups.first * together, groups.last * together};
    const Range inner = share(model.hidden / panel<T>, member, members), wide = share(w / panel<T>, member, members);
    const int64_t own = heads.count() * e, hidden = inner.count() * panel<T>, all = w / panel<T>;
    const int64_t first = heads.first * e / panel<T>, last = heads.last * e / panel<T>, size = m * w;
    const int64_t scores_size = most_rows * score_size(model.tokens);
    T* x = own_memory.room<T>(2 * size + scores_size + m * std::max(4 * own, (1 + model.gated) * hidden));
    T *norm = x + size, *score = norm + size, *qkv = score + scores_size, *mixed = qkv + 3 * m * own;
    const T* none = nullptr;
    // The members' sums of two kinds take turns: when one is written again, all have read it.
    const auto sums = [=](int64_t kind, int64_t of) { return common + (kind * members + of) * size; };
    const auto collect = [&](int64_t kind, int64_t count) {
        if (members > 1) meeting.wait(members);
        for (int64_t of = 0; of < count; ++of) {
            const T* from = sums(kind, of);
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) x[i] += from[i];
        }
    };
    for (int64_t i = 0; i < m; ++i) {
        const T* place = model.place + (start + i % n) * w;
        std::copy(place, place + w, x + i * w);
    }
    product(tokens, d, m, d, model.in, d, wide.first, wide.last, none, sums(1, 0) + wide.first * panel<T>, w, SET);
    collect(1, 1);
    for (int64_t l = 0; l < model.layers; ++l) {
        const LayerOf<S, C, T>& layer = model.layer[l];
        for (int64_t i = 0; layer.context && i < m; ++i) {
            const T* context = layer.context + which[i / n] * w;
            for (int64_t c = 0; c < w; ++c) x[i * w + c] += context[c];
        }
        normalise(x, norm, m, w, model.eps);
        for (int64_t kind = 0; kind < 3; ++kind)
            product(norm, w, m, w, layer.qkv, w, kind * all + first, kind * all + last, layer.qkv_bias,
                    qkv + kind * own, 3 * own, SET);
        for (int64_t task = 0; task < rows * heads.count(); ++task) {
            const int64_t row = task / heads.count(), head = task % heads.count();
            const int64_t then = std::min(task + 1, rows * heads.count() - 1);
            attend(model, layer, which[row], heads.first + head, n, start, qkv + row * n * 3 * own + head * e, own,
                   mixed + row * n * own + head * e, score, model.scale[which[row]],
                   which[then / heads.count()] * model.heads + heads.first + then % heads.count());
        }
        product(mixed, own, m, own, layer.proj + heads.first * e * panel<T>, w, 0, all, member ? none : layer.proj_bias,
                sums(0, member), w, SET);
        collect(0, members);
        normalise(x, norm, m, w, model.eps);
        T* up = qkv;
        const Finish finish = model.gated ? SET : GELU;
        product(norm, w, m, w, layer.up, w, inner.first, inner.last, layer.up_bias, up, hidden, finish);
        if (model.gated) {
            const int64_t values = model.hidden / panel<T>;
            T* value = up + m * hidden;
            product(norm, w, m, w, layer.up, w, values + inner.first, values + inner.last, layer.up_bias, value,
                    hidden, SET);
            for (int64_t i = 0; i < m * hidden; ++i) up[i] = silu(up[i]) * value[i];
        }
        product(up, hidden, m, hidden, layer.down + inner.first * panel<T> * panel<T>, model.hidden, 0, all,
                member ? none : layer.down_bias, sums(1, member), w, SET);
        collect(1, members);
    }
    if (model.final_norm) normalise(x, norm, m, w, model.eps);
    const Range ends = share(columns / panel<T>, member, members);
    product(model.final_norm ? norm : x, w, m, w, model.out, w, ends.first, ends.last, model.out_bias,
            out + ends.first * panel<T>, columns, SET);
}

// The members of a team for which each thread reads least: its share of the weights, and the members' sums.
template <typename S, typename C, typename T>
int64_t team(const ModelOf<S, C, T>& model, int64_t rows, int64_t n, int64_t threads) {
    const int64_t most = std::min(threads, model.heads / heads_together<T>(model.width / model.heads));
    int64_t best = 1;
    double least = 0;
    for (int64_t members = 1; members <= most; ++members) {
        const int64_t teams = std::min(threads / members, rows), m = (rows + teams - 1) / teams * n;
        const double read = 12. * model.width / members * sizeof(S) + 2. * members * m * sizeof(T);
        if (members == 1 || read < least) best = members, least = read;
    }
    return best;
}

// tokens (rows, n, token_dim) at places start ... start + n - 1 -> out (rows, n, columns): of a block, log-scale and
// shift of the next tokens. Row r uses cache, context and scale of image which[r].
//
// Teams of threads share the rows; with next to nothing to do, one thread does it.
template <typename S, typename C, typename T>
void step(const ModelOf<S, C, T>& model, const T* tokens, const int64_t* which, int64_t rows, int64_t n, int64_t start,
          T* out, int64_t columns) {
    const int64_t least = 1 << 18;  // multiply-adds of a layer that are worth more than one thread
    const int64_t threads = rows * n * 12 * model.width * model.width < least ? 1 : model.threads;
    const int64_t members = team(model, rows, n, threads), teams = std::min(threads / members, rows);
    const int64_t size = 2 * members * ((rows + teams - 1) / teams) * n * model.width;
    T* common = shared_memory.room<T>(teams * size);
    const std::unique_ptr<Meeting[]> meetings(new Meeting[teams]);
    const auto some = [&](int64_t first, int64_t last, int64_t team, int64_t member, int64_t of) {
        part(model, tokens + first * n * model.token_dim, which + first, last - first, n, start,
             out + first * n * columns, columns, common + team * size, meetings[team], member, of);
    };
#pragma omp parallel num_threads(teams * members)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), given = omp_get_num_threads();
#else
        const int64_t thread = 0, given = 1;
#endif
        if (given < teams * members) {  // the machine gave fewer than it was asked for
            if (thread == 0) some(0, rows, 0, 0, 1);
        } else {
            const Range own = share(rows, thread / members, teams);
            // What lies between the products of one thread stays in its cache.
            const int64_t most = members > 1 ? rows : std::max<int64_t>(1, 512 / n);
            for (int64_t first = own.first; first < own.last; first += most)
                some(first, std::min(first + most, own.last), thread / members, thread % members, members);
        }
    }
}

// Tokens first + 1 ... first + count of the images x (b, n, d) from their noise z, one after another:
// shift + exp(log-scale) * z, with log-scales within +-bound if it is not 0. With ``weight`` (b, n) the rows are two
// streams of the images, joined as c + weight * (c - u).
template <typename S, typename C, typename T>
void decode(const ModelOf<S, C, T>& model, const int64_t* which, int64_t rows, int64_t first, int64_t count, const T* z,
            T* x, const T* weight, T bound, T* tokens, T* out, int64_t columns) {
    const int64_t d = model.token_dim, n = model.tokens, images = weight ? rows / 2 : rows;
    const auto bounded = [bound](T value) { return bound ? bound * std::tanh(value / bound) : value; };
    for (int64_t i = first; i < first + count; ++i) {
        for (int64_t row = 0; row < rows; ++row) {
            const T* from = x + (row % images * n + i) * d;
            std::copy(from, from + d, tokens + row * d);
        }
        step(model, tokens, which, rows, 1, i, out, columns);
        for (int64_t image = 0; image < images; ++image) {
            const T *with = out + image * columns, *without = out + (images + image) * columns;
            const int64_t next = image * n + i + 1;
            for (int64_t c = 0; c < d; ++c) {
                T log_scale = bounded(with[c]), shift = with[d + c];
                if (weight) {
                    log_scale += weight[next] * (log_scale - bounded(without[c]));
                    shift += weight[next] * (shift - without[d + c]);
                }
                x[next * d + c] = shift + std::exp(log_scale) * z[next * d + c];
            }
        }
    }
}

}  // namespace

extern "C" {
// native.py mirrors these structures.
int layer_size() { return sizeof(LayerOf<float, float, float>); }
int model_size_f32() { return sizeof(ModelOf<float, float, float>); }
int model_size_f64() { return sizeof(ModelOf<double, double, double>); }

#define ENTRY(NAME, S, C, T)                                                                                          \
    void step_##NAME(const void* model, const T* tokens, const int64_t* which, int64_t rows, int64_t n, int64_t start, \
                     T* out, int64_t columns) {                                                                       \
        step(*static_cast<const ModelOf<S, C, T>*>(model), tokens, which, rows, n, start, out, columns);              \
    }                                                                                                                 \
    void decode_##NAME(const void* model, const int64_t* which, int64_t rows, int64_t first, int64_t count,           \
                       const T* z, T* x, const T* weight, T bound, T* tokens, T* out, int64_t columns) {              \
        decode(*static_cast<const ModelOf<S, C, T>*>(model), which, rows, first, count, z, x, weight, bound, tokens,  \
               out, columns);                                                                                         \
    }
ENTRY(f32, float, float, float)
ENTRY(f64, double, double, double)
ENTRY(bf16, uint16_t, uint16_t, float)
ENTRY(f32_bf16, float, uint16_t, float)
}
