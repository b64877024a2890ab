// XLA FFI handlers of the CPU back end: they check what they are given (ffi/arguments.h) and run. None throws.
// Arguments beyond those that are read are for XLA (rules.work_to_count).
#include <algorithm>
#include <exception>
#include <functional>
#include <string>
#include <utility>

#include "cpu/layer.h"
#include "cpu/network.h"
#include "cpu/permuted.h"
#include "cpu/row_chain.h"
#include "cpu/sampled.h"
#include "ffi/arguments.h"

namespace spdnn::cpu {
namespace {

namespace ffi = xla::ffi;

using arguments::Flags;
using arguments::Floats;
using arguments::Ints;
using arguments::Table;
using arguments::Words;

// The calling thread works too, hence one helper less than there are threads.
int helpers_of(const ffi::ThreadPool& pool) { return std::max(0, static_cast<int>(pool.num_threads()) - 1); }

ScheduleTask scheduler_of(ffi::ThreadPool& pool) {
  return [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
}

// Turns what `read` and, where that finds nothing wrong, `run` return, an empty string or what went wrong, into a
// status, and an exception too.
template <typename Read, typename Run>
ffi::Error guarded(const Read& read, const Run& run) {
  try {
    std::string wrong = read();
    if (wrong.empty()) wrong = run();
    return wrong.empty() ? ffi::Error::Success() : arguments::invalid(wrong);
  } catch (const std::exception& exception) {
    return ffi::Error::Internal(std::string("spdnn_jax: ") + exception.what());
  }
}

// Attributes other than `table` are for other back ends.
ffi::Error network(ffi::ThreadPool pool, ffi::AnyBuffer y0, Words words, ffi::RemainingArgs,
                   ffi::Result<Floats> activations, ffi::Result<Flags> alive, ffi::Result<Ints> active,
                   ffi::Dictionary attributes) {
  const auto table = attributes.get<Table>("table");
  if (table.has_error()) return table.error();
  NetworkCall call;
  return guarded([&] { return arguments::read_network(y0, words, *table, *activations, *alive, *active, &call); },
                 [&] { return run_network(call, helpers_of(pool), scheduler_of(pool)); });
}

ffi::Error layer(ffi::ThreadPool pool, Floats y, Ints indptr, Ints indices, Floats values, Floats bias,
                 ffi::Result<Floats> result, float lower, float upper) {
  LayerCall call;
  return guarded([&] { return arguments::read_layer(y, indptr, indices, values, bias, *result, lower, upper, &call); },
                 [&] { return run_layer(call, helpers_of(pool), scheduler_of(pool)); });
}

ffi::Error sampled(ffi::ThreadPool pool, Floats in, Floats out, Ints indptr, Ints indices, ffi::Result<Floats> result) {
  SampledCall call;
  return guarded([&] { return arguments::read_sampled(in, out, indptr, indices, *result, &call); },
                 [&] { return run_sampled(call, helpers_of(pool), scheduler_of(pool)); });
}

// The CUDA back end has no such call.
std::string read_permuted(const Floats& values, const Ints& order, const Floats& result, PermutedCall* call) {
  const int64_t count = arguments::count_of(values);
  if (arguments::count_of(order) != count || arguments::count_of(result) != count) {
    return "values, their order and the result must be of one length";
  }
  *call = {count, values.typed_data(), order.typed_data(), result.typed_data()};
  return "";
}

ffi::Error permuted(ffi::ThreadPool pool, Floats values, Ints order, ffi::Result<Floats> result) {
  PermutedCall call;
  return guarded([&] { return read_permuted(values, order, *result, &call); },
                 [&] { return run_permuted(call, helpers_of(pool), scheduler_of(pool)); });
}

ffi::Error chain(ffi::ThreadPool pool, Floats y0, Words words, ffi::RemainingArgs, ffi::Result<Floats> result,
                 ffi::Result<Words> masks, Table table) {
  ChainCall call;
  return guarded([&] { return arguments::read_chain(y0, *result, *masks, words, table, false, &call); },
                 [&] { return run_chain(call, helpers_of(pool), scheduler_of(pool)); });
}

ffi::Error chain_derivative(ffi::ThreadPool pool, Floats in, Words masks, Words words, ffi::RemainingArgs,
                            ffi::Result<Floats> out, Table table, bool transposed) {
  ChainCall call;
  return guarded([&] { return arguments::read_chain(in, *out, masks, words, table, transposed, &call); },
                 [&] { return run_chain_derivative(call, transposed, helpers_of(pool), scheduler_of(pool)); });
}

}  // namespace
}  // namespace spdnn::cpu

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnNetworkCpu, spdnn::cpu::network,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::U32>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::PRED>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnLayerCpu, spdnn::cpu::layer,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Attr<float>("lower")
                                  .Attr<float>("upper"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnSampledCpu, spdnn::cpu::sampled,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnPermutedCpu, spdnn::cpu::permuted,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnChainCpu, spdnn::cpu::chain,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::U32>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::U32>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("table"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(SpdnnChainDerivativeCpu, spdnn::cpu::chain_derivative,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::U32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::DataType::U32>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::DataType::F32>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("table")
                                  .Attr<bool>("transposed"));
