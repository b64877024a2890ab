// XLA FFI handlers of the CUDA back end: they check what they are given and launch.
#include <cuda_runtime.h>

#include <string>

#include "layer.h"
#include "layout/plan_view.h"
#include "network.h"
#include "xla/ffi/api/ffi.h"

namespace spdnn::cuda {
namespace {

namespace ffi = xla::ffi;

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("spdnn_jax: " + what); }

ffi::Error from_cuda(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("spdnn_jax: CUDA reports ") + cudaGetErrorName(error) + ": " +
                              cudaGetErrorString(error));
}

bool read_type(ffi::DataType type, InputType* result) {
  switch (type) {
    case ffi::DataType::F32:
      *result = InputType::kFloat32;
      return true;
    case ffi::DataType::U8:
    case ffi::DataType::PRED:
      *result = InputType::kUint8;
      return true;
    case ffi::DataType::U32:
      *result = InputType::kPacked;
      return true;
    default:
      return false;
  }
}

template <ffi::DataType kType>
using Result = ffi::Result<ffi::Buffer<kType>>;

ffi::Error network(cudaStream_t stream, ffi::AnyBuffer y0, ffi::Buffer<ffi::DataType::U32> words,
                   Result<ffi::DataType::F32> activations, Result<ffi::DataType::PRED> alive,
                   Result<ffi::DataType::S32> active, Result<ffi::DataType::U8> workspace,
                   ffi::Span<const int64_t> table, ffi::Span<const int64_t> schedule) {
  NetworkCall call;
  if (const char* wrong = view_plan(table.begin(), static_cast<int64_t>(table.size()), &call.plan))
    return invalid(wrong);
  if (const char* wrong = check_plan(call.plan, static_cast<int64_t>(words.element_count()))) return invalid(wrong);
  call.words = words.typed_data();
  call.schedule = reinterpret_cast<const ScheduleStep*>(schedule.begin());
  call.steps = static_cast<int64_t>(schedule.size()) / 3;
  if (const char* wrong = check_schedule(call.plan, call.schedule, call.steps)) return invalid(wrong);
  if (y0.dimensions().size() != 2 || !read_type(y0.element_type(), &call.input.type)) {
    return invalid("features must be a matrix of float32, uint8, bool, or bit-packed uint32");
  }
  call.features = y0.dimensions()[0];
  call.input.data = y0.untyped_data();
  call.input.inputs = call.plan.header->inputs;
  const bool packed = call.input.type == InputType::kPacked;
  if (y0.dimensions()[1] != (packed ? (call.input.inputs + 31) / 32 : call.input.inputs)) {
    return invalid("the features' width is not the network's");
  }
  if (call.features > INT32_MAX) return invalid("more than 2^31 - 1 features in one call: split them");
  call.activations = activations->element_count() > 0 ? activations->typed_data() : nullptr;
  call.alive = alive->typed_data();
  call.active = active->element_count() > 0 ? active->typed_data() : nullptr;
  call.workspace = workspace->typed_data();
  if (static_cast<int64_t>(workspace->element_count()) < workspace_bytes(call.plan, call.features)) {
    return invalid("the workspace is too small");
  }
  return from_cuda(run_network(call, stream));
}

ffi::Error layer(cudaStream_t stream, ffi::Buffer<ffi::DataType::F32> y, ffi::Buffer<ffi::DataType::S32> indptr,
                 ffi::Buffer<ffi::DataType::S32> indices, ffi::Buffer<ffi::DataType::F32> values,
                 ffi::Buffer<ffi::DataType::F32> bias, Result<ffi::DataType::F32> result, float lower, float upper) {
  LayerCall call{};
  if (y.dimensions().size() != 2 || result->dimensions().size() != 2) return invalid("features must be a matrix");
  call.features = y.dimensions()[0];
  call.inputs = y.dimensions()[1];
  call.outputs = result->dimensions()[1];
  if (static_cast<int64_t>(indptr.element_count()) != call.outputs + 1)
    return invalid("indptr must hold outputs + 1 entries");
  call.y = y.typed_data();
  call.indptr = indptr.typed_data();
  call.indices = indices.typed_data();
  call.values = values.typed_data();
  call.single_value = values.dimensions().size() == 0;
  call.bias = bias.typed_data();
  call.single_bias = bias.dimensions().size() == 0;
  call.lower = finite_bound(lower);
  call.upper = finite_bound(upper);
  call.result = result->typed_data();
  return from_cuda(run_layer(call, stream));
}

}  // namespace
}  // namespace spdnn::cuda

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnNetworkCuda, spdnn::cuda::network,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::U32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::PRED>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::U8>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("table")
                                  .Attr<xla::ffi::Span<const int64_t>>("schedule"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnLayerCuda, spdnn::cuda::layer,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Attr<float>("lower")
                                  .Attr<float>("upper"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

// The version of XLA's FFI interface that this library was built for, and the workspace of a call.
extern "C" __attribute__((visibility("default"))) int64_t spdnn_cuda_workspace_bytes(const int64_t* table,
                                                                                     int64_t count, int64_t features) {
  spdnn::PlanView plan;
  return spdnn::view_plan(table, count, &plan) ? -1 : spdnn::cuda::workspace_bytes(plan, features);
}
