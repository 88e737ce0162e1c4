// The objective's passes over the logits, a row at a time: what nelbo_cpu.py compiles and calls.
//
// A row of usual width stays in the processor's cache while it is read; sums add up in float32 over CHUNK columns, in
// double beyond.
// `#pragma omp simd` (no OpenMP runtime) lets the compiler add in lanes; NaN and infinities keep their meaning.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int64_t CHUNK = 1024;
// Four columns share a division and a logarithm: those of a CHUNK that are PART apart, where the product of their four
// 1 + c p, whose p add up to 1 at most, is finite
constexpr int64_t PART = CHUNK / 4;
constexpr float FOUR_FIT = 1e9f;

struct bfloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_of(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "as many bits");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float read(float value) { return value; }
inline float read(bfloat16 value) { return bits_of<float>(static_cast<uint32_t>(value.bits) << 16); }

inline void write(float value, float& out) { out = value; }
inline void write(float value, bfloat16& out) {  // to nearest, ties to even
  const uint32_t bits = bits_of<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

// exp(x) for x <= 0, 0 below 1.22e-38; Cody and Waite's reduction, Cephes' polynomial: about 1 ulp
inline float exp_of(float x) {
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 2^23: the sum's last bits are round(x / ln 2)
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float scale = bits_of<float>((bits_of<uint32_t>(shifted) + 127u) << 23);
  const float result = ((p * r) * r + r + 1.0f) * scale;
  return x < -87.3f ? 0.0f : result;
}

// log(w) for finite w >= 1; Cephes' polynomial: about 1 ulp
inline float log_of(float w) {
  const uint32_t bits = bits_of<uint32_t>(w) + (0x3f800000u - 0x3f3504f3u);  // so that m lies in [sqrt(1/2), sqrt(2))
  const float n = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  const float m = bits_of<float>((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float square = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  return ((p * m * square - n * 2.12194440e-4f) - 0.5f * square + m) + n * 0.693359375f;
}

// log(1 + u) for u >= 0, `inverse` being 1 / (1 + u): what rounding 1 + u has lost comes back
inline float log1p_of(float u, float inverse) {
  const float w = 1.0f + u;
  return log_of(w) + (u - (w - 1.0f)) * inverse;
}

template <class T>
float largest(const T* row, int64_t begin, int64_t end, float top) {
#pragma omp simd reduction(max : top)
  for (int64_t j = begin; j < end; ++j) top = std::max(top, read(row[j]));
  return top;
}

// The sums over one row that the loss reads; picked[2] are exp(logit - top) at its columns of their own.
template <class T>
void row_sums(const T* row, int64_t width, int64_t excluded, const int64_t* columns, bool is_wrong, float c,
              bool is_k_zero, float* e, float* picked, float& top, float& rest, float& norm, float& log_terms,
              float& damped) {
  const float none = -INFINITY;
  top = excluded < 0 ? largest(row, 0, width, none)
                     : largest(row, excluded + 1, width, largest(row, 0, excluded, none));
  picked[0] = std::exp(read(row[columns[0]]) - top);
  picked[1] = is_wrong ? std::exp(read(row[columns[1]]) - top) : 0.0f;
  const int64_t left_out[3] = {columns[0], columns[1], excluded};
  const float highest = top;
  double sum = 0.0;
  for (int64_t begin = 0; begin < width; begin += CHUNK) {
    const int64_t end = std::min(begin + CHUNK, width);
#pragma omp simd
    for (int64_t j = begin; j < end; ++j) e[j] = exp_of(read(row[j]) - highest);
    for (const int64_t column : left_out)
      if (column >= begin && column < end) e[column] = 0.0f;
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t j = begin; j < end; ++j) part += e[j];
    sum += part;
  }
  rest = static_cast<float>(sum);
  norm = static_cast<float>(sum + picked[0] + picked[1]);
  if (is_k_zero) return;
  const float scale = c / norm;
  double logs = 0.0, damps = 0.0;
  for (int64_t begin = 0; begin < width; begin += CHUNK) {
    const int64_t end = std::min(begin + CHUNK, width);
    float logs_part = 0.0f, damps_part = 0.0f;
    if (c < FOUR_FIT && end - begin == CHUNK) {
      const float *a = e + begin, *b = a + PART, *p = b + PART, *q = p + PART;
#pragma omp simd reduction(+ : logs_part, damps_part)
      for (int64_t j = 0; j < PART; ++j) {
        const float ua = a[j] * scale, ub = b[j] * scale, up = p[j] * scale, uq = q[j] * scale;
        const float wa = 1.0f + ua, wb = 1.0f + ub, wp = 1.0f + up, wq = 1.0f + uq;
        const float w_ab = wa * wb, w_pq = wp * wq, inverse = 1.0f / (w_ab * w_pq);
        damps_part += ((a[j] * wb + b[j] * wa) * w_pq + (p[j] * wq + q[j] * wp) * w_ab) * inverse;
        const float u_ab = ua + ub + ua * ub, u_pq = up + uq + up * uq;  // (1 + a)(1 + b) = 1 + (a + b + ab)
        logs_part += log1p_of(u_ab + u_pq + u_ab * u_pq, inverse);
      }
    } else {
#pragma omp simd reduction(+ : logs_part, damps_part)
      for (int64_t j = begin; j < end; ++j) {
        const float u = e[j] * scale, inverse = 1.0f / (1.0f + u);  // u = c p_j
        damps_part += e[j] * inverse;
        logs_part += log1p_of(u, inverse);
      }
    }
    logs += logs_part;
    damps += damps_part;
  }
  log_terms = static_cast<float>(logs);
  damped = static_cast<float>(damps);
}

template <class T>
void row_gradient(const T* row, T* out, int64_t width, int64_t excluded, bool is_k_zero, float top, float one, float c,
                  float kappa, float kappa_1, float g) {
  if (is_k_zero) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) write(exp_of(read(row[j]) - top) * g, out[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const float e = exp_of(read(row[j]) - top), u = e * c;
      write((u * kappa_1 + kappa) / (u + one) * e, out[j]);
    }
  }
  if (excluded >= 0) write(0.0f, out[excluded]);
}

// work(thread, first, last) on every share of the rows, a thread each
template <class Work>
void share(int64_t rows, int64_t threads, Work work) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) {
    const int64_t first = rows * i / threads, last = rows * (i + 1) / threads;
    try {
      others.emplace_back(work, i, first, last);
    } catch (const std::system_error&) {  // no more threads are allowed
      work(i, first, last);
    }
  }
  work(0, 0, rows / threads);
  for (auto& thread : others) thread.join();
}

template <class T>
void forward(const T* logits, int64_t stride, int64_t rows, int64_t width, int64_t excluded, bool is_k_zero,
             const int64_t* columns, const bool* is_wrong, const float* c, float* picked, float* sums, float* scratch,
             int64_t threads) {
  share(rows, threads, [=](int64_t thread, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      row_sums(logits + i * stride, width, excluded, columns + 2 * i, is_wrong[i], c[i], is_k_zero,
               scratch + thread * width, picked + 2 * i, sums[i], sums[rows + i], sums[2 * rows + i],
               sums[3 * rows + i], sums[4 * rows + i]);
  });
}

template <class T>
void backward(const T* logits, int64_t stride, T* out, int64_t out_stride, int64_t rows, int64_t width,
              int64_t excluded, bool is_k_zero, const float* factors, int64_t threads) {
  share(rows, threads, [=](int64_t, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      row_gradient(logits + i * stride, out + i * out_stride, width, excluded, is_k_zero, factors[i], factors[rows + i],
                   factors[2 * rows + i], factors[3 * rows + i], factors[4 * rows + i], factors[5 * rows + i]);
  });
}

}  // namespace

// Shapes and meanings: nelbo_cpu.py
#define EXPORT(NAME, T)                                                                                               \
  extern "C" void forward_##NAME(const T* logits, int64_t stride, int64_t rows, int64_t width, int64_t excluded,      \
                                 int64_t is_k_zero, const int64_t* columns, const bool* is_wrong, const float* c,     \
                                 float* picked, float* sums, float* scratch, int64_t threads) {                       \
    forward(logits, stride, rows, width, excluded, is_k_zero != 0, columns, is_wrong, c, picked, sums, scratch,       \
            threads);                                                                                                 \
  }                                                                                                                   \
  extern "C" void backward_##NAME(const T* logits, int64_t stride, T* out, int64_t out_stride, int64_t rows,          \
                                  int64_t width, int64_t excluded, int64_t is_k_zero, const float* factors,           \
                                  int64_t threads) {                                                                  \
    backward(logits, stride, out, out_stride, rows, width, excluded, is_k_zero != 0, factors, threads);               \
  }
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
