#include "layout/simplify.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <future>
#include <stdexcept>
#include <string>
#include <utility>

namespace spdnn {
namespace {

// Calls work(begin, end) for contiguous parts of 0 .. count, each on a thread of its own. What is thrown first, in the
// order of the parts, is thrown here.
template <typename Work>
void for_each_part(int64_t count, int threads, const Work& work) {
  constexpr int64_t kSmallest = 256;  // rows that are worth a thread
  const int64_t parts = std::clamp<int64_t>(count / kSmallest, 1, threads);
  std::vector<std::future<void>> others;
  for (int64_t part = 1; part < parts; ++part) {
    others.push_back(std::async(std::launch::async, work, part * count / parts, (part + 1) * count / parts));
  }
  work(0, count / parts);
  for (std::future<void>& other : others) other.get();
}

uint64_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <typename T>
void keep_one_if_all_equal(std::vector<T>& values) {
  const bool all_equal =
      std::all_of(values.begin(), values.end(), [&](T value) { return bits_of(value) == bits_of(values[0]); });
  if (values.size() > 1 && all_equal) values = std::vector<T>(1, values[0]);
}

// The rows of a layer in terms of the simplified layer before; each stands where the original row began.
struct Rows {
  explicit Rows(const LayerArrays& layer)
      : first(layer.indptr),
        edges(layer.outputs),
        hashes(layer.outputs),
        bias(layer.outputs),
        indices(layer.edges()),
        values(layer.edges()) {}

  bool equal(int64_t a, int64_t b) const {
    return edges[a] == edges[b] && bits_of(bias[a]) == bits_of(bias[b]) &&
           std::equal(indices.data() + first[a], indices.data() + first[a] + edges[a], indices.data() + first[b]) &&
           std::equal(values.data() + first[a], values.data() + first[a] + edges[a], values.data() + first[b],
                      [](float x, float y) { return bits_of(x) == bits_of(y); });
  }

  const int64_t* first;
  std::vector<int64_t> edges;
  std::vector<uint64_t> hashes;
  std::vector<float> bias;
  std::vector<int32_t> indices;
  std::vector<float> values;
};

// Rewrites rows, one after the other.
template <typename SourceOf>
class RowRewriter {
 public:
  // `source_of(input, weight, &bias)` returns the neuron that stands for an input, or -1 having added a constant's
  // share to the bias.
  RowRewriter(const LayerArrays& layer, int64_t number, uint64_t hash_mask, SourceOf source_of, Rows* rows)
      : layer_(layer), number_(number), hash_mask_(hash_mask), source_of_(source_of), rows_(*rows) {}

  void rewrite(int64_t row) {
    double bias = layer_.bias[layer_.bias_count > 1 ? row : 0];
    read_edges(row, &bias);
    const int64_t edges = write_edges(row);
    rows_.edges[row] = edges;
    rows_.bias[row] = rounded(bias, row, "bias") + 0.0f;                     // -0.0 becomes 0.0
    if (edges == 0) rows_.bias[row] = layer_.clip.clipped(rows_.bias[row]);  // constants of one value agree
    rows_.hashes[row] = hash(row) & hash_mask_;
  }

 private:
  // An edge as one number, by source, then by weight: a sum must not depend on the order of what was merged.
  static uint64_t packed(int32_t source, float weight) { return static_cast<uint64_t>(source) << 32 | bits_of(weight); }
  static int32_t source_of(uint64_t edge) { return static_cast<int32_t>(edge >> 32); }
  static float weight_of(uint64_t edge) {
    const uint32_t bits = static_cast<uint32_t>(edge);
    float weight;
    std::memcpy(&weight, &bits, sizeof weight);
    return weight;
  }

  void read_edges(int64_t row, double* bias) {
    edges_.clear();
    for (int64_t edge = layer_.indptr[row]; edge < layer_.indptr[row + 1]; ++edge) {
      const float weight = layer_.value(edge);
      if (weight == 0) continue;
      const int32_t source = source_of_(layer_.indices[edge], weight, bias);
      if (source >= 0) edges_.push_back(packed(source, weight));
    }
    if (!std::is_sorted(edges_.begin(), edges_.end())) std::sort(edges_.begin(), edges_.end());
  }

  // Adds up the weights of each source. Returns the edges that are left.
  int64_t write_edges(int64_t row) {
    const int64_t first = layer_.indptr[row];
    int64_t count = 0;
    for (size_t edge = 0; edge < edges_.size();) {
      const int32_t source = source_of(edges_[edge]);
      double sum = 0;
      for (; edge < edges_.size() && source_of(edges_[edge]) == source; ++edge) sum += weight_of(edges_[edge]);
      const float weight = rounded(sum, row, "weights");
      if (weight == 0) continue;
      rows_.indices[first + count] = source;
      rows_.values[first + count] = weight;
      ++count;
    }
    return count;
  }

  float rounded(double sum, int64_t row, const char* what) const {
    const float value = static_cast<float>(sum);
    if (!std::isfinite(value)) {
      fail_layer(number_, "the merged " + std::string(what) + " of output neuron " + std::to_string(row) +
                              " are too large for float32: build the plan with compress='none'");
    }
    return value;
  }

  uint64_t hash(int64_t row) const {
    uint64_t hash = 0x9E3779B97F4A7C15u ^ bits_of(rows_.bias[row]);
    for (int64_t edge = rows_.first[row]; edge < rows_.first[row] + rows_.edges[row]; ++edge) {
      hash = (hash ^ packed(rows_.indices[edge], rows_.values[edge])) * 0xD6E8FEB86659FD93u;
      hash ^= hash >> 32;
    }
    return hash;
  }

  const LayerArrays& layer_;
  int64_t number_;
  uint64_t hash_mask_;
  SourceOf source_of_;
  Rows& rows_;
  std::vector<uint64_t> edges_;  // of the row in work
};

// Classes of equal rows, numbered in the order of their first rows.
struct Classes {
  std::vector<int32_t> class_of;    // of each row
  std::vector<int64_t> first_rows;  // of each class

  explicit Classes(const Rows& rows) : class_of(rows.edges.size()) {
    size_t size = 1;
    while (size < 2 * class_of.size()) size *= 2;
    std::vector<int32_t> table(size, -1);  // class at a hash, or at the next free place after it
    for (size_t row = 0; row < class_of.size(); ++row) {
      size_t place = rows.hashes[row] & (size - 1);
      while (table[place] >= 0 && !same(rows, first_rows[table[place]], row)) place = (place + 1) & (size - 1);
      if (table[place] < 0) {
        table[place] = static_cast<int32_t>(first_rows.size());
        first_rows.push_back(static_cast<int64_t>(row));
      }
      class_of[row] = table[place];
    }
  }

  static bool same(const Rows& rows, int64_t a, int64_t b) {
    return rows.hashes[a] == rows.hashes[b] && rows.equal(a, b);
  }
};

SimplifiedLayer gather(const Rows& rows, const std::vector<int64_t>& chosen, int threads) {
  const int64_t count = static_cast<int64_t>(chosen.size());
  SimplifiedLayer layer;
  layer.indptr.resize(count + 1);
  layer.bias.resize(count);
  for (int64_t row = 0; row < count; ++row) {
    layer.indptr[row + 1] = layer.indptr[row] + rows.edges[chosen[row]];
    layer.bias[row] = rows.bias[chosen[row]];
  }
  layer.indices.resize(layer.indptr[count]);
  layer.values.resize(layer.indptr[count]);
  for_each_part(count, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = rows.first[chosen[row]], edges = rows.edges[chosen[row]];
      std::copy_n(rows.indices.data() + first, edges, layer.indices.data() + layer.indptr[row]);
      std::copy_n(rows.values.data() + first, edges, layer.values.data() + layer.indptr[row]);
    }
  });
  keep_one_if_all_equal(layer.values);
  keep_one_if_all_equal(layer.bias);
  return layer;
}

// Keeps the rows that are read, in order.
void keep_rows(const std::vector<char>& read, SimplifiedLayer* layer) {
  const bool own_values = layer->values.size() > 1, own_bias = layer->bias.size() > 1;
  int64_t rows = 0, edges = 0;
  for (int64_t row = 0; row < static_cast<int64_t>(read.size()); ++row) {
    const int64_t begin = layer->indptr[row], end = layer->indptr[row + 1];
    if (!read[row]) {
      begin == end ? ++layer->origin.constant : ++layer->origin.unread;
      continue;
    }
    if (own_bias) layer->bias[rows] = layer->bias[row];
    for (int64_t edge = begin; edge < end; ++edge, ++edges) {
      layer->indices[edges] = layer->indices[edge];
      if (own_values) layer->values[edges] = layer->values[edge];
    }
    layer->indptr[++rows] = edges;
  }
  layer->indptr.resize(rows + 1);
  layer->indices.resize(edges);
  layer->indices.shrink_to_fit();
  if (own_values) {
    layer->values.resize(edges);
    layer->values.shrink_to_fit();
  }
  if (own_bias) layer->bias.resize(rows);
  keep_one_if_all_equal(layer->values);
  keep_one_if_all_equal(layer->bias);
}

// Makes the layer's first neuron the only one, and a constant: no back end need know of layers without neurons.
void keep_placeholder(SimplifiedLayer* layer) {
  std::vector<char> read(layer->outputs(), 0);
  read[0] = 1;
  keep_rows(read, layer);
  layer->indptr[1] = 0;
  layer->indices.clear();
  layer->values.assign(1, 0.0f);
  layer->bias.assign(1, 0.0f);
}

}  // namespace

Simplifier::Simplifier(int threads, uint64_t hash_mask) : threads_(std::max(threads, 1)), hash_mask_(hash_mask) {}

void Simplifier::add(const LayerArrays& layer) {
  check_chain(layer, ++layer_count_, last_outputs_);
  check_layer(layer, layer_count_);
  last_outputs_ = layer.outputs;
  Rows rows(layer);
  const auto rewrite_all = [&](auto source_of) {
    for_each_part(layer.outputs, threads_, [&](int64_t begin, int64_t end) {
      RowRewriter rewriter(layer, layer_count_, hash_mask_, source_of, &rows);
      for (int64_t row = begin; row < end; ++row) rewriter.rewrite(row);
    });
  };
  if (layer_count_ == 1) {
    rewrite_all([](int32_t input, float, double*) { return input; });
  } else {
    rewrite_all([this](int32_t input, float weight, double* bias) {
      const Source source = sources_[input];
      if (source.neuron < 0) *bias += static_cast<double>(weight) * source.value;
      return source.neuron;
    });
  }
  Classes classes(rows);
  SimplifiedLayer simplified = gather(rows, classes.first_rows, threads_);
  simplified.inputs = layers_.empty() ? layer.inputs : layers_.back().outputs();
  simplified.origin.edges = layer.edges();
  simplified.origin.merged = layer.outputs - simplified.outputs();
  layers_.push_back(std::move(simplified));
  sources_.resize(layer.outputs);
  for (int64_t row = 0; row < layer.outputs; ++row) {
    sources_[row] = rows.edges[row] == 0 ? Source{-1, rows.bias[row]} : Source{classes.class_of[row], 0};
  }
  expansion_ = std::move(classes.class_of);
}

void Simplifier::finish() {
  if (layer_count_ == 0) throw std::invalid_argument("a network needs at least one layer");
  for (size_t l = layers_.size() - 1; l > 0; --l) {
    SimplifiedLayer &reader = layers_[l], &layer = layers_[l - 1];
    std::vector<char> read(layer.outputs(), 0);
    for (const int32_t index : reader.indices) read[index] = 1;
    std::vector<int32_t> place(read.size());
    int32_t kept = 0;
    for (size_t neuron = 0; neuron < read.size(); ++neuron) place[neuron] = read[neuron] ? kept++ : -1;
    if (kept == layer.outputs()) continue;
    if (kept == 0) {
      keep_placeholder(&layer);
    } else {
      keep_rows(read, &layer);
    }
    for (int32_t& index : reader.indices) index = place[index];
    reader.inputs = layer.outputs();
  }
}

SimplifiedLayer Simplifier::take() {
  SimplifiedLayer layer = std::move(layers_.front());
  layers_.pop_front();
  return layer;
}

}  // namespace spdnn
