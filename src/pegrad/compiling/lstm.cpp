// An LSTM's steps. Each thread takes some of the sequences through all steps, and waits for no other.
//
// (N, T, .) are N sequences of T steps with H hidden units; gates are i, f, g, o. A step's products, activations and new
// states are made for a few rows and a few columns at a time, and stay in registers from the first to the last.

#include <ATen/cpu/vec/vec.h>
#include <omp.h>

#include <cstdint>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t V = Vec::size();
constexpr int64_t WIDE = 2 * V;  // columns that are made at a time on the way back
constexpr int ROWS = 3, ROWS_BACK = 6;  // as many as the registers hold sums of

Vec load(const float* from) { return Vec::loadu(from); }

Vec sigmoid(const Vec& x) { return Vec(1) / (Vec(1) + x.neg().exp()); }

// How a thread finds its sequences: about as many as every other.
int64_t first_of(int64_t part, int64_t parts, int64_t rows) { return part * rows / parts; }

struct Forward {
  const float *ih, *bias;
  float *gates, *hidden, *cell, *squashed;
  int64_t N, T, H;

  // Makes columns j to j + V of R rows at step t, from the states before it. `weight` is (H, 4, V).
  template <int R>
  void step(int64_t r, int64_t t, int64_t before, int64_t after, int64_t j, const float* weight) const {
    Vec sums[R][4];
    for (int i = 0; i < R; ++i)
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t column = gate * H + j;
        sums[i][gate] = load(ih + ((r + i) * T + t) * 4 * H + column) + load(bias + column);
      }
    const float* past = hidden + (before * N + r) * H;
    for (int64_t k = 0; k < H; ++k, weight += 4 * V) {
      const Vec w[4] = {load(weight), load(weight + V), load(weight + 2 * V), load(weight + 3 * V)};
      for (int i = 0; i < R; ++i) {
        const Vec h(past[i * H + k]);
        for (int gate = 0; gate < 4; ++gate) sums[i][gate] = at::vec::fmadd(h, w[gate], sums[i][gate]);
      }
    }
    for (int i = 0; i < R; ++i) {
      const Vec in = sigmoid(sums[i][0]), forget = sigmoid(sums[i][1]), fresh = sums[i][2].tanh(),
                out = sigmoid(sums[i][3]);
      const int64_t at = (r + i) * H + j, size = N * H;
      const Vec now = forget * load(cell + before * size + at) + in * fresh;
      const Vec tanh = now.tanh();
      const Vec all[4] = {in, forget, fresh, out};
      for (int gate = 0; gate < 4; ++gate) all[gate].store(gates + (t * 4 + gate) * size + at);
      now.store(cell + after * size + at);
      tanh.store(squashed + t * size + at);
      (tanh * out).store(hidden + after * size + at);
    }
  }
};

struct Back {
  const float *gates, *cell, *squashed, *output;
  int64_t output_n, output_t;
  float *grads, *grad_hidden, *grad_cell;
  int64_t N, T, H;

  // Makes the gradients at a row's gates before their activations.
  void at_gates(int64_t r, int64_t t, int64_t before) const {
    const int64_t size = N * H;
    for (int64_t j = 0; j < H; j += V) {
      const int64_t at = r * H + j;
      const float* gate = gates + t * 4 * size + at;
      const Vec in = load(gate), forget = load(gate + size), fresh = load(gate + 2 * size), out = load(gate + 3 * size);
      const Vec tanh = load(squashed + t * size + at), one(1);
      const Vec hidden = load(grad_hidden + at) + load(output + r * output_n + t * output_t + j);
      const Vec now = load(grad_cell + at) + hidden * out * (one - tanh * tanh);
      float* to = grads + (r * T + t) * 4 * H + j;
      (now * fresh * in * (one - in)).store(to);
      (now * load(cell + before * size + at) * forget * (one - forget)).store(to + H);
      (now * in * (one - fresh * fresh)).store(to + 2 * H);
      (hidden * tanh * out * (one - out)).store(to + 3 * H);
      (now * forget).store(grad_cell + at);
    }
  }

  // Takes R rows' gradients at step t to columns j to j + WIDE of the hidden state before it. `weight` is (4 H, WIDE).
  template <int R>
  void step(int64_t r, int64_t t, int64_t j, const float* weight) const {
    Vec sums[R][2];
    for (int i = 0; i < R; ++i) sums[i][0] = sums[i][1] = Vec(0);
    const float* rows = grads + (r * T + t) * 4 * H;
    for (int64_t k = 0; k < 4 * H; ++k, weight += WIDE) {
      const Vec w[2] = {load(weight), load(weight + V)};
      for (int i = 0; i < R; ++i) {
        const Vec g(rows[i * T * 4 * H + k]);
        for (int half = 0; half < 2; ++half) sums[i][half] = at::vec::fmadd(g, w[half], sums[i][half]);
      }
    }
    for (int i = 0; i < R; ++i)
      for (int half = 0; half < 2; ++half) sums[i][half].store(grad_hidden + (r + i) * H + j + half * V);
  }
};

}  // namespace

// Of what H must be a multiple.
extern "C" int64_t lstm_columns() { return WIDE; }

// Arrays are contiguous: ih (N, T, 4 H), bias (4 H), hh (4 H, H), gates (T, 4, N, H), squashed (T, N, H); hidden and cell
// are (T + 1, N, H), the states before and after every step, and the first ones are there.
extern "C" void lstm(const float* ih, const float* bias, const float* hh, float* gates, float* hidden, float* cell,
                     float* squashed, int64_t N, int64_t T, int64_t H, bool backwards) {
  std::vector<float> packed(4 * H * H);
#pragma omp parallel for
  for (int64_t j = 0; j < H; ++j)
    for (int64_t gate = 0; gate < 4; ++gate)
      for (int64_t k = 0; k < H; ++k) packed[((j / V * H + k) * 4 + gate) * V + j % V] = hh[(gate * H + j) * H + k];
  const Forward run{ih, bias, gates, hidden, cell, squashed, N, T, H};
  const int64_t parts = omp_get_max_threads();
#pragma omp parallel for
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = first_of(part, parts, N), last = first_of(part + 1, parts, N);
    for (int64_t s = 0; s < T; ++s) {
      const int64_t t = backwards ? T - 1 - s : s, before = t + backwards, after = t + !backwards;
      for (int64_t j = 0; j < H; j += V) {
        const float* weight = packed.data() + j * H * 4;
        int64_t r = first;
        for (; r + ROWS <= last; r += ROWS) run.step<ROWS>(r, t, before, after, j, weight);
        for (; r < last; ++r) run.step<1>(r, t, before, after, j, weight);
      }
    }
  }
}

// Beside those, contiguous as well: grads (N, T, 4 H), grad_hidden and grad_cell (N, H), which hold the gradients at the
// last states and, in the end, those at the first. output, (N, T, H), lies in memory by its first two strides.
extern "C" void lstm_back(const float* gates, const float* cell, const float* squashed, const float* output,
                          int64_t output_n, int64_t output_t, const float* hh, float* grads, float* grad_hidden,
                          float* grad_cell, int64_t N, int64_t T, int64_t H, bool backwards) {
  std::vector<float> packed(4 * H * H);
#pragma omp parallel for
  for (int64_t k = 0; k < 4 * H; ++k)
    for (int64_t j = 0; j < H; ++j) packed[(j / WIDE * 4 * H + k) * WIDE + j % WIDE] = hh[k * H + j];
  const Back run{gates, cell, squashed, output, output_n, output_t, grads, grad_hidden, grad_cell, N, T, H};
  const int64_t parts = omp_get_max_threads();
#pragma omp parallel for
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = first_of(part, parts, N), last = first_of(part + 1, parts, N);
    for (int64_t s = 0; s < T; ++s) {
      const int64_t t = backwards ? s : T - 1 - s;
      for (int64_t r = first; r < last; ++r) run.at_gates(r, t, t + backwards);
      for (int64_t j = 0; j < H; j += WIDE) {
        const float* weight = packed.data() + j * 4 * H;
        int64_t r = first;
        for (; r + ROWS_BACK <= last; r += ROWS_BACK) run.step<ROWS_BACK>(r, t, j, weight);
        for (; r < last; ++r) run.step<1>(r, t, j, weight);
      }
    }
  }
}
