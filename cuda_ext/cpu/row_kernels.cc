#include "cpu/row_kernels.h"

#include "cpu/vectors.h"

#define SPDNN_CONCATENATE_(a, b) a##b
#define SPDNN_CONCATENATE(a, b) SPDNN_CONCATENATE_(a, b)

namespace spdnn::cpu {
namespace {

constexpr int kVectors = 4;  // of features in registers
constexpr int kWordBits = 32;

typedef float UnalignedVector __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

// --- product ---

// Edges go in two chains, so that additions need not wait for each other.
template <int kV>
inline void compute_row(const ProductTask& task, int64_t row, int64_t feature) {
  const float* in = task.in + feature;
  const int64_t begin = task.rows.indptr[row], end = task.rows.indptr[row + 1];
  Vector even[kV] = {}, odd[kV] = {};
  const auto add_edge = [&](Vector* sums, int64_t edge) {
    const Vector* x = reinterpret_cast<const Vector*>(in + static_cast<int64_t>(task.rows.indices[edge]) * task.stride);
    const Vector w = Vector{} + (task.values ? task.values[edge] : task.value);
    for (int v = 0; v < kV; ++v) sums[v] = multiply_add(w, x[v], sums[v]);
  };
  int64_t edge = begin;
  for (; edge + 1 < end; edge += 2) {
    add_edge(even, edge);
    add_edge(odd, edge + 1);
  }
  if (edge < end) add_edge(even, edge);
  const Vector bias = Vector{} + (task.bias ? task.bias[row] : task.shared_bias);
  const Vector lower = Vector{} + task.lower, upper = Vector{} + task.upper;
  Vector* out = reinterpret_cast<Vector*>(task.out + row * task.stride + feature);
  for (int v = 0; v < kV; ++v) {
    Vector y = even[v] + odd[v] + bias;
    y = y > lower ? y : lower;  // in this order a NaN becomes the lower bound, and -0.0 becomes 0.0
    out[v] = y > upper ? upper : y;
  }
}

void product(const ProductTask& task) {
  for (int64_t row = task.rows.first; row < task.rows.end; ++row) {
    int64_t feature = 0;
    for (; feature + (kVectors - 1) * kLanes < task.features; feature += kVectors * kLanes) {
      compute_row<kVectors>(task, row, feature);
    }
    for (; feature < task.features; feature += kLanes) compute_row<1>(task, row, feature);
  }
}

// --- sampled product ---

// Sums of neighbouring lanes: those of `a`, then those of `b`.
inline Vector add_neighbours(Vector a, Vector b) {
#if defined(__clang__)
  Vector sums;
  for (int k = 0; k < kLanes / 2; ++k) {
    sums[k] = a[2 * k] + a[2 * k + 1];
    sums[kLanes / 2 + k] = b[2 * k] + b[2 * k + 1];
  }
  return sums;
#else
  Bits even, odd;
  for (int k = 0; k < kLanes; ++k) {
    even[k] = 2 * k;
    odd[k] = 2 * k + 1;
  }
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}

template <int kV>
inline void sample_row(const SampledTask& task, int64_t row, int64_t feature) {
  const Vector* y = reinterpret_cast<const Vector*>(task.out + row * task.stride + feature);
  const float* in = task.in + feature;
  const int64_t begin = task.rows.indptr[row], end = task.rows.indptr[row + 1];
  Vector own[kV];
  for (int v = 0; v < kV; ++v) own[v] = y[v];
  const auto product_of = [&](int64_t edge) {
    const Vector* x = reinterpret_cast<const Vector*>(in + static_cast<int64_t>(task.rows.indices[edge]) * task.stride);
    Vector sum = own[0] * x[0];
    for (int v = 1; v < kV; ++v) sum = multiply_add(own[v], x[v], sum);
    return sum;
  };
  for (int64_t edge = begin; edge < end; edge += kLanes) {
    const int count = static_cast<int>(end - edge < kLanes ? end - edge : kLanes);
    Vector products[kLanes] = {};
    for (int k = 0; k < count; ++k) products[k] = product_of(edge + k);
    for (int width = kLanes; width > 1; width /= 2) {
      for (int k = 0; k < width / 2; ++k) products[k] = add_neighbours(products[2 * k], products[2 * k + 1]);
    }
    if (count == kLanes) {
      *reinterpret_cast<UnalignedVector*>(task.sums + edge) += products[0];
    } else {
      for (int k = 0; k < count; ++k) task.sums[edge + k] += products[0][k];
    }
  }
}

void sampled(const SampledTask& task) {
  for (int64_t row = task.rows.first; row < task.rows.end; ++row) {
    int64_t feature = 0;
    for (; feature + kVectors * kLanes <= task.stride; feature += kVectors * kLanes) {
      sample_row<kVectors>(task, row, feature);
    }
    for (; feature < task.stride; feature += kLanes) sample_row<1>(task, row, feature);
  }
}

// --- masks ---

inline int64_t bits_of_word(const MaskTask& task, int64_t word) {
  const int64_t left = task.neurons - word * kWordBits;
  return left < kWordBits ? left : kWordBits;
}

void store_mask(const MaskTask& task) {
  const Vector lower = Vector{} + task.lower, upper = Vector{} + task.upper;
  for (int64_t word = 0; word * kWordBits < task.neurons; ++word) {
    const int64_t bits = bits_of_word(task, word);
    for (int64_t feature = 0; feature < task.features; feature += kLanes) {
      Bits mask{};
      for (int64_t bit = 0; bit < bits; ++bit) {
        const Vector y = *reinterpret_cast<const Vector*>(task.tile + (word * kWordBits + bit) * task.stride + feature);
        mask |= (Bits)((y > lower) & (y < upper)) & (uint32_t{1} << bit);
      }
      for (int k = 0; k < kLanes && feature + k < task.features; ++k) {
        task.words[(feature + k) * task.words_stride + word] = mask[k];
      }
    }
  }
}

void apply_mask(const MaskTask& task) {
  for (int64_t word = 0; word * kWordBits < task.neurons; ++word) {
    const int64_t bits = bits_of_word(task, word);
    for (int64_t feature = 0; feature < task.features; feature += kLanes) {
      Bits mask{};
      for (int k = 0; k < kLanes && feature + k < task.features; ++k) {
        mask[k] = task.words[(feature + k) * task.words_stride + word];
      }
      for (int64_t bit = 0; bit < bits; ++bit) {
        Vector* y = reinterpret_cast<Vector*>(task.tile + (word * kWordBits + bit) * task.stride + feature);
        *y = (mask & (uint32_t{1} << bit)) != 0 ? *y : Vector{};
      }
    }
  }
}

}  // namespace

extern const RowKernels SPDNN_CONCATENATE(row_kernels_, SPDNN_KERNELS);
const RowKernels SPDNN_CONCATENATE(row_kernels_, SPDNN_KERNELS) = {&product, &sampled, &store_mask, &apply_mask};

}  // namespace spdnn::cpu
