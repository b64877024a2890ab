// XLA FFI handlers of the CPU back end: they check what they are given and run. None throws. Arguments beyond those
// that are read are for XLA (rules.work_to_count).
#include <algorithm>
#include <exception>
#include <functional>
#include <string>
#include <tuple>
#include <utility>

#include "cpu/layer.h"
#include "cpu/network.h"
#include "cpu/permuted.h"
#include "cpu/row_chain.h"
#include "cpu/sampled.h"
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
ffi::Error network(ffi::ThreadPool pool, ffi::AnyBuffer y0, ffi::Buffer<DataType::U32> words, ffi::RemainingArgs,
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

// --- one layer, and its derivative in the weights ---

using Floats = ffi::Buffer<DataType::F32>;
using Ints = ffi::Buffer<DataType::S32>;

// Rows between features of `in` and of `out`.
std::string read_rows(const Floats& in, const Floats& out, const Ints& indptr, const Ints& indices,
                      CompressedRows* rows) {
  if (in.dimensions().size() != 2 || out.dimensions().size() != 2 || in.dimensions()[0] != out.dimensions()[0]) {
    return "activations must be matrices with one feature a row, and those of inputs and outputs have as many rows";
  }
  rows->inputs = in.dimensions()[1];
  rows->outputs = out.dimensions()[1];
  rows->edges = count_of(indices);
  rows->indptr = indptr.typed_data();
  rows->indices = indices.typed_data();
  return count_of(indptr) == rows->outputs + 1 ? "" : "indptr must hold outputs + 1 entries";
}

ffi::Error layer(ffi::ThreadPool pool, Floats y, Ints indptr, Ints indices, Floats values, Floats bias,
                 ffi::ResultBuffer<DataType::F32> result, float lower, float upper) {
  return guarded([&]() -> std::string {
    LayerCall call;
    if (const std::string wrong = read_rows(y, *result, indptr, indices, &call.rows); !wrong.empty()) return wrong;
    call.features = y.dimensions()[0];
    call.y = y.typed_data();
    call.values = values.typed_data();
    call.single_value = values.dimensions().size() == 0;
    call.bias = bias.typed_data();
    call.single_bias = bias.dimensions().size() == 0;
    call.lower = finite_bound(lower);
    call.upper = finite_bound(upper);
    call.result = result->typed_data();
    if (!call.single_value && count_of(values) != call.rows.edges) {
      return "values must be a scalar, or hold one entry an edge";
    }
    if (!call.single_bias && count_of(bias) != call.rows.outputs) {
      return "bias must be a scalar, or hold one entry an output";
    }
    return run_layer(call, helpers_of(pool), scheduler_of(pool));
  });
}

ffi::Error sampled(ffi::ThreadPool pool, Floats in, Floats out, Ints indptr, Ints indices,
                   ffi::ResultBuffer<DataType::F32> result) {
  return guarded([&]() -> std::string {
    SampledCall call;
    if (const std::string wrong = read_rows(in, out, indptr, indices, &call.rows); !wrong.empty()) return wrong;
    if (count_of(*result) != call.rows.edges) return "the result must hold one entry an edge";
    call.features = in.dimensions()[0];
    call.in = in.typed_data();
    call.out = out.typed_data();
    call.result = result->typed_data();
    return run_sampled(call, helpers_of(pool), scheduler_of(pool));
  });
}

ffi::Error permuted(ffi::ThreadPool pool, Floats values, Ints order, ffi::ResultBuffer<DataType::F32> result) {
  return guarded([&]() -> std::string {
    const PermutedCall call{count_of(values), values.typed_data(), order.typed_data(), result->typed_data()};
    if (count_of(order) != call.count || count_of(*result) != call.count) {
      return "values, their order and the result must be of one length";
    }
    return run_permuted(call, helpers_of(pool), scheduler_of(pool));
  });
}

// --- a plan's rows, and their derivative ---

std::string read_chain(const Floats& in, const Floats& out, const ffi::Buffer<DataType::U32>& masks,
                       const ffi::Buffer<DataType::U32>& words, ffi::Span<const int64_t> table, bool transposed,
                       ChainCall* call) {
  if (const char* wrong = view_rows(table.begin(), static_cast<int64_t>(table.size()), count_of(words), &call->rows)) {
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
  return "";
}

ffi::Error chain(ffi::ThreadPool pool, Floats y0, ffi::Buffer<DataType::U32> words, ffi::RemainingArgs,
                 ffi::ResultBuffer<DataType::F32> result, ffi::ResultBuffer<DataType::U32> masks,
                 ffi::Span<const int64_t> table) {
  return guarded([&]() -> std::string {
    ChainCall call;
    const std::string wrong = read_chain(y0, *result, *masks, words, table, false, &call);
    return wrong.empty() ? run_chain(call, helpers_of(pool), scheduler_of(pool)) : wrong;
  });
}

ffi::Error chain_derivative(ffi::ThreadPool pool, Floats in, ffi::Buffer<DataType::U32> masks,
                            ffi::Buffer<DataType::U32> words, ffi::RemainingArgs, ffi::ResultBuffer<DataType::F32> out,
                            ffi::Span<const int64_t> table, bool transposed) {
  return guarded([&]() -> std::string {
    ChainCall call;
    const std::string wrong = read_chain(in, *out, masks, words, table, transposed, &call);
    return wrong.empty() ? run_chain_derivative(call, transposed, helpers_of(pool), scheduler_of(pool)) : wrong;
  });
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
