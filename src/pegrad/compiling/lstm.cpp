// An LSTM's steps. Each thread takes some of the sequences through all steps, and waits for no other.
//
// (N, T, .) are N sequences of T steps with H hidden units; gates are i, f, g, o. Arrays are contiguous.

#include <ATen/cpu/vec/vec.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t V = Vec::size();
constexpr int64_t COLUMNS = 2 * V;  // of a product that are made at a time,
constexpr int ROWS = 4;             // and rows: as many as keep multipliers busy

Vec load(const float* from) { return Vec::loadu(from); }

Vec sigmoid(const Vec& x) { return Vec(1) / (Vec(1) + x.neg().exp()); }

// To 2^-23, absolutely, which is the last place of a gate; Vec::tanh is right to its own, and takes longer.
Vec tanh_of(const Vec& x) { return Vec(1) - Vec(2) / (Vec(1) + (x + x).exp()); }

// A matrix (K, M) that rows are multiplied by again and again, laid out for that: COLUMNS of it after the other.
struct Weight {
  std::vector<float> packed;
  int64_t K, M;

  // Number (k, m) is at from[k * row + m * column].
  Weight(const float* from, int64_t K, int64_t M, int64_t row, int64_t column) : packed(K * M), K(K), M(M) {
#pragma omp parallel for
    for (int64_t block = 0; block < M / COLUMNS; ++block)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t m = 0; m < COLUMNS; ++m)
          packed[(block * K + k) * COLUMNS + m] = from[k * row + (block * COLUMNS + m) * column];
  }

  // out = in W, over rows that lie so far apart in memory.
  void product(const float* in, int64_t in_row, float* out, int64_t out_row, int64_t rows) const {
    for (int64_t m = 0; m < M; m += COLUMNS) tiles<ROWS>(in, in_row, out + m, out_row, rows, packed.data() + m * K);
  }

  template <int R>
  void tiles(const float* in, int64_t in_row, float* out, int64_t out_row, int64_t rows, const float* weight) const {
    for (; rows >= R; rows -= R, in += R * in_row, out += R * out_row) tile<R>(in, in_row, out, out_row, weight);
    if constexpr (R > 1) tiles<R - 1>(in, in_row, out, out_row, rows, weight);
  }

  template <int R>
  void tile(const float* in, int64_t in_row, float* out, int64_t out_row, const float* weight) const {
    Vec left[R], right[R];
    for (int r = 0; r < R; ++r) left[r] = right[r] = Vec(0);
    for (int64_t k = 0; k < K; ++k, weight += COLUMNS) {
      const Vec first = load(weight), second = load(weight + V);
      for (int r = 0; r < R; ++r) {
        const Vec x(in[r * in_row + k]);
        left[r] = at::vec::fmadd(x, first, left[r]);
        right[r] = at::vec::fmadd(x, second, right[r]);
      }
    }
    for (int r = 0; r < R; ++r) left[r].store(out + r * out_row), right[r].store(out + r * out_row + V);
  }
};

// Calls work(first row, last row, number of steps done) for every step, each thread with rows of its own.
template <typename Work>
void sweep(int64_t N, int64_t T, Work work) {
  const int64_t parts = omp_get_max_threads();
#pragma omp parallel for
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t s = 0; s < T; ++s) work(part * N / parts, (part + 1) * N / parts, s);
}

}  // namespace

// Of what H must be a multiple.
extern "C" int64_t lstm_columns() { return COLUMNS; }

// ih (N, T, 4 H), bias (4 H), hh (4 H, H), gates (T, 4, N, H), squashed (T, N, H); hidden and cell are (T + 1, N, H), the
// states before and after every step, and the first ones are there.
extern "C" void lstm(const float* ih, const float* bias, const float* hh, float* gates, float* hidden, float* cell,
                     float* squashed, int64_t N, int64_t T, int64_t H, bool backwards) {
  const int64_t size = N * H;
  const Weight weight(hh, H, 4 * H, 1, H);
  std::vector<float> products(4 * size);
  sweep(N, T, [&](int64_t first, int64_t last, int64_t s) {
    const int64_t t = backwards ? T - 1 - s : s, before = t + backwards, after = t + !backwards;
    weight.product(hidden + before * size + first * H, H, products.data() + first * 4 * H, 4 * H, last - first);
    for (int64_t r = first; r < last; ++r)
      for (int64_t j = 0; j < H; j += V) {
        const int64_t at = r * H + j;
        const auto sum = [&](int64_t gate) {
          const int64_t column = gate * H + j;
          return load(products.data() + r * 4 * H + column) + load(ih + (r * T + t) * 4 * H + column) +
                 load(bias + column);
        };
        const Vec in = sigmoid(sum(0)), forget = sigmoid(sum(1)), fresh = tanh_of(sum(2)), out = sigmoid(sum(3));
        const Vec now = forget * load(cell + before * size + at) + in * fresh, tanh = tanh_of(now);
        float* gate = gates + t * 4 * size + at;
        in.store(gate), forget.store(gate + size), fresh.store(gate + 2 * size), out.store(gate + 3 * size);
        now.store(cell + after * size + at);
        tanh.store(squashed + t * size + at);
        (tanh * out).store(hidden + after * size + at);
      }
  });
}

// Beside those, grads (N, T, 4 H), grad_hidden and grad_cell (N, H), which hold the gradients at the last states and, in
// the end, those at the first. output, (N, T, H), lies in memory by its first two strides.
extern "C" void lstm_back(const float* gates, const float* cell, const float* squashed, const float* output,
                          int64_t output_n, int64_t output_t, const float* hh, float* grads, float* grad_hidden,
                          float* grad_cell, int64_t N, int64_t T, int64_t H, bool backwards) {
  const int64_t size = N * H;
  const Weight weight(hh, 4 * H, H, H, 1);
  std::vector<float> at_gates(4 * size);  // of one step: rows of `grads` lie as far apart as caches do not like
  const Vec one(1);
  sweep(N, T, [&](int64_t first, int64_t last, int64_t s) {
    const int64_t t = backwards ? s : T - 1 - s, before = t + backwards;
    for (int64_t r = first; r < last; ++r) {
      float* row = at_gates.data() + r * 4 * H;
      for (int64_t j = 0; j < H; j += V) {
        const int64_t at = r * H + j;
        const float* gate = gates + t * 4 * size + at;
        const Vec in = load(gate), forget = load(gate + size), fresh = load(gate + 2 * size),
                  out = load(gate + 3 * size), tanh = load(squashed + t * size + at);
        const Vec state = load(grad_hidden + at) + load(output + r * output_n + t * output_t + j);
        const Vec now = load(grad_cell + at) + state * out * (one - tanh * tanh);
        float* to = row + j;
        (now * fresh * in * (one - in)).store(to);
        (now * load(cell + before * size + at) * forget * (one - forget)).store(to + H);
        (now * in * (one - fresh * fresh)).store(to + 2 * H);
        (state * tanh * out * (one - out)).store(to + 3 * H);
        (now * forget).store(grad_cell + at);
      }
      std::copy_n(row, 4 * H, grads + (r * T + t) * 4 * H);
    }
    weight.product(at_gates.data() + first * 4 * H, 4 * H, grad_hidden + first * H, H, last - first);
  });
}
