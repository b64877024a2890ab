#include <algorithm>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <tuple>

#include "launch.h"

namespace spdnn::cuda {
namespace {

// Answers that do not change while the process lives, of any thread's questions.
template <typename Question, typename Answer>
class Answers {
 public:
  // `ask(&answer)` returns an error, which is not kept.
  template <typename Ask>
  cudaError_t find(const Question& question, Answer* answer, const Ask& ask) {
    {
      const std::shared_lock lock(mutex_);
      if (const auto known = known_.find(question); known != known_.end()) return *answer = known->second, cudaSuccess;
    }
    if (const cudaError_t error = ask(answer); error != cudaSuccess) return error;
    const std::unique_lock lock(mutex_);
    known_.emplace(question, *answer);
    return cudaSuccess;
  }

 private:
  std::shared_mutex mutex_;
  std::map<Question, Answer> known_;
};

cudaError_t ask_limits(int device, DeviceLimits* limits) {
  const auto read = [device](cudaDeviceAttr attribute, int* value) {
    return cudaDeviceGetAttribute(value, attribute, device);
  };
  for (const cudaError_t error : {read(cudaDevAttrMultiProcessorCount, &limits->multiprocessors),
                                  read(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits->shared_bytes),
                                  read(cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->block_shared_bytes)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t limits_of(int device, DeviceLimits* limits) {
  static Answers<int, DeviceLimits> answers;
  return answers.find(device, limits, [device](DeviceLimits* asked) { return ask_limits(device, asked); });
}

// Once for a device and a kernel: as much as a block can have beside the kernel's own.
cudaError_t allow_shared_memory(const void* kernel, const DeviceLimits& limits) {
  cudaFuncAttributes attributes{};
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel); error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              limits.block_shared_bytes - static_cast<int>(attributes.sharedSizeBytes));
}

}  // namespace

cudaError_t read_device_limits(DeviceLimits* limits) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  return limits_of(device, limits);
}

cudaError_t resident_block_count(const void* kernel, int threads, int64_t shared_bytes, int64_t* blocks) {
  static Answers<std::tuple<int, const void*, int, int64_t>, int64_t> answers;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  return answers.find({device, kernel, threads, shared_bytes}, blocks, [=](int64_t* asked) {
    DeviceLimits limits;
    cudaError_t error = limits_of(device, &limits);
    if (error == cudaSuccess && shared_bytes > 0) error = allow_shared_memory(kernel, limits);
    if (error != cudaSuccess) return error;
    int each = 0;
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, static_cast<size_t>(shared_bytes));
    *asked = static_cast<int64_t>(limits.multiprocessors) * std::max(each, 1);
    return error;
  });
}

}  // namespace spdnn::cuda
