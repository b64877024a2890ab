// XLA FFI handlers of the CPU back end: they check what they are given and run.
#include <functional>
#include <string>

#include "cpu/layer.h"
#include "cpu/network.h"
#include "plan_view.h"
#include "xla/ffi/api/ffi.h"

namespace spdnn::cpu {
namespace {

namespace ffi = xla::ffi;

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("spdnn_jax: " + what); }

// The calling thread works too, hence one helper less than there are threads.
int helpers_of(ffi::ThreadPool& pool) { return static_cast<int>(pool.num_threads()) - 1; }

ScheduleTask scheduler_of(ffi::ThreadPool& pool) {
  return [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
}

bool read_type(ffi::DataType type, InputType* result) {
  switch (type) {
    case ffi::DataType::F32: *result = InputType::kFloat32; return true;
    case ffi::DataType::U8:
    case ffi::DataType::PRED: *result = InputType::kUint8; return true;
    case ffi::DataType::U32: *result = InputType::kPacked; return true;
    default: return false;
  }
}

ffi::Error network(ffi::ThreadPool pool, ffi::AnyBuffer y0, ffi::Buffer<ffi::DataType::U32> words,
                   ffi::ResultBuffer<ffi::DataType::F32> activations, ffi::ResultBuffer<ffi::DataType::PRED> alive,
                   ffi::ResultBuffer<ffi::DataType::S32> active, ffi::Span<const int64_t> table) {
  NetworkCall call;
  const char* wrong = view_plan(table.begin(), static_cast<int64_t>(table.size()), &call.plan);
  if (!wrong) wrong = check_plan(call.plan, static_cast<int64_t>(words.element_count()));
  if (wrong) return invalid(wrong);
  call.words = words.typed_data();
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
  if (static_cast<int64_t>(alive->element_count()) != call.features) return invalid("alive must hold one entry a feature");
  call.alive = alive->typed_data();
  call.activations = activations->element_count() > 0 ? activations->typed_data() : nullptr;
  call.active = active->element_count() > 0 ? active->typed_data() : nullptr;
  const std::string error = run_network(call, helpers_of(pool), scheduler_of(pool));
  return error.empty() ? ffi::Error::Success() : invalid(error);
}

ffi::Error layer(ffi::ThreadPool pool, ffi::Buffer<ffi::DataType::F32> y, ffi::Buffer<ffi::DataType::S32> indptr,
                 ffi::Buffer<ffi::DataType::S32> indices, ffi::Buffer<ffi::DataType::F32> values,
                 ffi::Buffer<ffi::DataType::F32> bias, ffi::ResultBuffer<ffi::DataType::F32> result, float cap) {
  if (y.dimensions().size() != 2 || result->dimensions().size() != 2) return invalid("features must be a matrix");
  LayerCall call;
  call.features = y.dimensions()[0];
  call.inputs = y.dimensions()[1];
  call.outputs = result->dimensions()[1];
  call.edges = static_cast<int64_t>(indices.element_count());
  call.y = y.typed_data();
  call.indptr = indptr.typed_data();
  call.indices = indices.typed_data();
  call.values = values.typed_data();
  call.single_value = values.dimensions().size() == 0;
  call.bias = bias.typed_data();
  call.single_bias = bias.dimensions().size() == 0;
  call.cap = cap;
  call.result = result->typed_data();
  if (static_cast<int64_t>(indptr.element_count()) != call.outputs + 1) return invalid("indptr must hold outputs + 1 entries");
  if (!call.single_value && static_cast<int64_t>(values.element_count()) != call.edges) {
    return invalid("values must hold one entry an edge");
  }
  if (!call.single_bias && static_cast<int64_t>(bias.element_count()) != call.outputs) {
    return invalid("bias must hold one entry an output");
  }
  const std::string error = run_layer(call, helpers_of(pool), scheduler_of(pool));
  return error.empty() ? ffi::Error::Success() : invalid(error);
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
                                  .Attr<xla::ffi::Span<const int64_t>>("table"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnLayerCpu, spdnn::cpu::layer,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Attr<float>("cap"));
