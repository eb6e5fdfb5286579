// u = g + N^T u of one block on the CPU, from the last token to the first: N^T is strictly upper triangular in
// the tokens, so that this is exact and costs one backward pass for the input. Compiled on first use by
// back_substitution.py, which says what the arrays hold.
//
// Each thread takes some images through all tokens and waits for nobody. A token's gradient goes down through the
// layers; what it leaves at the keys and values of earlier tokens waits in `gradient` until their turn comes.
//
// Letters: as in kernels.h, and b images, n tokens, w width, e head width, d dimensions of a token.

#include <limits>

#include "kernels.h"

namespace {

template <typename T> struct LayerOf {
    const T *qkv, *proj, *up, *down;          // packed, to multiply gradients of the outputs; norms folded in
    const T *input, *qkv_out, *middle, *up_out;  // of the encode pass: (b, n, w), (b, n, 3w), (b, n, w), (b, n, k)
    T* gradient;                              // (b, n, 2w), of keys and values; 0 at the start
};

template <typename T> struct ModelOf {
    int64_t width, heads, hidden, layers, token_dim, tokens, images, threads, columns;
    T eps;
    const T *in, *out;                           // packed likewise; that of `in` fills up to `columns`
    const T* slope;                              // (b, n, d): of a token by its log-scale, at fixed z
    const LayerOf<T>* layer;
    T *down, *part, *wide, *token, *weight;      // scratch: (b, w), (b, w), (b, widest), (b, columns), (threads, 2n)
};

// The gradient of x from that of (x - mean) / deviation, added to `to`.
template <typename T> void normalised_back(const T* x, const T* gradient, T* to, int64_t width, T eps) {
    T sum = 0, square = 0, total = 0, along = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += x[i];
    const T mean = sum / width;
#pragma omp simd reduction(+ : square, total, along)
    for (int64_t i = 0; i < width; ++i) {
        const T centred = x[i] - mean;
        square += centred * centred;
        total += gradient[i];
        along += gradient[i] * centred;
    }
    const T factor = 1 / std::sqrt(square / width + eps);
    const T shift = total / width, tilt = along * factor * factor / width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] += factor * (gradient[i] - shift - tilt * (x[i] - mean));
}

template <typename T> inline T dot(const T* a, const T* b, int64_t e) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < e; ++i) sum += a[i] * b[i];
    return sum;
}

template <typename T> inline void add(T* to, T factor, const T* from, int64_t e) {
#pragma omp simd
    for (int64_t i = 0; i < e; ++i) to[i] += factor * from[i];
}

// Attention of the query at `place` in one head: adds to the gradients of the keys and values that it saw, and
// sets that of the query. `qkv` and `gradient` are those of the image's first token in this head.
template <typename T>
void attention_back(const T* qkv, T* gradient, const T* outer, T* query, int64_t place, int64_t width, int64_t e,
                    T* weight, int64_t tokens) {
    const T scale = 1 / std::sqrt(static_cast<T>(e)), *q = qkv + place * 3 * width;
    T* slope = weight + tokens;
    T most = -std::numeric_limits<T>::infinity(), sum = 0, mean = 0;
    for (int64_t t = 0; t <= place; ++t) {
        weight[t] = scale * dot(q, qkv + t * 3 * width + width, e);
        slope[t] = dot(outer, qkv + t * 3 * width + 2 * width, e);
        most = std::max(most, weight[t]);
    }
#pragma omp simd reduction(+ : sum, mean)
    for (int64_t t = 0; t <= place; ++t) {
        weight[t] = fast_exp(weight[t] - most);
        sum += weight[t];
        mean += weight[t] * slope[t];
    }
    mean /= sum;
    std::fill(query, query + e, T(0));
    for (int64_t t = 0; t <= place; ++t) {
        const T share = weight[t] / sum, raw = scale * share * (slope[t] - mean);
        add(query, raw, qkv + t * 3 * width + width, e);
        add(gradient + t * 2 * width, raw, q, e);
        add(gradient + t * 2 * width + width, share, outer, e);
    }
}

// The images first ... last - 1; u (b, n, d) holds g and becomes u.
template <typename T> void solve(const ModelOf<T>& model, T* u, int64_t first, int64_t last, T* weight) {
    const int64_t w = model.width, n = model.tokens, d = model.token_dim, k = model.hidden, e = w / model.heads;
    const int64_t rows = last - first, widest = std::max({3 * w, k, 2 * d});
    T *down = model.down + first * w, *part = model.part + first * w;
    T *wide = model.wide + first * widest, *token = model.token + first * model.columns;
    const auto times = [rows](const T* x, int64_t ldx, int64_t inner, const T* matrix, T* y, int64_t columns) {
        product(x, ldx, rows, inner, matrix, inner, 0, columns / panel<T>, static_cast<const T*>(nullptr), y, columns,
                SET);
    };
    for (int64_t place = n - 2; place >= 0; --place) {  // the last token's prediction goes nowhere
        const auto at = [&](const T* states, int64_t row, int64_t size) {
            return states + ((first + row) * n + place) * size;
        };
        for (int64_t r = 0; r < rows; ++r) {
            const T *next = at(u, r, d) + d, *slope = at(model.slope, r, d) + d;
            for (int64_t c = 0; c < d; ++c) {
                wide[r * 2 * d + c] = next[c] * slope[c];
                wide[r * 2 * d + d + c] = next[c];
            }
        }
        times(wide, 2 * d, 2 * d, model.out, down, w);
        for (int64_t l = model.layers - 1; l >= 0; --l) {
            const LayerOf<T>& layer = model.layer[l];
            times(down, w, w, layer.down, wide, k);
            for (int64_t r = 0; r < rows; ++r) {
                const T* x = at(layer.up_out, r, k);
                T* y = wide + r * k;
#pragma omp simd
                for (int64_t c = 0; c < k; ++c)
                    y[c] *= normal(x[c]) + x[c] * T(0.39894228040143267794) * fast_exp(T(-0.5) * x[c] * x[c]);
            }
            times(wide, k, k, layer.up, part, w);
            for (int64_t r = 0; r < rows; ++r)
                normalised_back(at(layer.middle, r, w), part + r * w, down + r * w, w, model.eps);
            times(down, w, w, layer.proj, part, w);
            for (int64_t r = 0; r < rows; ++r) {
                const T* qkv = layer.qkv_out + (first + r) * n * 3 * w;
                T* gradient = layer.gradient + (first + r) * n * 2 * w;
                for (int64_t c = 0; c < w; c += e)
                    attention_back(qkv + c, gradient + c, part + r * w + c, wide + r * 3 * w + c, place, w, e, weight, n);
                std::copy(gradient + place * 2 * w, gradient + (place + 1) * 2 * w, wide + r * 3 * w + w);
            }
            times(wide, 3 * w, 3 * w, layer.qkv, part, w);
            for (int64_t r = 0; r < rows; ++r)
                normalised_back(at(layer.input, r, w), part + r * w, down + r * w, w, model.eps);
        }
        times(down, w, w, model.in, token, model.columns);
        for (int64_t r = 0; r < rows; ++r) {
            T* to = u + ((first + r) * n + place) * d;
            for (int64_t c = 0; c < d; ++c) to[c] += token[r * model.columns + c];
        }
    }
}

template <typename T> void solve_all(const ModelOf<T>& model, T* u) {
#pragma omp parallel num_threads(model.threads)
    {
#ifdef _OPENMP
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
        const int64_t thread = 0, threads = 1;
#endif
        const int64_t first = model.images * thread / threads, last = model.images * (thread + 1) / threads;
        if (first < last) solve(model, u, first, last, model.weight + thread * 2 * model.tokens);
    }
}

}  // namespace

extern "C" {
// back_substitution.py mirrors these structures.
int layer_size() { return sizeof(LayerOf<float>); }
int model_size_f32() { return sizeof(ModelOf<float>); }
int model_size_f64() { return sizeof(ModelOf<double>); }

void solve_f32(const void* model, float* u) { solve_all(*static_cast<const ModelOf<float>*>(model), u); }
void solve_f64(const void* model, double* u) { solve_all(*static_cast<const ModelOf<double>*>(model), u); }
}
