// What the XLA handlers of both back ends are given, checked before any of it is read: shapes, dtypes and sizes, for a
// custom call can be made past the checks of Python. `Call` is a back end's own record of a call; both name its fields
// alike. All functions return what is wrong, or an empty string. Host code.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "layout/plan_rows.h"
#include "layout/plan_view.h"
#include "xla/ffi/api/ffi.h"

namespace spdnn::arguments {

namespace ffi = xla::ffi;

using Table = ffi::Span<const int64_t>;
using Floats = ffi::Buffer<ffi::DataType::F32>;
using Ints = ffi::Buffer<ffi::DataType::S32>;
using Flags = ffi::Buffer<ffi::DataType::PRED>;
using Words = ffi::Buffer<ffi::DataType::U32>;

inline ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("spdnn_jax: " + what); }

template <typename Buffer>
int64_t count_of(const Buffer& buffer) {
  return static_cast<int64_t>(buffer.element_count());
}

template <typename Buffer>
bool is_matrix(const Buffer& buffer, int64_t rows, int64_t width) {
  const auto shape = buffer.dimensions();
  return shape.size() == 2 && shape[0] == rows && shape[1] == width;
}

// --- the network ---

// `call->plan` is known.
template <typename Call>
std::string read_features(const ffi::AnyBuffer& y0, Call* call) {
  using Type = decltype(call->input.type);
  constexpr int64_t kBits = 32;
  switch (y0.element_type()) {
    case ffi::DataType::F32:
      call->input.type = Type::kFloat32;
      break;
    case ffi::DataType::U8:
    case ffi::DataType::PRED:
      call->input.type = Type::kUint8;
      break;
    case ffi::DataType::U32:
      call->input.type = Type::kPacked;
      break;
    default:
      return "features must be float32, uint8, bool, or uint32 for bit-packed ones";
  }
  const auto shape = y0.dimensions();
  if (shape.size() != 2) return "features must be a matrix, one feature a row";
  call->features = shape[0];
  call->input.data = y0.untyped_data();
  call->input.inputs = call->plan.header->inputs;
  const bool packed = call->input.type == Type::kPacked;
  const int64_t width = packed ? (call->input.inputs + kBits - 1) / kBits : call->input.inputs;
  if (shape[1] != width) {
    return "features are " + std::to_string(shape[1]) + " wide, but the network takes " + std::to_string(width) +
           (packed ? " words of 32 bits" : "");
  }
  return "";
}

// Of activations and active, zero elements mean that the caller does not want them.
template <typename Call>
std::string read_network(const ffi::AnyBuffer& y0, const Words& words, Table table, const Floats& activations,
                         const Flags& alive, const Ints& active, Call* call) {
  const char* wrong = view_plan(table.begin(), static_cast<int64_t>(table.size()), &call->plan);
  if (!wrong) wrong = check_plan(call->plan, count_of(words));
  if (wrong) return wrong;
  call->words = words.typed_data();
  if (std::string problem = read_features(y0, call); !problem.empty()) return problem;
  const PlanHeader& header = *call->plan.header;
  const bool wants_activations = count_of(activations) > 0, wants_active = count_of(active) > 0;
  if (wants_activations && !is_matrix(activations, call->features, header.outputs)) {
    return "the activations must have room for features x outputs, or for none";
  }
  if (count_of(alive) != call->features) return "alive must have room for one entry a feature";
  if (wants_active && count_of(active) != header.layers) {
    return "active must have room for one entry a layer, or for none";
  }
  call->activations = wants_activations ? activations.typed_data() : nullptr;
  call->alive = alive.typed_data();
  call->active = wants_active ? active.typed_data() : nullptr;
  return "";
}

// --- one layer, and its derivative in the weights ---

// Rows between features of `in` and of `out`. What the rows hold is not looked at.
template <typename Call>
std::string read_rows(const Floats& in, const Floats& out, const Ints& indptr, const Ints& indices, Call* call) {
  const auto in_shape = in.dimensions(), out_shape = out.dimensions();
  if (in_shape.size() != 2 || out_shape.size() != 2 || in_shape[0] != out_shape[0]) {
    return "activations must be matrices with one feature a row, and those of inputs and outputs have as many rows";
  }
  if (count_of(indptr) != out_shape[1] + 1) return "indptr must hold outputs + 1 entries";
  if (count_of(indices) > 0 && (in_shape[1] == 0 || out_shape[1] == 0)) {
    return "a layer without inputs or without outputs has no edges";
  }
  call->rows = {in_shape[1], out_shape[1], count_of(indices), indptr.typed_data(), indices.typed_data()};
  call->features = in_shape[0];
  call->in = in.typed_data();
  return "";
}

template <typename Call>
std::string read_layer(const Floats& in, const Ints& indptr, const Ints& indices, const Floats& values,
                       const Floats& bias, const Floats& out, float lower, float upper, Call* call) {
  if (std::string problem = read_rows(in, out, indptr, indices, call); !problem.empty()) return problem;
  const auto is_scalar = [](const Floats& buffer) { return buffer.dimensions().size() == 0; };
  call->single_value = is_scalar(values);
  call->single_bias = is_scalar(bias);
  if (!call->single_value && count_of(values) != count_of(indices)) {
    return "values must be a scalar, or hold one entry an edge";
  }
  if (!call->single_bias && count_of(bias) != out.dimensions()[1]) {
    return "bias must be a scalar, or hold one entry an output";
  }
  if (!(lower <= upper)) return "lower must not lie above upper";
  call->values = values.typed_data();
  call->bias = bias.typed_data();
  call->lower = finite_bound(lower);
  call->upper = finite_bound(upper);
  call->out = out.typed_data();
  return "";
}

template <typename Call>
std::string read_sampled(const Floats& in, const Floats& out, const Ints& indptr, const Ints& indices,
                         const Floats& result, Call* call) {
  if (std::string problem = read_rows(in, out, indptr, indices, call); !problem.empty()) return problem;
  if (count_of(result) != count_of(indices)) return "the result must hold one entry an edge";
  call->out = out.typed_data();
  call->result = result.typed_data();
  return "";
}

// --- a plan's rows, and their derivative ---

// Transposed, `in` is of the outputs' width, and `out` of the inputs'. What the rows hold is not looked at.
template <typename Call>
std::string read_chain(const Floats& in, const Floats& out, const Words& masks, const Words& words, Table table,
                       bool transposed, Call* call) {
  if (const char* wrong = view_rows(table.begin(), static_cast<int64_t>(table.size()), count_of(words), &call->rows)) {
    return wrong;
  }
  int64_t in_width = call->rows.inputs(), out_width = call->rows.outputs();
  if (transposed) std::swap(in_width, out_width);
  const int64_t features = in.dimensions().size() == 2 ? in.dimensions()[0] : -1;
  if (!is_matrix(in, features, in_width) || !is_matrix(out, features, out_width) ||
      !is_matrix(masks, features, call->rows.mask_words())) {
    return "activations and masks must be matrices of the plan's widths, one feature a row";
  }
  call->features = features;
  call->words = words.typed_data();
  call->in = in.typed_data();
  call->out = out.typed_data();
  call->masks = masks.typed_data();
  return "";
}

}  // namespace spdnn::arguments
