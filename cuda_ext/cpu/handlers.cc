// XLA FFI handlers of the CPU back end: they check what they are given and run. Neither throws.
#include <algorithm>
#include <exception>
#include <functional>
#include <string>
#include <tuple>
#include <utility>

#include "cpu/layer.h"
#include "cpu/network.h"
#include "layout/plan_view.h"
#include "xla/ffi/api/ffi.h"

namespace spdnn::cpu {
namespace {

namespace ffi = xla::ffi;

using ffi::DataType;

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("spdnn_jax: " + what); }

// The calling thread works too, hence one helper less than there are threads.
int helpers_of(const ffi::ThreadPool& pool) { return std::max(0, static_cast<int>(pool.num_threads()) - 1); }

ScheduleTask scheduler_of(ffi::ThreadPool& pool) {
  return [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
}

// Turns what `run` returns, an empty string or what went wrong, into a status, and an exception too.
template <typename Run>
ffi::Error guarded(Run run) {
  try {
    const std::string wrong = run();
    return wrong.empty() ? ffi::Error::Success() : invalid(wrong);
  } catch (const std::exception& exception) {
    return ffi::Error::Internal(std::string("spdnn_jax: ") + exception.what());
  }
}

template <typename Buffer>
int64_t count_of(const Buffer& buffer) {
  return static_cast<int64_t>(buffer.element_count());
}

// --- the network ---

std::string read_features(const ffi::AnyBuffer& y0, NetworkCall* call) {
  constexpr int64_t kBits = 32;
  switch (y0.element_type()) {
    case DataType::F32:
      call->input.type = InputType::kFloat32;
      break;
    case DataType::U8:
    case DataType::PRED:
      call->input.type = InputType::kUint8;
      break;
    case DataType::U32:
      call->input.type = InputType::kPacked;
      break;
    default:
      return "features must be float32, uint8, bool, or uint32 for bit-packed ones";
  }
  if (y0.dimensions().size() != 2) return "features must be a matrix, one feature a row";
  call->features = y0.dimensions()[0];
  call->input.data = y0.untyped_data();
  call->input.inputs = call->plan.header->inputs;
  const bool packed = call->input.type == InputType::kPacked;
  const int64_t width = packed ? (call->input.inputs + kBits - 1) / kBits : call->input.inputs;
  if (y0.dimensions()[1] != width) {
    return "features are " + std::to_string(y0.dimensions()[1]) + " wide, but the network takes " +
           std::to_string(width) + (packed ? " words of 32 bits" : "");
  }
  return "";
}

using NetworkResults = std::tuple<ffi::Buffer<DataType::F32>, ffi::Buffer<DataType::PRED>, ffi::Buffer<DataType::S32>>;

// Of activations and active, zero elements mean that the caller does not want them.
std::string place_results(const NetworkResults& results, NetworkCall* call) {
  const auto& [activations, alive, active] = results;
  const PlanHeader& header = *call->plan.header;
  if (count_of(activations) != 0 && count_of(activations) != call->features * header.outputs) {
    return "the activations must have room for features x outputs, or for none";
  }
  if (count_of(alive) != call->features) return "alive must have room for one entry a feature";
  if (count_of(active) != 0 && count_of(active) != header.layers) {
    return "active must have room for one entry a layer, or for none";
  }
  call->activations = count_of(activations) > 0 ? activations.typed_data() : nullptr;
  call->alive = alive.typed_data();
  call->active = count_of(active) > 0 ? active.typed_data() : nullptr;
  return "";
}

// Attributes other than `table` are for other back ends.
ffi::Error network(ffi::ThreadPool pool, ffi::AnyBuffer y0, ffi::Buffer<DataType::U32> words,
                   ffi::ResultBuffer<DataType::F32> activations, ffi::ResultBuffer<DataType::PRED> alive,
                   ffi::ResultBuffer<DataType::S32> active, ffi::Dictionary attributes) {
  const auto table = attributes.get<ffi::Span<const int64_t>>("table");
  if (table.has_error()) return table.error();
  return guarded([&]() -> std::string {
    NetworkCall call;
    const char* wrong = view_plan(table->begin(), static_cast<int64_t>(table->size()), &call.plan);
    if (!wrong) wrong = check_plan(call.plan, count_of(words));
    if (wrong) return wrong;
    call.words = words.typed_data();
    std::string problem = read_features(y0, &call);
    if (problem.empty()) problem = place_results({*activations, *alive, *active}, &call);
    return problem.empty() ? run_network(call, helpers_of(pool), scheduler_of(pool)) : problem;
  });
}

// --- one layer ---

std::string check_shapes(const LayerCall& call, int64_t offsets, int64_t values, int64_t bias) {
  if (offsets != call.outputs + 1) return "indptr must hold outputs + 1 entries";
  if (!call.single_value && values != call.edges) return "values must be a scalar, or hold one entry an edge";
  if (!call.single_bias && bias != call.outputs) return "bias must be a scalar, or hold one entry an output";
  return "";
}

ffi::Error layer(ffi::ThreadPool pool, ffi::Buffer<DataType::F32> y, ffi::AnyBuffer indptr,
                 ffi::Buffer<DataType::S32> indices, ffi::Buffer<DataType::F32> values, ffi::Buffer<DataType::F32> bias,
                 ffi::ResultBuffer<DataType::F32> result, float lower, float upper) {
  return guarded([&]() -> std::string {
    if (y.dimensions().size() != 2 || result->dimensions().size() != 2 ||
        y.dimensions()[0] != result->dimensions()[0]) {
      return "features must be a matrix, one feature a row, and the result have as many rows";
    }
    if (indptr.element_type() != DataType::S32 && indptr.element_type() != DataType::S64) {
      return "indptr must be int32 or int64";
    }
    LayerCall call;
    call.features = y.dimensions()[0];
    call.inputs = y.dimensions()[1];
    call.outputs = result->dimensions()[1];
    call.edges = count_of(indices);
    call.y = y.typed_data();
    call.indptr = {indptr.untyped_data(), indptr.element_type() == DataType::S64};
    call.indices = indices.typed_data();
    call.values = values.typed_data();
    call.single_value = values.dimensions().size() == 0;
    call.bias = bias.typed_data();
    call.single_bias = bias.dimensions().size() == 0;
    call.lower = finite_bound(lower);
    call.upper = finite_bound(upper);
    call.result = result->typed_data();
    const std::string problem = check_shapes(call, count_of(indptr), count_of(values), count_of(bias));
    return problem.empty() ? run_layer(call, helpers_of(pool), scheduler_of(pool)) : problem;
  });
}

}  // namespace
}  // namespace spdnn::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnNetworkCpu, spdnn::cpu::network,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::U32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::PRED>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnLayerCpu, spdnn::cpu::layer,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Attr<float>("lower")
                                  .Attr<float>("upper"));
