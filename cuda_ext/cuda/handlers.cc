// XLA FFI handlers of the CUDA back end: they check what they are given (ffi/arguments.h) and launch.
#include <cuda_runtime.h>

#include <string>

#include "ffi/arguments.h"
#include "network.h"
#include "row_chain.h"
#include "row_products.h"

namespace spdnn::cuda {
namespace {

namespace ffi = xla::ffi;

using arguments::Flags;
using arguments::Floats;
using arguments::Ints;
using arguments::invalid;
using arguments::Table;
using arguments::Words;
using Bytes = ffi::Buffer<ffi::DataType::U8>;

ffi::Error from_cuda(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("spdnn_jax: CUDA reports ") + cudaGetErrorName(error) + ": " +
                              cudaGetErrorString(error));
}

// An empty string where the workspace has that many bytes.
std::string check_workspace(const Bytes& workspace, int64_t bytes) {
  return arguments::count_of(workspace) < bytes ? "the workspace is too small" : "";
}

ffi::Error network(cudaStream_t stream, ffi::AnyBuffer y0, Words words, ffi::Result<Floats> activations,
                   ffi::Result<Flags> alive, ffi::Result<Ints> active, ffi::Result<Bytes> workspace, Table table,
                   Table schedule) {
  constexpr int64_t kFields = sizeof(ScheduleStep) / sizeof(int64_t);
  NetworkCall call;
  std::string wrong = arguments::read_network(y0, words, table, *activations, *alive, *active, &call);
  if (!wrong.empty()) return invalid(wrong);
  if (schedule.size() % kFields != 0) return invalid("the schedule does not hold whole steps");
  call.schedule = reinterpret_cast<const ScheduleStep*>(schedule.begin());
  call.steps = static_cast<int64_t>(schedule.size()) / kFields;
  if (const char* amiss = check_schedule(call.plan, call.schedule, call.steps)) return invalid(amiss);
  if (call.features > INT32_MAX) return invalid("more than 2^31 - 1 features in one call: split them");
  call.workspace = workspace->typed_data();
  wrong = check_workspace(*workspace, workspace_bytes(call.plan, call.features));
  return wrong.empty() ? from_cuda(run_network(call, stream)) : invalid(wrong);
}

ffi::Error layer(cudaStream_t stream, Floats y, Ints indptr, Ints indices, Floats values, Floats bias,
                 ffi::Result<Floats> result, ffi::Result<Bytes> workspace, float lower, float upper) {
  Product product{};
  std::string wrong = arguments::read_layer(y, indptr, indices, values, bias, *result, lower, upper, &product);
  if (wrong.empty()) wrong = check_workspace(*workspace, product_workspace_bytes(product.rows, product.features));
  product.workspace = workspace->typed_data();
  return wrong.empty() ? from_cuda(launch_product(product, stream)) : invalid(wrong);
}

ffi::Error sampled(cudaStream_t stream, Floats in, Floats out, Ints indptr, Ints indices, ffi::Result<Floats> result,
                   ffi::Result<Bytes> workspace) {
  Sampled call{};
  std::string wrong = arguments::read_sampled(in, out, indptr, indices, *result, &call);
  if (wrong.empty()) wrong = check_workspace(*workspace, sampled_workspace_bytes(call.rows, call.features));
  call.workspace = workspace->typed_data();
  return wrong.empty() ? from_cuda(launch_sampled(call, stream)) : invalid(wrong);
}

// --- a plan's rows, and their derivative ---

std::string read_chain(const Floats& in, const Floats& out, const Words& masks, const Words& words,
                       const Bytes& workspace, Table table, bool transposed, ChainCall* call) {
  const std::string wrong = arguments::read_chain(in, out, masks, words, table, transposed, call);
  if (!wrong.empty()) return wrong;
  call->workspace = reinterpret_cast<char*>(workspace.typed_data());
  return check_workspace(workspace, chain_workspace_bytes(call->rows, call->features));
}

ffi::Error chain(cudaStream_t stream, Floats y0, Words words, ffi::Result<Floats> result, ffi::Result<Words> masks,
                 ffi::Result<Bytes> workspace, Table table) {
  ChainCall call;
  const std::string wrong = read_chain(y0, *result, *masks, words, *workspace, table, false, &call);
  return wrong.empty() ? from_cuda(run_chain(call, stream)) : invalid(wrong);
}

ffi::Error chain_derivative(cudaStream_t stream, Floats in, Words masks, Words words, ffi::Result<Floats> out,
                            ffi::Result<Bytes> workspace, Table table, bool transposed) {
  ChainCall call;
  const std::string wrong = read_chain(in, *out, masks, words, *workspace, table, transposed, &call);
  return wrong.empty() ? from_cuda(run_chain_derivative(call, transposed, stream)) : invalid(wrong);
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
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::U8>>()
                                  .Attr<float>("lower")
                                  .Attr<float>("upper"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnSampledCuda, spdnn::cuda::sampled,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::U8>>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnChainCuda, spdnn::cuda::chain,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::U32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::U32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::U8>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("table"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnChainDerivativeCuda, spdnn::cuda::chain_derivative,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::U32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::U32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::U8>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("table")
                                  .Attr<bool>("transposed"),
                              {xla::ffi::Traits::kCmdBufferCompatible});

// The version of XLA's FFI interface that this library was built for, and the workspace of a call.
extern "C" __attribute__((visibility("default"))) int64_t spdnn_cuda_workspace_bytes(const int64_t* table,
                                                                                     int64_t count, int64_t features) {
  spdnn::PlanView plan;
  return spdnn::view_plan(table, count, &plan) ? -1 : spdnn::cuda::workspace_bytes(plan, features);
}

// The workspaces of the other calls.
extern "C" __attribute__((visibility("default"))) int64_t spdnn_cuda_product_workspace_bytes(int64_t features,
                                                                                             int64_t inputs,
                                                                                             int64_t outputs,
                                                                                             int64_t edges) {
  return spdnn::cuda::product_workspace_bytes({inputs, outputs, edges, nullptr, nullptr}, features);
}

extern "C" __attribute__((visibility("default"))) int64_t spdnn_cuda_sampled_workspace_bytes(int64_t features,
                                                                                             int64_t inputs,
                                                                                             int64_t outputs,
                                                                                             int64_t edges) {
  return spdnn::cuda::sampled_workspace_bytes({inputs, outputs, edges, nullptr, nullptr}, features);
}

extern "C" __attribute__((visibility("default"))) int64_t spdnn_cuda_chain_workspace_bytes(const int64_t* table,
                                                                                           int64_t count, int64_t words,
                                                                                           int64_t features) {
  spdnn::RowsView rows;
  return spdnn::view_rows(table, count, words, &rows) ? -1 : spdnn::cuda::chain_workspace_bytes(rows, features);
}
