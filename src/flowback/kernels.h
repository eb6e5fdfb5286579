// What the compiled code shares: vectors, exp and GELU, and the product of a few rows with packed weights.
//
// T computes (float, double), S stores weights (T, or bfloat16 as uint16_t).
// Letters: m rows of a product, k its inner size, p columns of a panel.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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

// The largest of n numbers; compilers do not make vectors of this by themselves.
template <typename T> inline T largest(const T* x, int64_t n) {
    constexpr int L = Lanes<T>::count;
    Vec<T> most = x[0] - Vec<T>{};
    int64_t t = 0;
    for (; t + L <= n; t += L) {
        const Vec<T> some = load(x + t);
        most = some > most ? some : most;
    }
    T found = most[0];
    for (int i = 1; i < L; ++i) found = std::max(found, most[i]);
    for (; t < n; ++t) found = std::max(found, x[t]);
    return found;
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

// The normal distribution; in float erf is Abramowitz and Stegun 7.1.26, off by at most 1.5e-7.
inline float normal(float x) {
    const float a = std::fabs(x) * 0.70710678f, t = 1.f / (1.f + 0.3275911f * a);
    float poly = 1.061405429f;
    poly = poly * t - 1.453152027f;
    poly = poly * t + 1.421413741f;
    poly = poly * t - 0.284496736f;
    poly = poly * t + 0.254829592f;
    const float tail = 0.5f * poly * t * fast_exp(-a * a);  // at |x|
    return x < 0 ? tail : 1.f - tail;
}
inline double normal(double x) { return 0.5 * (1 + std::erf(x * 0.70710678118654752440)); }
template <typename T> inline T gelu(T x) { return x * normal(x); }  // the exact one
template <typename T> inline T silu(T x) { return x / (1 + fast_exp(-x)); }

enum Finish { SET, ADD, GELU };

constexpr int most_rows = BYTES == 64 ? 8 : 6;  // whose sums fill the registers

// Columns of one panel for R rows: y (op)= x · w + bias. Meanwhile the weights at ``ahead`` are fetched, one every
// ``stride``: into the second cache, where more requests can wait for memory than in the first.
template <int R, typename S, typename T>
inline void tile(const T* x, int64_t ldx, int64_t k, const S* w, const S* ahead, int64_t stride, const T* bias, T* y,
                 int64_t ldy, Finish finish) {
    constexpr int L = Lanes<T>::count;
    constexpr int U = R == 1 ? 4 : R <= 3 ? 2 : 1;  // independent sums that hide the latency of few rows
    Vec<T> sum[U][R][2] = {};
    int64_t i = 0;
    for (; i + U <= k; i += U)
        for (int u = 0; u < U; ++u) {
            const S* row = w + (i + u) * 2 * L;
            const Vec<T> left = load(row), right = load(row + L);
            __builtin_prefetch(ahead + (i + u) * stride, 0, 2);
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

// y (op)= x · w + bias for the panels from ``first`` to before ``last``; w holds rows ``from`` to from + k - 1 of
// matrices of ``height`` rows. The first two tiles of a panel fetch half of the next one each.
template <typename S, typename T>
void product(const T* x, int64_t ldx, int64_t m, int64_t k, const S* w, int64_t height, int64_t first, int64_t last,
             const T* bias, T* y, int64_t ldy, Finish finish) {
    const int64_t tiles = (m + most_rows - 1) / most_rows;
    const int64_t halves = std::min<int64_t>(tiles, 2), stride = panel<T> / halves;
    for (int64_t column = first; column < last; ++column) {
        const S* weights = w + column * height * panel<T>;
        const T* shift = bias ? bias + column * panel<T> : nullptr;
        T* out = y + (column - first) * panel<T>;
        for (int64_t part = 0; part < tiles; ++part) {
            const int64_t row = m * part / tiles, rows = m * (part + 1) / tiles - row;
            const S* ahead = weights + height * panel<T> + std::min(part, halves - 1) * k * stride;
            const T* from = x + row * ldx;
            T* to = out + row * ldy;
            switch (rows) {
                case 1: tile<1>(from, ldx, k, weights, ahead, stride, shift, to, ldy, finish); break;
                case 2: tile<2>(from, ldx, k, weights, ahead, stride, shift, to, ldy, finish); break;
                case 3: tile<3>(from, ldx, k, weights, ahead, stride, shift, to, ldy, finish); break;
                case 4: tile<4>(from, ldx, k, weights, ahead, stride, shift, to, ldy, finish); break;
                case 5: tile<5>(from, ldx, k, weights, ahead, stride, shift, to, ldy, finish); break;
                case 6: tile<6>(from, ldx, k, weights, ahead, stride, shift, to, ldy, finish); break;
                case 7: tile<7>(from, ldx, k, weights, ahead, stride, shift, to, ldy, finish); break;
                default: tile<most_rows>(from, ldx, k, weights, ahead, stride, shift, to, ldy, finish);
            }
        }
    }
}

}  // namespace

extern "C" {
int lanes_f32() { return Lanes<float>::count; }
int lanes_f64() { return Lanes<double>::count; }
}
