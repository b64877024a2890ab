// The native core without Python and XLA, for the sanitizers: main SEED ROUNDS. Each round makes a random network, lays
// it out, runs it on a pool of threads in every way there is, from buffers exactly as large as they must be, and
// compares with sums in double; then damages words and runs again. Tables of text are read whole and damaged, too.
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/layer.h"
#include "cpu/network.h"
#include "cpu/row_chain.h"
#include "cpu/sampled.h"
#include "io/tsv.h"
#include "layout/plan_builder.h"
#include "layout/plan_check.h"
#include "layout/plan_rows.h"
#include "layout/simplify.h"

namespace {

using namespace spdnn;

std::mt19937 generator;

int64_t below(int64_t limit) { return std::uniform_int_distribution<int64_t>(0, limit - 1)(generator); }
float uniform() { return std::uniform_real_distribution<float>(-1, 1)(generator); }

void require(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

// As XLA's: a task runs at any later time.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int k = 0; k < threads; ++k) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  void schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

constexpr int kHelpers = 3;

// A layer that owns its arrays.
struct Layer {
  int64_t inputs, outputs;
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices;
  std::vector<float> values, bias;
  ClipBounds clip;

  LayerArrays arrays() const {
    return {inputs,        outputs,
            indptr.data(), indices.data(),
            values.data(), static_cast<int64_t>(values.size()),
            bias.data(),   static_cast<int64_t>(bias.size()),
            clip};
  }
};

// Some outputs share their inputs, some are equal.
Layer random_layer(int64_t inputs, int64_t outputs) {
  Layer layer{};
  layer.indptr = {0};
  layer.inputs = inputs;
  layer.outputs = outputs;
  const bool one_value = below(3) == 0;
  for (int64_t row = 0; row < outputs; ++row) {
    const int64_t begin = layer.indptr.back(), before = row > 0 ? layer.indptr[row - 1] : 0;
    if (row > 0 && below(3) > 0) {
      for (int64_t e = before; e < begin; ++e) layer.indices.push_back(layer.indices[e]);
    } else {
      for (int64_t i = 0; i < inputs; ++i) {
        if (below(4) == 0) layer.indices.push_back(static_cast<int32_t>(i));
      }
    }
    layer.indptr.push_back(static_cast<int64_t>(layer.indices.size()));
  }
  const bool repeats = below(2) == 0;
  for (size_t e = 0; e < layer.indices.size(); ++e) layer.values.push_back(repeats ? 0.25f : uniform());
  if (one_value) layer.values.assign(1, 0.5f);
  for (int64_t row = 0; row < outputs; ++row) layer.bias.push_back(repeats ? -0.25f : uniform());
  if (below(3) == 0) layer.bias.assign(1, -0.125f);
  layer.clip = below(4) > 0 ? ClipBounds{0, 4} : ClipBounds{-1, INFINITY};
  return layer;
}

std::vector<double> run_in_double(const Layer& layer, const std::vector<double>& y, int64_t features) {
  std::vector<double> result(features * layer.outputs);
  for (int64_t f = 0; f < features; ++f) {
    for (int64_t row = 0; row < layer.outputs; ++row) {
      double sum = layer.bias[layer.bias.size() > 1 ? row : 0];
      for (int64_t e = layer.indptr[row]; e < layer.indptr[row + 1]; ++e) {
        sum += y[f * layer.inputs + layer.indices[e]] * layer.values[layer.values.size() > 1 ? e : 0];
      }
      const double lower = layer.clip.lower, upper = layer.clip.upper;
      result[f * layer.outputs + row] = std::min(std::max(sum, lower), upper);
    }
  }
  return result;
}

template <typename T>
void require_close(const std::vector<float>& got, const std::vector<T>& expected, const std::string& what) {
  for (size_t k = 0; k < got.size(); ++k) {
    require(std::abs(got[k] - expected[k]) <= 1e-3 * (1 + std::abs(expected[k])), what + " differs");
  }
}

struct Plan {
  std::vector<uint32_t> words;
  std::vector<int64_t> records;
  PlanView view;
};

std::shared_ptr<Plan> build(const std::vector<Layer>& layers, bool simplify) {
  const LayoutRule rules[] = {{}, {4, 16, 0}, {0, 0, 8}};
  PlanBuilder builder(kHelpers, rules[below(3)]);
  Simplification simplification;
  std::vector<SimplifiedLayer> simplified;
  if (simplify) {
    Simplifier simplifier(kHelpers, below(2) ? ~uint64_t{0} : 3);
    for (const Layer& layer : layers) simplifier.add(layer.arrays());
    simplifier.finish();
    while (!simplifier.empty()) simplified.push_back(simplifier.take());
    simplification = {true, below(2) == 0, simplifier.expansion()};
  }
  for (size_t l = 0; l < layers.size(); ++l) {
    LayerArrays arrays = layers[l].arrays();
    LayerOrigin origin;
    origin.edges = arrays.edges();
    if (simplify) {
      const SimplifiedLayer& layer = simplified[l];
      arrays = {layer.inputs,        layer.outputs(),
                layer.indptr.data(), layer.indices.data(),
                layer.values.data(), static_cast<int64_t>(layer.values.size()),
                layer.bias.data(),   static_cast<int64_t>(layer.bias.size()),
                layers[l].clip};
      origin = layer.origin;
    }
    builder.add(arrays, origin, nullptr);
  }
  auto plan = std::make_shared<Plan>();
  plan->words.resize(builder.finish(simplification));
  builder.write(plan->words.data());
  PlanHeader header;
  std::memcpy(&header, plan->words.data(), sizeof header);
  const int64_t bytes = sizeof header + header.layers * sizeof(PlanLayer) + header.runs * sizeof(PlanRun);
  plan->records.resize(bytes / sizeof(int64_t));
  std::memcpy(plan->records.data(), plan->words.data(), bytes);
  const std::string wrong = check_contents(plan->records.data(), static_cast<int64_t>(plan->records.size()),
                                           plan->words.data(), static_cast<int64_t>(plan->words.size()));
  require(wrong.empty(), wrong);
  require(!view_plan(plan->records.data(), static_cast<int64_t>(plan->records.size()), &plan->view), "no view");
  return plan;
}

// Features of zeros and ones, in all three forms.
struct Features {
  int64_t count, inputs;
  std::vector<float> floats;
  std::vector<uint8_t> bytes;
  std::vector<uint32_t> bits;

  Features(int64_t features, int64_t width) : count(features), inputs(width) {
    const int64_t row_words = (width + 31) / 32;
    bits.resize(features * row_words);
    for (int64_t f = 0; f < features; ++f) {
      for (int64_t i = 0; i < width; ++i) {
        const bool set = below(3) == 0;
        bytes.push_back(set);
        floats.push_back(set);
        bits[f * row_words + i / 32] |= static_cast<uint32_t>(set) << (i % 32);
      }
    }
  }

  cpu::InputFeatures as(cpu::InputType type) const {
    const void* data[] = {floats.data(), bytes.data(), bits.data()};
    return {data[static_cast<int>(type)], type, inputs};
  }
};

std::string run_network(const Plan& plan, const Features& y0, cpu::InputType type, Pool& pool,
                        std::vector<float>* activations) {
  activations->assign(y0.count * plan.view.header->outputs, NAN);
  const std::unique_ptr<bool[]> alive(new bool[y0.count]);
  std::vector<int32_t> active(plan.view.header->layers);
  cpu::NetworkCall call;
  call.plan = plan.view;
  call.words = plan.words.data();
  call.input = y0.as(type);
  call.features = y0.count;
  call.activations = activations->data();
  call.alive = alive.get();
  call.active = active.data();
  return cpu::run_network(call, kHelpers, [&](std::function<void()> task) { pool.schedule(std::move(task)); });
}

void try_network(const std::vector<Layer>& layers, int64_t features, Pool& pool) {
  const Features y0(features, layers.front().inputs);
  std::vector<double> expected(y0.floats.begin(), y0.floats.end());
  for (const Layer& layer : layers) expected = run_in_double(layer, expected, y0.count);
  const std::shared_ptr<Plan> plan = build(layers, below(2) == 0);
  std::thread others[2];  // calls at one time, on one pool
  for (int k = 0; k < 2; ++k) {
    others[k] = std::thread([&, k] {
      std::vector<float> activations;
      const auto type = static_cast<cpu::InputType>(1 + k);
      const std::string wrong = run_network(*plan, y0, type, pool, &activations);
      require(wrong.empty(), wrong);
      require_close(activations, expected, "the network of bytes or bits");
    });
  }
  std::vector<float> activations;
  const std::string wrong = run_network(*plan, y0, cpu::InputType::kFloat32, pool, &activations);
  for (std::thread& other : others) other.join();
  require(wrong.empty(), wrong);
  require_close(activations, expected, "the network");
  Plan damaged = *plan;
  for (int k = 0; k < 20; ++k) {
    damaged.words[below(static_cast<int64_t>(damaged.words.size()))] = static_cast<uint32_t>(generator());
    damaged.view = PlanView{};
    require(!view_plan(damaged.records.data(), static_cast<int64_t>(damaged.records.size()), &damaged.view), "no view");
    run_network(damaged, y0, cpu::InputType::kFloat32, pool, &activations);
    check_contents(damaged.records.data(), static_cast<int64_t>(damaged.records.size()), damaged.words.data(),
                   static_cast<int64_t>(damaged.words.size()));
    PlanView ignored;
    std::vector<int64_t> records = plan->records;
    records[below(static_cast<int64_t>(records.size()))] = static_cast<int64_t>(generator()) << below(32);
    check_records(records.data(), static_cast<int64_t>(records.size()), static_cast<int64_t>(plan->words.size()),
                  &ignored);
  }
}

std::vector<float> random_floats(int64_t size) {
  std::vector<float> floats(size);
  for (float& x : floats) x = uniform();
  return floats;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t k = 0; k < a.size(); ++k) sum += static_cast<double>(a[k]) * b[k];
  return sum;
}

// The way forward, and that both ways through the derivative are each other's transpose.
void try_derivatives(const std::vector<Layer>& layers, Pool& pool) {
  const cpu::ScheduleTask schedule = [&](std::function<void()> task) { pool.schedule(std::move(task)); };
  const std::shared_ptr<Plan> plan = build(layers, below(2) == 0);
  PlanRows rows = build_rows(plan->view, plan->words.data());
  const int64_t features = 1 + below(100), size = static_cast<int64_t>(rows.layers.size() * sizeof(RowsLayer) / 8);
  cpu::ChainCall call;
  const char* problem = view_rows(reinterpret_cast<const int64_t*>(rows.layers.data()), size,
                                  static_cast<int64_t>(rows.words.size()), &call.rows);
  require(!problem, problem ? problem : "");
  const std::vector<float> y0 = random_floats(features * call.rows.inputs()), x = random_floats(y0.size());
  std::vector<float> y(features * call.rows.outputs()), forward(y.size()), backward(y0.size());
  const std::vector<float> g = random_floats(y.size());
  std::vector<uint32_t> masks(features * call.rows.mask_words());
  call.words = rows.words.data();
  call.features = features;
  call.masks = masks.data();
  const auto run = [&](const std::vector<float>& in, std::vector<float>* out, int way) {
    call.in = in.data();
    call.out = out->data();
    return way == 0 ? cpu::run_chain(call, kHelpers, schedule)
                    : cpu::run_chain_derivative(call, way == 2, kHelpers, schedule);
  };
  for (const std::string& wrong : {run(y0, &y, 0), run(x, &forward, 1), run(g, &backward, 2)}) {
    require(wrong.empty(), wrong);
  }
  std::vector<double> expected(y0.begin(), y0.end());
  for (const Layer& layer : layers) expected = run_in_double(layer, expected, features);
  require_close(y, expected, "the chain");
  const double there = dot(forward, g), back = dot(x, backward);
  require(std::abs(there - back) <= 1e-3 * (1 + std::abs(there)), "the derivative is not its transpose's");
  for (int k = 0; k < 20; ++k) {
    rows.words[below(static_cast<int64_t>(rows.words.size()))] = static_cast<uint32_t>(generator());
    for (int way : {0, 1}) run(y0, &y, way);
    run(g, &backward, 2);
  }
}

void try_layer(const Layer& layer, Pool& pool) {
  const cpu::ScheduleTask schedule = [&](std::function<void()> task) { pool.schedule(std::move(task)); };
  const int64_t features = below(150), edges = static_cast<int64_t>(layer.indices.size());
  std::vector<int32_t> indptr(layer.indptr.begin(), layer.indptr.end()), indices = layer.indices;
  const std::vector<float> y = random_floats(features * layer.inputs), g = random_floats(features * layer.outputs);
  std::vector<float> result(g.size()), sampled(edges);
  const cpu::CompressedRows rows{layer.inputs, layer.outputs, edges, indptr.data(), indices.data()};
  const cpu::LayerCall call{rows,
                            features,
                            y.data(),
                            layer.values.data(),
                            layer.values.size() == 1,
                            layer.bias.data(),
                            layer.bias.size() == 1,
                            layer.clip.lower,
                            finite_bound(layer.clip.upper),
                            result.data()};
  const cpu::SampledCall sampled_call{rows, features, y.data(), g.data(), sampled.data()};
  require(cpu::run_layer(call, kHelpers, schedule).empty(), "a layer is refused");
  require_close(result, run_in_double(layer, {y.begin(), y.end()}, features), "a layer");
  require(cpu::run_sampled(sampled_call, kHelpers, schedule).empty(), "a sampled product is refused");
  for (int64_t row = 0; row < layer.outputs; ++row) {
    for (int64_t e = indptr[row]; e < indptr[row + 1]; ++e) {
      double sum = 0;
      for (int64_t f = 0; f < features; ++f) sum += y[f * layer.inputs + indices[e]] * g[f * layer.outputs + row];
      require(std::abs(sum - sampled[e]) < 1e-3, "a sampled product differs");
    }
  }
  for (int k = 0; k < 5 && edges > 0; ++k) {
    indices[below(edges)] = static_cast<int32_t>(generator());
    indptr[below(layer.outputs + 1)] = static_cast<int32_t>(generator());
    require(!cpu::run_layer(call, kHelpers, schedule).empty() || layer.inputs > 1, "a wrong index runs");
    cpu::run_sampled(sampled_call, kHelpers, schedule);
  }
}

// On one thread and on some: the same rows, and of an undamaged table all of them.
void try_table(int64_t rows) {
  std::string text;
  for (int64_t row = 0; row < rows; ++row) {
    text += std::to_string(below(1 << 20)) + "\t" + std::to_string(below(1024)) + "\t" + std::to_string(uniform());
    text += below(8) ? "\n" : " \r\n";
  }
  for (int damage = 0; damage < 8; ++damage) {
    const std::vector<char> exact(text.begin(), text.end());
    const auto size = static_cast<int64_t>(exact.size());
    const TsvTable one = parse_tsv(exact.data(), size, 1), some = parse_tsv(exact.data(), size, kHelpers);
    require(damage > 0 || one.rows == rows, "a table is cut short");
    require(one.rows == some.rows && one.bytes == some.bytes, "a table depends on the threads");
    require(std::equal(one.third.get(), one.third.get() + one.rows, some.third.get()), "numbers depend on the threads");
    if (text.empty()) return;
    text[below(size)] = static_cast<char>(below(4) ? "0123456789\t\n\r .-+eE"[below(19)] : generator());
    if (damage % 3 == 2) text.resize(below(size));
  }
}

}  // namespace

int main(int, char** arguments) {
  Pool pool(kHelpers);
  const unsigned seed = static_cast<unsigned>(std::atol(arguments[1]));
  const int64_t rounds = std::atol(arguments[2]);
  generator.seed(seed);
  try_table(150000);                     // some MiB: parts for several threads
  for (int64_t features : {1, 3, 20}) {  // few, but work for several threads
    try_network({random_layer(500, 900), random_layer(900, 700), random_layer(700, 40)}, features, pool);
  }
  for (int64_t round = 0; round < rounds; ++round) {
    generator.seed(seed + static_cast<unsigned>(round));
    const int64_t widths[] = {1, 3, 31, 33, 64, 100, 200};
    std::vector<Layer> layers;
    int64_t width = widths[below(7)];
    for (int64_t l = 1 + below(5); l > 0; --l) {
      const int64_t next = widths[below(7)];
      layers.push_back(random_layer(width, next));
      width = next;
    }
    try_network(layers, below(150), pool);
    try_derivatives(layers, pool);
    try_layer(layers.front(), pool);
    try_table(below(50));
  }
  return 0;
}
