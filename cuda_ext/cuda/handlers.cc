// XLA FFI handlers of the CUDA back end: they check what they are given and launch.
#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "layout/plan_view.h"
#include "network.h"
#include "row_chain.h"
#include "row_products.h"
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

using Floats = ffi::Buffer<ffi::DataType::F32>;
using Ints = ffi::Buffer<ffi::DataType::S32>;
using Words = ffi::Buffer<ffi::DataType::U32>;

// Rows between features of `in` and of `out`. Returns what is wrong, or null.
const char* read_rows(const Floats& in, const Floats& out, const Ints& indptr, const Ints& indices,
                      CompressedRows* rows) {
  if (in.dimensions().size() != 2 || out.dimensions().size() != 2 || in.dimensions()[0] != out.dimensions()[0]) {
    return "activations must be matrices with one feature a row, and those of inputs and outputs have as many rows";
  }
  *rows = {in.dimensions()[1], out.dimensions()[1], static_cast<int64_t>(indices.element_count()), indptr.typed_data(),
           indices.typed_data()};
  return static_cast<int64_t>(indptr.element_count()) == rows->out_width + 1 ? nullptr
                                                                             : "indptr must hold outputs + 1 entries";
}

ffi::Error layer(cudaStream_t stream, Floats y, Ints indptr, Ints indices, Floats values, Floats bias,
                 Result<ffi::DataType::F32> result, float lower, float upper) {
  Product product{};
  if (const char* wrong = read_rows(y, *result, indptr, indices, &product.rows)) return invalid(wrong);
  product.features = y.dimensions()[0];
  product.in = y.typed_data();
  product.values = values.typed_data();
  product.single_value = values.dimensions().size() == 0;
  product.bias = bias.typed_data();
  product.single_bias = bias.dimensions().size() == 0;
  product.lower = finite_bound(lower);
  product.upper = finite_bound(upper);
  product.out = result->typed_data();
  return from_cuda(launch_product(product, stream));
}

ffi::Error sampled(cudaStream_t stream, Floats in, Floats out, Ints indptr, Ints indices,
                   Result<ffi::DataType::F32> result, Result<ffi::DataType::U8> workspace) {
  Sampled call{};
  if (const char* wrong = read_rows(in, out, indptr, indices, &call.rows)) return invalid(wrong);
  call.features = in.dimensions()[0];
  call.in = in.typed_data();
  call.out = out.typed_data();
  call.result = result->typed_data();
  call.workspace = reinterpret_cast<float*>(workspace->typed_data());
  if (static_cast<int64_t>(result->element_count()) != call.rows.edges ||
      static_cast<int64_t>(workspace->element_count()) < sampled_workspace_bytes(call.features, call.rows.edges)) {
    return invalid("the result must hold one entry an edge, and the workspace be large enough");
  }
  return from_cuda(launch_sampled(call, stream));
}

// --- a plan's rows, and their derivative ---

const char* read_chain(const Floats& in, const Floats& out, const Words& masks, const Words& words,
                       const ffi::Buffer<ffi::DataType::U8>& workspace, ffi::Span<const int64_t> table, bool transposed,
                       ChainCall* call) {
  if (const char* wrong = view_rows(table.begin(), static_cast<int64_t>(table.size()),
                                    static_cast<int64_t>(words.element_count()), &call->rows)) {
    return wrong;
  }
  int64_t in_width = call->rows.inputs(), out_width = call->rows.outputs();
  if (transposed) std::swap(in_width, out_width);
  const auto is_matrix = [&](const auto& buffer, int64_t width) {
    return buffer.dimensions().size() == 2 && buffer.dimensions()[0] == in.dimensions()[0] &&
           buffer.dimensions()[1] == width;
  };
  if (!is_matrix(in, in_width) || !is_matrix(out, out_width) || !is_matrix(masks, call->rows.mask_words())) {
    return "activations and masks must be matrices of the plan's widths, one feature a row";
  }
  call->features = in.dimensions()[0];
  call->words = words.typed_data();
  call->in = in.typed_data();
  call->out = out.typed_data();
  call->masks = masks.typed_data();
  call->workspace = reinterpret_cast<float*>(workspace.typed_data());
  return static_cast<int64_t>(workspace.element_count()) < chain_workspace_bytes(call->rows, call->features)
             ? "the workspace is too small"
             : nullptr;
}

ffi::Error chain(cudaStream_t stream, Floats y0, Words words, Result<ffi::DataType::F32> result,
                 Result<ffi::DataType::U32> masks, Result<ffi::DataType::U8> workspace,
                 ffi::Span<const int64_t> table) {
  ChainCall call;
  if (const char* wrong = read_chain(y0, *result, *masks, words, *workspace, table, false, &call))
    return invalid(wrong);
  return from_cuda(run_chain(call, stream));
}

ffi::Error chain_derivative(cudaStream_t stream, Floats in, Words masks, Words words, Result<ffi::DataType::F32> out,
                            Result<ffi::DataType::U8> workspace, ffi::Span<const int64_t> table, bool transposed) {
  ChainCall call;
  if (const char* wrong = read_chain(in, *out, masks, words, *workspace, table, transposed, &call)) {
    return invalid(wrong);
  }
  return from_cuda(run_chain_derivative(call, transposed, stream));
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
extern "C" __attribute__((visibility("default"))) int64_t spdnn_cuda_sampled_workspace_bytes(int64_t features,
                                                                                             int64_t edges) {
  return spdnn::cuda::sampled_workspace_bytes(features, edges);
}

extern "C" __attribute__((visibility("default"))) int64_t spdnn_cuda_chain_workspace_bytes(const int64_t* table,
                                                                                           int64_t count, int64_t words,
                                                                                           int64_t features) {
  spdnn::RowsView rows;
  return spdnn::view_rows(table, count, words, &rows) ? -1 : spdnn::cuda::chain_workspace_bytes(rows, features);
}
