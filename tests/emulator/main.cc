// Runs one network: main FOLDER SEED reads what emulator.py wrote there, and writes the results beside it.
#include <cuda_runtime.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "layout/plan_view.h"
#include "network.h"

namespace {

std::string folder;

// Exactly as large as the file, so that reads past the end show. Aligned as device memory is.
template <typename T>
std::vector<T> read(const char* name) {
  std::ifstream file(folder + "/" + name, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<T> result(bytes.size() / sizeof(T));
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<char*>(result.data()));
  return result;
}

template <typename T>
void write(const char* name, const T* data, size_t count) {
  std::ofstream(folder + "/" + name, std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(count * sizeof(T)));
}

int refuse(const char* what) { return std::fprintf(stderr, "%s\n", what), 2; }

}  // namespace

int main(int, char** arguments) {
  using namespace spdnn::cuda;
  folder = arguments[1];
  emulator::seed(std::stoull(arguments[2]));
  const auto records = read<int64_t>("records"), schedule = read<int64_t>("schedule"),
             call_data = read<int64_t>("call");
  const auto words = read<uint32_t>("words");
  const auto input = read<char>("input");
  NetworkCall call;
  if (const char* wrong = spdnn::view_plan(records.data(), static_cast<int64_t>(records.size()), &call.plan)) {
    return refuse(wrong);
  }
  if (const char* wrong = spdnn::check_plan(call.plan, static_cast<int64_t>(words.size()))) return refuse(wrong);
  call.words = words.data();
  call.schedule = reinterpret_cast<const ScheduleStep*>(schedule.data());
  call.steps = static_cast<int64_t>(schedule.size()) / 3;
  if (const char* wrong = check_schedule(call.plan, call.schedule, call.steps)) return refuse(wrong);
  call.features = call_data[0];
  call.input = {input.data(), static_cast<InputType>(call_data[1]), call.plan.header->inputs, 1};
  const size_t features = static_cast<size_t>(call.features);
  std::vector<float> activations(call_data[2] ? features * call.plan.header->outputs : 0, NAN);
  const std::unique_ptr<bool[]> alive(new bool[features]());
  std::vector<int32_t> active(call.plan.header->layers, -1);
  std::vector<char> workspace(workspace_bytes(call.plan, call.features), '\xFF');  // NaN
  call.activations = activations.empty() ? nullptr : activations.data();
  call.alive = alive.get();
  call.active = active.data();
  call.workspace = workspace.data();
  if (run_network(call, nullptr) != cudaSuccess) return refuse("a launch was refused");
  write("activations", activations.data(), activations.size());
  write("alive", alive.get(), features);
  write("active", active.data(), active.size());
  return 0;
}
